"""The base GEMMs with the adapter inside: the rank is extra iterations of the same accumulator, so that y and dx are written once."""

import torch
import triton
import triton.language as tl

from . import tiles
from .dropout import dropout_keep_tile
from .launch import input_precision, launch_on, padded

# Programs that run together share these many rows of tiles, so that they find each other's operands in the cache.
_TILE_ROWS = 8


@triton.jit
def _tile_of(pid, blocks_m, blocks_n, TILE_ROWS: tl.constexpr):
    """(row, column) of the tile of program `pid`: TILE_ROWS rows of tiles are walked column by column."""
    width = TILE_ROWS * blocks_n
    first = pid // width * TILE_ROWS
    height = tl.minimum(blocks_m - first, TILE_ROWS)
    return first + pid % width % height, pid % width // height


@triton.jit(do_not_specialize=["M", "R", "stride_sm"], do_not_specialize_on_alignment=["s_ptr"])
def _lora_gemm_expand_kernel(
    y_ptr, x_ptr, w_ptr, bias_ptr, s_ptr, e_ptr, b_ptr, M, N, K, R,
    stride_xm, stride_wn, stride_wk, stride_sm, stride_bn, stride_br, scaling,
    BIAS: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """
    y[m, n] = Σ_k x[m, k] W[n, k] + bias[n] + Σ_r scaling · S[m, r] e[r] B[n, r]          (without SCALE: e = 1)

    One program owns a (BLOCK_M, BLOCK_N) tile of y (contiguous) and sums both products in one fp32 accumulator.
    """
    pid_m, pid_n = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), TILE_ROWS)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < N
    dtype = x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r_start in range(0, R, BLOCK_R):
        offs_r = (r_start + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask_r = offs_r < R
        s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :]
        s = tl.load(s_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0) * tl.cast(scaling, tl.float32)
        if SCALE:
            s *= tl.load(e_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
        b_ptrs = b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
        b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(s.to(dtype), b.to(dtype), acc, input_precision=PRECISION)
    x_rows = x_ptr + offs_m[:, None] * stride_xm
    w_rows = w_ptr + offs_n[None, :] * stride_wn
    for k_start in range(0, K, BLOCK_K):
        offs_k = (k_start + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = offs_k < K
        x = tl.load(x_rows + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_rows + offs_k[:, None] * stride_wk, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(dtype), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(
    do_not_specialize=["M", "rank_0", "rank_1", "rank_2", "stride_dm", "threshold"],
    do_not_specialize_on_alignment=["ds_ptr"],
)
def _lora_gemm_dx_kernel(
    dx_ptr, dy_ptrs, w_ptrs, ds_ptr, a_ptrs, seed_ptrs, M, K, widths, rank_0, rank_1, rank_2,
    strides_ym, strides_wn, strides_wk, stride_dm, strides_ar, strides_ak, threshold, inv_keep,
    GROUP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """
    dx[m, k] = Σ_i (inv_keep · keep_i[m, k] · Σ_r dS_i[m, r] A_i[r, k] + Σ_n dy_i[m, n] W_i[n, k])

    One program owns a (BLOCK_M, BLOCK_K) tile of dx (contiguous). The update comes first: its mask is put on the accumulator
    before the base product is added to it. The dS of the GROUP modules lie side by side, as S does in `lora_shrink`.
    """
    pid_m, pid_k = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), TILE_ROWS)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_k = (pid_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    mask_m, mask_k = offs_m < M, offs_k < K
    dtype = dx_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    ranks = (rank_0, rank_1, rank_2)
    ds_rows = ds_ptr + offs_m[:, None] * stride_dm
    for i in tl.static_range(GROUP):
        update = acc
        if DROPOUT and i > 0:
            update = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for r_start in range(0, ranks[i], BLOCK_R):
            offs_r = (r_start + tl.arange(0, BLOCK_R)).to(tl.int64)
            mask_r = offs_r < ranks[i]
            ds = tl.load(ds_rows + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
            a_ptrs_i = a_ptrs[i] + offs_r[:, None] * strides_ar[i] + offs_k[None, :] * strides_ak[i]
            a = tl.load(a_ptrs_i, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
            update = tl.dot(ds, a.to(dtype), update, input_precision=PRECISION)
        if DROPOUT:
            keep = dropout_keep_tile(tl.load(seed_ptrs[i]), offs_m, pid_k * BLOCK_K, threshold, BLOCK_K)
            update = tl.where(keep, update * tl.cast(inv_keep, tl.float32), 0.0)
            if i > 0:
                update += acc
        acc = update
        ds_rows += ranks[i]
    for i in tl.static_range(GROUP):
        dy_rows = dy_ptrs[i] + offs_m[:, None] * strides_ym[i]
        w_columns = w_ptrs[i] + offs_k[None, :] * strides_wk[i]
        for n_start in range(0, widths[i], BLOCK_N):
            offs_n = (n_start + tl.arange(0, BLOCK_N)).to(tl.int64)
            mask_n = offs_n < widths[i]
            dy = tl.load(dy_rows + offs_n[None, :], mask=mask_m[:, None] & mask_n[None, :], other=0.0)
            w = tl.load(w_columns + offs_n[:, None] * strides_wn[i], mask=mask_n[:, None] & mask_k[None, :], other=0.0)
            acc = tl.dot(dy, w, acc, input_precision=PRECISION)
    tl.store(dx_ptr + offs_m[:, None] * K + offs_k[None, :], acc.to(dtype), mask=mask_m[:, None] & mask_k[None, :])


def lora_gemm_expand(x, weight, bias, s, B, tile, *, scaling=1.0, rank_scale=None) -> torch.Tensor:
    """
    y = x Wᵀ + bias + scaling · (S ∘ E) Bᵀ

    Args:
        x: (M, K), unit column stride.   weight: (N, K), any strides.   bias: (N,) contiguous, or None.   All of one 16-bit dtype.
        s: (M, R) fp32, unit column stride.   B: (N, R), any strides.   rank_scale: E (R,), contiguous, or None.
        tile: a GemmTile.   scaling · S ∘ E and B are rounded to the dtype of x.
    Returns: y (M, N), dtype of x.
    """
    (M, K), (N, R) = x.shape, B.shape
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    with launch_on(x):
        _lora_gemm_expand_kernel[(triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)](
            y, x, weight, bias, s, rank_scale, B, M, N, K, R, x.stride(0), *weight.stride(), s.stride(0), *B.stride(), scaling,
            BIAS=bias is not None, SCALE=rank_scale is not None, PRECISION=input_precision(x.dtype), TILE_ROWS=_TILE_ROWS,
            BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, BLOCK_R=tiles.rank_block(R, tiles.GEMM_EXPAND_RANKS),
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tiles.ALL_REGISTERS,
        )  # fmt: skip
    return y


def lora_gemm_dx(dys, weights, ds, As, tile, dropout_p=0.0, threshold=0, seeds=None) -> torch.Tensor:
    """
    dx = Σ_i (dy_i W_i + drop_i(dS_i A_i))

    Args:
        dys: list of at most MAX_GROUP (M, N_i), unit column stride.   weights: list of (N_i, K), any strides.   All of one 16-bit dtype.
        ds: [dS_0 | dS_1 | …] (M, ΣR) of that dtype, unit column stride.   As: list of (R_i, K), R_i ≥ 1, any strides, rounded to it.
        tile: a GemmTile.   dropout_p, threshold, seeds: one seed a module; no dropout where seeds is None.
    Returns: dx (M, K), dtype of dy.
    """
    M, K = dys[0].shape[0], weights[0].shape[1]
    ranks = [A.shape[0] for A in As]
    dx = torch.empty((M, K), dtype=dys[0].dtype, device=ds.device)
    with launch_on(dx):
        _lora_gemm_dx_kernel[(triton.cdiv(M, tile.rows) * triton.cdiv(K, tile.columns),)](
            dx, tuple(dys), tuple(weights), ds, tuple(As), (None,) * len(As) if seeds is None else tuple(seeds), M, K,
            tuple(w.shape[0] for w in weights), *padded(ranks), tuple(dy.stride(0) for dy in dys),
            tuple(w.stride(0) for w in weights), tuple(w.stride(1) for w in weights), ds.stride(0),
            tuple(A.stride(0) for A in As), tuple(A.stride(1) for A in As), threshold, 1 / (1 - dropout_p),
            GROUP=len(As), DROPOUT=seeds is not None, PRECISION=input_precision(dx.dtype), TILE_ROWS=_TILE_ROWS,
            BLOCK_M=tile.rows, BLOCK_N=tile.depth, BLOCK_K=tile.columns,
            BLOCK_R=tiles.rank_block(max(ranks), tiles.GEMM_DX_RANKS[len(As) - 1]),
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tiles.ALL_REGISTERS,
        )  # fmt: skip
    return dx
