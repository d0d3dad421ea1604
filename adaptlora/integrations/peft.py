"""PEFT's LoRA layers: their factors out, other ones in."""

import torch
from torch import nn

from ..lora_files import LoraModule, peft_config


class PeftHandle:
    """
    The LoRA layers of one adapter of a PeftModel.

    Raises: ValueError (no such adapter, merged, a layer that is no plain LoRA of a linear layer: the message names it).
    """

    def __init__(self, model, adapter_name: str | None):
        from peft.tuners.lora import LoraLayer

        active = model.active_adapters if hasattr(model, "active_adapters") else [model.active_adapter]
        self.model = model
        self.adapter_name = active[0] if adapter_name is None else adapter_name
        self.config = model.peft_config.get(self.adapter_name)
        if self.config is None or self.config.peft_type != "LORA":
            found = "none of it" if self.config is None else str(self.config.peft_type)
            raise ValueError(f"shear: adapter {self.adapter_name!r} must be a LoRA adapter of the model, got {found}")
        self.layers = {
            name: module
            for name, module in model.get_base_model().named_modules()
            if isinstance(module, LoraLayer) and self._names(module) & {self.adapter_name}
        }
        if not self.layers:
            raise ValueError(f"shear: adapter {self.adapter_name!r} must have layers in the model, got none")
        for name, layer in self.layers.items():
            self._check(name, layer)

    @staticmethod
    def _names(layer) -> set[str]:
        return {*layer.lora_A.keys(), *layer.lora_embedding_A.keys()}

    def _check(self, name: str, layer) -> None:
        if layer.merged:
            raise ValueError(f"shear: {name} must not be merged (unmerge_adapter() first)")
        variant = getattr(layer, "lora_variant", {}).get(self.adapter_name)
        plain = self.adapter_name in layer.lora_A and type(layer.lora_A[self.adapter_name]) is nn.Linear
        if variant is not None or not plain:
            found = type(variant).__name__ if variant is not None else type(layer.get_base_layer()).__name__
            raise ValueError(f"shear: {name} must be a plain LoRA of a linear layer, got {found}")

    def modules(self) -> dict[str, LoraModule]:
        key = self.adapter_name
        return {
            name: LoraModule(
                name=name,
                lora_A=layer.lora_A[key].weight.detach(),
                lora_B=layer.lora_B[key].weight.detach(),
                scaling=layer.scaling[key],
                bias=None if layer.lora_B[key].bias is None else layer.lora_B[key].bias.detach(),
                fan_in_fan_out=bool(getattr(layer, "fan_in_fan_out", False)),
            )
            for name, layer in self.layers.items()
        }

    def weight(self, name: str) -> torch.Tensor:
        layer = self.layers[name]
        weight = layer.get_base_layer().weight.detach()
        if not weight.is_floating_point():
            raise ValueError(f"shear: the base weight of {name} must be floating-point, got {weight.dtype}")
        return weight.t() if getattr(layer, "fan_in_fan_out", False) else weight

    def replace(self, modules: list[LoraModule]) -> None:
        """Other factors and scalings, in the layers and in the configuration, so that save_pretrained saves what now computes."""
        key, config = self.adapter_name, self.config
        ranks = {m.name: m.lora_A.shape[0] for m in modules if m.lora_A.shape[0]}
        alphas = {
            m.name: peft_config.alpha_for(vars(config), m.scaling, ranks[m.name]) for m in modules if m.name in ranks
        }
        changed = peft_config.for_modules(vars(config), ranks, alphas, self._others(ranks))
        for module in modules:
            layer = self.layers[module.name]
            if module.name not in ranks:
                for of_adapters in (layer.lora_A, layer.lora_B, layer.lora_dropout):
                    of_adapters.pop(key)
                for of_adapters in (layer.r, layer.lora_alpha, layer.scaling):
                    of_adapters.pop(key)
                continue
            layer.lora_A[key] = _linear(layer.lora_A[key], module.lora_A, None)
            layer.lora_B[key] = _linear(layer.lora_B[key], module.lora_B, module.bias)
            layer.r[key], layer.scaling[key] = ranks[module.name], module.scaling
            layer.lora_alpha[key] = alphas[module.name]
        for field, value in changed.items():
            if field != "init_lora_weights" and getattr(config, field) != value:
                setattr(config, field, value)

    def _others(self, left) -> list[str]:
        """Names of the model's modules that are not adapted."""
        return [name for name, _ in self.model.get_base_model().named_modules() if name not in left]


def _linear(old: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    for name, values in (("weight", weight), ("bias", bias)):
        if values is not None:
            setattr(new, name, nn.Parameter(values.contiguous(), requires_grad=getattr(old, name).requires_grad))
    return new.train(old.training)
