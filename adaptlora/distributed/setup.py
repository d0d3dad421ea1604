"""`Adapter.distribute`: who the processes are, who averages the gradients, and that all begin alike."""

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .ddp import check_ddp, first_group, take_over
from .decisions import Agreement
from .distribution import Distribution
from .gradients import GradientSync
from .processes import Processes, ProcessGroup


def distribute(
    adapter,
    model: nn.Module | None,
    *,
    process_group=None,
    comm_hook: tuple[object, Callable] | None = None,
    timeout: timedelta | None = None,
) -> Distribution:
    """See `Adapter.distribute`."""
    root = adapter.model if model is None else model
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("distribute: torch.distributed must be initialised (init_process_group), and it is not")
    ddp = root if isinstance(root, DistributedDataParallel) else None
    group = first_group(ddp) if process_group is None and ddp is not None else process_group
    if dist.get_world_size(group) == 1:
        return Distribution()
    trained = _trained(adapter, root)
    if ddp is not None:
        check_ddp(ddp)
    processes = ProcessGroup(group, timeout)
    distribution = Distribution(processes, ddp=ddp)
    _check_state(adapter, processes)
    sharded = any(isinstance(module, FSDPModule) for module in root.modules())
    if sharded:
        from .fsdp import follow_gradient_sync

        wanted = follow_gradient_sync(root)
    elif ddp is not None:

        def wanted() -> bool:
            return ddp.require_backward_grad_sync
    else:

        def wanted() -> bool:
            return True

    with_timeout = timeout is not None and all(_over_gloo(p, group) for p in trained.values())
    if with_timeout:
        group = processes.control  # the same backend with that timeout
    distribution.gradients = sync = GradientSync(
        root,
        list(trained.values()),
        processes,
        group=group,
        wanted=wanted,
        step=lambda: adapter.method.t,
        comm_hook=_hook(ddp, comm_hook),
    )
    processes.show(lambda: {"step": adapter.method.t, "ranks": adapter.ranks(), **sync.facts()})
    if ddp is not None:
        own = {id(buffer) for layer in adapter.layers.values() for buffer in layer.buffers()}
        ignored = {name for name, buffer in ddp.module.named_buffers() if id(buffer) in own}
        distribution.stand_in = take_over(ddp, sync, processes, ignored, adapter.follow_step, adapter.take_state_of)
        ddp.process_group = group if with_timeout else distribution.stand_in.group
    processes.run(
        "distribute: sending the parameters of process 0", _broadcast, adapter, trained, group, processes.ranks[0]
    )
    return distribution


def _over_gloo(parameter: nn.Parameter, group) -> bool:
    group = dist.group.WORLD if group is None else group
    return group._get_backend(parameter.device).name() == "gloo"


def _check_state(adapter, processes: Processes) -> None:
    """Raises: ValueError, in all processes, if they have other ranks or are at other steps."""
    with Agreement(processes, "distribute") as agreement:
        agreement.reached({name: [rank, rank] for name, rank in adapter.ranks().items()})
    states = processes.gather(adapter.method.step_state(), doing="distribute: comparing the method's state")
    for process, state in enumerate(states):
        different = sorted(key for key in state if state[key] != states[0].get(key))
        if different:
            shown = ", ".join(f"{key} {states[0].get(key)!r} and {state[key]!r}" for key in different[:3])
            raise ValueError(
                f"distribute: the method's state must be the same on all processes, and process 0 and process {process} have {shown}: "
                "load the same checkpoint everywhere"
            )


@torch.no_grad()
def _broadcast(adapter, trained: dict[str, nn.Parameter], group, source: int) -> None:
    """What trains, and parked vectors, as they are in `source`: one broadcast for each dtype and device."""
    factors = {id(factor) for factor in adapter.factors()}
    tensors = [p.data for p in trained.values() if id(p) not in factors]
    for layer in adapter.layers.values():
        tensors += layer.pair.whole_rows()
    by_kind: dict[tuple, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in by_kind.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.broadcast(flat, source, group=group)
        for tensor, values in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(values.view(tensor.shape))


def _hook(ddp: DistributedDataParallel | None, given: tuple[object, Callable] | None):
    """The communication hook: the one given, or that which DDP has."""
    if given is None and ddp is not None and ddp._comm_hooks:
        hook, state = ddp._comm_hooks[-1]
        return state, hook
    return given


def _trained(adapter, root: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of all that trains in `root` and that no other engine shards.  Raises: ValueError (not the adapter's model)."""
    ignored = getattr(root, "parameters_to_ignore", set())
    inner = root.module if isinstance(root, DistributedDataParallel) else root
    parameters = dict(inner.named_parameters())
    plain = {name: p for name, p in parameters.items() if not isinstance(p, DTensor) and name not in ignored}
    held = {id(p) for p in plain.values()}
    names = {id(p): name for name, p in adapter.model.named_parameters()}
    for factor in adapter.factors():
        if isinstance(factor.data, DTensor):
            raise ValueError(
                f"distribute: the adapter's factors must not be sharded, got a DTensor for {names.get(id(factor))}: pass "
                "ignored_params=set(adapter.factors()) to fully_shard"
            )
        if id(factor) not in held:
            raise ValueError(
                f"distribute: model must be the adapter's model, or a wrapper of it, got a {type(root).__name__} without "
                f"{names.get(id(factor))}"
            )
    return {name: p for name, p in plain.items() if p.requires_grad}
