"""Optimizers around optimizers: which of them make steps, which keep state of their own, and what no rank change could reach."""

from collections.abc import Iterable, Iterator, Mapping

import torch

from .optimizer_state import check_optimizer

_FOLLOWED = ("state", "param_groups", "defaults")


def held_parameters(optimizer) -> set[int]:
    """Ids of the parameters in its groups; none if it has no groups."""
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, (list, tuple)):
        return set()
    return {id(p) for group in groups for p in group["params"]}


def _values(thing) -> Iterable:
    if isinstance(thing, Mapping):
        return thing.values()
    return thing if isinstance(thing, (list, tuple)) else ()


def _inner(optimizer) -> list:
    """
    The optimizers that one holds, whatever it calls them, and what a wrapper calls `optimizer`, whatever that is. One that has
    parameters of its own is a wrapper only of those that share some.
    """
    named, own = getattr(optimizer, "optimizer", None), held_parameters(optimizer)
    attributes = [value for name, value in getattr(optimizer, "__dict__", {}).items() if name not in _FOLLOWED]
    found = []
    for value in (named, *attributes, *(v for attribute in attributes for v in _values(attribute))):
        if value is None or value is optimizer or any(value is other for other in found):
            continue
        held = held_parameters(value)
        steps = isinstance(value, torch.optim.Optimizer) or (held and callable(getattr(value, "step", None)))
        anything = value is named and not isinstance(optimizer, torch.optim.Optimizer)
        if anything or (steps and (not own or own & held)):
            found.append(value)
    return found


def nested(optimizer) -> list:
    """The optimizer and all that are in it, the outermost first."""
    found = [optimizer]
    for holder in found:
        found += [inner for inner in _inner(holder) if not any(inner is other for other in found)]
    return found


def unwrap(optimizer) -> tuple[list, list]:
    """
    (those around others that keep state of their own, as Lookahead its slow weights; those that make the steps).

    Wrappers, accelerate's among them, may be optimizers by class, and what they keep may be the state of the one inside.
    """
    around, stepping = [], []
    for holder in nested(optimizer):
        inner = _inner(holder)
        state = getattr(holder, "state", None)
        if not inner:
            stepping.append(holder)
        elif isinstance(state, Mapping) and all(state is not getattr(other, "state", None) for other in inner):
            around.append(holder)
    return around, stepping


def holding(op: str, optimizer, factors: Iterable[torch.nn.Parameter], where: str) -> tuple[list, list]:
    """
    `unwrap`, of those that make steps the ones that hold some of the `factors`.

    Raises: TypeError (one that is no optimizer), ValueError (none holds any; `where` says what to build it over).
    """
    around, stepping = unwrap(optimizer)
    for inner in stepping:
        if not isinstance(inner, torch.optim.Optimizer):
            raise TypeError(f"{op}: optimizer must be a torch.optim.Optimizer, got {type(inner).__name__}")
    ids = {id(p) for p in factors}
    stepping = [inner for inner in stepping if ids & held_parameters(inner)]
    if not stepping:
        raise ValueError(f"{op}: optimizer must hold the adapter's factors (build it over {where}), got none of them")
    return around, stepping


def check_wrappers(op: str, optimizer, around: list, factors: list[torch.nn.Parameter]) -> None:
    """Raises: TypeError if one around another, of which `around` keep state of their own, keeps what a rank change could not reach."""
    for outer in around:
        if not hasattr(outer, "param_groups"):
            raise TypeError(
                f"{op}: a wrapper with state of its own must have `param_groups`, and {type(outer).__name__} has none"
            )
    for holder in nested(optimizer):
        if hasattr(holder, "state"):
            check_optimizer(holder)
        check_attributes(op, holder, factors)


def _tensors(value, seen: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif id(value) not in seen:
        seen.add(id(value))
        for part in _values(value):
            yield from _tensors(part, seen)


def check_attributes(op: str, optimizer, factors: list[torch.nn.Parameter]) -> None:
    """Raises: TypeError if an attribute besides `state` holds tensors shaped like the factors, which no rank change would reach."""
    shapes, known = {p.shape for p in factors}, held_parameters(optimizer) | {id(p) for p in factors}
    for name, value in getattr(optimizer, "__dict__", {}).items():
        if name in _FOLLOWED:
            continue
        for tensor in _tensors(value, set()):
            if tensor.shape in shapes and id(tensor) not in known:
                raise TypeError(
                    f"{op}: the optimizer's tensors for each factor must be in its `state`, to follow the rank; "
                    f"{type(optimizer).__name__} keeps one of shape {tuple(tensor.shape)} in {name!r}. Keep it in "
                    "state[parameter] (adaptlora.register_optimizer_state says what it is), or take a method that leaves ranks "
                    "as they are (LoraConfig)"
                )
