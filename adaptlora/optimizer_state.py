"""Which parts of an optimizer's state belong to the ranks of a factor: `register_optimizer_state`, and what is known without it."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping

import torch

from .state_layouts import BUILT_IN, COPY, ELEMENTWISE, SLOW_WEIGHTS, Packed, Refused, Rows

_registered: dict[type, Callable] = {}
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def register_optimizer_state(optimizer_class: type, layout: Callable) -> None:
    """
    Say how the state of an optimizer follows the ranks; of subclasses too, unless they have a layout of their own.

    Without one, a state tensor shaped like its parameter is one number for each element, and a tensor of one element is a scalar (at
    rank 1 only a 0-dim one, or "step"); any other tensor, also in a list or dict, is refused before ranks change. It begins with 0 for
    a new rank: a copy of the parameter must be said to be one, `Rows(dim, fresh="parameter")`. Known besides: torch's and
    transformers' Adafactor, bitsandbytes' and torchao's optimizers, the copies that schedule-free optimizers, MADGRAD, ASGD and
    Lookahead keep, and LBFGS, which cannot follow.

    Args:
        optimizer_class: a subclass of torch.optim.Optimizer.
        layout: called as layout(factor, key, value, shape) for every entry `value = optimizer.state[parameter][key]` of a factor, which is
            "lora_A" of shape (R, K), "lora_B" of shape (N, R) or AdaLoRA's "lora_E" of shape (R, 1); `shape` is that of the parameter now.
            It returns
            - the dimension of the tensor `value` that runs over the ranks, an int, or `Rows(dim, fresh)` (of this module, as `Packed`);
            - None for what has none: scalars, tables, statistics over the ranks, which stay as they are;
            - `Packed` for numbers that are stored in another form;
            - NotImplemented for the rule above.
    Raises: TypeError (not an optimizer class, layout not callable).

    An optimizer that keeps the mean square of each row and a direction:
    ```python
    def layout(factor, key, value, shape):
        if key == "row_mean":                              # (N,) for lora_B, (R,) for the others
            return None if factor == "lora_B" else 0
        return NotImplemented                              # "direction" is shaped like the parameter

    adaptlora.register_optimizer_state(MyOptimizer, layout)
    ```
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
        raise TypeError(
            f"register_optimizer_state: optimizer_class must be a subclass of torch.optim.Optimizer, got {optimizer_class!r}"
        )
    if not callable(layout):
        raise TypeError(f"register_optimizer_state: layout must be callable, got {layout!r}")
    _registered[optimizer_class] = layout
    _layout.cache_clear()


@functools.lru_cache(maxsize=64)
def _layout(optimizer_class: type) -> Callable | Refused | None:
    for cls in optimizer_class.__mro__:
        found = _registered.get(cls) or BUILT_IN.get((cls.__module__.split(".")[0], cls.__name__))
        if found is not None:
            return found
    return None


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raises: TypeError if no state of this optimizer could follow a rank change."""
    layout, kind = _layout(type(optimizer)), type(optimizer).__name__
    if isinstance(layout, Refused):
        raise TypeError(
            f"rank change: the optimizer's state must be resizable, got {kind}: {layout.reason}. Take another optimizer, "
            "or a method that leaves ranks as they are (LoraConfig)"
        )
    if not isinstance(getattr(optimizer, "state", None), Mapping):
        raise TypeError(f"rank change: the optimizer must keep its state in `state`, and {kind} has none")


def _refuse(optimizer, key: str, value, rule: str) -> TypeError:
    what = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"type {type(value).__name__}"
    return TypeError(
        f"rank change: optimizer state must be {rule}, to follow the rank; {type(optimizer).__name__} keeps {key!r} of {what}. "
        "adaptlora.register_optimizer_state says which dimension runs over the ranks"
    )


def _is_plain(value) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN)


def _usual(optimizer, factor: str, key: str, value, shape: torch.Size) -> Rows | None:
    """What an entry is where no layout knows it."""
    if isinstance(value, torch.Tensor):
        # At rank 1 one element may be a scalar, and may be what a rank has one of.
        scalar = value.dim() == 0 or (value.dim() == 1 and (key == "step" or shape[ELEMENTWISE[factor].dim] != 1))
        if value.numel() == 1 and scalar and value.shape != shape:
            return None
        raise _refuse(optimizer, key, value, f"shaped like its parameter, {tuple(shape)}, or one number")
    if _is_plain(value):
        return None
    raise _refuse(optimizer, key, value, "tensors by key, or numbers")


def entries(optimizer, factor: str, parameter: torch.Tensor) -> Iterator[tuple[str, object, Rows | Packed | None]]:
    """
    (key, value, how it follows the ranks, or None) of everything the optimizer keeps for a factor.

    Raises: TypeError (state that cannot follow; a layout that does not fit it).
    """
    check_optimizer(optimizer)
    layout, shape, elementwise = _layout(type(optimizer)), parameter.shape, ELEMENTWISE[factor]
    rank = shape[elementwise.dim]
    for key, value in optimizer.state.get(parameter, {}).items():
        found = NotImplemented if layout is None else layout(factor, key, value, shape)
        if found is NotImplemented:
            same = isinstance(value, torch.Tensor) and value.shape == shape
            if not same:
                yield key, value, _usual(optimizer, factor, key, value, shape)
            else:
                yield key, value, COPY[factor] if key in SLOW_WEIGHTS else elementwise
            continue
        if isinstance(found, int) and not isinstance(found, bool):
            found = Rows(found)
        if isinstance(found, Rows):
            if (
                not isinstance(value, torch.Tensor)
                or not 0 <= found.dim < value.dim()
                or value.shape[found.dim] != rank
            ):
                raise _refuse(optimizer, key, value, f"a tensor with {rank} entries in dimension {found.dim}")
        elif found is not None and not isinstance(found, Packed):
            raise TypeError(
                f"rank change: the layout of {type(optimizer).__name__} must return int, Rows, Packed, None or NotImplemented, "
                f"got {found!r} for {key!r}"
            )
        yield key, value, found


def fresh_value(optimizer, parameter: torch.Tensor, layout: Rows) -> float:
    """The number that the state of a new rank begins with."""
    if not isinstance(layout.fresh, str):
        return layout.fresh
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return float(group[layout.fresh])
    return 0.0


def held_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the memory behind a tensor, of a quantised one too."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(getattr(tensor, name).untyped_storage().nbytes() for name in tensor.__tensor_flatten__()[0])
    return tensor.untyped_storage().nbytes()


def _drop_empty_gradients(optimizer, *_) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and not parameter.numel():
                parameter.grad = None


def skip_empty_factors(optimizer: torch.optim.Optimizer) -> None:
    """Factors of rank 0 are left out of the optimizer's steps, whose means over their elements (Adafactor, Muon) would divide by zero."""
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
    # A wrapper may have other hooks, or none: those of the optimizer inside do it.
    if isinstance(hooks, OrderedDict) and _drop_empty_gradients not in hooks.values():
        optimizer.register_step_pre_hook(_drop_empty_gradients)
