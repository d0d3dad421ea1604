"""Drop-in layers."""

from .lora_linear import LoraLinear, is_linear, linear_shape

__all__ = ["LoraLinear", "is_linear", "linear_shape"]
