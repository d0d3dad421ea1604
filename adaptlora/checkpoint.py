"""Checkpoints of a training loop of one's own: whole or not there, and the run that resumes from one equals the run that never stopped."""

import contextlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

from . import doctor
from .checkpoint_files import (
    LOOP,
    MANIFEST,
    TRAINER,
    check_files,
    checkpoints,
    read_json,
    read_manifest,
    write_manifest,
)
from .distributed.processes import Processes
from .distributed.state import check_same, share_state
from .encoding import decode, encode
from .files import LEFTOVER, atomic_folder, locked
from .integrations import trainer_checkpoint
from .tensor_files import read_tensors, save_file
from .training_state import TrainingState, the_optimizer

STATE = "state.json"
TENSORS = "tensors.safetensors"
_FIELDS = {"step", "versions", "config", "adapter", "others", "optimizer", "random", "extra"}
_PARTS = {"scheduler", "scaler", "processes"}  # where there are such; the last: random states of the processes 1, 2, …
# What a killed save leaves: a folder being written, one being removed, one that was to be replaced.
_LEFT = re.compile(rf"\.checkpoint-\d+\.({LEFTOVER}|dropped|kept)")
_ADVICE = "adaptlora.last_checkpoint(folder) finds the latest whole one"
_SAME = "adaptlora.last_checkpoint(folder, processes=adapter.processes) gives all the same"


class Resumed(NamedTuple):
    """What `load_checkpoint` returns: the `step` and `extra` that were saved."""

    step: int
    extra: object


def save_checkpoint(folder, adapter, optimizer, *, step: int, scheduler=None, scaler=None, extra=None, keep=2) -> Path:
    """
    Write folder/checkpoint-<step>: everything that the next steps depend on. Call it between two steps; after `adapter.distribute` in
    every process: the first writes, its errors are raised by all, and none goes on before the folder is complete.

    Held: factors, parked vectors, ranks, scalings, modules_to_save, the method's state; the optimizer's state and groups, by parameter
    name, and its parameters that are not the adapter's; persistent buffers (running statistics); the random number generators of
    torch (and of the model's GPUs), Python and NumPy. Not held: frozen weights, gradients, and where the data is: put that into `extra`.
    Of several processes the random states of each, tensors that FSDP2 shards whole, and all else, `extra` too, as process 0 has it.
    The folder appears under its name once it is complete and synced to disk; a save that fails or is killed leaves the others as they were.

    Args:
        optimizer: torch optimizer or a wrapper with `.optimizer`; its state may be numbers, strings, tensors and collections of them.
        step: number ≥ 0 for the name; a checkpoint of that step is replaced.
        scheduler, scaler: a learning rate scheduler and a GradScaler, if the loop has them.
        extra: None, numbers, strings, tensors, and lists, tuples and dicts of them; `load_checkpoint` returns it.
        keep: how many checkpoints up to this step to leave, ≥ 1, or None for all; older ones are removed once the new one is complete.
    Returns: the checkpoint's folder.
    Raises: TypeError (something that cannot be stored exactly, by its place), ValueError (step, keep, a folder of that name with other
        files in it, processes with other steps), OSError (TimeoutError where another process writes to `folder` for long); no checkpoint
        has changed then. What was raised in another process is a ValueError or RuntimeError that names it.
    """
    op, processes = "save_checkpoint", adapter.processes
    with processes.agreement(op):
        _check_integer("step", step, 0)
        if keep is not None:
            _check_integer("keep", keep, 1)
        loop = TrainingState(op, adapter, [the_optimizer(op, optimizer)], scheduler, scaler)
    check_same(op, processes, "step", step)
    state, tensors = loop.gather()
    folder = Path(folder)
    path = folder / f"checkpoint-{step}"
    with processes.agreement(op):
        if processes.first:
            state["extra"] = encode(op, "extra", extra, tensors)
            state |= {"step": step, "versions": doctor.versions()}
            text = json.dumps(state, allow_nan=False)
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder):
                _tidy(folder)
                if path.exists() and not _is_ours(path):
                    raise ValueError(
                        f"save_checkpoint: {path} must be absent or a checkpoint of this function, got other files"
                    )
                _write(path, text, tensors, step)
                _drop_older(folder, step, keep)
    return path


