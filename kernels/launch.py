"""What every launcher asks: which device to launch on, what the matrix units take, how far to split a reduction."""

import contextlib

import torch
import triton

from .devices import DEVICES

if triton.knobs.runtime.interpret:
    from .interpreter import repair_bf16

    repair_bf16()

# Without a GPU (in the interpreter, or compiling for one that is not there) kernels are launched as on an A100.
_CAPABILITY_WITHOUT_GPU = 80
# A split reduction writes and reads fp32 partial results: at most this share of the bytes of the operand it streams.
PARTIALS_SHARE = 1 / 32
# Modules that one launch takes when they share x; more take several launches.
MAX_GROUP = 3


def launch_on(tensor: torch.Tensor):
    """Context in which a kernel launches on the tensor's device (triton takes torch's current one)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def capability(device: torch.device) -> int:
    """Compute capability as 10 · major + minor: 80 for an A100, 90 for an H100."""
    if device.type != "cuda":
        return _CAPABILITY_WITHOUT_GPU
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """How many programs run at the same time if each fills a multiprocessor."""
    if device.type != "cuda":
        return DEVICES[_CAPABILITY_WITHOUT_GPU].multiprocessors
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits(streamed: torch.Tensor, blocks: int, steps: int, partial: int, per_multiprocessor: float = 2) -> int:
    """
    In how many parts to split a reduction of `steps` steps so that `blocks` programs become enough to fill the device.

    Args: streamed: the large operand, read once whatever the answer.   partial: fp32 numbers in the result of one part.
    """
    wanted = -(-int(per_multiprocessor * multiprocessors(streamed.device)) // blocks)
    affordable = PARTIALS_SHARE * streamed.numel() * streamed.element_size() / (8 * partial)
    return max(1, min(steps, wanted, int(affordable)))


def padded(numbers) -> list[int]:
    """`numbers`, at most MAX_GROUP of them, filled up with zeros: triton specialises what is in a tuple whatever it is told."""
    return [*numbers, *(0,) * (MAX_GROUP - len(numbers))]


def uses_tensor_cores(dtype: torch.dtype) -> bool:
    """Whether products of this dtype run as matrix instructions: fp32 does so only as TF32, which the user must allow."""
    # Unlike `allow_tf32`, this reads settings made through torch's old and new switches alike.
    return dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32"


def input_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot; it only matters for fp32 operands."""
    return "tf32" if uses_tensor_cores(dtype) else "ieee"


def is_aligned(matrix: torch.Tensor) -> bool:
    """Whether rows lie and end on 16-byte boundaries, as triton sees it: what asynchronous copies and wide loads need."""
    return (
        matrix.stride(1) == 1
        and matrix.data_ptr() % 16 == 0
        and matrix.stride(0) % 16 == 0
        and matrix.shape[1] % 16 == 0
    )
