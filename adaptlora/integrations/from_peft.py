"""from_peft: an adapter of PEFT's, in memory or in files, as an Adapter."""

import os
from pathlib import Path

import torch
from torch import nn

from .. import io
from ..adapter import Adapter, _attach, _replace, load
from ..lora_files import peft as peft_files
from ..nn import is_linear
from ..shear.live import is_peft_model
from .peft_fields import fields_from_peft

# Of PEFT's fields those that an adapter in memory has already carried out.
_CARRIED_OUT = {
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
}


def from_peft(
    source, model: nn.Module | None = None, *, adapter_name: str | None = None, group_projections: bool = True
) -> Adapter:
    """
    Go on with an adapter of PEFT's as an `Adapter`, with a LoraConfig: the same factors bit for bit, scalings, dropout, biases of B and
    modules_to_save, each trained or frozen, in training mode or not, as it was. `adapter.save` writes it for PEFT again.

    Args:
        source: a PeftModel: its LoRA layers are taken off, ours take their place in its base model, which is the Adapter's model, and the
            PeftModel is of no use any more. Factors are new parameters: build the optimizer anew. Or the path of a saved adapter.
        model: the base model for a path.
        adapter_name: which adapter. Of a path: save_pretrained puts others than "default" into folders of their names; what a saved
            adapter was called does not matter otherwise.
        group_projections: as in `attach`.
    Raises: TypeError (source, a layer that is no linear one), ValueError (DoRA and whatever else is more than a LoRA of linear layers,
        fields that have no counterpart, an initialisation that changed the base weights, merged or inactive layers, several adapters in
        one PeftModel, of which the others would be lost; of a path as `load`); model and PeftModel are unchanged then.
    """
    if isinstance(source, (str, os.PathLike)):
        if model is None:
            raise ValueError("from_peft: model must be the base model for a path, got None")
        return load(model, _folder(Path(source), adapter_name), group_projections=group_projections)
    if not is_peft_model(source):
        raise TypeError(f"from_peft: source must be a PeftModel or a path, got {type(source).__name__}")
    if model is not None:
        raise ValueError(
            f"from_peft: model must be None for a PeftModel, which has its own, got {type(model).__name__}"
        )
    return _Takeover(source, adapter_name).adapter(group_projections)


def _folder(path: Path, adapter_name: str | None) -> Path:
    """Where save_pretrained puts the adapter.  Raises: ValueError."""
    inner = sorted(file.parent.name for file in path.glob(f"*/{peft_files.CONFIG_FILE}"))
    if adapter_name in inner:
        return path / adapter_name
    alone = (path / peft_files.CONFIG_FILE).exists() or not inner
    if adapter_name not in (None, "default") or (not alone and len(inner) > 1):
        found = [*["default"] * alone, *inner]
        raise ValueError(f"from_peft: adapter_name must be one of {found} in {path}, got {adapter_name!r}")
    return path if alone else path / inner[0]


