"""out += Σ_i drop_i(S_i F_i): rank-R products added to what a base GEMM left, in place. It ends the forward and the backward."""

import triton
import triton.language as tl

from . import tiles
from .dropout import dropout_keep_tile
from .launch import MAX_GROUP, input_precision, launch_on, padded


@triton.jit(
    do_not_specialize=["M", "rank_0", "rank_1", "rank_2", "stride_sm", "threshold"],
    do_not_specialize_on_alignment=["s_ptr"],
)
def _lora_expand_kernel(
    out_ptr, s_ptr, e_ptr, f_ptrs, seed_ptrs, M, N, rank_0, rank_1, rank_2,
    stride_om, stride_on, stride_sm, strides_fr, strides_fn, threshold, scaling, inv_keep,
    GROUP: tl.constexpr, DROPOUT: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """
    out[m, n] += inv_keep · Σ_i keep_i[m, n] · Σ_r scaling · S_i[m, r] e[r] F_i[r, n]     (without DROPOUT: no mask; without SCALE: e = 1)

    One program owns a (BLOCK_M, BLOCK_N) tile of out. The S of the GROUP modules lie side by side, as in `lora_shrink`.
    """
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on
    dtype = out_ptr.dtype.element_ty
    total = tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    ranks = (rank_0, rank_1, rank_2)
    s_rows = s_ptr + offs_m[:, None] * stride_sm
    for i in tl.static_range(GROUP):
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for r_start in range(0, ranks[i], BLOCK_R):
            offs_r = (r_start + tl.arange(0, BLOCK_R)).to(tl.int64)
            mask_r = offs_r < ranks[i]
            s = tl.load(s_rows + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0).to(tl.float32)
            s *= tl.cast(scaling, tl.float32)
            if SCALE:
                s *= tl.load(e_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
            f_ptrs_i = f_ptrs[i] + offs_r[:, None] * strides_fr[i] + offs_n[None, :] * strides_fn[i]
            f = tl.load(f_ptrs_i, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
            acc = tl.dot(s.to(dtype), f.to(dtype), acc, input_precision=PRECISION)
        if DROPOUT:
            keep = dropout_keep_tile(tl.load(seed_ptrs[i]), offs_m, pid_n * BLOCK_N, threshold, BLOCK_N)
            acc = tl.where(keep, acc * tl.cast(inv_keep, tl.float32), 0.0)
        total += acc
        s_rows += ranks[i]
    tl.store(out_ptrs, total.to(dtype), mask=mask)


def lora_expand_(out, s, factors, dropout_p=0.0, threshold=0, seeds=None, *, scaling=1.0, rank_scale=None) -> None:
    """
    out += scaling · Σ_i drop_i((S_i ∘ E) F_i), in place

    Args:
        out: (M, N), any strides without overlap.   s: [S_0 | S_1 | …] (M, ΣR), unit column stride.
        factors: list of F_i (R_i, N), R_i ≥ 1, any strides: Bᵀ in the forward, A in the backward. S ∘ E and F are rounded to out's dtype.
        dropout_p, threshold, seeds: the masks over (M, N), one seed a module; none where seeds is None.
        rank_scale: E (R,), contiguous, for a single module.
    """
    M, N = out.shape
    kind = tiles.kind(out)
    tile = tiles.EXPAND[kind]
    first = 0
    for start in range(0, len(factors), MAX_GROUP):
        group = factors[start : start + MAX_GROUP]
        group_seeds = (None,) * len(group) if seeds is None else tuple(seeds[start : start + MAX_GROUP])
        ranks = tuple(factor.shape[0] for factor in group)
        with launch_on(out):
            _lora_expand_kernel[(triton.cdiv(M, tile.rows), triton.cdiv(N, tile.columns))](
                out, s[:, first:], rank_scale, tuple(group), group_seeds, M, N, *padded(ranks), *out.stride(), s.stride(0),
                tuple(f.stride(0) for f in group), tuple(f.stride(1) for f in group), threshold, scaling,
                1 / (1 - dropout_p), GROUP=len(group), DROPOUT=seeds is not None, SCALE=rank_scale is not None,
                PRECISION=input_precision(out.dtype), BLOCK_M=tile.rows, BLOCK_N=tile.columns,
                BLOCK_R=tiles.rank_block(max(ranks), tiles.EXPAND_RANKS[kind]), num_warps=tile.warps, num_stages=tile.stages,
                maxnreg=tiles.REGISTERS[kind],
            )  # fmt: skip
        first += sum(ranks)
