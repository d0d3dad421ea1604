"""LoraLinear: a frozen linear layer plus a low-rank update whose rank can change."""

import torch
from torch import nn

from ..ranks import RankedPair
from .frozen import adapted
from .residual import ResidualLinear


class LoraLinear(ResidualLinear):
    """
    y = x Wᵀ + bias + scaling · (drop(x) Aᵀ Bᵀ + lora_bias) with W and bias frozen          [LoRA, arXiv:2106.09685, eq. 3]

    Args:
        base_layer: nn.Linear or transformers' Conv1D, with or without bias, float32, bfloat16, float16 or float64; or a quantised
            linear of bitsandbytes or torchao. It is frozen.
        r: rank ≥ 0; at rank 0 the layer is its base.
        scaling: number; lora_alpha / r for plain LoRA.
        dropout_p: probability in [0, 1), while training.
        capacity, generator: see `RankedPair`.
    The factors, lora_A (R, K) and lora_B (N, R), are float64 for a float64 base, else float32; so is lora_bias (N,), which there is
    after `add_lora_bias`.
    Attributes: grouping: weak reference to the `Grouping` that asks siblings along, or None; copies have none.
    Raises: TypeError (base_layer of another kind or dtype), ValueError (r, capacity, scaling, dropout_p).
    """

    grouping = None

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
        self.start_scaling = 1.0
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        self._train(pair)

    @torch.no_grad()
    def start_at(self, lora_A: torch.Tensor, lora_B: torch.Tensor, *, keep_original: bool = True) -> None:
        """
        Begin with other vectors in the place of the active ones; `apply_residual` makes the base W − ΔW_0, ΔW_0 = scaling · B A.

        Args:
            lora_A: (R, K).   lora_B: (N, R).   Copied, in the factors' dtype: rank-major buffers start_A (R, K) and start_B (R, N).
            keep_original: see `ResidualLinear`.
        """
        self.keep_original = keep_original
        self.set_factors(lora_A, lora_B)
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().t().clone()
        self.start_scaling = self.scaling

    def start_state(self) -> dict:
        """What `start_at` was given, the live tensors; {} if it was not called."""
        if self.start_A is None:
            return {}
        return {"start_A": self.start_A, "start_B": self.start_B, "start_scaling": self.start_scaling}

    def check_start(self, state: dict) -> None:
        own = self.start_state()
        sizes = [
            {key: tuple(value.shape) if isinstance(value, torch.Tensor) else value for key, value in found.items()}
            for found in (own, state)
        ]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"what was taken out of the base must be {sizes[0] or 'nothing'}, got {sizes[1] or 'nothing'}"
            )
        if self._starts_elsewhere(state):
            self._check_whole()

    def take_start(self, state: dict) -> None:
        self.check_start(state)
        if self._starts_elsewhere(state):
            self._replace_taken([self.start_A, self.start_B], [state["start_A"], state["start_B"]])

    def _starts_elsewhere(self, state: dict) -> bool:
        tensors = {key: value for key, value in self.start_state().items() if isinstance(value, torch.Tensor)}
        return not all(torch.equal(own, state[key].to(own)) for key, own in tensors.items())

    def _taken(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        return None if self.start_A is None else (self.start_A, self.start_B.t(), self.start_scaling)

    @property
    def running_scaling(self) -> float:
        """What the forward pass scales by: another number than `scaling` only where a subclass runs with other vectors than it saves."""
        return self.scaling

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer runs with: (A, B), behind it a quantised base's correction."""
        correction = self._correction()
        if correction is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, correction[0]]), torch.cat([self.lora_B.t(), correction[1]]).t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grouping = None if self.grouping is None or torch.compiler.is_compiling() else self.grouping()
        return self.alone(x) if grouping is None else grouping.output(self, x)

    def alone(self, x: torch.Tensor) -> torch.Tensor:
        """y, whatever siblings take the same x."""
        lora_A, lora_B = self._factors()
        dropout_p = self.dropout_p if self.training else 0.0
        return self.biased(
            adapted(self.base_layer, x, lora_A, lora_B, scaling=self.running_scaling, dropout_p=dropout_p)
        )

    def biased(self, y: torch.Tensor) -> torch.Tensor:
        """y + scaling · lora_bias, in y's dtype."""
        return y if self.lora_bias is None else y + (self.running_scaling * self.lora_bias).to(y.dtype)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "grouping"}

    def effective_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_A.detach(), self.lora_B.detach()
