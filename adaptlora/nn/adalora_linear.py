"""AdaLoraLinear: a frozen linear layer plus an update in the form of a singular value decomposition, whose triplets can be pruned."""

import torch
from torch import nn

from ..triplets import TripletPair
from .adapted_linear import AdaptedLinear
from .frozen import adapted


class AdaLoraLinear(AdaptedLinear):
    """
    y = base_layer(x) + scaling · drop(x) Aᵀ diag(E) Bᵀ with base_layer frozen          [AdaLoRA, arXiv:2303.10512, Eq. 3]

    Args: as `LoraLinear`; A and B start at N(0, 0.02²) and E at zero. scaling is lora_alpha / (r + 1e-5) in PEFT.
    The factors, lora_A (R, K), lora_E (R, 1) and lora_B (N, R), are float64 for a float64 base, else float32.
    Raises: TypeError (base_layer of another kind or dtype), ValueError (r, capacity, scaling, dropout_p).
    """

    def __init__(self, base_layer: nn.Module, r: int, *, scaling=1.0, dropout_p=0.0, capacity=None, generator=None):
        super().__init__(base_layer, scaling=scaling, dropout_p=dropout_p)
        like = {"dtype": self.factor_dtype, "device": self.weight.device}
        self._train(TripletPair(self.in_features, self.out_features, r, capacity=capacity, generator=generator, **like))

    @property
    def lora_E(self) -> nn.Parameter:
        """The pair's third factor, (R, 1): one number for each triplet."""
        return self.pair.lora_E

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropout_p = self.dropout_p if self.training else 0.0
        options = {"scaling": self.scaling, "rank_scale": self.lora_E.squeeze(1), "dropout_p": dropout_p}
        return adapted(self.base_layer, x, self.lora_A, self.lora_B, **options)

    def effective_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(diag(E) A, B): one rounding of each element of A in the factors' dtype, the product that PEFT's own layer makes."""
        return (self.lora_A * self.lora_E).detach(), self.lora_B.detach()

    def set_factors(self, lora_A: torch.Tensor, lora_B: torch.Tensor) -> None:
        super().set_factors(lora_A, lora_B)
        with torch.no_grad():
            self.lora_E.fill_(1)
