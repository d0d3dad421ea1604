"""The LoRA linear layer on a GPU: a group of one module."""

from .lora_group import lora_group, lora_group_backward


def lora_linear(x2d, weight, bias, A, B, rank_scale, scaling: float, dropout_p: float, threshold: int, seed):
    """
    y = x Wᵀ + bias + (S ∘ e) Bᵀ,   S = drop(x) Aᵀ,   e = scaling · E

    Args:
        x2d: (M, K) fp32 / bf16 / fp16.   weight: (N, K), bias: (N,) or None, of that dtype.
        A: (R, K), B: (N, R), dtype of x or fp32.   rank_scale: E (R,) or None for ones.   All sizes ≥ 1, any strides.
        dropout_p, threshold, seed: probability, its 24-bit threshold and the 0-dim int64 seed, None without dropout.
    Returns: y (M, N), dtype of x; S (M, R) fp32, contiguous.
    """
    seeds = None if seed is None else [seed]
    (y,), s = lora_group(x2d, [weight], [bias], [A], [B], [rank_scale], [scaling], dropout_p, threshold, seeds)
    return y, s


def lora_linear_backward(
    dy2d, x2d, weight, S, A, B, rank_scale, scaling: float, dropout_p: float, threshold: int, seed,
    need_dx, need_dA, need_dB, need_dE,
):  # fmt: skip
    """
    dS = (dy B) ∘ e;   dx = dy W + drop(dS A);   dA = dSᵀ drop(x);   G = dyᵀ S;   dB = G ∘ e;   dE = scaling · Σ_n G B

    Args: as in `lora_linear`, with dy2d (M, N) in the dtype of x and S as returned there; x2d may be None without need_dA, and S
        without need_dB and need_dE.
    Returns: dx (M, K); dA (R, K), contiguous; dB (N, R) with strides (1, N); dE (R,); each in the dtype of its operand, None
        where not needed.
    """
    dx, (dA,), (dB,), (dE,) = lora_group_backward(
        [dy2d], x2d, [weight], S, [A], [B], [rank_scale], [scaling], dropout_p, threshold,
        None if seed is None else [seed], need_dx, [need_dA], [need_dB], [need_dE],
    )  # fmt: skip
    return dx, dA, dB, dE
