"""FLOPs of the ops for torch's counter: after `import adaptlora.ops.flops`, `FlopCounterMode` counts adapted layers too.

Not imported by the package: torch's counter brings triton with it, or warns where there is none.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from . import lora_linear  # noqa: F401  (defines the ops)


@register_flop_formula(torch.ops.adaptlora.lora_linear)
def _(x, weight, bias, lora_A, lora_B, *rest, out_shape=None, **kwargs) -> int:
    M, (N, K), R = math.prod(x[:-1]), weight, lora_A[0]
    return 2 * M * (N * K + R * (K + N))


@register_flop_formula(torch.ops.adaptlora.lora_linear_backward)
def _(dy, x, weight, s, lora_A, lora_B, rank_scale, seed, scaling, dropout_p, need, out_shape=None, **kwargs) -> int:
    M, (N, K), R = math.prod(dy[:-1]), weight, lora_A[0]
    dx, dA, dB, dE = need
    products = (dx * N * K, (dx or dA) * R * N, dx * R * K, dA * R * K, (dB or dE) * R * N)
    return 2 * M * sum(products)
