"""FLOPs of the ops for torch's counter: after `import adaptlora.ops.flops`, `FlopCounterMode` counts adapted layers too.

Not imported by the package: torch's counter brings triton with it, or warns where there is none.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from . import compose, lora_delta, lora_group, lora_linear  # noqa: F401  (defines the ops)


@register_flop_formula(torch.ops.adaptlora.compose)
def _(lora_A, lora_B, outer_A, outer_B, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(lora_A) * (outer_A[1] + outer_B[1])


@register_flop_formula(torch.ops.adaptlora.compose_backward)
def _(dA_eff, dB_eff, outer_A, outer_B, need, out_shape=None, **kwargs) -> int:
    return sum(2 * math.prod(d) * outer_A[0] for d, needed in zip((dA_eff, dB_eff), need, strict=True) if needed)


@register_flop_formula([torch.ops.adaptlora.lora_delta_, torch.ops.adaptlora.lora_delta])
def _lora_delta(y, x, lora_A, *rest, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(lora_A[:1] + x[:-1]) * (x[-1] + y[-1])


@register_flop_formula(torch.ops.adaptlora.lora_delta_backward)
def _lora_delta_backward(
    dy, x, s, lora_A, lora_B, rank_scale, seed, scaling, dropout_p, need, out_shape=None, **kwargs
) -> int:
    N, K = dy[-1], lora_A[1]
    dx, dA, dB, dE = need
    return 2 * math.prod(lora_A[:1] + dy[:-1]) * ((dx or dA) * N + dx * K + dA * K + (dB or dE) * N)


@register_flop_formula(torch.ops.adaptlora.lora_linear)
def _lora_linear(x, weight, bias, lora_A, lora_B, *rest, out_shape=None, **kwargs) -> int:
    M, (N, K) = math.prod(x[:-1]), weight
    return 2 * M * N * K + _lora_delta(weight[:1], x, lora_A)


@register_flop_formula(torch.ops.adaptlora.lora_linear_backward)
def _lora_linear_backward(
    dy, x, weight, s, lora_A, lora_B, rank_scale, seed, scaling, dropout_p, need, out_shape=None, **kwargs
) -> int:
    low_rank = _lora_delta_backward(dy, x, s, lora_A, lora_B, rank_scale, seed, scaling, dropout_p, need)
    return need[0] * 2 * math.prod((*dy, lora_A[1])) + low_rank


@register_flop_formula(torch.ops.adaptlora.lora_group)
def _(x, weights, biases, lora_As, *rest, out_shape=None, **kwargs) -> int:
    return sum(_lora_linear(x, weight, None, A, None) for weight, A in zip(weights, lora_As, strict=True))


@register_flop_formula(torch.ops.adaptlora.lora_group_backward)
def _(
    dys, x, weights, s, lora_As, lora_Bs, rank_scales, seeds, scalings, dropout_p, need_dx, need_dA, need_dB, need_dE,
    out_shape=None, **kwargs,
) -> int:  # fmt: skip
    modules = zip(dys, weights, lora_As, need_dA, need_dB, need_dE, strict=True)
    return sum(
        _lora_linear_backward(dy, x, weight, s, A, None, None, None, None, None, (need_dx, *need))
        for dy, weight, A, *need in modules
        if dy is not None
    )
