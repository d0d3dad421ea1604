"""Drop-in layers."""

from .adalora_linear import AdaLoraLinear
from .dylora_linear import DyLoraLinear
from .frozen import dequantised_weight, is_conv1d, is_linear, is_quantised, linear_shape
from .grouping import Grouping
from .lora_group import LoraGroup
from .lora_linear import LoraLinear
from .nora_linear import NoRALinear, Outer, nora_serial_ref

__all__ = [
    "AdaLoraLinear",
    "DyLoraLinear",
    "Grouping",
    "LoraGroup",
    "LoraLinear",
    "NoRALinear",
    "Outer",
    "dequantised_weight",
    "is_conv1d",
    "is_linear",
    "is_quantised",
    "linear_shape",
    "nora_serial_ref",
]
