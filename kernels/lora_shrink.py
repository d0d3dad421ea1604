"""S = drop(x) Aᵀ: the tokens shrunk to the rank, with the dropout mask made on the fly."""

import torch
import triton
import triton.language as tl

from .dropout import dropout_keep_tile
from .launch import block_r, input_precision, launch_on, uses_tensor_cores, warps


@triton.jit(do_not_specialize=["M", "R", "threshold"])
def _lora_shrink_kernel(
    x_ptr, a_ptr, e_ptr, s_ptr, seed_ptr, M, K, R,
    stride_xm, stride_xk, stride_ar, stride_ak, threshold, inv_keep,
    DROPOUT: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """
    S[m, r] = e[r] · inv_keep · Σ_k keep[m, k] x[m, k] A[r, k]          (without DROPOUT: no mask; without SCALE: e = 1)

    One program owns a (BLOCK_M, BLOCK_R) tile of S (fp32, contiguous) and reads x over all of K.
    """
    pid_m, pid_r = tl.program_id(0), tl.program_id(1)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_r = (pid_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    mask_m, mask_r = offs_m < M, offs_r < R
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for k_start in range(0, K, BLOCK_K):
        offs_k = (k_start + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = offs_k < K
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if DROPOUT:
            x = tl.where(dropout_keep_tile(seed, offs_m, k_start, threshold, BLOCK_K), x, 0.0)
        a_ptrs = a_ptr + offs_r[None, :] * stride_ar + offs_k[:, None] * stride_ak
        a = tl.load(a_ptrs, mask=mask_r[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(x, a.to(x.dtype), acc, input_precision=PRECISION)
    if DROPOUT:
        acc *= tl.cast(inv_keep, tl.float32)
    if SCALE:
        acc *= tl.load(e_ptr + offs_r, mask=mask_r, other=0.0)[None, :]
    tl.store(s_ptr + offs_m[:, None] * R + offs_r[None, :], acc, mask=mask_m[:, None] & mask_r[None, :])


def lora_shrink(x: torch.Tensor, A: torch.Tensor, e=None, dropout_p=0.0, threshold=0, seed=None) -> torch.Tensor:
    """
    S = (drop(x) Aᵀ) ∘ e, (M, R) fp32 contiguous

    Args: x (M, K), A (R, K), any strides; e (R,) fp32 or None for ones; no dropout where seed is None. A is rounded to x's dtype.
    """
    (M, K), R = x.shape, A.shape[0]
    s = torch.empty((M, R), dtype=torch.float32, device=x.device)
    matrix = uses_tensor_cores(x.dtype)
    BLOCK_M, BLOCK_K, BLOCK_R = 64, 64 if matrix else 32, block_r(R, 128 if matrix else 32)
    with launch_on(x):
        _lora_shrink_kernel[(triton.cdiv(M, BLOCK_M), triton.cdiv(R, BLOCK_R))](
            x, A, e, s, seed, M, K, R, *x.stride(), *A.stride(), threshold, 1 / (1 - dropout_p),
            DROPOUT=seed is not None, SCALE=e is not None, PRECISION=input_precision(x.dtype),
            BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R, num_warps=warps(BLOCK_R), num_stages=3,
        )  # fmt: skip
    return s
