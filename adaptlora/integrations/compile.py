"""torch.compile around ranks that change."""

import contextlib
import copy
import threading
from collections.abc import Iterator

from torch import nn

from ..ranks import RankedPair
from ..state_layouts import RANK_DIM

# What torch's mark on a tensor is made of.
_MARKS = ("_dynamo_weak_dynamic_indices", "_has_dynamo_dim_marking")


def _pairs(adapted) -> list[RankedPair]:
    """Every pair in the model.  Raises: TypeError (neither an Adapter nor a module)."""
    model = adapted if isinstance(adapted, nn.Module) else getattr(adapted, "model", None)
    if not isinstance(model, nn.Module):
        raise TypeError(f"dynamic_ranks: adapted must be an Adapter or an nn.Module, got {type(adapted).__name__}")
    return [module for module in model.modules() if isinstance(module, RankedPair)]


def _set_marks(factor: nn.Parameter, marks: dict) -> None:
    for name in _MARKS:
        vars(factor).pop(name, None)
    vars(factor).update(marks)


_within = threading.local()


def _compare_sizes(expression) -> bool:
    """torch's guard_or_true; in threads that are within `dynamic_ranks` a size that is known, if only as an example, is looked at."""
    from torch.fx.experimental import _config, symbolic_shapes

    oblivious = _config.backed_size_oblivious and not getattr(_within, "depth", 0)
    with _config.patch(backed_size_oblivious=oblivious):
        return symbolic_shapes.guard_or_true(expression)


@contextlib.contextmanager
def _sizes_compared() -> Iterator[None]:
    """
    torch 2.13 takes strides of activations that are sizes for others than inductor's own, unless it may look at an example, and then
    compiles a backward pass for that one size. Its function stays replaced: outside, and in other threads, the new one does the same.
    """
    import torch._functorch._aot_autograd.graph_compile as graph_compile

    if hasattr(graph_compile, "guard_or_true"):  # else a version of torch that does it in another way
        graph_compile.guard_or_true = _compare_sizes
    _within.depth = getattr(_within, "depth", 0) + 1
    try:
        yield
    finally:
        _within.depth -= 1


@contextlib.contextmanager
def dynamic_ranks(adapted=None) -> Iterator[None]:
    """
    Within, torch.compile compiles for any rank: a model whose ranks change is compiled once, whatever they become.

    By default dynamo takes the shape of a parameter for a constant, so that every new rank compiles again until it gives up
    (torch 2.13: after eight), sizes 0 and 1 for special, and sizes that are equal at first for one and the same: those of modules
    that start at one rank. Settings and marks count when code is compiled: keep the calls of the compiled model, not only
    torch.compile itself, inside. They are torch's own, the settings hold for this thread, and settings and marks are restored at the end.

    Args:
        adapted: the Adapter, or a module with LoraLinear layers, whose factors' ranks are then known to be dynamic from the start.
            Without it dynamo finds out by itself, and compiles again whenever another module's rank changes for the first time.
    Raises: TypeError (adapted is neither).
    """
    import torch._dynamo
    import torch.compiler.config
    import torch.fx.experimental._config as shapes

    pairs = [] if adapted is None else _pairs(adapted)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(force_parameter_static_shapes=False))
        stack.enter_context(shapes.patch(backed_size_oblivious=True, use_duck_shape=False))
        stack.enter_context(_sizes_compared())
        # torch keeps what it compiled on disk, by a key that knows nothing of all this.
        tag = f"{torch.compiler.config.cache_key_tag} adaptlora.dynamic_ranks"
        stack.enter_context(torch.compiler.config.patch(cache_key_tag=tag))
        for pair in pairs:
            for name in pair.factor_names:
                factor = getattr(pair, name)
                marks = {mark: copy.copy(value) for mark, value in vars(factor).items() if mark in _MARKS}
                stack.callback(_set_marks, factor, marks)
                # Not mark_dynamic: a compiled function may look at a rank, and is then compiled for each.
                torch._dynamo.maybe_mark_dynamic(factor, RANK_DIM[name])
        yield
