"""The LoRA linear layer on a GPU: base GEMMs by torch, everything else by the kernels of lora_shrink, _expand and _grads.

Numbers: tiles enter the matrix units in the dtype of x, as under autocast (fp32 as TF32 only if torch allows it); sums, S, dS
and G are fp32.   Deterministic: yes (no atomics, sums in a fixed order).   Saved tensors are never written.
"""

import torch.nn.functional as F

from .lora_expand import lora_expand_
from .lora_grads import lora_da, lora_ds_db
from .lora_shrink import lora_shrink


def lora_linear(x2d, weight, bias, A, B, e, dropout_p: float, threshold: int, seed):
    """
    y = x Wᵀ + bias + (S ∘ e) Bᵀ,   S = drop(x) Aᵀ

    Args:
        x2d: (M, K) fp32 / bf16 / fp16.   weight: (N, K), bias: (N,) or None, of that dtype.
        A: (R, K), B: (N, R), dtype of x or fp32.   e: (R,) fp32, scaling included.   All sizes ≥ 1, any strides.
        dropout_p, threshold, seed: probability, its 24-bit threshold and the 0-dim int64 seed, None without dropout.
    Returns: y (M, N), dtype of x; S (M, R) fp32, contiguous.
    """
    s = lora_shrink(x2d, A, None, dropout_p, threshold, seed)
    y = F.linear(x2d, weight, bias)
    lora_expand_(y, s, e.contiguous(), B.t())
    return y, s


def lora_linear_backward(
    dy2d, x2d, weight, S, A, B, e, dropout_p: float, threshold: int, seed, need_dx, need_dA, need_dB, need_G
):
    """
    dS = (dy B) ∘ e;   dx = dy W + drop(dS A);   dA = dSᵀ drop(x);   G = dyᵀ S, of which dB = G ∘ e

    Args: as in `lora_linear`, with dy2d (M, N) in the dtype of x and S as returned there.
    Returns: dx (M, K) in the dtype of x; dA (R, K) fp32, contiguous; G (N, R) fp32 with strides (1, N), needed for dB or for
        itself. None where not needed.
    """
    ds, g = None, None
    if need_dx or need_dA or need_dB or need_G:
        ds, g = lora_ds_db(dy2d, B, S.contiguous(), e.contiguous(), need_dx or need_dA, need_dB or need_G)
    dx = None
    if need_dx:
        dx = dy2d @ weight
        lora_expand_(dx, ds, None, A, dropout_p, threshold, seed)
    dA = lora_da(x2d, ds, dropout_p, threshold, seed) if need_dA else None
    return dx, dA, g


__all__ = ["lora_linear", "lora_linear_backward"]
