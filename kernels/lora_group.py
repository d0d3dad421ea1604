"""LoRA layers that share their input, on a GPU: up to three, whose ranks fit one block, read x once for all S and once for all dA.

The fused product sums their dx in one accumulator; torch's adds one product after the other to dx.

Numbers: tiles enter the matrix units in the dtype of x, as under autocast (fp32 as TF32 only if torch allows it); sums and S are
fp32, dS has the dtype of x.   Deterministic: yes (no atomics, sums in a fixed order).   Saved tensors are never written.
"""

import torch
import torch.nn.functional as F

from .gemm_choice import choose
from .lora_da import lora_da
from .lora_ds_db import lora_ds_db
from .lora_expand import lora_expand_
from .lora_gemm import lora_gemm_dx, lora_gemm_expand
from .lora_shrink import lora_shrink


def dense(rank_scale):
    """`rank_scale` as the kernels take it: contiguous, or None."""
    return None if rank_scale is None else rank_scale.contiguous()


def _columns(ranks) -> list[slice]:
    """Where each module's ranks are in S and dS."""
    ends = [sum(ranks[: i + 1]) for i in range(len(ranks))]
    return [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]


def _chosen(items, where):
    return None if items is None else [items[i] for i in where]


def lora_group(x2d, weights, biases, As, Bs, rank_scales, scalings, dropout_p: float, threshold: int, seeds):
    """
    y_i = x W_iᵀ + bias_i + (S_i ∘ e_i) B_iᵀ,   S_i = drop_i(x) A_iᵀ,   e_i = scaling_i · E_i

    Args:
        x2d: (M, K) fp32 / bf16 / fp16.   weights: (N_i, K), biases: (N_i,) or None, of that dtype.
        As: (R_i, K), Bs: (N_i, R_i), dtype of x or fp32; R_i may be 0.   rank_scales: E_i (R_i,) or None for ones.   Any strides.
        dropout_p, threshold, seeds: probability, its 24-bit threshold and a 0-dim int64 seed a module, None without dropout.
    Returns: list of y_i (M, N_i), dtype of x; S (M, ΣR) fp32, contiguous, the modules' ranks side by side.
    """
    ranks = [A.shape[0] for A in As]
    s = torch.empty((x2d.shape[0], sum(ranks)), dtype=torch.float32, device=x2d.device)
    ranked = [i for i, rank in enumerate(ranks) if rank]
    if ranked:
        lora_shrink(x2d, _chosen(As, ranked), dropout_p, threshold, _chosen(seeds, ranked), out=s)
    ys = []
    for i, columns in enumerate(_columns(ranks)):
        # The fused product is for rank-major factors, as RankedPair's: gathering PEFT's B would cost it registers it does not have.
        tile = choose("gemm_expand", x2d, [weights[i]]) if ranks[i] and Bs[i].stride(0) == 1 else None
        options = {"scaling": scalings[i], "rank_scale": dense(rank_scales[i])}
        if tile is not None:
            ys.append(lora_gemm_expand(x2d, weights[i], dense(biases[i]), s[:, columns], Bs[i], tile, **options))
            continue
        ys.append(F.linear(x2d, weights[i], biases[i]))
        if ranks[i]:
            lora_expand_(ys[i], s[:, columns], [Bs[i].t()], **options)
    return ys, s


def lora_group_backward(
    dys, x2d, weights, S, As, Bs, rank_scales, scalings, dropout_p: float, threshold: int, seeds,
    need_dx, need_dA, need_dB, need_dE,
):  # fmt: skip
    """
    dS_i = (dy_i B_i) ∘ e_i;   dx = Σ_i dy_i W_i + drop_i(dS_i A_i);   dA_i = dS_iᵀ drop_i(x);   G_i = dy_iᵀ S_i;
    dB_i = G_i ∘ e_i;   dE_i = scaling_i · Σ_n G_i B_i

    Args: as in `lora_group`, with dys (M, N_i) in the dtype of x, None where nothing depends on that y, and S as returned there;
        need_dx: bool; need_dA, need_dB, need_dE: one a module. x2d may be None without a dA, and S without a dB and a dE.
    Returns: dx (M, K); lists of dA_i (R_i, K), contiguous; dB_i (N_i, R_i) with strides (1, N_i); dE_i (R_i,); each in the dtype
        of its operand, None where not needed. Gradients through a dy_i of None are None too, and so is dx where all are.
    """
    ranks = [A.shape[0] for A in As]
    columns = _columns(ranks)
    used = [i for i, dy in enumerate(dys) if dy is not None]
    dAs, dBs, dEs = [None] * len(As), [None] * len(As), [None] * len(As)
    if not used:
        return None, dAs, dBs, dEs
    through = [i for i in used if ranks[i] and (need_dx or need_dA[i])]
    dy = dys[used[0]]
    ds = dy.new_empty((dy.shape[0], sum(ranks[i] for i in through)))
    parts = dict(zip(through, _columns([ranks[i] for i in through]), strict=True))
    for i in used:
        dBs[i], dEs[i] = factor_gradients(
            dys[i], None if S is None else S[:, columns[i]], Bs[i], rank_scales[i], scalings[i],
            ds[:, parts[i]] if i in parts else None, need_dB[i], need_dE[i],
        )  # fmt: skip
    masks = (dropout_p, threshold)
    dx = None
    if need_dx:
        dx = _dx(
            [dys[i] for i in used],
            [weights[i] for i in used],
            ds,
            [As[i] for i in through],
            *masks,
            _chosen(seeds, through),
        )
    wanted = [i for i in used if need_dA[i]]
    for i in wanted:
        dAs[i] = torch.empty(As[i].shape, dtype=As[i].dtype, device=As[i].device)
    trained = [i for i in wanted if ranks[i]]
    if trained:
        if trained != through:  # what dx alone needed stands between the rest
            ds = torch.cat([ds[:, parts[i]] for i in trained], dim=1)
        lora_da(x2d, ds, [dAs[i] for i in trained], *masks, _chosen(seeds, trained))
    return dx, dAs, dBs, dEs


def factor_gradients(dy, s, B, rank_scale, scaling, ds, need_dB, need_dE):
    """(dB, dE), each None where not needed; fills ds, unless it is None."""
    (N, R), e = B.shape, dense(rank_scale)
    if need_dE:
        G = torch.empty((R, N), dtype=torch.float32, device=B.device).t()
        if R:
            lora_ds_db(dy, B, s, e, scaling, ds, G=G)
        dB = (G * (rank_scale.float() * scaling)).to(B.dtype) if need_dB else None
        return dB, ((G * B).sum(0) * scaling).to(rank_scale.dtype)
    dB = torch.empty((R, N), dtype=B.dtype, device=B.device).t() if need_dB else None
    if R and (ds is not None or need_dB):
        lora_ds_db(dy, B, s, e, scaling, ds, dB=dB)
    return dB, None


def _dx(dys, weights, ds, As, dropout_p, threshold, seeds):
    tile = choose("gemm_dx", dys[0], weights, dys) if len(As) == len(dys) else None
    if tile is not None:
        return lora_gemm_dx(dys, weights, ds, As, tile, dropout_p, threshold, seeds)
    dx = dys[0] @ weights[0]
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight)
    if As:
        lora_expand_(dx, ds, As, dropout_p, threshold, seeds)
    return dx
