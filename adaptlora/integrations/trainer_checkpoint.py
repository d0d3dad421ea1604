"""The checkpoints that transformers' Trainer writes: sealed once they are complete, and checked before they are resumed from.

Trainer writes into checkpoint-N itself, in this order: weights, optimizer.pt, scheduler.pt, scaler.pt, rng_state.pth, trainer_state.json;
then it removes old checkpoints, then it tells its callbacks. A run that is killed leaves a folder of that name at any of these points.
"""

import json
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path

from ..checkpoint_files import (
    MANIFEST,
    TRAINER,
    check_files,
    checkpoints,
    read_json,
    read_manifest,
    step_of,
    write_manifest,
)
from ..distributed.processes import Processes
from ..distributed.state import check_same
from ..tensor_files import open_tensors

STATE = "trainer_state.json"
_OPTIMIZER, _SCHEDULER, _SCALER = "optimizer.pt", "scheduler.pt", "scaler.pt"
# accelerate's names under FSDP: whole, or folders of torch.distributed.checkpoint
_OPTIMIZERS = {_OPTIMIZER, "optimizer.bin", "optimizer_0"}
_FSDP_WEIGHTS = {"pytorch_model_fsdp.bin", "pytorch_model_fsdp_0"}
_METADATA = ".metadata"  # which that writes last into its folders
_INDEX = "model.safetensors.index.json"
_RANDOM = re.compile(r"rng_state(?:_(\d+))?\.pth")


def seal(folder, *, first: bool = True, processes: Processes | None = None) -> None:
    """
    Sync a complete checkpoint to disk and vouch for it: adaptlora_checkpoint.json gets size and SHA-256 of every file, the adapter's too.

    Args:
        first: whether this process writes.
        processes: those that train together, adapter.processes. Each calls when it has written its own files; what goes wrong in the one
            that writes is raised by all.
    """
    processes = processes or Processes()
    processes.gather(None, doing="Trainer: waiting for the files of a checkpoint")
    with processes.agreement("Trainer"):
        if first:
            _vouch(Path(folder))


def _vouch(folder: Path) -> None:
    names = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    visible = [name for name in names if not any(part.startswith(".") and part != _METADATA for part in name.parts)]
    times = folder.stat()
    step = _check_state(folder)["global_step"]
    write_manifest(folder, TRAINER, step, [name.as_posix() for name in visible if name.name != MANIFEST])
    # Trainer removes the folders that were changed longest ago, and what it wrote has not changed.
    os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))


def check(folder) -> None:
    """
    Raises: ValueError that names the first file that keeps a checkpoint of Trainer's from being resumed exactly.

    A sealed one is compared with its seal. One that is not, since the run was killed before or had no adapter, is whole if its files
    can be read to their ends, the random states of all processes among them, and trainer_state.json, which process 0 writes last, is of
    this step. On how many processes it is resumed does not matter: Trainer goes on without random states where there are none.
    """
    folder = Path(folder)
    sealed, processes = (folder / MANIFEST).exists(), 0
    if sealed:
        manifest = read_manifest(folder)
        if manifest["kind"] != TRAINER:
            raise ValueError(
                f"{folder / MANIFEST} must be of a checkpoint of Trainer's, got one of {manifest['kind']!r}"
            )
        check_files(folder, manifest)
        names = manifest["files"].keys()
    else:
        processes = _processes(_check_state(folder))
        names = {file.name for file in folder.iterdir()}
        _check_weights(folder, names)
    names = {name.partition("/")[0] for name in names}
    random = {name for name in names if _RANDOM.fullmatch(name)}
    optimizers = names & _OPTIMIZERS or {_OPTIMIZER}
    # A seal names all that there were, and disks that nodes do not share have the files of their own processes alone.
    lost = None if sealed and random else _lost_random_state(random, processes)
    for name in sorted({*optimizers, _SCHEDULER} - names) or ([lost] if lost else []):
        raise ValueError(
            f"{folder / name} is missing: the checkpoint cannot be resumed exactly (save_only_model leaves it out; or it was "
            "lost)"
        )
    if not sealed:
        for name in sorted({*optimizers, _SCHEDULER, *random} | ({_SCALER} & names)):
            _check_saved(folder / name)


def _processes(state: dict) -> int:
    """How many there were, as AdapterCallback notes; 0 if it does not say."""
    try:
        return int(state["stateful_callbacks"]["AdapterCallback"]["attributes"]["processes"])
    except (KeyError, TypeError, ValueError):
        return 0


def _lost_random_state(names: set[str], processes: int) -> str | None:
    """
    The first file of random states that must be beside `names`: one, or one of each process. Where that of process 0 is not, it is what
    another node has on a disk of its own (save_on_each_node), of successive processes, as many as there are.
    """
    numbers = [int(number) for name in names if (number := _RANDOM.fullmatch(name)[1]) is not None]
    if not numbers and processes <= 1:
        return None if names else "rng_state.pth"
    first, last = min(numbers, default=0), max(numbers, default=0)
    every = range(first, last + 1 if first else max(last + 1, processes))
    return next((name for i in every if (name := f"rng_state_{i}.pth") not in names), None)


