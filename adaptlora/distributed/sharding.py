"""Tensors that FSDP2 has spread over processes (DTensors), among values that every process has whole."""

import copy
import sys

import torch

from ..encoding import decode, encode


def is_sharded(value) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")  # before somebody imports it there is no DTensor
    return tensor is not None and isinstance(value, tensor.DTensor)


def reshard(model: torch.nn.Module) -> None:
    """Parameters that FSDP2 left whole after a forward pass without backward are again those that the optimizer knows."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def encode_parts(op: str, where: str, value, tensors: dict[str, torch.Tensor], device=None):
    """`encoding.encode`, for which DTensors are no tensors: they come into `tensors` as they are."""
    sharded: dict[str, torch.Tensor] = {}
    encoded = encode(op, where, _set_aside(where, value, sharded), tensors, device)
    tensors.update(sharded)
    return encoded


def _set_aside(where: str, value, sharded: dict):
    if is_sharded(value):
        sharded[where] = value.detach()
        return torch.empty(0, device="cpu")
    return _rebuilt(where, value, lambda place, item: _set_aside(place, item, sharded))


def decode_parts(where: str, encoded, tensors: dict[str, torch.Tensor], device=None):
    """Inverse of `encode_parts`; DTensors among `tensors` come back as copies of themselves."""
    sharded = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
    plain = tensors | dict.fromkeys(sharded, torch.empty(0, device="cpu"))
    return _put_back(where, decode(encoded, plain, device), sharded)


def _put_back(where: str, value, sharded: dict):
    if where in sharded:
        return sharded[where].clone()
    return _rebuilt(where, value, lambda place, item: _put_back(place, item, sharded)) if sharded else value


def _rebuilt(where: str, value, part):
    """A collection of part(place, item) for its items, at the places that `encode` gives them; anything else is itself."""
    if type(value) in (list, tuple):
        return type(value)(part(f"{where}.{i}", item) for i, item in enumerate(value))
    if not isinstance(value, dict):
        return value
    rebuilt = copy.copy(value)
    rebuilt.update({key: part(f"{where}.{key}", item) for key, item in value.items()})
    return rebuilt


def gathered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    DTensors whole, on the host; all else as it is.

    A collective of all processes of their meshes, which must have the same names: one tensor after the other, so that no
    more than one lies whole on a GPU.
    """
    whole = {name: tensors[name].full_tensor().cpu() for name in sorted(tensors) if is_sharded(tensors[name])}
    return tensors | whole


def sharded_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's share of a whole `tensor`, as the DTensor `like` is spread; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
