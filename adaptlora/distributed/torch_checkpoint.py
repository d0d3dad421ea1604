"""An adapter's training in checkpoints of torch.distributed.checkpoint (DCP), loaded on any number of processes whatever its ranks are."""

import json
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .. import doctor
from ..encoding import decode, encode
from ..training_state import TrainingState, the_optimizer
from .sharding import is_sharded

_STATE, _TENSORS = "state", "tensors"
_FIELDS = {"config", "adapter", "others", "optimizer", "random", "extra", "versions"}
_PARTS = {"scheduler", "scaler", "processes"}
_NOT_WHAT_WAS_SAVED = (TypeError, LookupError, AttributeError)  # what reading damaged JSON further raises


class AdapterState:
    """
    What `save_checkpoint` holds, as DCP's Stateful, to be saved beside whatever else a loop has; also by dcp.async_save, if that is given a
    process_group (gloo) of its own: its thread would mix its messages with the training's.

        dcp.save({"adapter": AdapterState(adapter, optimizer)}, checkpoint_id=folder)
        load_distributed(folder, adapter, optimizer)

    What every process has whole is written once, from process 0, and sharded tensors from where they are, without being gathered. All is
    tensors, so that nothing of it is unpickled: JSON is the bytes of one of uint8. `load_distributed` loads it, since dcp.load takes
    only shapes that it is given, and those of a checkpoint are not those of an adapter that was just attached.

    Args: as of `save_checkpoint`; extra is returned by `load_distributed`.
    Raises: as `save_checkpoint`, in all processes.
    """

    def __init__(self, adapter, optimizer, *, scheduler=None, scaler=None, extra=None):
        self._loop = adapter, optimizer, scheduler, scaler
        self.extra = extra

    def state_dict(self) -> dict:
        """This process's part: {"state": JSON, uint8, "tensors": {name: tensor}}; called by dcp.save in all processes."""
        op, processes = "AdapterState", self._loop[0].processes
        with processes.agreement(op):
            loop = _training_state(op, *self._loop)
        state, tensors = loop.gather(whole=False)
        with processes.agreement(op):
            state["extra"] = encode(op, "extra", self.extra, tensors)
            text = json.dumps(state | {"versions": doctor.versions()}, allow_nan=False).encode()
        if processes.first:
            return {_STATE: torch.frombuffer(bytearray(text), dtype=torch.uint8), _TENSORS: tensors}
        return {_TENSORS: {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}}

    def load_state_dict(self, state: dict) -> None:
        """Raises: TypeError: see the class."""
        raise TypeError(
            "AdapterState: dcp.load must not be given it: call load_distributed(folder, adapter, optimizer)"
        )


def _training_state(op: str, adapter, optimizer, scheduler, scaler) -> TrainingState:
    return TrainingState(op, adapter, [the_optimizer(op, optimizer)], scheduler, scaler)


def load_distributed(folder, adapter, optimizer, *, scheduler=None, scaler=None, key: str = "adapter"):
    """
    Put a loop back to where dcp.save({key: AdapterState(…)}, checkpoint_id=folder) found it, as `load_checkpoint` does: on as many
    processes or others, which all call it and each read what they need, from one file system; sharded as this model is.

    DCP keeps the list of a checkpoint's tensors as a pickle of torch's own, `.metadata`, and unpickling runs code: load only from whom you
    trust. It keeps no checksums either.

    Returns: the `extra` that was saved.   Gradients are dropped.
    Raises: FileNotFoundError, ValueError (damaged, other content under `key`, of another model, method, optimizer, scheduler or scaler);
        nothing has changed then, in no process.
    """
    op, processes, folder = "load_distributed", adapter.processes, Path(folder)
    with processes.agreement(op):
        loop = _training_state(op, adapter, optimizer, scheduler, scaler)
        state, tensors = _read(op, folder, key, loop)
        extra = _decoded(op, folder, key, state, tensors)["extra"]
    try:
        with processes.agreement(op):
            loop.check(state, tensors)
        loop.replace(state, tensors)
    except ValueError as error:
        raise ValueError(f"{op}: {folder}: {error}") from error
    except _NOT_WHAT_WAS_SAVED as error:
        raise ValueError(f"{op}: {folder}: {key}.{_STATE} must be what AdapterState gives: {error!r}") from error
    loop.drop_gradients()
    return extra


