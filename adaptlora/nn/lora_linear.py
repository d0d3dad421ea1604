"""LoraLinear: a frozen linear layer plus a low-rank update whose rank can change."""

import torch
from torch import nn

from ..ranks import RankedPair
from .adapted_linear import AdaptedLinear
from .frozen import adapted


class LoraLinear(AdaptedLinear):
    """
    y = x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ with W and bias frozen          [LoRA, arXiv:2106.09685, eq. 3]

    Args:
        base_layer: nn.Linear or transformers' Conv1D, with or without bias, float32, bfloat16, float16 or float64; or a quantised
            linear of bitsandbytes or torchao. It is frozen.
        r: rank ≥ 0; at rank 0 the layer is its base.
        scaling: number; lora_alpha / r for plain LoRA.
        dropout_p: probability in [0, 1), while training.
        capacity, generator: see `RankedPair`.
    The factors, lora_A (R, K) and lora_B (N, R), are float64 for a float64 base, else float32.
    Raises: TypeError (base_layer of another kind or dtype), ValueError (r, capacity, scaling, dropout_p).
    """

    def __init__(self, base_layer: nn.Module, r: int, *, scaling=1.0, dropout_p=0.0, capacity=None, generator=None):
        super().__init__(base_layer, scaling=scaling, dropout_p=dropout_p)
        pair = RankedPair(
            self.in_features,
            self.out_features,
            r,
            capacity=capacity,
            generator=generator,
            dtype=self.factor_dtype,
            device=self.weight.device,
        )
        self._train(pair)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropout_p = self.dropout_p if self.training else 0.0
        return adapted(self.base_layer, x, self.lora_A, self.lora_B, scaling=self.scaling, dropout_p=dropout_p)

    def effective_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_A.detach(), self.lora_B.detach()
