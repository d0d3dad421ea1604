"""What every launcher asks: which device to launch on, how many programs fill it, how wide a rank block is."""

import contextlib

import torch
import triton

if triton.knobs.runtime.interpret:
    from .interpreter import repair_bf16

    repair_bf16()

# Enough programs that the interpreter's small tests also split the long dimension.
_PROGRAMS_WITHOUT_GPU = 8
_PROGRAMS_PER_SM = 2


def launch_on(tensor: torch.Tensor):
    """Context in which a kernel launches on the tensor's device (triton takes torch's current one)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def programs_wanted(tensor: torch.Tensor) -> int:
    """How many programs a kernel that may split its work needs to fill the tensor's device."""
    if not tensor.is_cuda:
        return _PROGRAMS_WITHOUT_GPU
    return _PROGRAMS_PER_SM * torch.cuda.get_device_properties(tensor.device).multi_processor_count


def uses_tensor_cores(dtype: torch.dtype) -> bool:
    """Whether products of this dtype run as matrix instructions: fp32 does so only as TF32, which the user must allow."""
    # Unlike `allow_tf32`, this reads settings made through torch's old and new switches alike.
    return dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32"


def input_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot; it only matters for fp32 operands."""
    return "tf32" if uses_tensor_cores(dtype) else "ieee"


def block_r(R: int, limit: int = 128) -> int:
    """Ranks that a program holds at once, R padded to 16, 32, 64 or 128; larger ranks take several blocks."""
    return min(limit, max(16, triton.next_power_of_2(R)))


def warps(BLOCK_R: int) -> int:
    """Warps of a program that holds BLOCK_R ranks: the tiles of wide blocks do not fit in the registers of four."""
    return 8 if BLOCK_R >= 64 else 4
