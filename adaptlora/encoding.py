"""Python values as JSON and tensors, exactly: what a checkpoint is written as, since a pickle runs code when it is read."""

import math
from collections import Counter, OrderedDict, defaultdict

import torch

_MAPPINGS = {"$dict": dict, "$OrderedDict": OrderedDict, "$Counter": Counter}


def encode(op: str, where: str, value, tensors: dict[str, torch.Tensor], device=None):
    """
    `value` as JSON. Its tensors are copied to the host and into `tensors`, under names made of `where`.

    Args:
        value: None, bool, int, float (NaN and infinities too), str, dense tensors of any dtype and layout, and lists, tuples and mappings
            of them with keys of any of these but tensors.
        device: where `decode` is to put tensors that are on this device now; others stay on the host.
    Raises: TypeError (anything else, named by its place).
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value) if -(1 << 63) <= value < 1 << 63 else {"$int": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, torch.Tensor):
        return _encode_tensor(op, where, value, tensors, device)
    if type(value) in (list, tuple):
        items = [encode(op, f"{where}.{i}", item, tensors, device) for i, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    kind = next((tag for tag, kind in _MAPPINGS.items() if type(value) is kind), None)
    kind = "$dict" if isinstance(value, defaultdict) else kind
    if kind is None:
        raise TypeError(
            f"{op}: {where} must be a number, a string, None, a dense tensor, or a list, tuple or dict of these, "
            f"got {type(value).__name__}"
        )
    if kind == "$dict" and all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: encode(op, f"{where}.{key}", item, tensors, device) for key, item in value.items()}
    pairs = []
    for key, item in value.items():
        if isinstance(key, torch.Tensor):
            raise TypeError(f"{op}: keys of {where} must be numbers or strings, got a tensor")
        pairs.append([encode(op, where, key, tensors), encode(op, f"{where}.{key}", item, tensors, device)])
    return {kind: pairs}


def _encode_tensor(op: str, where: str, tensor: torch.Tensor, tensors: dict, device) -> dict:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(f"{op}: {where} must be a plain dense tensor, got {type(tensor).__name__} ({tensor.layout})")
    name = where if where not in tensors else f"{where}#{len(tensors)}"
    # The layout in memory is part of what a reduction rounds to.
    order = sorted(range(tensor.dim()), key=lambda i: (-tensor.stride(i), i))
    dense = tensor.detach().permute(order)
    if not dense.is_contiguous():
        order, dense = sorted(order), tensor.detach()
    tensors[name] = dense.to("cpu", copy=True).contiguous()
    encoded = {"$tensor": name}
    if order != sorted(order):
        encoded["order"] = order
    if device is not None and tensor.device != device:
        encoded["host"] = True
    return encoded


def decode(value, tensors: dict[str, torch.Tensor], device=None):
    """
    Inverse of `encode`, on `device` what was on its device then; new tensors at every call.

    Raises: ValueError (an entry that is no such value, a tensor that is not there).
    """
    if isinstance(value, list):
        return [decode(item, tensors, device) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: decode(item, tensors, device) for key, item in value.items()}
    content = value[tag]
    if tag == "$tensor":
        if content not in tensors:
            raise ValueError(f"tensors must hold {content!r}, and do not")
        order = value.get("order", range(tensors[content].dim()))
        tensor = tensors[content].permute([list(order).index(i) for i in range(len(order))])
        return tensor.to("cpu" if device is None or value.get("host") else device, copy=True)
    if tag == "$float":
        return float(content)
    if tag == "$int":
        return int(content, 16)
    if tag == "$tuple":
        return tuple(decode(content, tensors, device))
    if tag in _MAPPINGS:
        pairs = ((decode(key, tensors), decode(item, tensors, device)) for key, item in content)
        return _MAPPINGS[tag](dict(pairs))
    raise ValueError(f"{tag!r} must be one of $tensor, $float, $int, $tuple, {', '.join(_MAPPINGS)}")
