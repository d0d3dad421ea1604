"""DyLoraLinear: a LoraLinear that trains with a prefix of its vectors, and is evaluated with as many as one asks for."""

import torch
from torch import nn

from .lora_linear import LoraLinear


class DyLoraLinear(LoraLinear):
    """
    y = x Wᵀ + bias + s_b · drop(x) A_{≤b}ᵀ B_{≤b}ᵀ, s_b = scaling · (r / b)^exponent          [DyLoRA, arXiv:2210.07558, algorithm 1]

    While training b is the pair's active rank, and the vectors behind it are parked. In evaluation mode b is `evaluated`, parked vectors
    included; their gradients are not recorded then, so that training in evaluation mode fails instead of training something else.

    Args:
        base_layer, scaling, dropout_p, capacity, generator: as for `LoraLinear`; r: of the scaling, and the active rank at the start.
        exponent: 1 for lora_alpha / b, 0.5 for lora_alpha / √b, 0 for one scaling.
        frozen: while training, the first b − 1 vectors get gradients of zero.
    Attributes: full_rank, full_scaling: r and scaling.   scaling: s_b of `evaluated`, for what is saved and merged.
    Raises: as `LoraLinear`.
    """

    def __init__(self, base_layer: nn.Module, r: int, *, scaling=1.0, exponent=1.0, frozen=False, **options):
        super().__init__(base_layer, r, scaling=scaling, **options)
        self.exponent, self.frozen = exponent, frozen
        self.fill(r, scaling)

    def fill(self, rank: int, scaling: float) -> None:
        """There are `rank` vectors, scaled by `scaling` where all run: evaluated are all of them."""
        self.full_rank, self.full_scaling = rank, scaling
        self.evaluate_at(rank)

    def evaluate_at(self, rank: int) -> None:
        """Evaluate, merge and save with the first `rank` vectors, or all if there are fewer."""
        self.evaluated = min(rank, self.full_rank)
        self.scaling = self._scaling_at(self.evaluated)

    def _scaling_at(self, rank: int) -> float:
        return self.full_scaling * (self.full_rank / rank if rank else 1) ** self.exponent

    @property
    def running_scaling(self) -> float:
        if not self.training:
            return self.scaling
        return self.full_scaling if torch.compiler.is_compiling() else self._scaling_at(self.rank)

    def _ratio(self) -> torch.Tensor:
        """(r / b)^exponent as a tensor: a number that follows the rank would be compiled anew for each."""
        return (self.full_rank / self.lora_A.new_ones(self.rank).sum()) ** self.exponent

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.training:
            return self.effective_factors()
        lora_A, lora_B = self.lora_A, self.lora_B
        if self.frozen:
            last = self.rank - 1
            lora_A, rows_B = (torch.cat([rows[:last].detach(), rows[last:]]) for rows in (lora_A, lora_B.t()))
            lora_B = rows_B.t()
        return (lora_A * self._ratio() if torch.compiler.is_compiling() else lora_A), lora_B

    def biased(self, y: torch.Tensor) -> torch.Tensor:
        if self.lora_bias is None or not (self.training and torch.compiler.is_compiling()):
            return super().biased(y)
        return y + (self.running_scaling * self._ratio() * self.lora_bias).to(y.dtype)

    def effective_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        lora_A, lora_B = self.pair.whole()
        return lora_A[: self.evaluated], lora_B[:, : self.evaluated]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, full_rank={self.full_rank}, evaluated={self.evaluated}"
