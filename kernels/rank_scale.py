"""Every rank vector of every module times a factor of its own, in one launch: what penalty gradients and proximal steps need."""

import torch
import triton
import triton.language as tl

from .launch import launch_on
from .rank_table import empty_pairs, load_vector, store_vector, vector_row, vector_table


@triton.jit(do_not_specialize=["total"])
def _rank_scale_kernel(
    in_table_ptr, out_table_ptr, owners_ptr, addresses_ptr, factors_a_ptr, factors_b_ptr, total,
    IN_VECTOR: tl.constexpr, OUT_VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """
    out_v[i] = f[v] · in_v[i]

    One program owns one rank vector: the `total` vectors a_r come first in the tables, then as many b_r. Addresses in the
    output table are absolute, or relative to those of the factors if these are given (see `empty_pairs`).
    """
    pid = tl.program_id(0)
    in_address, in_stride, length, in_code = vector_row(in_table_ptr, pid, IN_VECTOR)
    out_address, out_stride, _, out_code = vector_row(out_table_ptr, pid, OUT_VECTOR)
    if addresses_ptr is not None:
        out_address += tl.load(addresses_ptr + tl.load(owners_ptr + pid))
    factor = tl.load(factors_a_ptr + pid) if pid < total else tl.load(factors_b_ptr + pid - total)
    for start in range(0, length, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < length
        values = factor * load_vector(in_address, offs * in_stride, mask, in_code, IN_VECTOR)
        store_vector(out_address, offs * out_stride, mask, out_code, values, OUT_VECTOR)


def _launch(in_table, in_vector, out_table, out_vector, owners, addresses, fA, fB) -> None:
    total = fA.shape[0]
    if not total:
        return
    with launch_on(in_table):
        _rank_scale_kernel[(2 * total,)](
            in_table, out_table, owners, addresses, fA.contiguous(), fB.contiguous(), total,
            IN_VECTOR=in_vector, OUT_VECTOR=out_vector, BLOCK=1024, num_warps=4,
        )  # fmt: skip


def rank_scale(As, Bs, fA, fB) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """
    New A's and B's whose rank vectors are multiplied by their factors

    Args: As, Bs: as in `rank_norms`.   fA, fB: (ΣR,) fp32, modules in order.
    Returns: (out_As, out_Bs): dtypes and shapes kept; A's (R, K) contiguous, B's (N, R) with strides (1, N).
    """
    out_As, out_Bs, *out = empty_pairs(As, Bs)
    _launch(*vector_table(As, Bs), *out, fA, fB)
    return out_As, out_Bs


def rank_scale_(As, Bs, fA, fB) -> None:
    """`rank_scale` in place; the A's and B's may have any strides without overlap."""
    table, vector = vector_table(As, Bs)
    _launch(table, vector, table, vector, None, None, fA, fB)
