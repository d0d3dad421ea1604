"""shear_files(adapter, out, config): an adapter on disk, against base weights read one module at a time."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

from .. import lora_files
from ..base_weights import BaseWeights
from ..merging import check_merge, check_stored_bases, write_merged
from ..pool import check_workers, over
from . import processes
from .base import remaining
from .config import NoRMConfig
from .methods import method_for
from .report import ShearReport
from .unfinished import Unfinished

MERGED_FOLDER = "merged"


def shear_files(
    adapter: str | Path,
    out: str | Path,
    config=None,
    *,
    base: str | Path | None = None,
    merge: bool = False,
    skip_unsupported: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ShearReport | None:
    """
    `shear` for an adapter file: the result has the format of the input and computes W + scaling · B'A' in whatever loads that format.

    Base weights are read one module at a time, so that memory holds the adapter and `workers` base weights, never the model. What is
    done is kept beside `out` until the end: the same call after a kill goes on where it stopped. Under torchrun, or in a process group
    that exists already, all processes call this, on one file system, and the modules are split over them; files come out bit for bit as
    from one process, whatever its number of threads.

    Args:
        adapter: a PEFT folder, or a kohya or diffusers .safetensors file.
        out: folder (PEFT) or .safetensors file to write; the report goes into the folder, or into one beside the file.
        config: NoRMConfig() if None; others as in `shear`.
        base: a transformers folder, sharded or not, or a .safetensors file; NoRM and `merge` need it.
        merge: also write the base with the sheared update merged, to `out`/merged.
        skip_unsupported: pass DoRA, embeddings and the like through untouched instead of refusing them.
        device: where the factorizations run.   workers, progress: as in `shear`.
    Returns: the report; None in the processes of torchrun other than the first.
    Raises: FileNotFoundError, ValueError (files that are damaged, unsupported or do not fit, NaN, a configuration that does not fit),
        TypeError (config). Nothing is written then.
    """
    config = NoRMConfig() if config is None else config
    method = method_for(config)
    out = Path(out)
    file = lora_files.read(adapter, skip_unsupported=skip_unsupported)
    if not file.modules:
        raise ValueError(
            f"shear: {adapter} must hold at least one plain LoRA module, got no module but {len(file.skipped)} unsupported ones"
        )
    weights = _base(file, base, method.needs_base, merge)
    report_folder = _check_out(file, out, base, merge)
    if merge:
        _check_merge(file, weights, out)
    check_workers("shear", workers)
    on_device = _device(device)
    method.prepare(list(file.modules))
    with processes.group() as group:
        work = Unfinished(out, _fingerprint(file, weights, config, device), file.modules, group)

        def compute(name: str):
            module = file.modules[name]
            moved = dataclasses.replace(module, lora_A=module.lora_A.to(on_device), lora_B=module.lora_B.to(on_device))

            def weight() -> torch.Tensor:
                return weights.load(name, fan_in_fan_out=module.fan_in_fan_out).to(on_device)

            work.keep(method.module(moved, weight if method.needs_base else None))

        with work.undone_by_bad_input():
            _compute(compute, file.modules, work, group, workers if on_device.type == "cpu" else 1, progress)
        with work.undone_by_bad_input():
            return _finish(file, weights, ShearReport(config, []), method, work, group, out, report_folder, merge)


def _compute(compute, modules: dict, work: Unfinished, group, workers: int | None, progress) -> None:
    """This process's share of the modules; an error in any process is one in all."""
    share = group.share(sorted(modules, key=lambda name: -math.prod(_shape(modules[name]))))
    done = work.done()
    todo = [name for name in share if name not in done]
    with group.agreement("shear"):
        for i, _ in enumerate(over(compute, todo, workers)):
            if progress is not None:
                progress(len(share) - len(todo) + i + 1, len(share))


def _finish(
    file, weights, report, method, work, group, out: Path, report_folder: Path, merge: bool
) -> ShearReport | None:
    """The first process writes what all have computed; the others wait for it."""
    with group.agreement("shear"):
        if not group.first:
            return None
        report.modules = method.finish([work.load(name) for name in file.modules])
        modules = {s.module.name: s.module for s in remaining(report.modules)}
        if merge:
            write_merged(weights, modules.values(), work.merged, file.saved())
        file.write(out, modules)
        report.write(report_folder)
        if merge:
            os.replace(work.merged, out / MERGED_FOLDER)
        work.discard()
        return report


def _base(file, base, needed: bool, merge: bool) -> BaseWeights | None:
    """The base weights, seen to fit every module before anything is computed."""
    if base is None:
        if needed or merge:
            raise ValueError(
                f"shear: base must be given to {'merge' if merge else 'compare with the base weights'}, got None"
            )
        return None
    if not (needed or merge):
        return None
    weights = BaseWeights(base)
    weights.find(list(file.modules))
    for name, module in file.modules.items():
        shape, expected = weights.shape(name, fan_in_fan_out=module.fan_in_fan_out), _shape(module)
        if shape != expected:
            raise ValueError(
                f"shear: the base weight of {name} must have shape {expected}, as the adapter's factors, got {shape}"
            )
    return weights


def _shape(module) -> tuple[int, int]:
    return module.lora_B.shape[0], module.lora_A.shape[1]


def _check_out(file, out: Path, base, merge: bool) -> Path:
    """Folder of the report.  Raises: ValueError."""
    if out.resolve() == file.path.resolve():
        raise ValueError(f"shear: out must not be the adapter itself, got {str(out)!r}")
    if base is not None and out.resolve().is_relative_to(Path(base).resolve()):
        raise ValueError(f"shear: out must not be the base model or lie in it, got {str(out)!r}")
    report_folder = out if file.kind == "peft" else out.with_suffix(".report")
    if file.kind != "peft":
        if merge:
            raise ValueError(f"shear: merge must go with a PEFT adapter, got a {file.kind} file")
        if out.suffix != ".safetensors" or out.is_dir():
            raise ValueError(f"shear: out must be a .safetensors file for a {file.kind} file, got {str(out)!r}")
    if report_folder.is_file():
        what = "a PEFT adapter" if file.kind == "peft" else "the report"
        raise ValueError(f"shear: out must be a folder for {what}, got the file {str(report_folder)!r}")
    return report_folder


def _check_merge(file, weights: BaseWeights, out: Path) -> None:
    """Everything that could keep the merged model from being written, but for its numbers.  Raises: ValueError."""
    if file.skipped:
        name, why = next(iter(file.skipped.items()))
        raise ValueError(f"shear: merge must find plain LoRA modules only, got {name} ({why})")
    check_merge(weights, file.modules.values(), out / MERGED_FOLDER, file.saved())
    check_stored_bases("shear", file, weights)


def _device(device: str) -> torch.device:
    """The device, for processes of torchrun one GPU each.  Raises: ValueError."""
    try:
        found = torch.device(device)
        if found == torch.device("cuda") and "LOCAL_RANK" in os.environ:
            found = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"shear: device must be one that torch can use, got {device!r}") from error
    return found


def _fingerprint(file, weights, config, device: str) -> str:
    """What the result depends on; another one makes unfinished work worthless."""
    from .. import __version__

    facts = {
        "adapter": _state(file.path),
        "base": weights.fingerprint() if weights is not None else None,
        "config": [type(config).__name__, dataclasses.asdict(config)],
        "device": device,
        "versions": [__version__, torch.__version__],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _state(path: Path) -> list:
    """Names, sizes and times of a file, or of the files in a folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
