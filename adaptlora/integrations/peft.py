"""PEFT's LoRA layers: their factors out, other ones in."""

import math

import torch
from torch import nn

from ..distributed.sharding import is_sharded
from ..lora_files import LoraModule, peft_config
from ..shear.base import Sheared
from .peft_ranks import BorrowedPair, Followers, change_ranks


class PeftHandle:
    """
    The LoRA layers of one adapter of a PeftModel, and the optimizer that trains it, if one does.

    Raises: ValueError (no such adapter, merged, a layer that is no plain LoRA of a linear layer or shares its factors: the message names
        it; an optimizer without these factors), TypeError (an optimizer whose state cannot follow).
    """

    def __init__(self, model, adapter_name: str | None, optimizer=None, *, op: str = "shear"):
        from peft.tuners.lora import LoraLayer

        self._op = op

        active = model.active_adapters if hasattr(model, "active_adapters") else [model.active_adapter]
        self.model = model
        self.adapter_name = active[0] if adapter_name is None else adapter_name
        self.config = model.peft_config.get(self.adapter_name)
        if self.config is None or self.config.peft_type != "LORA":
            found = f"adapters {list(model.peft_config)}" if self.config is None else str(self.config.peft_type)
            raise ValueError(f"{op}: adapter {self.adapter_name!r} must be a LoRA adapter of the model, got {found}")
        self.layers = {
            name: module
            for name, module in model.get_base_model().named_modules()
            if isinstance(module, LoraLayer) and self._names(module) & {self.adapter_name}
        }
        if not self.layers:
            raise ValueError(f"{op}: adapter {self.adapter_name!r} must have layers in the model, got none")
        reason = peft_config.changed_base(vars(self.config))
        if reason is not None:
            raise ValueError(f"{op}: adapter {self.adapter_name!r}: {reason}")
        owners: dict[int, str] = {}
        for name, layer in self.layers.items():
            self._check(name, layer)
            for factor in self._factors(name):
                other = owners.setdefault(factor.data_ptr(), name)
                if other != name:
                    raise ValueError(f"{op}: {name} must have factors of its own, got those of {other}")
        factors = [factor for name in self.layers for factor in self._factors(name)]
        self._followers = Followers(op, optimizer, factors)

    @staticmethod
    def _names(layer) -> set[str]:
        return {*layer.lora_A.keys(), *layer.lora_embedding_A.keys()}

    def _check(self, name: str, layer) -> None:
        if layer.merged:
            raise ValueError(f"{self._op}: {name} must not be merged (unmerge_adapter() first)")
        from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper

        variant = getattr(layer, "lora_variant", {}).get(self.adapter_name)
        plain = self.adapter_name in layer.lora_A and type(layer.lora_A[self.adapter_name]) is nn.Linear
        if variant is not None or not plain or isinstance(layer, (MultiheadAttention, ParamWrapper)):
            found = type(variant).__name__ if variant is not None else type(layer.get_base_layer()).__name__
            raise ValueError(f"{self._op}: {name} must be a plain LoRA of a linear layer, got {found}")
        lora_A, lora_B = self._factors(name)
        scaling = float(layer.scaling[self.adapter_name])
        if not (math.isfinite(scaling) and scaling > 0):
            raise ValueError(f"{self._op}: {name} must have a finite scaling > 0, got {scaling}")
        rank, expected = layer.r[self.adapter_name], [layer.in_features, layer.out_features]
        if is_sharded(lora_A) or [*lora_A.shape, *lora_B.shape] != [rank, expected[0], expected[1], rank]:
            shapes = f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
            rule = f"whole factors ({rank}, {expected[0]}) and ({expected[1]}, {rank})"
            raise ValueError(f"{self._op}: {name} must have {rule}, got {shapes}{' of DTensors' * is_sharded(lora_A)}")

    def _factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        layer = self.layers[name]
        return layer.lora_A[self.adapter_name].weight, layer.lora_B[self.adapter_name].weight

    def modules(self) -> dict[str, LoraModule]:
        key = self.adapter_name
        return {
            name: LoraModule(
                name=name,
                lora_A=layer.lora_A[key].weight.detach(),
                lora_B=layer.lora_B[key].weight.detach(),
                scaling=float(layer.scaling[key]),
                bias=None if layer.lora_B[key].bias is None else layer.lora_B[key].bias.detach(),
                fan_in_fan_out=bool(getattr(layer, "fan_in_fan_out", False)),
                use_rslora=layer.use_rslora[key],
            )
            for name, layer in self.layers.items()
        }

    def weight(self, name: str) -> torch.Tensor:
        layer = self.layers[name]
        weight = layer.get_base_layer().weight.detach()
        if not weight.is_floating_point():
            raise ValueError(f"shear: the base weight of {name} must be floating-point, got {weight.dtype}")
        return weight.t() if getattr(layer, "fan_in_fan_out", False) else weight

    def replace(self, sheared: list[Sheared]) -> None:
        """
        Other ranks, factors and scalings, in the layers, in the optimizer and in the configuration, so that save_pretrained saves what now
        computes. PEFT's parameters stay the same objects; those of modules of rank 0 leave the layers and the optimizer.

        Raises: TypeError (an optimizer's state that cannot follow; the module is named); nothing has changed then.
        """
        left = {s.module.name: s for s in sheared if s.rank}
        changed, alphas = self._configuration(left)
        pairs, orders = {}, {}
        for name, new in left.items():
            order = None if new.kept is None else new.order()
            if new.kept is not None and order is None and new.rank == new.rank_before:
                continue
            values = (new.module.lora_A, new.module.lora_B) if new.kept is None else None
            pairs[name] = BorrowedPair(*self._factors(name), self._followers.optimizers, values)
            if order is not None:
                orders[name] = order
        change_ranks(pairs, {name: left[name].rank for name in pairs}, orders)
        for name in self.layers.keys() - left.keys():
            self._remove(name)
        for name, new in left.items():
            self._renew(name, new, alphas[name])
        for field, value in changed.items():
            # PEFT joins the sets of several adapters, and no lists.
            value = set(value) if field == "target_modules" and isinstance(value, list) else value
            if field != "init_lora_weights" and getattr(self.config, field) != value:
                setattr(self.config, field, value)

    def _configuration(self, left: dict[str, Sheared]) -> tuple[dict, dict[str, float]]:
        """(the configuration's fields, {module: lora_alpha})  Raises: ValueError (a scaling of a moment, as rescale_adapter_scale's)."""
        for name, layer in self.layers.items():
            key, scaling = self.adapter_name, float(layer.scaling[self.adapter_name])
            saved = layer.lora_alpha[key] / peft_config.divisor(layer.r[key], layer.use_rslora[key])
            if not math.isclose(scaling, saved, rel_tol=1e-6):
                raise ValueError(
                    f"{self._op}: {name} must have the scaling that save_pretrained saves, {saved}, got {scaling}: leave "
                    "rescale_adapter_scale, or undo scale_layer, first"
                )
        config, ranks = vars(self.config), {name: new.rank for name, new in left.items()}
        alphas = {name: peft_config.alpha_for(config, left[name].module.scaling, rank) for name, rank in ranks.items()}
        names = [name for name, _ in self.model.get_base_model().named_modules()]
        # While no module leaves, what they were chosen by still chooses them.
        others = [] if left.keys() == self.layers.keys() else [name for name in names if name not in left]
        return peft_config.for_modules(config, ranks, alphas, others), alphas

    def _remove(self, name: str) -> None:
        layer, key = self.layers[name], self.adapter_name
        self._followers.release([*layer.lora_A[key].parameters(), *layer.lora_B[key].parameters()])
        for field in (*layer.adapter_layer_names, *layer.other_param_names):
            of_adapters = getattr(layer, field)
            if key in of_adapters:
                del of_adapters[key]

    @torch.no_grad()
    def _renew(self, name: str, new: Sheared, lora_alpha: float) -> None:
        layer, key = self.layers[name], self.adapter_name
        lora_A, lora_B = layer.lora_A[key], layer.lora_B[key]
        lora_A.out_features = lora_B.in_features = layer.r[key] = new.rank
        layer.scaling[key], layer.lora_alpha[key] = new.module.scaling, lora_alpha
        if new.module.bias is not None:
            lora_B.bias.copy_(new.module.bias)
        if new.kept is None:
            self._followers.forget([*lora_A.parameters(), *lora_B.parameters()])
