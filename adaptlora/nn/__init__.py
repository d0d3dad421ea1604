"""Drop-in layers."""

from .lora_group import LoraGroup
from .lora_linear import LoraLinear, is_linear, linear_shape

__all__ = ["LoraGroup", "LoraLinear", "is_linear", "linear_shape"]
