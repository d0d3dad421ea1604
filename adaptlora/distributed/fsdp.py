"""FSDP2 around an adapter: it shards the frozen base, leaves the factors out, and says when gradients are to be averaged."""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


def follow_gradient_sync(model: nn.Module) -> Callable[[], bool]:
    """
    A function that says whether gradients are to be averaged now: as `set_requires_gradient_sync` of the FSDP2 modules in `model` was
    called last, which has no counterpart to ask.

    It is True as long as one of them is to synchronise: where FSDP reduces nothing, another average of the same sum changes nothing.
    HSDP's `set_requires_all_reduce` leaves it alone, since without replicas it changes nothing either.
    """
    wanted = {module: True for module in model.modules() if isinstance(module, FSDPModule)}
    for module in wanted:
        module.set_requires_gradient_sync = _noted(module, wanted)
    return lambda: any(wanted.values())


def _noted(module: FSDPModule, wanted: dict[FSDPModule, bool]) -> Callable:
    method = module.set_requires_gradient_sync

    @functools.wraps(method)
    def set_and_note(requires_gradient_sync: bool, *, recurse: bool = True) -> None:
        method(requires_gradient_sync, recurse=recurse)
        for part in module.modules() if recurse else (module,):
            if part in wanted:
                wanted[part] = requires_gradient_sync

    return set_and_note


def leave_out(plugin, adapter, device: torch.device) -> None:
    """
    Have accelerate shard all but what `adapter` trains, which goes to `device` as FSDP would have brought it there.

    Args: plugin: accelerate's FullyShardedDataParallelPlugin, before `Accelerator.prepare`. A pattern that it has in ignored_modules stays.
    Raises: ValueError (cpu_ram_efficient_loading); nothing has changed then.
    """
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "FSDP: cpu_ram_efficient_loading must be False, got True: it puts other parameters in the place of those that are left out"
        )
    if isinstance(plugin.ignored_modules, str):
        return
    trained = [*(layer.pair for layer in adapter.layers.values()), *adapter.saved.values()]
    for module in trained:
        module.to(device)
    plugin.ignored_modules = [*(plugin.ignored_modules or ()), *trained]
