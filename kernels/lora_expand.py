"""out += drop(S F): a rank-R product added to what a base GEMM left, in place. It ends both the forward and the backward."""

import torch
import triton
import triton.language as tl

from .dropout import dropout_keep_tile
from .launch import block_r, input_precision, launch_on, uses_tensor_cores


@triton.jit(do_not_specialize=["M", "R", "threshold"])
def _lora_expand_kernel(
    out_ptr, s_ptr, e_ptr, f_ptr, seed_ptr, M, N, R,
    stride_om, stride_on, stride_fr, stride_fn, threshold, inv_keep,
    DROPOUT: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """
    out[m, n] += inv_keep · keep[m, n] · Σ_r S[m, r] e[r] F[r, n]          (without DROPOUT: no mask; without SCALE: e = 1)

    One program owns a (BLOCK_M, BLOCK_N) tile of out; S (M, R) is fp32 and contiguous.
    """
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < N
    dtype = out_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r_start in range(0, R, BLOCK_R):
        offs_r = (r_start + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask_r = offs_r < R
        s = tl.load(s_ptr + offs_m[:, None] * R + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        if SCALE:
            s *= tl.load(e_ptr + offs_r, mask=mask_r, other=0.0)[None, :]
        f_ptrs = f_ptr + offs_r[:, None] * stride_fr + offs_n[None, :] * stride_fn
        f = tl.load(f_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(s.to(dtype), f.to(dtype), acc, input_precision=PRECISION)
    if DROPOUT:
        keep = dropout_keep_tile(tl.load(seed_ptr), offs_m, pid_n * BLOCK_N, threshold, BLOCK_N)
        acc = tl.where(keep, acc * tl.cast(inv_keep, tl.float32), 0.0)
    out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on
    mask = mask_m[:, None] & mask_n[None, :]
    acc += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptrs, acc.to(dtype), mask=mask)


def lora_expand_(
    out: torch.Tensor, s: torch.Tensor, e, factor: torch.Tensor, dropout_p=0.0, threshold=0, seed=None
) -> None:
    """
    out += drop((S ∘ e) F), in place

    Args:
        out: (M, N), any strides without overlap.   s: (M, R) fp32 contiguous.   e: (R,) fp32 or None for ones.
        factor: F (R, N), any strides: Bᵀ in the forward, A in the backward. S ∘ e and F are rounded to the dtype of out.
        dropout_p, threshold, seed: the mask over (M, N), none where seed is None.
    """
    (M, N), R = out.shape, s.shape[1]
    matrix = uses_tensor_cores(out.dtype)
    BLOCK_M, BLOCK_N, BLOCK_R = 64, 64, block_r(R, 64 if matrix else 32)
    with launch_on(out):
        _lora_expand_kernel[(triton.cdiv(M, BLOCK_M), triton.cdiv(N, BLOCK_N))](
            out, s, e, factor, seed, M, N, R, *out.stride(), *factor.stride(), threshold, 1 / (1 - dropout_p),
            DROPOUT=seed is not None, SCALE=e is not None, PRECISION=input_precision(out.dtype),
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R, num_warps=4, num_stages=2,
        )  # fmt: skip
