"""Who factorizes a batch of small square matrices: the CUDA library for CUDA tensors, the same source in adaptlora._C for others."""

import torch

from ..ops import _backend, _cuda_library
from .launch import capability

MAX_SIZE = 256


def cuda_library(tensor: torch.Tensor):
    """The CUDA library where it is built and has code for the tensor's device, or None."""
    library = _cuda_library.library() if tensor.is_cuda else None
    if library is None or capability(tensor.device) < min(_cuda_library.architectures(library)):
        return None
    return library


def is_built(tensor: torch.Tensor) -> bool:
    """Whether anything but torch can factorize it."""
    return (cuda_library(tensor) if tensor.is_cuda else _backend.extension()) is not None


def launch_arguments(library, factorization: str, matrices: int, tensor: torch.Tensor):
    """Workspace of a launch whose algorithm uses `matrices` of the size of those of `tensor` (b, l, l), shared memory, stream."""
    limit = torch.cuda.get_device_properties(tensor.device).shared_memory_per_block_optin
    held, _, _ = _cuda_library.plan(library, factorization, tensor.shape[-1], limit)
    workspace = (
        None if held == matrices else torch.empty(matrices * tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    )
    return workspace, limit, torch.cuda.current_stream(tensor.device).cuda_stream
