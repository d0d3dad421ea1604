"""Whether values of YAML are of the types that a dataclass gives its fields."""

import types
from collections.abc import Mapping, Sequence
from typing import Union, get_args, get_origin


def fits(value, hint) -> bool:
    """Whether a value is of a field's type; a list is a tuple or sequence, and a whole number a number."""
    origin = get_origin(hint)
    if hint is object:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if origin in (tuple, Sequence):
        return isinstance(value, list | tuple) and all(fits(item, get_args(hint)[0]) for item in value)
    if hint is dict or (origin is not None and issubclass(origin, Mapping)):
        values = get_args(hint)[1] if origin is not None else object
        return isinstance(value, dict) and all(isinstance(k, str) and fits(v, values) for k, v in value.items())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def described(hint) -> str:
    """A type in words."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(described(option) for option in get_args(hint))
    if origin in (tuple, Sequence):
        return "a list of texts"
    if hint is dict or origin is not None:
        return "a mapping"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}[hint]
