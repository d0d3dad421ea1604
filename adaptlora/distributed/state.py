"""What one process has, on all: tensors as bytes, and all that an adapter's training depends on."""

import math

import torch
import torch.distributed as dist

from ..training_state import TrainingState
from .processes import Processes

_PIECE = 1 << 28  # bytes of one message


def check_same(op: str, processes: Processes, what: str, value, advice: str = "") -> None:
    """Raises: ValueError, in all processes, if they were not given the same."""
    told = processes.gather(value, doing=f"{op}: {what}")
    for rank, other in enumerate(told):
        if other != told[0]:
            raise ValueError(
                f"{op}: {what} must be the same in all processes, got {told[0]} in process 0, {other} in process {rank}{advice}"
            )


def share_state(processes: Processes, state, tensors: dict[str, torch.Tensor], source: int = 0, *, doing: str):
    """
    (state, tensors) of the process `source`, on all; what the others give does not matter.

    Args: state: JSON.   tensors: on the host, dense; they travel in one buffer, not as pickles.
    """
    if processes.size == 1:
        return state, tensors
    mine = processes.rank == source
    # The widest dtype first, so that every tensor is aligned in the buffer.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size()) if mine else []
    facts = [(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in order]
    state, facts = processes.broadcast((state, facts), source, doing=doing)
    sizes = [dtype.itemsize * math.prod(shape) for _, dtype, shape in facts]
    if mine:
        flat = torch.cat([torch.empty(0, dtype=torch.uint8), *(_bytes(tensors[name]) for name in order)])
    else:
        flat = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
    for piece in flat.split(_PIECE):
        processes.run(doing, dist.broadcast, piece, src=processes.ranks[source], group=processes.control)
    parts = zip(facts, flat.split(sizes), strict=True)
    return state, {name: part.view(dtype).view(shape) for (name, dtype, shape), part in parts}


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def broadcast_state(adapter, optimizers: list, source: int) -> None:
    """
    Bring what trains, and all that its steps depend on, from the process `source` to all others, bit for bit: ranks, factors, parked
    vectors, scalings, modules_to_save, the method's state, other parameters of the optimizers, their state and groups.

    `source` itself, random states, buffers, gradients and frozen weights are left as they are. Every process of
    `adapter.processes` calls it.

    Args:
        optimizers: those of this process, in any order: torch optimizers, told apart by their class and parameters.
        source: the process, as `adapter.processes.rank` says.
    Raises: ValueError (other modules, method or optimizers than those of `source`), TypeError (no torch optimizer, state that is no
        number, string, tensor or collection of them), in all processes; nothing has changed then.
    """
    op, processes = "broadcast_state", adapter.processes
    if processes.size == 1:
        return
    kept = processes.rank == source
    with processes.agreement(op):
        loop = TrainingState(op, adapter, _ordered(adapter.model, optimizers), own=False)
    state, tensors = share_state(processes, *loop.gather(), source, doing=op)
    with processes.agreement(op):
        loop.check(state, tensors)
    loop.replace(state, tensors, kept=kept)


def _ordered(model: torch.nn.Module, optimizers: list) -> list:
    """The same order in every process, whatever order they are given in."""
    names = {id(p): name for name, p in model.named_parameters()}

    def key(optimizer):
        groups = getattr(optimizer, "param_groups", [])
        return type(optimizer).__name__, [[names.get(id(p), "") for p in group["params"]] for group in groups]

    return sorted(optimizers, key=key)
