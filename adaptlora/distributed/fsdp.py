"""FSDP2 around an adapter: it shards the frozen base, and says when gradients are to be averaged."""

import functools
from collections.abc import Callable

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