def _check_state(folder: Path) -> dict:
    file = folder / STATE
    if not file.exists():
        raise ValueError(f"{file} is missing: the checkpoint was not written to its end")
    state = read_json(file, strict=False)  # Trainer writes NaN where a loss was
    step = state.get("global_step")
    if step_of(folder) not in (None, step) or not isinstance(step, int):
        raise ValueError(f"{file} must be of step {step_of(folder)}, as the folder's name says, got {step!r}")
    return state


def _check_weights(folder: Path, names: set[str]) -> None:
    weights = {name for name in names if name.endswith(".safetensors")}
    if _INDEX in names:
        index = read_json(folder / _INDEX)
        try:
            shards = set(index["weight_map"].values())
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{folder / _INDEX} must be an index of shards, whole: {error!r}") from error
        for name in sorted(shards - weights):
            raise ValueError(f"{folder / name} is missing, and {_INDEX} names it")
    elif not weights and not names & _FSDP_WEIGHTS:
        raise ValueError(f"{folder / 'model.safetensors'} is missing")
    for name in sorted(weights):
        with open_tensors("check", folder / name):
            pass
    for name in sorted(names & _FSDP_WEIGHTS):
        _check_saved(folder / name)


def _check_saved(file: Path) -> None:
    """Raises: ValueError if a file of torch.save's, or a folder of torch.distributed.checkpoint's, was not written to its end."""
    if file.is_dir():
        if not (file / _METADATA).exists():
            raise ValueError(f"{file / _METADATA} is missing: the folder was not written to its end")
        return
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, struct.error, ValueError) as error:
        raise ValueError(f"{file} must be a whole file of torch.save's: {error}") from error
    if bad is not None:
        raise ValueError(f"{file} must be a whole file of torch.save's, and {bad} in it is damaged")


def check_resumed(
    output_dir, state, optimizer=None, scheduler=None, *, first: bool = True, processes: Processes | None = None
) -> None:
    """
    For `on_train_begin`, when Trainer has loaded what it resumes from: that must have been a whole checkpoint.

    Which one it was Trainer does not say: checkpoint-<global_step> in `output_dir` if its state is the one that was loaded. What a
    killed run left whole but unsealed there is sealed, before Trainer writes over it.

    Args:
        state: TrainerState.   optimizer, scheduler: Trainer's, as callbacks get them.   first: whether this process may write.
        processes: those that train together: all call, and must resume from the same step.
    Raises: ValueError that names the file, and the checkpoint to resume from instead; in all processes.
    """
    processes = processes or Processes()
    advice = " (adaptlora.last_checkpoint(folder, processes=…) gives all the same checkpoint)"
    check_same("Trainer", processes, "the step to resume from", state.global_step, advice)
    with processes.agreement("Trainer"):
        _check_resumed(Path(output_dir), state, optimizer, scheduler, first)


def _check_resumed(output_dir: Path, state, optimizer, scheduler, first: bool) -> None:
    if state.global_step and not _check_source(output_dir, state):
        began = scheduler is None or getattr(scheduler, "last_epoch", 0) > 0
        if optimizer is not None and not optimizer.state_dict()["state"] and not began:
            raise ValueError(
                f"Trainer: the checkpoint of step {state.global_step} must hold {_OPTIMIZER} and {_SCHEDULER}, and Trainer goes on "
                f"without them, not as before{_advice(output_dir)}"
            )
    if first and output_dir.is_dir():
        for step, folder in checkpoints(output_dir).items():
            if step >= state.global_step and not (folder / MANIFEST).exists() and _is_whole(folder):
                _vouch(folder)


def _is_whole(folder: Path) -> bool:
    try:
        check(folder)
    except ValueError:
        return False
    return True


def _check_source(output_dir: Path, state) -> bool:
    """Whether the checkpoint that was loaded is known.  Raises: ValueError if it is, and it is not whole."""
    folder = output_dir / f"checkpoint-{state.global_step}"
    try:
        stored = _check_state(folder)["stateful_callbacks"]
    except (ValueError, KeyError):
        return False
    if json.dumps(stored, sort_keys=True) != json.dumps(state.stateful_callbacks, sort_keys=True):
        return False
    try:
        check(folder)
    except ValueError as error:
        raise ValueError(f"Trainer: {folder} cannot be resumed from: {error}{_advice(output_dir)}") from error
    return True


def _advice(output_dir: Path) -> str:
    from ..checkpoint import last_checkpoint

    found = last_checkpoint(output_dir)
    if found is None:
        return f"; {output_dir} has no whole checkpoint: start anew"
    return f"; resume from the latest whole one, trainer.train(resume_from_checkpoint={str(found)!r})"
