"""LoraLinear: a frozen linear layer plus a low-rank update whose rank can change."""

import torch
from torch import nn

from ..ops import lora_linear
from ..ops._library import accumulation_dtype
from ..ranks import RankedPair


def is_conv1d(module: nn.Module) -> bool:
    # transformers' Conv1D is a linear layer that stores its weight as (K, N); known by name so that transformers stays optional.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether `LoraLinear` can wrap the module: nn.Linear itself or transformers' Conv1D.

    Subclasses of nn.Linear are not: quantised ones hold no float weight, and nn.MultiheadAttention never calls its out_proj.
    """
    return type(module) is nn.Linear or is_conv1d(module)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(K, N) of a module that `is_linear` accepts."""
    rows, columns = module.weight.shape
    return (rows, columns) if is_conv1d(module) else (columns, rows)


class LoraLinear(nn.Module):
    """
    y = x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ with W and bias frozen          [LoRA, arXiv:2106.09685, eq. 3]

    Args:
        base_layer: nn.Linear or transformers' Conv1D, with or without bias, float32, bfloat16, float16 or float64; it is frozen.
        r: rank ≥ 0; at rank 0 the layer is its base.
        scaling: number; lora_alpha / r for plain LoRA.
        dropout_p: probability in [0, 1), while training.
        capacity, generator: see `RankedPair`.
    The factors are float32 for a half-precision base, else of the base's dtype.
    Raises: TypeError (base_layer of another kind or dtype).
    """

    def __init__(self, base_layer: nn.Module, r: int, *, scaling=1.0, dropout_p=0.0, capacity=None, generator=None):
        super().__init__()
        if not is_linear(base_layer):
            raise TypeError(f"LoraLinear: base_layer must be nn.Linear or Conv1D, got {type(base_layer).__name__}")
        if not base_layer.weight.is_floating_point():
            raise TypeError(f"LoraLinear: base_layer.weight must be floating-point, got {base_layer.weight.dtype}")
        self.in_features, self.out_features = linear_shape(base_layer)
        self.base_layer = base_layer.requires_grad_(False)
        self.scaling = scaling
        self.dropout_p = dropout_p
        dtype = torch.float64 if base_layer.weight.dtype == torch.float64 else torch.float32
        self.pair = RankedPair(
            self.in_features,
            self.out_features,
            r,
            capacity=capacity,
            generator=generator,
            dtype=dtype,
            device=base_layer.weight.device,
        )
        self.fan_in_fan_out = is_conv1d(base_layer)

    @property
    def lora_A(self) -> nn.Parameter:
        """(R, K), rank-major."""
        return self.pair.lora_A

    @property
    def lora_B(self) -> nn.Parameter:
        """(N, R), rank-major: its transpose is contiguous."""
        return self.pair.lora_B

    @property
    def rank(self) -> int:
        return self.pair.rank

    @property
    def weight(self) -> torch.Tensor:
        """The base's parameter as it is: (N, K), or (K, N) for Conv1D. Code around a model reads its dtype and device."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base, pair = self.base_layer, self.pair
        return lora_linear(
            x,
            base.weight.t() if self.fan_in_fan_out else base.weight,
            base.bias,
            pair.lora_A,
            pair.lora_B,
            scaling=self.scaling,
            dropout_p=self.dropout_p if self.training else 0.0,
        )

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """W + scaling · B A, computed in float32 (float64 for float64) and rounded once; shape and dtype of `weight`."""
        acc = accumulation_dtype(self.lora_B.dtype)
        delta = self.scaling * (self.lora_B.to(acc) @ self.lora_A.to(acc))
        if self.fan_in_fan_out:
            delta = delta.t()
        return (self.weight.to(delta.dtype) + delta).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scaling={self.scaling}, dropout_p={self.dropout_p}"
