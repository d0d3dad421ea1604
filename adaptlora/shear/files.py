"""shear_files(adapter, out, config): an adapter on disk, against base weights read one module at a time."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

from .. import lora_files
from ..base_weights import BaseWeights
from ..merging import whole_tensors, write_merged
from . import processes
from .config import NoRMConfig
from .methods import method_for
from .pool import over
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
    done is kept beside `out` until the end: the same call after a kill goes on where it stopped. Under torchrun the modules are split
    over the processes; files come out bit for bit as from one process, whatever its number of threads.

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
    report_folder = _check_out(file, out, merge)
    if merge:
        whole_tensors(weights, file.saved())
    method.prepare(list(file.modules))
    with processes.group() as group:
        work = Unfinished(out, _fingerprint(file, weights, config, device), file.modules, group)

        def compute(name: str):
            module = file.modules[name]
            on_device = dataclasses.replace(module, lora_A=module.lora_A.to(device), lora_B=module.lora_B.to(device))

            def weight() -> torch.Tensor:
                return weights.load(name, fan_in_fan_out=module.fan_in_fan_out).to(device)

            sheared = method.module(on_device, weight if method.needs_base else None)
            work.keep(sheared)

        with torch.no_grad():
            _compute(compute, list(file.modules), work, group, workers if device == "cpu" else 1, progress)
            if not group.first:
                return None
            report = ShearReport(config, method.finish([work.load(name) for name in file.modules]))
        modules = {s.module.name: s.module for s in report.modules if s.rank}
        if merge:
            write_merged(weights, modules.values(), out / MERGED_FOLDER, file.saved())
        file.write(out, modules)
        report.write(report_folder)
        work.discard()
        return report


def _compute(compute, names: list[str], work: Unfinished, group, workers: int | None, progress) -> None:
    """This process's share of the modules. An error about the input in any process is raised in all, and nothing is left then."""
    share, error = group.share(names), None
    todo = [name for name in share if name not in work.done()]
    try:
        for i, _ in enumerate(over(compute, todo, workers)):
            if progress is not None:
                progress(len(share) - len(todo) + i + 1, len(share))
    except ValueError as found:
        error = found
    first = group.agree(None if error is None else str(error))
    if first is not None:
        work.discard()
        raise error if error is not None else ValueError(first)


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


def _check_out(file, out: Path, merge: bool) -> Path:
    """Folder of the report.  Raises: ValueError."""
    if out.resolve() == file.path.resolve():
        raise ValueError(f"shear: out must not be the adapter itself, got {str(out)!r}")
    if file.kind == "peft":
        if out.is_file():
            raise ValueError(f"shear: out must be a folder for a PEFT adapter, got the file {str(out)!r}")
        if merge and file.skipped:
            name, why = next(iter(file.skipped.items()))
            raise ValueError(f"shear: merge must find plain LoRA modules only, got {name} ({why})")
        if merge and (out / MERGED_FOLDER).exists():
            raise ValueError(f"shear: {out / MERGED_FOLDER} must not exist before a merged model is written there")
        return out
    if merge:
        raise ValueError(f"shear: merge must go with a PEFT adapter, got a {file.kind} file")
    if out.suffix != ".safetensors":
        raise ValueError(f"shear: out must end in .safetensors for a {file.kind} file, got {str(out)!r}")
    return out.with_suffix(".report")


def _fingerprint(file, weights, config, device: str) -> str:
    """What the result depends on; another one makes unfinished work worthless."""
    facts = {
        "adapter": _state(file.path),
        "base": weights.fingerprint() if weights is not None else None,
        "config": [type(config).__name__, dataclasses.asdict(config)],
        "device": device,
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _state(path: Path) -> list:
    """Names, sizes and times of a file, or of the files in a folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