def _decoded(op: str, folder: Path, key: str, state: dict, tensors: dict[str, torch.Tensor]) -> dict:
    """All of `state`, without what is sharded: to see that nothing is missing.  Raises: ValueError."""
    empty = torch.empty(0, device="cpu")
    plain = {name: empty if is_sharded(tensor) else tensor for name, tensor in tensors.items()}
    try:
        return decode(state, plain)
    except (ValueError, RuntimeError, *_NOT_WHAT_WAS_SAVED) as error:
        raise ValueError(f"{op}: {folder}: {key}.{_STATE} must be what AdapterState gives: {error!r}") from error


def _read(op: str, folder: Path, key: str, loop: TrainingState) -> tuple[dict, dict]:
    """JSON and tensors, each sharded like its counterpart in this process's model."""
    reader = dcp.FileSystemReader(folder)
    try:
        stored = reader.read_metadata().state_dict_metadata
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{op}: {folder} must be a folder that dcp.save completed, and has no .metadata"
        ) from error
    except Exception as error:  # whatever unpickling raises
        raise ValueError(f"{op}: {folder} must be a folder that dcp.save completed: {error!r}") from error
    own = {name: facts for name, facts in stored.items() if name.startswith(f"{key}.")}
    start = f"{key}.{_TENSORS}."
    known = [name == f"{key}.{_STATE}" or name.startswith(start) for name in own]
    # Anything but a tensor would be unpickled.
    if (
        f"{key}.{_STATE}" not in own
        or not all(known)
        or not all(isinstance(v, TensorStorageMetadata) for v in own.values())
    ):
        raise ValueError(f"{op}: {folder} must hold an AdapterState as {key!r}, got {sorted(stored)[:3]}")
    facts = own[f"{key}.{_STATE}"]
    if facts.properties.dtype != torch.uint8 or len(facts.size) != 1:
        raise ValueError(
            f"{op}: {folder}: {key}.{_STATE} must be JSON's bytes, a vector of uint8, got {facts.properties.dtype} "
            f"of shape {tuple(facts.size)}"
        )
    text = _load(op, reader, {f"{key}.{_STATE}": _empty(own.pop(f"{key}.{_STATE}"))})[f"{key}.{_STATE}"]
    try:
        state = json.loads(bytes(text.tolist()))
        whole = state.keys() - _PARTS == _FIELDS
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{op}: {folder}: {key}.{_STATE} must be JSON: {error!r}") from error
    if not whole:
        raise ValueError(f"{op}: {folder}: {key}.{_STATE} must hold {', '.join(sorted(_FIELDS))}")
    likes = loop.spread_as({name.removeprefix(start): facts.size for name, facts in own.items()})
    template = {name: _empty(facts, likes.get(name.removeprefix(start))) for name, facts in own.items()}
    return state, {name.removeprefix(start): tensor for name, tensor in _load(op, reader, template).items()}


def _empty(facts: TensorStorageMetadata, like: torch.Tensor | None = None) -> torch.Tensor:
    dtype = facts.properties.dtype
    return torch.empty(facts.size, dtype=dtype, device="cpu") if like is None else torch.empty_like(like, dtype=dtype)


def _load(op: str, reader: dcp.FileSystemReader, template: dict) -> dict:
    """`template`, filled. Every process reads by itself: there is nothing to agree on, and an error of one keeps none waiting."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            dcp.load(template, storage_reader=reader, no_dist=True)
    except CheckpointException as error:  # no Exception by class
        raise ValueError(f"{op}: {reader.path} must be whole: {error}") from error
    return template
