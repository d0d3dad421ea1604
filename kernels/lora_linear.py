"""The LoRA linear layer on a GPU: base GEMMs by torch, everything else by the kernels of lora_shrink, _expand and _grads.

Numbers: tiles enter the matrix units in the dtype of x, as under autocast (fp32 as TF32 only if torch allows it); sums, S, dS
and G are fp32.   Deterministic: yes (no atomics, sums in a fixed order).   Saved tensors are never written.
"""

import torch
import torch.nn.functional as F

from .lora_expand import lora_expand_
from .lora_grads import lora_da, lora_ds_db
from .lora_shrink import lora_shrink


def _rank_factor(A, rank_scale, scaling: float) -> torch.Tensor:
    if rank_scale is None:
        return torch.full((A.shape[0],), scaling, dtype=torch.float32, device=A.device)
    return (rank_scale.float() * scaling).contiguous()


def lora_linear(x2d, weight, bias, A, B, rank_scale, scaling: float, dropout_p: float, threshold: int, seed):
    """
    y = x Wᵀ + bias + (S ∘ e) Bᵀ,   S = drop(x) Aᵀ,   e = scaling · E

    Args:
        x2d: (M, K) fp32 / bf16 / fp16.   weight: (N, K), bias: (N,) or None, of that dtype.
        A: (R, K), B: (N, R), dtype of x or fp32.   rank_scale: E (R,) or None for ones.   All sizes ≥ 1, any strides.
        dropout_p, threshold, seed: probability, its 24-bit threshold and the 0-dim int64 seed, None without dropout.
    Returns: y (M, N), dtype of x; S (M, R) fp32, contiguous.
    """
    s = lora_shrink(x2d, A, None, dropout_p, threshold, seed)
    y = F.linear(x2d, weight, bias)
    lora_expand_(y, s, _rank_factor(A, rank_scale, scaling), B.t())
    return y, s


def lora_linear_backward(
    dy2d, x2d, weight, S, A, B, rank_scale, scaling: float, dropout_p: float, threshold: int, seed,
    need_dx, need_dA, need_dB, need_dE,
):  # fmt: skip
    """
    dS = (dy B) ∘ e;   dx = dy W + drop(dS A);   dA = dSᵀ drop(x);   dB = G ∘ e;   dE = scaling · Σ_n G B;   G = dyᵀ S

    Args: as in `lora_linear`, with dy2d (M, N) in the dtype of x and S as returned there.
    Returns: dx (M, K); dA (R, K), contiguous; dB (N, R) with strides (1, N); dE (R,); each in the dtype of its operand, None
        where not needed.
    """
    if not (need_dx or need_dA or need_dB or need_dE):
        return None, None, None, None
    e = _rank_factor(A, rank_scale, scaling)
    ds, g = lora_ds_db(dy2d, B, S.contiguous(), e, need_dx or need_dA, need_dB or need_dE)
    dx = None
    if need_dx:
        dx = dy2d @ weight
        lora_expand_(dx, ds, None, A, dropout_p, threshold, seed)
    dA = lora_da(x2d, ds, dropout_p, threshold, seed).to(A.dtype) if need_dA else None
    dB = (g * e).to(B.dtype) if need_dB else None
    dE = ((g * B).sum(0) * scaling).to(rank_scale.dtype) if need_dE else None
    return dx, dA, dB, dE


__all__ = ["lora_linear", "lora_linear_backward"]
