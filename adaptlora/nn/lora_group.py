"""LoraGroup: LoRA layers that share their input, run by one op."""

import torch
from torch import nn

from ..ops import lora_group
from .frozen import is_quantised
from .lora_linear import LoraLinear


def shared(layer: LoraLinear) -> dict:
    """What the layers of a group have in common."""
    return {
        "in_features": layer.in_features,
        "dropout_p": layer.dropout_p,
        "device": layer.weight.device,
        "dtype": layer.weight.dtype,
    }


class LoraGroup(nn.Module):
    """
    y_i = layer_i(x) for layers that take the same x: q, k and v, or gate and up. Sizes N_i, ranks and scalings may differ.

    Args:
        layers: LoraLinear modules of one in_features, dtype, device and dropout_p. They stay what they are: parameters are
            theirs, so that a change of a layer's rank holds here too, and each can still be called alone.
    forward(x (..., K)) returns the list of y_i (..., N_i). Dropout draws what the layers would draw, called one after the other.
    Raises: TypeError (a layer of another kind or dtype, or over a quantised base), ValueError (no layer; in_features, device or dropout_p
        that differ).
    """

    def __init__(self, layers):
        super().__init__()
        layers = list(layers)
        if not layers:
            raise ValueError("LoraGroup: layers must hold at least one LoraLinear, got none")
        for i, layer in enumerate(layers):
            if type(layer) is not LoraLinear:  # a subclass may run with other vectors
                raise TypeError(f"LoraGroup: layer {i} must be a LoraLinear, got {type(layer).__name__}")
            if is_quantised(layer.base_layer):
                raise TypeError(f"LoraGroup: layer {i} must have a plain base, got a quantised one: call it alone")
            for name, value in shared(layer).items():
                expected = shared(layers[0])[name]
                if value != expected:
                    error = TypeError if name == "dtype" else ValueError
                    raise error(f"LoraGroup: layer {i} must have the {name} of layer 0, {expected}, got {value}")
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        dropout_p, *others = (layer.dropout_p if layer.training else 0.0 for layer in self.layers)
        if any(p != dropout_p for p in others):
            raise ValueError(f"LoraGroup: the layers must have one dropout_p, got {[dropout_p, *others]}")
        ys = lora_group(
            x,
            [layer.weight.t() if layer.fan_in_fan_out else layer.weight for layer in self.layers],
            [layer.bias for layer in self.layers],
            [layer.lora_A for layer in self.layers],
            [layer.lora_B for layer in self.layers],
            scalings=[layer.scaling for layer in self.layers],
            dropout_p=dropout_p,
        )
        return [layer.biased(y) for layer, y in zip(self.layers, ys, strict=True)]
