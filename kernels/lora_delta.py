"""The low-rank term on a y that is already there, on a GPU: the kernels of the LoRA layer without its base GEMMs."""

import torch

from .lora_da import lora_da
from .lora_expand import lora_expand_
from .lora_group import dense, factor_gradients
from .lora_shrink import lora_shrink


def lora_delta_(y2d, x2d, A, B, rank_scale, scaling: float, dropout_p: float, threshold: int, seed):
    """
    y += (S ∘ e) Bᵀ in place,   S = drop(x) Aᵀ,   e = scaling · E

    Args:
        y2d: (M, N), x2d: (M, K), one dtype of fp32 / bf16 / fp16.   A: (R, K), B: (N, R), dtype of x or fp32.
        rank_scale: E (R,) or None for ones.   All sizes ≥ 1, any strides, those of y without overlap.
        dropout_p, threshold, seed: probability, its 24-bit threshold and the 0-dim int64 seed, None without dropout.
    Returns: S (M, R) fp32, contiguous.
    """
    s = lora_shrink(x2d, [A], dropout_p, threshold, None if seed is None else [seed])
    lora_expand_(y2d, s, [B.t()], scaling=scaling, rank_scale=dense(rank_scale))
    return s


def lora_delta_backward(
    dy2d, x2d, S, A, B, rank_scale, scaling: float, dropout_p: float, threshold: int, seed,
    need_dx, need_dA, need_dB, need_dE,
):  # fmt: skip
    """
    dS = (dy B) ∘ e;   dx = drop(dS A);   dA = dSᵀ drop(x);   G = dyᵀ S;   dB = G ∘ e;   dE = scaling · Σ_n G B

    Args: as in `lora_delta_`, with dy2d (M, N) in the dtype of x and S as returned there; x2d may be None without need_dA, and S
        without need_dB and need_dE.
    Returns: dx (M, K); dA (R, K), contiguous; dB (N, R) with strides (1, N); dE (R,); each in the dtype of its operand, None
        where not needed.
    """
    dropout = (dropout_p, threshold, None if seed is None else [seed])
    ds = dy2d.new_empty((dy2d.shape[0], A.shape[0])) if need_dx or need_dA else None
    dB, dE = factor_gradients(dy2d, S, B, rank_scale, scaling, ds, need_dB, need_dE)
    dx = dA = None
    if need_dx:
        dx = dy2d.new_zeros((dy2d.shape[0], A.shape[1]))
        lora_expand_(dx, ds, [A], *dropout)
    if need_dA:
        dA = torch.empty(A.shape, dtype=A.dtype, device=A.device)
        lora_da(x2d, ds, [dA], *dropout)
    return dx, dA, dB, dE
