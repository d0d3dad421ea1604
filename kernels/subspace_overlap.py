"""q_i = ‖u_iᵀ W‖² for every column u_i of a batch of bases; the products themselves are never stored."""

import torch
import triton
import triton.language as tl

from .launch import launch_on
from .partials import sum_partials

_BLOCK_M, _BLOCK_R, _BLOCK_N = 32, 32, 32


@triton.jit(do_not_specialize=["n", "m", "r"])
def _subspace_overlap_kernel(
    u_ptr, w_ptr, q_ptr, n, m, r, stride_ub, stride_un, stride_um, stride_wb, stride_wn, stride_wr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """
    q[p, b, i] = Σ_{j in block p} (Σ_k U[b, k, i] W[b, k, j])²

    Program (i, p, b) owns BLOCK_M columns of U and reads block p, BLOCK_R columns, of W.
    """
    pid_m, pid_r, pid_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_r = (pid_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    mask_m, mask_r = offs_m < m, offs_r < r
    u_columns = u_ptr + pid_b * stride_ub + offs_m[:, None] * stride_um
    w_columns = w_ptr + pid_b * stride_wb + offs_r[None, :] * stride_wr
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, n, BLOCK_N):
        offs_n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = offs_n < n
        u = tl.load(u_columns + offs_n[None, :] * stride_un, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        w = tl.load(w_columns + offs_n[:, None] * stride_wn, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
        acc = tl.dot(u.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
    q_row = q_ptr + (pid_r * tl.num_programs(2) + pid_b) * m
    tl.store(q_row + offs_m, tl.sum(acc * acc, axis=1), mask=mask_m)


def subspace_overlap(U: torch.Tensor, U_base: torch.Tensor) -> torch.Tensor:
    """
    Args: U: (..., n, m), U_base: (..., n, r), fp32 / bf16 / fp16, any strides.
    Returns: q (..., m), fp32.
    """
    (*batch, n, m), r = U.shape, U_base.shape[-1]
    q = torch.zeros((*batch, m), dtype=torch.float32, device=U.device)
    if 0 in (n, r) or not q.numel():
        return q
    u, w = U.reshape(-1, n, m), U_base.reshape(-1, n, r)
    parts = triton.cdiv(r, _BLOCK_R)
    q_parts = torch.empty((parts, q.numel() // m, m), dtype=torch.float32, device=U.device)
    with launch_on(U):
        _subspace_overlap_kernel[(triton.cdiv(m, _BLOCK_M), parts, len(u))](
            u, w, q_parts, n, m, r, *u.stride(), *w.stride(),
            BLOCK_M=_BLOCK_M, BLOCK_R=_BLOCK_R, BLOCK_N=_BLOCK_N, num_warps=4, num_stages=2,
        )  # fmt: skip
    if parts == 1:
        return q_parts.reshape(q.shape)
    sum_partials((q_parts, q.view(-1, m)))
    return q