class _Takeover:
    """The way from a PeftModel to an Adapter and, if something fails, back."""

    def __init__(self, peft_model, adapter_name: str | None):
        from .peft import PeftHandle

        self.handle = PeftHandle(peft_model, adapter_name, op="from_peft")
        self.base, self.name = peft_model.get_base_model(), self.handle.adapter_name
        others = [name for name in peft_model.peft_config if name != self.name]
        if others:
            raise ValueError(
                f"from_peft: the PeftModel must have no adapter but {self.name!r}, since the others would be lost, got {others} "
                "(delete_adapter them, or save them and load each from its folder)"
            )
        fields_from_peft("from_peft", self.handle.config, _CARRIED_OUT)
        self.emptied = self._emptied()
        self.wrappers = self._wrappers()
        for name, layer in self.handle.layers.items():
            self._check(name, layer)

    def _emptied(self) -> dict[str, nn.Module]:
        """{name: layer or wrapper of PEFT's} that pruning or delete_adapter left without an adapter."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        return {
            name: module
            for name, module in self.base.named_modules()
            if (isinstance(module, BaseTunerLayer) and name not in self.handle.layers)
            or (isinstance(module, ModulesToSaveWrapper) and self.name not in module.modules_to_save)
        }

    def _wrappers(self) -> dict[str, nn.Module]:
        from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

        found = {n: m for n, m in self.base.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
        found = {name: wrapper for name, wrapper in found.items() if name not in self.emptied}
        for name, wrapper in found.items():
            inside = any(layer.startswith(f"{name}.") for layer in (*self.handle.layers, *self.emptied))
            if not isinstance(wrapper, ModulesToSaveWrapper) or wrapper.disable_adapters or inside:
                raise ValueError(
                    f"from_peft: {name} must be trained whole without LoRA layers in it, and be active, got a {type(wrapper).__name__}"
                )
        return found

    def _check(self, name: str, layer: nn.Module) -> None:
        base, pair = layer.get_base_layer(), (layer.lora_A[self.name].weight, layer.lora_B[self.name].weight)
        if not is_linear(base):
            raise TypeError(f"from_peft: {name} must adapt nn.Linear or Conv1D, got {type(base).__name__}")
        if layer.disable_adapters or self.name not in layer.active_adapters:
            raise ValueError(f"from_peft: adapter {self.name!r} must be active in {name}, and is not")
        if any(parameter.requires_grad for parameter in base.parameters()):
            raise ValueError(f"from_peft: the base of {name} must be frozen, got requires_grad=True")
        ours = (
            torch.promote_types(base.weight.dtype, torch.float32) if base.weight.is_floating_point() else torch.float32
        )
        for factor in pair:
            if torch.promote_types(factor.dtype, ours) != ours:
                raise ValueError(f"from_peft: factors of {name} must be exact in {ours}, got {factor.dtype}")

    def _stored(self) -> io.StoredAdapter:
        modules = self.handle.modules()
        return io.StoredAdapter(
            f"the PeftModel's {self.name!r}",
            dict(vars(self.handle.config)),
            {name: (module.lora_A, module.lora_B) for name, module in modules.items()},
            {name: module.scaling for name, module in modules.items()},
            {name: wrapper.modules_to_save[self.name].state_dict() for name, wrapper in self.wrappers.items()},
            {name: module.bias for name, module in modules.items() if module.bias is not None},
        )

    def adapter(self, group_projections: bool) -> Adapter:
        stored = self._stored()
        config = vars(self.base).pop("peft_config", None)
        for name, layer in self.handle.layers.items():
            _replace(self.base, name, layer.get_base_layer())
        for name, wrapper in self.wrappers.items():
            _replace(self.base, name, wrapper.original_module)
        for name, module in self.emptied.items():
            wrapped = getattr(module, "original_module", None)
            _replace(self.base, name, module.get_base_layer() if wrapped is None else wrapped)
        trained = {name for name, parameter in self.base.named_parameters() if parameter.requires_grad}
        try:
            adapter = _attach(self.base, group_projections=group_projections, **stored.attach_options())
            try:
                adapter._fill(stored)
            except BaseException:
                adapter.detach()
                raise
        except BaseException:
            for name, module in {**self.handle.layers, **self.wrappers, **self.emptied}.items():
                _replace(self.base, name, module)
            if config is not None:
                self.base.peft_config = config
            raise
        self._set_modes(adapter, trained)
        return adapter

    def _set_modes(self, adapter: Adapter, trained: set[str]) -> None:
        """What trains, what is in training mode, and what each layer drops."""
        for name, parameter in self.base.named_parameters():
            if name in trained:
                parameter.requires_grad_(True)
        for name, layer in self.handle.layers.items():
            ours, dropout, lora_B = adapter.layers[name], layer.lora_dropout[self.name], layer.lora_B[self.name]
            ours.dropout_p = getattr(dropout, "p", 0.0)
            ours.train(dropout.training)
            ours.lora_A.requires_grad_(layer.lora_A[self.name].weight.requires_grad)
            ours.lora_B.requires_grad_(lora_B.weight.requires_grad)
            if lora_B.bias is not None:
                ours.lora_bias.requires_grad_(lora_B.bias.requires_grad)
        for name, wrapper in self.wrappers.items():
            theirs, ours = wrapper.modules_to_save[self.name], adapter.saved[name]
            for (_, module), (_, own) in zip(theirs.named_modules(), ours.named_modules(), strict=True):
                own.training = module.training
            for parameter, own in zip(theirs.parameters(), ours.parameters(), strict=True):
                own.requires_grad_(parameter.requires_grad)
