"""shear(model or adapter, config): an adapter in memory."""

from collections.abc import Callable

import torch

from ..adapter import Adapter
from ..lora_files import LoraModule
from ..nn import dequantised_weight
from ..pool import check_workers, over
from ..ranks import commit_ranks
from .base import Sheared, remaining
from .config import NoRMConfig
from .methods import method_for
from .report import ShearReport


def shear(
    target,
    config=None,
    *,
    optimizer=None,
    adapter_name: str | None = None,
    workers: int | None = None,
    progress: Callable | None = None,
) -> ShearReport:
    """
    Remove from a trained adapter what `config` says, in place: NoRM (without a config), singular values, TAIA, random drops.

    Args:
        target: an `Adapter`, or PEFT's PeftModel.
        config: NoRMConfig(), SVDConfig(…), ClipConfig(…), TAIAConfig(), RandomConfig(…), DropConfig(…).
        optimizer: of a PeftModel that goes on training: torch optimizer, or a wrapper of one, over its factors. An Adapter knows its own.
        adapter_name: of a PeftModel: which adapter (without it: the active one).
        workers: modules at a time (without it: torch's number of threads).   progress: called with (modules done, modules in all).
    Returns: a `ShearReport`: ranks before and after, what the method found for each module.
    Raises: TypeError (target, config, an optimizer whose state cannot follow), ValueError (a base weight that is not floating-point, NaN,
        a layer that is no plain LoRA of a linear layer, an optimizer without the adapter's factors); nothing has changed then.
    The result does not depend on `workers`. NoRM's default merges with scale 1; other methods keep each module's scaling. Where a method
    keeps vectors as they are (all but NoRM and singular values) the optimizer's state of these stays, bit for bit (La-LoRA's does not);
    elsewhere the vectors are others now, and their state and gradients are forgotten.
    """
    config = NoRMConfig() if config is None else config
    method = method_for(config)
    handle = _handle(target, adapter_name, optimizer)
    modules = handle.modules()
    check_workers("shear", workers)
    method.prepare(list(modules))
    done = {}

    def compute(module: LoraModule):
        return method.module(module, (lambda: handle.weight(module.name)) if method.needs_base else None)

    # What is made in inference mode could never be trained again.
    with torch.inference_mode(False), torch.no_grad():
        for module, sheared in over(compute, modules.values(), workers if _on_cpu(modules) else 1):
            done[module.name] = sheared
            if progress is not None:
                progress(len(done), len(modules))
        sheared = method.finish([done[name] for name in modules])
        remaining(sheared)
        handle.replace(sheared)
    return ShearReport(config, sheared)


def _on_cpu(modules) -> bool:
    return all(module.lora_A.device.type == "cpu" for module in modules.values())


def _handle(target, adapter_name: str | None, optimizer):
    if isinstance(target, Adapter):
        if adapter_name is not None:
            raise ValueError(f"shear: adapter_name must be None for an Adapter, got {adapter_name!r}")
        if optimizer is not None:
            found = type(optimizer).__name__
            raise ValueError(f"shear: optimizer must be None for an Adapter, which tracks its own, got {found}")
        return _AdapterHandle(target)
    if is_peft_model(target):
        from ..integrations.peft import PeftHandle

        return PeftHandle(target, adapter_name, optimizer)
    raise TypeError(f"shear: target must be an Adapter or a PeftModel, got {type(target).__name__}")


def is_peft_model(target) -> bool:
    """By its attributes, so that PEFT stays optional; no PeftMixedModel, and no model with adapters injected."""
    return all(hasattr(target, name) for name in ("peft_config", "base_model", "get_base_model"))


class _AdapterHandle:
    """An Adapter's modules of rank above 0."""

    def __init__(self, adapter: Adapter):
        adapter.check_trainable("shear")
        if adapter.method.nested:
            raise ValueError(
                "shear: target must hold plain pairs, got NoRA's nested ones (save it for PEFT and shear that)"
            )
        if any(layer.residual is not None for layer in adapter.layers.values()):
            raise ValueError(
                "shear: target must not have taken its start out of the base weights, as PiSSA and MiLoRA do (save it for PEFT with "
                "fold_residual=True and shear that)"
            )
        self.adapter = adapter

    def modules(self) -> dict[str, LoraModule]:
        modules = {}
        for name, layer in self.adapter.layers.items():
            if layer.rank:
                bias = None if layer.lora_bias is None else layer.lora_bias.detach()
                flags = layer.fan_in_fan_out, self.adapter.config.use_rslora
                modules[name] = LoraModule(name, *layer.effective_factors(), layer.scaling, bias, *flags)
        return modules

    def weight(self, name: str) -> torch.Tensor:
        return dequantised_weight(self.adapter.layers[name].base_layer)

    def replace(self, sheared: list[Sheared]) -> None:
        self._replace_factors(sheared)
        with torch.no_grad():
            for s in sheared:
                if s.module.bias is not None:
                    self.adapter.layers[s.module.name].lora_bias.copy_(s.module.bias if s.rank else 0.0)

    def _replace_factors(self, sheared: list[Sheared]) -> None:
        adapter, modules = self.adapter, [s.module for s in sheared]
        if adapter.method.parks or any(s.kept is None for s in sheared):
            factors = {m.name: (m.lora_A, m.lora_B) for m in modules}
            adapter.replace_factors(factors, {m.name: m.scaling for m in modules})
            return
        ranks = adapter.ranks() | {s.module.name: s.rank for s in sheared}
        adapter.method.check_ranks(ranks)
        orders = {s.module.name: order for s in sheared if (order := s.order()) is not None}
        pairs = {name: layer.pair for name, layer in adapter.layers.items()}
        commit_ranks(pairs, ranks, orders=orders, compact=True)
        for module in modules:
            adapter.layers[module.name].scaling = module.scaling
        adapter.method.start_from(ranks)
