"""Where every rank vector of every module lies in memory: the operand of the kernels that take all modules in one launch."""

import functools

import torch
import triton
import triton.language as tl

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ALIGNMENT = 16


@triton.jit
def vector_row(table_ptr, index, VECTOR: tl.constexpr):
    """(address, element stride, length, dtype code) of rank vector `index`; VECTOR: as promised by `vector_table`."""
    row = table_ptr + index.to(tl.int64) * 4
    address, stride, length, code = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    if VECTOR:
        stride, length = 1, tl.multiple_of(length, 16)
    return address, stride, length, code


@triton.jit
def _elements(address, dtype: tl.constexpr, offs, VECTOR: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    # The hint must sit on the pointer: what is known of an integer is forgotten when it becomes one.
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + offs


@triton.jit
def load_vector(address, offs, mask, code, VECTOR: tl.constexpr):
    """fp32 values at `offs` (elements) of the vector at `address`."""
    if code == 0:
        values = tl.load(_elements(address, tl.float32, offs, VECTOR), mask=mask, other=0.0)
    elif code == 1:
        values = tl.load(_elements(address, tl.bfloat16, offs, VECTOR), mask=mask, other=0.0).to(tl.float32)
    else:
        values = tl.load(_elements(address, tl.float16, offs, VECTOR), mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def store_vector(address, offs, mask, code, values, VECTOR: tl.constexpr):
    """Rounds fp32 `values` to the vector's dtype and writes them at `offs` (elements)."""
    if code == 0:
        tl.store(_elements(address, tl.float32, offs, VECTOR), values, mask=mask)
    elif code == 1:
        tl.store(_elements(address, tl.bfloat16, offs, VECTOR), values.to(tl.bfloat16), mask=mask)
    else:
        tl.store(_elements(address, tl.float16, offs, VECTOR), values.to(tl.float16), mask=mask)


@functools.lru_cache(maxsize=16)
def _table(device: torch.device, factors: tuple) -> torch.Tensor:
    layout = torch.tensor(
        [
            (pointer, step * dtype.itemsize, stride, length, _CODES[dtype])
            for pointer, _, step, stride, length, dtype in factors
        ]
    )
    ranks = torch.tensor([rank for _, rank, *_ in factors])
    vectors = layout.repeat_interleave(ranks, dim=0)
    r = torch.arange(len(vectors)) - (ranks.cumsum(0) - ranks).repeat_interleave(ranks)
    address = vectors[:, 0] + r * vectors[:, 1]
    return torch.cat([address[:, None], vectors[:, 2:]], dim=1).to(device)


def vector_table(lora_As, lora_Bs) -> tuple[torch.Tensor, bool]:
    """
    The table, int64 (2 ΣR, 4) on the device of the factors: address, element stride, length and dtype code of every a_r
    of every module, then of every b_r. It is made of nothing but addresses and layouts, and kept while they do not change.

    Args: lora_As: list of (R_i, K_i), lora_Bs: list of (N_i, R_i), fp32 / bf16 / fp16 in any mixture, any strides.
    Returns: (table, vector): `vector` promises unit strides, addresses on 16 bytes and lengths that are multiples of 16.
    """
    factors = tuple(
        (M.data_ptr(), M.shape[0], M.stride(0), M.stride(1), M.shape[1], M.dtype)
        for M in (*lora_As, *(B.t() for B in lora_Bs))
    )
    vector = all(
        stride == 1
        and pointer % _ALIGNMENT == 0
        and step * dtype.itemsize % _ALIGNMENT == 0
        and length % _ALIGNMENT == 0
        for pointer, _, step, stride, length, dtype in factors
    )
    return _table(lora_As[0].device, factors), vector
