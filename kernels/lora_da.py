"""dA = dSᵀ drop(x) for one or several modules, the masks made again on the fly; also G = dyᵀ S, which has the same form."""

import torch
import triton
import triton.language as tl

from . import tiles
from .dropout import dropout_keep_tile
from .launch import MAX_GROUP, input_precision, launch_on, padded, splits
from .partials import sum_partials


@triton.jit(
    do_not_specialize=["M", "rank_0", "rank_1", "rank_2", "stride_dm", "threshold"],
    do_not_specialize_on_alignment=["ds_ptr"],
)
def _lora_da_kernel(
    x_ptr, ds_ptr, e_ptr, seed_ptrs, da_ptrs, M, K, rank_0, rank_1, rank_2,
    stride_xm, stride_xk, stride_dm, rows, threshold, factor,
    GROUP: tl.constexpr, DROPOUT: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """
    dA_i[p, r, k] = factor · e[r] · Σ_{m in rows p} dS_i[m, r] keep_i[m, k] x[m, k]      (without SCALE: e = 1)

    Program (k, p, r) reads BLOCK_K columns and `rows` rows (whole blocks) of x once for all GROUP modules and owns that tile of
    part p of each dA. The dS of the modules lie side by side, as S does in `lora_shrink`.
    """
    pid_k, pid_m, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_k = (pid_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    offs_r = (pid_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    mask_k = offs_k < K
    x_columns = x_ptr + offs_k[None, :] * stride_xk
    ranks = (rank_0, rank_1, rank_2)
    seeds, accs = (), ()
    for i in tl.static_range(GROUP):
        if DROPOUT:
            seeds += (tl.load(seed_ptrs[i]),)
        accs += (tl.zeros((BLOCK_R, BLOCK_K), tl.float32),)
    m_begin = pid_m * rows
    for m_start in range(m_begin, tl.minimum(M, m_begin + rows), BLOCK_M):
        offs_m = (m_start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        x = tl.load(x_columns + offs_m[:, None] * stride_xm, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        ds_ptrs = ds_ptr + offs_m[None, :] * stride_dm + offs_r[:, None]
        sums = ()
        for i in tl.static_range(GROUP):
            kept = x
            if DROPOUT:
                keep = dropout_keep_tile(seeds[i], offs_m, pid_k * BLOCK_K, threshold, BLOCK_K)
                kept = tl.where(keep, x, 0.0)
            ds = tl.load(ds_ptrs, mask=mask_m[None, :] & (offs_r < ranks[i])[:, None], other=0.0)
            sums += (tl.dot(ds.to(x.dtype), kept, accs[i], input_precision=PRECISION),)
            ds_ptrs += ranks[i]
        accs = sums
    offs_rk = offs_r[:, None] * K + offs_k[None, :]
    for i in tl.static_range(GROUP):
        mask_r = offs_r < ranks[i]
        acc = accs[i] * tl.cast(factor, tl.float32)
        if SCALE:
            acc *= tl.load(e_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[:, None]
        da_ptr = da_ptrs[i] + pid_m.to(tl.int64) * ranks[i] * K
        tl.store(da_ptr + offs_rk, acc.to(da_ptr.dtype.element_ty), mask=mask_r[:, None] & mask_k[None, :])


def lora_da(x, ds, outs, dropout_p=0.0, threshold=0, seeds=None, *, scaling=1.0, rank_scale=None) -> None:
    """
    out_i ← scaling · (dS_i ∘ E)ᵀ drop_i(x)

    Args:
        x: (M, K), any strides.   ds: [dS_0 | dS_1 | …] (M, ΣR), unit column stride, rounded to x's dtype.
        outs: list of (R_i, K), R_i ≥ 1, contiguous, of any dtype.
        dropout_p, threshold, seeds, rank_scale: as in `lora_shrink`.
    """
    first = 0
    for start in range(0, len(outs), MAX_GROUP):
        group = outs[start : start + MAX_GROUP]
        group_seeds = None if seeds is None else seeds[start : start + MAX_GROUP]
        width = sum(out.shape[0] for out in group)
        _da_group(x, ds[:, first : first + width], group, dropout_p, threshold, group_seeds, scaling, rank_scale)
        first += width


def _da_group(x, ds, outs, dropout_p, threshold, seeds, scaling, rank_scale) -> None:
    (M, K), ranks, kind = x.shape, [out.shape[0] for out in outs], tiles.kind(x)
    BLOCK_R = tiles.rank_block(max(ranks), tiles.DA_RANKS[kind][len(outs) - 1])
    tile = tiles.DA[kind, BLOCK_R]
    blocks, steps = triton.cdiv(K, tile.columns), triton.cdiv(M, tile.rows)
    rank_blocks = triton.cdiv(max(ranks), BLOCK_R)
    parts = splits(x, blocks * rank_blocks, steps, sum(ranks) * K)
    rows = triton.cdiv(steps, parts) * tile.rows
    parts = triton.cdiv(M, rows)
    dAs = [
        out[None] if parts == 1 else torch.empty((parts, *out.shape), dtype=torch.float32, device=x.device)
        for out in outs
    ]
    with launch_on(x):
        _lora_da_kernel[(blocks, parts, rank_blocks)](
            x, ds, rank_scale, (None,) * len(outs) if seeds is None else tuple(seeds), tuple(dAs), M, K, *padded(ranks),
            *x.stride(), ds.stride(0), rows, threshold,
            scaling / (1 - dropout_p if seeds is not None else 1),
            GROUP=len(outs), DROPOUT=seeds is not None, SCALE=rank_scale is not None, PRECISION=input_precision(x.dtype),
            BLOCK_M=tile.rows, BLOCK_K=tile.columns, BLOCK_R=BLOCK_R, num_warps=tile.warps, num_stages=tile.stages,
            maxnreg=tiles.REGISTERS[kind],
        )  # fmt: skip
    if parts > 1:
        sum_partials(*zip(dAs, outs, strict=True))