def _check_integer(name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"save_checkpoint: {name} must be an integer ≥ {least}, got {value!r}")


def _write(path: Path, text: str, tensors: dict, step: int) -> None:
    kept = path.with_name(f".{path.name}.kept")
    try:
        with atomic_folder(path) as temporary:
            save_file(tensors, temporary / TENSORS)
            (temporary / STATE).write_text(text, encoding="utf-8")
            write_manifest(temporary, LOOP, step, (TENSORS, STATE))
            if path.exists():
                os.replace(
                    path, kept
                )  # a folder cannot be replaced by another; `_tidy` puts it back if this is all that happens
    except BaseException:
        if kept.exists() and not path.exists():
            os.replace(kept, path)
        raise
    shutil.rmtree(kept, ignore_errors=True)  # what stays is `_tidy`'s


def _drop_older(folder: Path, step: int, keep: int | None) -> None:
    found = checkpoints(folder)
    later = [path.name for n, path in found.items() if n > step]
    if later:
        warnings.warn(
            f"save_checkpoint: {folder} holds {later} of later steps than {step}, which last_checkpoint prefers: remove them if this run "
            "is to go on from its own",
            stacklevel=3,
        )
    older = [path for n, path in found.items() if n <= step and _is_ours(path)]
    for path in [] if keep is None else older[keep:]:
        dropped = path.with_name(f".{path.name}.dropped")
        try:
            os.replace(path, dropped)  # gone at once, not file by file
        except OSError as error:
            warnings.warn(f"save_checkpoint: {path} is older than the last {keep} and stays: {error}", stacklevel=3)
        shutil.rmtree(dropped, ignore_errors=True)  # what stays is `_tidy`'s


def _is_ours(path: Path) -> bool:
    return path.is_dir() and {file.name for file in path.iterdir()} <= {MANIFEST, STATE, TENSORS}


def _tidy(folder: Path) -> None:
    """Remove what killed saves left, and put back what one of them was about to replace. Whoever calls holds the lock."""
    _put_back_kept(folder)
    for path in list(folder.iterdir()):
        if _LEFT.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path)


def _put_back_kept(folder: Path) -> None:
    for path in list(folder.glob(".checkpoint-*.kept")):
        original = folder / path.name[1:].removesuffix(".kept")
        if not original.exists():
            os.replace(path, original)


