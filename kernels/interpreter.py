"""bfloat16 in triton's interpreter as a GPU computes it.

The interpreter (triton 3.7.1) keeps bf16 tiles as uint16: tl.dot multiplies the bit patterns as integers, and a conversion
from fp32 truncates where the hardware rounds to nearest even. Without this, TRITON_INTERPRET=1 says nothing about bf16.
"""

import functools

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _widened(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.uint16).numpy()


@functools.cache
def repair_bf16() -> None:
    """Replace those two operations of the interpreter, once in a process."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, *rest):
        return dot(self, _widened(a), _widened(b), *rest)

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(_rounded(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
