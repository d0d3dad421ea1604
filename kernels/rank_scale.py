"""Every rank vector of every module times a factor of its own, in one launch: what penalty gradients and proximal steps need."""

import torch
import triton
import triton.language as tl

from .launch import launch_on
from .rank_table import load_vector, store_vector, vector_row, vector_table


@triton.jit(do_not_specialize=["total"])
def _rank_scale_kernel(
    in_table_ptr, out_table_ptr, factors_a_ptr, factors_b_ptr, total,
    IN_VECTOR: tl.constexpr, OUT_VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """
    out_v[i] = f[v] · in_v[i]

    One program owns one rank vector: the `total` vectors a_r come first in the tables, then as many b_r.
    """
    pid = tl.program_id(0)
    in_address, in_stride, length, in_code = vector_row(in_table_ptr, pid, IN_VECTOR)
    out_address, out_stride, _, out_code = vector_row(out_table_ptr, pid, OUT_VECTOR)
    factor = tl.load(factors_a_ptr + pid) if pid < total else tl.load(factors_b_ptr + pid - total)
    for start in range(0, length, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < length
        values = factor * load_vector(in_address, offs * in_stride, mask, in_code, IN_VECTOR)
        store_vector(out_address, offs * out_stride, mask, out_code, values, OUT_VECTOR)


def _launch(As, Bs, out_As, out_Bs, fA, fB) -> None:
    total = sum(A.shape[0] for A in As)
    if not total:
        return
    in_table, in_vector = vector_table(As, Bs)
    out_table, out_vector = vector_table(out_As, out_Bs)
    with launch_on(in_table):
        _rank_scale_kernel[(2 * total,)](
            in_table, out_table, fA.contiguous(), fB.contiguous(), total,
            IN_VECTOR=in_vector, OUT_VECTOR=out_vector, BLOCK=1024, num_warps=4,
        )  # fmt: skip


def rank_scale(As, Bs, fA, fB) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """
    New A's and B's whose rank vectors are multiplied by their factors

    Args: As, Bs: as in `rank_norms`.   fA, fB: (ΣR,) fp32, modules in order.
    Returns: (out_As, out_Bs): dtypes and shapes kept; A's (R, K) contiguous, B's (N, R) with strides (1, N).
    """
    out_As = [torch.empty(A.shape, dtype=A.dtype, device=A.device) for A in As]
    out_Bs = [torch.empty((B.shape[1], B.shape[0]), dtype=B.dtype, device=B.device).t() for B in Bs]
    _launch(As, Bs, out_As, out_Bs, fA, fB)
    return out_As, out_Bs


def rank_scale_(As, Bs, fA, fB) -> None:
    """`rank_scale` in place; the A's and B's may have any strides without overlap."""
    _launch(As, Bs, As, Bs, fA, fB)
