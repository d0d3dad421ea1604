"""S = drop(x) Aᵀ for one or several modules: the tokens shrunk to the ranks, with the dropout masks made on the fly."""

import torch
import triton
import triton.language as tl

from . import tiles
from .dropout import dropout_keep_tile
from .launch import MAX_GROUP, input_precision, launch_on, padded, splits
from .partials import sum_partials


@triton.jit(
    do_not_specialize=["M", "rank_0", "rank_1", "rank_2", "stride_sp", "stride_sm", "threshold"],
    do_not_specialize_on_alignment=["s_ptr"],
)
def _lora_shrink_kernel(
    x_ptr, a_ptrs, e_ptr, seed_ptrs, s_ptr, M, K, rank_0, rank_1, rank_2,
    stride_xm, stride_xk, strides_ar, strides_ak, stride_sp, stride_sm, columns, threshold, factor,
    GROUP: tl.constexpr, DROPOUT: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """
    S_i[p, m, r] = factor · e[r] · Σ_{k in columns p} keep_i[m, k] x[m, k] A_i[r, k]     (without SCALE: e = 1)

    Program (m, p, r) reads BLOCK_M rows and `columns` columns (whole blocks) of x once for all GROUP modules and owns that
    tile of part p of their S, which lie side by side: module i's ranks follow those of module i − 1.
    """
    pid_m, pid_k, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_r = (pid_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    mask_m = offs_m < M
    x_rows = x_ptr + offs_m[:, None] * stride_xm
    ranks = (rank_0, rank_1, rank_2)
    seeds, accs = (), ()
    for i in tl.static_range(GROUP):
        if DROPOUT:
            seeds += (tl.load(seed_ptrs[i]),)
        accs += (tl.zeros((BLOCK_M, BLOCK_R), tl.float32),)
    k_begin = pid_k * columns
    for k_start in range(k_begin, tl.minimum(K, k_begin + columns), BLOCK_K):
        offs_k = (k_start + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = offs_k < K
        x = tl.load(x_rows + offs_k[None, :] * stride_xk, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        sums = ()
        for i in tl.static_range(GROUP):
            kept = x
            if DROPOUT:
                keep = dropout_keep_tile(seeds[i], offs_m, k_start, threshold, BLOCK_K)
                kept = tl.where(keep, x, 0.0)
            a_ptr = a_ptrs[i] + offs_r[None, :] * strides_ar[i] + offs_k[:, None] * strides_ak[i]
            a = tl.load(a_ptr, mask=(offs_r < ranks[i])[None, :] & mask_k[:, None], other=0.0)
            sums += (tl.dot(kept, a.to(x.dtype), accs[i], input_precision=PRECISION),)
        accs = sums
    s_ptrs = s_ptr + pid_k.to(tl.int64) * stride_sp + offs_m[:, None] * stride_sm + offs_r[None, :]
    for i in tl.static_range(GROUP):
        mask_r = offs_r < ranks[i]
        acc = accs[i] * tl.cast(factor, tl.float32)
        if SCALE:
            acc *= tl.load(e_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
        tl.store(s_ptrs, acc.to(s_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])
        s_ptrs += ranks[i]


def lora_shrink(
    x, As, dropout_p=0.0, threshold=0, seeds=None, *, scaling=1.0, rank_scale=None, out=None
) -> torch.Tensor:
    """
    S = scaling · [drop_0(x) A_0ᵀ | drop_1(x) A_1ᵀ | …] ∘ E

    Args:
        x: (M, K).   As: list of (R_i, K), R_i ≥ 1, rounded to x's dtype.   Any strides.
        dropout_p, threshold, seeds: one seed a module; no dropout where seeds is None.
        rank_scale: E (R,), contiguous, for a single module.
        out: (M, ΣR) of any dtype with unit column stride; a new fp32 tensor if None.
    Returns: out.
    """
    ranks = [A.shape[0] for A in As]
    if out is None:
        out = torch.empty((x.shape[0], sum(ranks)), dtype=torch.float32, device=x.device)
    first = 0
    for start in range(0, len(As), MAX_GROUP):
        group = slice(start, start + MAX_GROUP)
        width = sum(ranks[group])
        group_seeds = None if seeds is None else seeds[group]
        s = out[:, first : first + width]
        _shrink_group(x, As[group], ranks[group], dropout_p, threshold, group_seeds, scaling, rank_scale, s)
        first += width
    return out


def _shrink_group(x, As, ranks, dropout_p, threshold, seeds, scaling, rank_scale, out) -> None:
    (M, K), total, kind = x.shape, sum(ranks), tiles.kind(x)
    BLOCK_R = tiles.rank_block(max(ranks), tiles.SHRINK_RANKS[kind][len(As) - 1])
    tile = tiles.SHRINK[kind, BLOCK_R]
    blocks, steps = triton.cdiv(M, tile.rows), triton.cdiv(K, tile.columns)
    rank_blocks = triton.cdiv(max(ranks), BLOCK_R)
    parts = splits(x, blocks * rank_blocks, steps, M * total)
    columns = triton.cdiv(steps, parts) * tile.columns
    parts = triton.cdiv(K, columns)
    s = out[None] if parts == 1 else torch.empty((parts, M, total), dtype=torch.float32, device=x.device)
    with launch_on(x):
        _lora_shrink_kernel[(blocks, parts, rank_blocks)](
            x, tuple(As), rank_scale, (None,) * len(As) if seeds is None else tuple(seeds), s, M, K, *padded(ranks),
            *x.stride(), tuple(A.stride(0) for A in As), tuple(A.stride(1) for A in As), s.stride(0), s.stride(1),
            columns, threshold, scaling / (1 - dropout_p if seeds is not None else 1),
            GROUP=len(As), DROPOUT=seeds is not None, SCALE=rank_scale is not None, PRECISION=input_precision(x.dtype),
            BLOCK_M=tile.rows, BLOCK_K=tile.columns, BLOCK_R=BLOCK_R, num_warps=tile.warps, num_stages=tile.stages,
            maxnreg=tiles.REGISTERS[kind],
        )  # fmt: skip
    if parts > 1:
        sum_partials((s, out))