def check_checkpoint(path) -> None:
    """
    Read a checkpoint, Trainer's or that of `save_checkpoint`, as far as is needed to know that it is whole.

    Raises: FileNotFoundError (no such folder), ValueError that names the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"check_checkpoint: {path} must be a checkpoint's folder, and is not there")
    if _is_trainers(path):
        trainer_checkpoint.check(path)
    else:
        _read(path)


def _is_trainers(path: Path) -> bool:
    if (path / MANIFEST).exists():
        return read_manifest(path)["kind"] == TRAINER
    return not _is_ours(path)


def _read(path: Path) -> tuple[dict, dict]:
    """State and tensors of `save_checkpoint`, every byte checked.  Raises: ValueError."""
    manifest = read_manifest(path)
    if manifest["kind"] != LOOP or manifest["files"].keys() != {STATE, TENSORS}:
        raise ValueError(f"{path / MANIFEST} must be that of a training loop, with {STATE} and {TENSORS}")
    check_files(path, manifest)
    file = path / STATE
    state = read_json(file)
    if state.keys() - _PARTS != _FIELDS or state["step"] != manifest["step"]:
        raise ValueError(f"{file} must hold {', '.join(sorted(_FIELDS))} of step {manifest['step']}")
    tensors, _ = read_tensors("check_checkpoint", path / TENSORS)
    try:
        decode(state, tensors)
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        raise ValueError(f"{file} must be what `save_checkpoint` writes: {error}") from error
    return state, tensors


def last_checkpoint(folder, *, processes: Processes | None = None) -> Path | None:
    """
    The latest whole checkpoint in `folder`, by its number: for `load_checkpoint`, or `trainer.train(resume_from_checkpoint=…)`.

    Later ones that are damaged or half-written are named in one warning. What a killed `save_checkpoint` was about to replace is put back.
    Args: processes: those that are to resume together, adapter.processes: all call, the first looks, and all get what it found. Without
        them each looks for itself, and on disks that are not the same, or not at once, may find another.
    Returns: None if there is none, or no folder.
    """
    processes, found = processes or Processes(), None
    with processes.agreement("last_checkpoint"):
        if processes.first:
            found = _last(Path(folder))
    return processes.broadcast(found, doing="last_checkpoint")


def _last(folder: Path) -> Path | None:
    if not folder.is_dir():
        return None
    if any(folder.glob(".checkpoint-*.kept")):
        with contextlib.suppress(OSError), locked(folder):
            _put_back_kept(folder)
    refused, found = [], None
    for path in checkpoints(folder).values():
        try:
            check_checkpoint(path)
        except (ValueError, FileNotFoundError) as error:
            refused.append(str(error))
        else:
            found = path
            break
    if refused:
        warnings.warn(
            f"last_checkpoint: {found or 'none'} is the latest whole checkpoint: {'; '.join(refused)}", stacklevel=3
        )
    return found


def load_checkpoint(path, adapter, optimizer, *, scheduler=None, scaler=None) -> Resumed:
    """
    Put a loop back to where `save_checkpoint` found it: the steps that follow are, bit for bit, those that would have followed.

    After `adapter.distribute` every process calls it, and process 0 reads for all. They may be more or fewer than those that saved: process
    i takes the random states of process i; where there were fewer, it seeds its generators from those of process 0 and i.

    Args:
        path: the checkpoint's folder.   adapter: attached as before, with its modules and configuration; ranks follow the checkpoint, and
            fields that later steps do not depend on (`Method.start_fields`) may differ.
        optimizer, scheduler, scaler: built as before; one that was saved must be given, and no other.
    Returns: Resumed(step, extra).   Gradients are dropped.
    Raises: FileNotFoundError, ValueError (damaged, or of another model, configuration, optimizer, scheduler or scaler; the file and what
        differs are named; another path than the other processes'); nothing has changed then, in no process.
    """
    op, path, processes = "load_checkpoint", Path(path), adapter.processes
    check_same(op, processes, "path", path.name, f" ({_SAME})")
    state, tensors = {}, {}
    with processes.agreement(op):
        loop = TrainingState(op, adapter, [the_optimizer(op, optimizer)], scheduler, scaler)
        if processes.first:
            state, tensors = _read_loop(path)
    state, tensors = share_state(processes, state, tensors, doing=op)
    try:
        with processes.agreement(op):
            loop.check(state, tensors)
        loop.replace(state, tensors)
    except ValueError as error:
        raise ValueError(f"load_checkpoint: {path / STATE}: {error}") from error
    loop.drop_gradients()
    return Resumed(state["step"], decode(state["extra"], tensors))


def _read_loop(path: Path) -> tuple[dict, dict]:
    if not path.is_dir():
        raise FileNotFoundError(f"load_checkpoint: {path} must be a checkpoint's folder, and is not there ({_ADVICE})")
    try:
        if _is_trainers(path):
            raise ValueError(f"{path} is Trainer's: give it to trainer.train(resume_from_checkpoint=…)")
        return _read(path)
    except ValueError as error:
        raise ValueError(f"load_checkpoint: {error} ({_ADVICE})") from error
