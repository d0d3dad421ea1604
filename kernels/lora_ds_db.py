"""dS and dB of one module from one pass over dy."""

import torch
import triton
import triton.language as tl

from . import tiles
from .launch import input_precision, launch_on, splits
from .lora_da import lora_da
from .lora_shrink import lora_shrink
from .partials import sum_partials


@triton.jit(
    do_not_specialize=["M", "R", "stride_sm", "stride_dp", "stride_dm"],
    do_not_specialize_on_alignment=["s_ptr", "ds_ptr"],
)
def _lora_ds_db_kernel(
    dy_ptr, b_ptr, s_ptr, e_ptr, ds_ptr, g_ptr, M, N, R,
    stride_ym, stride_yn, stride_bn, stride_br, stride_sm, stride_dp, stride_dm, columns, scaling, scaling_g,
    SCALE: tl.constexpr, SCALE_G: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """
    dS[j, m, r] = scaling · e[r] · Σ_{n in columns j} dy[m, n] B[n, r]                     (without SCALE: e = 1)
    G[i, r, n] = Σ_{m in rows i} dy[m, n] · scaling_g · e[r] S[m, r]                     (without SCALE_G: e = 1)

    Program (i, j) owns BLOCK_M rows and `columns` columns (whole blocks) of dy and reads them once. Its rows of S and dS stay
    in registers; it writes part i of its columns of G tile by tile. R ≤ BLOCK_R.
    """
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m, mask_r = offs_m < M, offs_r < R
    mask_mr = mask_m[:, None] & mask_r[None, :]
    dtype = dy_ptr.dtype.element_ty
    s = tl.load(s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :], mask=mask_mr, other=0.0)
    s *= tl.cast(scaling_g, tl.float32)
    if SCALE_G:
        s *= tl.load(e_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    s = s.to(dtype)
    ds = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    dy_rows = dy_ptr + offs_m[:, None] * stride_ym
    g_rows = g_ptr + (pid_m.to(tl.int64) * R + offs_r[:, None]) * N
    n_begin = pid_n * columns
    for n_start in range(n_begin, tl.minimum(N, n_begin + columns), BLOCK_N):
        offs_n = (n_start + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = offs_n < N
        dy = tl.load(dy_rows + offs_n[None, :] * stride_yn, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        b_ptrs = b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br
        b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
        ds = tl.dot(dy, b.to(dtype), ds, input_precision=PRECISION)
        g = tl.dot(tl.trans(s), dy, input_precision=PRECISION)
        tl.store(g_rows + offs_n[None, :], g.to(g_ptr.dtype.element_ty), mask=mask_r[:, None] & mask_n[None, :])
    ds *= tl.cast(scaling, tl.float32)
    if SCALE:
        ds *= tl.load(e_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    ds_ptrs = ds_ptr + pid_n.to(tl.int64) * stride_dp + offs_m[:, None] * stride_dm + offs_r[None, :]
    tl.store(ds_ptrs, ds.to(ds_ptr.dtype.element_ty), mask=mask_mr)


def lora_ds_db(dy, B, s, rank_scale, scaling: float, ds=None, dB=None, G=None) -> None:
    """
    ds ← scaling · (dy B) ∘ E;   dB ← scaling · dyᵀ (S ∘ E);   G ← dyᵀ S; at most one of dB and G

    Args:
        dy: (M, N), B: (N, R), any strides.   s: (M, R) fp32, unit column stride.   rank_scale: E (R,) contiguous, or None.
        ds: (M, R), unit column stride.   dB, G: (N, R) with strides (1, N).   Written in their own dtypes; None: not needed. Without
            both dB and G, s may be None.
    B and scaling · S ∘ E, or S, are rounded to the dtype of dy.
    """
    (M, N), R, kind = dy.shape, B.shape[1], tiles.kind(dy, B.t())
    out = dB if G is None else G
    scaling_g, scale_g = (scaling, rank_scale) if G is None else (1.0, None)
    if ds is None or out is None or tiles.DS_DB_RANKS[kind] < R:
        # dS has the form of S, and Gᵀ = Sᵀ dy that of dA.
        if ds is not None:
            lora_shrink(dy, [B.t()], scaling=scaling, rank_scale=rank_scale, out=ds)
        if out is not None:
            lora_da(dy, s, [out.t()], scaling=scaling_g, rank_scale=scale_g)
        return
    BLOCK_R = tiles.rank_block(R, 32)
    tile = tiles.DS_DB[kind, BLOCK_R]
    blocks, steps = triton.cdiv(M, tile.rows), triton.cdiv(N, tile.columns)
    # A program keeps much of dy in flight, so that half of the multiprocessors saturate the memory. Each part reads S again.
    parts = splits(dy, blocks, steps, M * R * 3 // 2, per_multiprocessor=0.5)
    columns = triton.cdiv(steps, parts) * tile.columns
    parts = triton.cdiv(N, columns)
    part_ds = ds[None] if parts == 1 else torch.empty((parts, M, R), dtype=torch.float32, device=dy.device)
    part_g = out.t()[None] if blocks == 1 else torch.empty((blocks, R, N), dtype=torch.float32, device=dy.device)
    with launch_on(dy):
        _lora_ds_db_kernel[(blocks, parts)](
            dy, B, s, rank_scale, part_ds, part_g, M, N, R, *dy.stride(), *B.stride(), s.stride(0),
            part_ds.stride(0), part_ds.stride(1), columns, scaling, scaling_g,
            SCALE=rank_scale is not None, SCALE_G=scale_g is not None, PRECISION=input_precision(dy.dtype),
            BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_R=BLOCK_R, num_warps=tile.warps, num_stages=tile.stages,
            maxnreg=tiles.ALL_REGISTERS,
        )  # fmt: skip
    jobs = [(part_ds, ds)] if parts > 1 else []
    if blocks > 1:
        jobs.append((part_g, out.t()))
    if jobs:
        sum_partials(*jobs)
