"""Chosen rows of many tensors into new memory, in one launch."""

import math

import torch
import triton
import triton.language as tl

from .launch import launch_on, multiprocessors
from .rank_table import ALIGNMENT, elements, repeated, to_device, vector_row

_BLOCK = 1024


@triton.jit
def _copy(out_address, address, stride, length, dtype: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    if VECTOR:
        stride, length = 1, length * 2
    for start in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < length
        words = tl.load(elements(address, dtype, offs * stride, VECTOR), mask=mask & (address != 0), other=0)
        tl.store(elements(out_address, dtype, offs, VECTOR), words, mask=mask)


@triton.jit
def _rank_gather_kernel(table_ptr, out_addresses_ptr, BLOCK: tl.constexpr):
    """
    out_v[i] = in_v[i], or 0 where in_v has address 0

    Program (v, c) owns the blocks c, c + num_programs(1), … of row v. A row is words of 2^code bytes: the widest that its
    alignment and length permit where its elements lie together, otherwise its elements. 16 bytes move as two words of 8.
    """
    pid = tl.program_id(0)
    address, stride, length, code = vector_row(table_ptr, pid, False)
    out_address = tl.load(out_addresses_ptr + pid)
    if code == 4:
        _copy(out_address, address, stride, length, tl.int64, True, BLOCK)
    elif code == 3:
        _copy(out_address, address, stride, length, tl.int64, False, BLOCK)
    elif code == 2:
        _copy(out_address, address, stride, length, tl.int32, False, BLOCK)
    elif code == 1:
        _copy(out_address, address, stride, length, tl.int16, False, BLOCK)
    else:
        _copy(out_address, address, stride, length, tl.int8, False, BLOCK)


def _words(source: torch.Tensor) -> tuple[int, int, int]:
    """(word stride, words, code) of a row."""
    length, size = source.shape[1], source.element_size()
    if length > 1 and source.stride(1) != 1:
        return source.stride(1), length, size.bit_length() - 1
    width = math.gcd(ALIGNMENT, source.data_ptr(), source.stride(0) * size, length * size)
    return 1, length * size // width, width.bit_length() - 1


def rank_gather(sources, rows, counts) -> list[torch.Tensor]:
    """
    Every row of every output, by a table of addresses. A gather moves tensors to new memory, so that its table is never needed
    again: each call makes one and copies it to the device in one piece.

    Args: sources: list of (R_i, L_i), any real dtypes and strides.   rows: int64 on the CPU, counts[i] row indices for each source in
        turn, −1 for a row of zeros.
    Returns: list of (counts[i], L_i), contiguous, each in memory of its own.
    """
    outs = [
        torch.empty((count, source.shape[1]), dtype=source.dtype, device=source.device)
        for source, count in zip(sources, counts, strict=True)
    ]
    total = rows.shape[0]
    if not total:
        return outs
    layout = [
        (source.data_ptr(), source.stride(0) * size, *_words(source), out.data_ptr(), source.shape[1] * size)
        for source, out in zip(sources, outs, strict=True)
        for size in (source.element_size(),)
    ]
    lines, j = repeated(layout, counts)
    address = torch.where(rows < 0, 0, lines[:, 0] + rows * lines[:, 1])
    table = torch.cat([address[:, None], lines[:, 2:5]], dim=1)
    both = to_device(torch.cat([table.flatten(), lines[:, 5] + j * lines[:, 6]]), outs[0].device)
    blocks = triton.cdiv(int(lines[:, 3].max()), _BLOCK)
    chunks = max(1, min(blocks, triton.cdiv(2 * multiprocessors(both.device), total)))
    with launch_on(both):
        _rank_gather_kernel[(total, chunks)](both, both[table.numel() :], BLOCK=_BLOCK, num_warps=4)
    return outs
