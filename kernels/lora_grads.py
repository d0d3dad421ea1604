"""The reductions of the backward: dS and G from one pass over dy, dA from one pass over x. fp32 partials, then a sum."""

import torch
import triton
import triton.language as tl

from .dropout import dropout_keep_tile
from .launch import block_r, input_precision, launch_on, programs_wanted, uses_tensor_cores, warps
from .lora_shrink import lora_shrink

# One pass over dy writes and reads partials of G, together 8 R / BLOCK_M bytes for every element of dy. At this rank that is
# the 2 bytes of a second pass over a bf16 dy, and more ranks would not fit in registers beside each other.
_FUSED_R = 32


@triton.jit(do_not_specialize=["M", "R"])
def _lora_ds_db_kernel(
    dy_ptr, b_ptr, s_ptr, e_ptr, ds_ptr, g_ptr, M, N, R,
    stride_ym, stride_yn, stride_bn, stride_br, columns,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """
    dS[j, m, r] = e[r] · Σ_{n in columns j} dy[m, n] B[n, r]          G[i, r, n] = Σ_{m in rows i} dy[m, n] S[m, r]

    Program (i, j) owns BLOCK_M rows and `columns` columns (whole blocks) of dy and reads them once. It keeps its rows of dS,
    partial number j, in registers and writes its columns of G, partial number i, tile by tile. R ≤ BLOCK_R.
    """
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m, mask_r = offs_m < M, offs_r < R
    dtype = dy_ptr.dtype.element_ty
    offs_mr = offs_m[:, None] * R + offs_r[None, :]
    mask_mr = mask_m[:, None] & mask_r[None, :]
    s = tl.load(s_ptr + offs_mr, mask=mask_mr, other=0.0).to(dtype)
    g_ptr += pid_m.to(tl.int64) * R * N
    ds = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    n_begin = pid_n * columns
    for n_start in range(n_begin, tl.minimum(N, n_begin + columns), BLOCK_N):
        offs_n = (n_start + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = offs_n < N
        dy_ptrs = dy_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        b_ptrs = b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br
        b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
        ds = tl.dot(dy, b.to(dtype), ds, input_precision=PRECISION)
        g = tl.dot(tl.trans(s), dy, input_precision=PRECISION)
        tl.store(g_ptr + offs_r[:, None] * N + offs_n[None, :], g, mask=mask_r[:, None] & mask_n[None, :])
    ds *= tl.load(e_ptr + offs_r, mask=mask_r, other=0.0)[None, :]
    tl.store(ds_ptr + pid_n.to(tl.int64) * M * R + offs_mr, ds, mask=mask_mr)


@triton.jit(do_not_specialize=["M", "R", "rows", "threshold"])
def _lora_da_kernel(
    x_ptr, ds_ptr, da_ptr, seed_ptr, M, K, R,
    stride_xm, stride_xk, rows, threshold, inv_keep,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """
    dA[i, r, k] = inv_keep · Σ_{m in rows i} dS[m, r] keep[m, k] x[m, k]

    One program owns a (BLOCK_R, BLOCK_K) tile of partial number i and reads `rows` rows of x.
    """
    pid_m, pid_k, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m_begin = pid_m * rows
    m_end = tl.minimum(M, m_begin + rows)
    offs_k = (pid_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    offs_r = (pid_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    mask_k, mask_r = offs_k < K, offs_r < R
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for m_start in range(m_begin, m_end, BLOCK_M):
        offs_m = (m_start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if DROPOUT:
            x = tl.where(dropout_keep_tile(seed, offs_m, pid_k * BLOCK_K, threshold, BLOCK_K), x, 0.0)
        ds_ptrs = ds_ptr + offs_m[:, None] * R + offs_r[None, :]
        ds = tl.load(ds_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        acc = tl.dot(tl.trans(ds.to(x.dtype)), x, acc, input_precision=PRECISION)
    if DROPOUT:
        acc *= tl.cast(inv_keep, tl.float32)
    da_ptrs = da_ptr + (pid_m.to(tl.int64) * R + offs_r[:, None]) * K + offs_k[None, :]
    tl.store(da_ptrs, acc, mask=mask_r[:, None] & mask_k[None, :])


@triton.jit(do_not_specialize=["parts"])
def _sum_partials_kernel(part_ptr, out_ptr, parts, numel, BLOCK: tl.constexpr):
    """out[i] = Σ_p part[p, i], p in order; one program owns BLOCK neighbouring elements."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        acc += tl.load(part_ptr + offs, mask=offs < numel, other=0.0)
        part_ptr += numel
    tl.store(out_ptr + offs, acc, mask=offs < numel)


def _summed(partials: torch.Tensor) -> torch.Tensor:
    """Sum over the first dimension, in a fixed order."""
    if partials.shape[0] == 1:
        return partials[0]
    out = torch.empty(partials.shape[1:], dtype=torch.float32, device=partials.device)
    BLOCK = 1024
    with launch_on(out):
        _sum_partials_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            partials, out, partials.shape[0], out.numel(), BLOCK=BLOCK, num_warps=4
        )
    return out


def lora_ds_db(dy: torch.Tensor, B: torch.Tensor, s: torch.Tensor, e: torch.Tensor, need_ds: bool, need_g: bool):
    """
    dS = (dy B) ∘ e, (M, R) fp32 contiguous, and G = dyᵀ S, (N, R) fp32 with strides (1, N); None where not needed

    Args: dy (M, N), B (N, R), any strides; s (M, R) fp32 contiguous; e (R,) fp32. B and S are rounded to the dtype of dy.
    """
    (M, N), R = dy.shape, B.shape[1]
    if R > _FUSED_R or not (need_ds and need_g):
        # Gᵀ = Sᵀ dy has the form of dA, and dS that of S.
        ds = lora_shrink(dy, B.t(), e) if need_ds else None
        return ds, lora_da(dy, s).t() if need_g else None
    BLOCK_M, BLOCK_N, BLOCK_R = 128 if uses_tensor_cores(dy.dtype) else 64, 64, block_r(R)
    blocks_m, blocks_n = triton.cdiv(M, BLOCK_M), triton.cdiv(N, BLOCK_N)
    splits = min(blocks_n, triton.cdiv(programs_wanted(dy), blocks_m))
    columns = triton.cdiv(blocks_n, splits) * BLOCK_N
    splits = triton.cdiv(N, columns)
    ds = torch.empty((splits, M, R), dtype=torch.float32, device=dy.device)
    g = torch.empty((blocks_m, R, N), dtype=torch.float32, device=dy.device)
    with launch_on(dy):
        _lora_ds_db_kernel[(blocks_m, splits)](
            dy, B, s, e, ds, g, M, N, R, *dy.stride(), *B.stride(), columns, PRECISION=input_precision(dy.dtype),
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R, num_warps=8, num_stages=2,
        )  # fmt: skip
    return _summed(ds), _summed(g).t()


def lora_da(x: torch.Tensor, ds: torch.Tensor, dropout_p=0.0, threshold=0, seed=None) -> torch.Tensor:
    """dA = dSᵀ drop(x), (R, K) fp32 contiguous, of x (M, K), any strides, and dS (M, R) fp32 contiguous, rounded to x's dtype."""
    (M, K), R = x.shape, ds.shape[1]
    matrix = uses_tensor_cores(x.dtype)
    BLOCK_M, BLOCK_K, BLOCK_R = 64 if matrix else 32, 64, block_r(R, 128 if matrix else 32)
    tiles = triton.cdiv(K, BLOCK_K) * triton.cdiv(R, BLOCK_R)
    blocks_m = triton.cdiv(M, BLOCK_M)
    splits = min(blocks_m, triton.cdiv(programs_wanted(x), tiles))
    rows = triton.cdiv(blocks_m, splits) * BLOCK_M
    partials = torch.empty((triton.cdiv(M, rows), R, K), dtype=torch.float32, device=x.device)
    with launch_on(x):
        _lora_da_kernel[(partials.shape[0], triton.cdiv(K, BLOCK_K), triton.cdiv(R, BLOCK_R))](
            x, ds, partials, seed, M, K, R, *x.stride(), rows, threshold, 1 / (1 - dropout_p),
            DROPOUT=seed is not None, PRECISION=input_precision(x.dtype),
            BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R, num_warps=warps(BLOCK_R), num_stages=3,
        )  # fmt: skip
    return _summed(partials)
