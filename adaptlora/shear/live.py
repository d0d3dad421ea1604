"""shear(model or adapter, config): an adapter in memory."""

from collections.abc import Callable

import torch

from ..adapter import Adapter
from ..lora_files import LoraModule
from ..nn import dequantised_weight
from ..pool import check_workers, over
from .base import remaining
from .config import NoRMConfig
from .methods import method_for
from .report import ShearReport


def shear(
    target,
    config=None,
    *,
    adapter_name: str | None = None,
    workers: int | None = None,
    progress: Callable | None = None,
) -> ShearReport:
    """
    Remove from a trained adapter what `config` says, in place: NoRM (without a config), singular values, TAIA, random drops.

    Args:
        target: an `Adapter`, or PEFT's PeftModel.
        config: NoRMConfig(), SVDConfig(…), TAIAConfig(), RandomConfig(…), DropConfig(…).
        adapter_name: of a PeftModel: which adapter (without it: the active one).
        workers: modules at a time (without it: torch's number of threads).   progress: called with (modules done, modules in all).
    Returns: a `ShearReport`: ranks before and after, what the method found for each module.
    Raises: TypeError (target, config), ValueError (a base weight that is not floating-point, NaN, a layer that is no plain LoRA of a
        linear layer); nothing has changed then.
    The result does not depend on `workers`. NoRM's default merges with scale 1; other methods keep each module's scaling. An optimizer
    that an Adapter tracks forgets the state of its factors: their vectors are others now.
    """
    config = NoRMConfig() if config is None else config
    method = method_for(config)
    handle = _handle(target, adapter_name)
    modules = handle.modules()
    check_workers("shear", workers)
    method.prepare(list(modules))
    done = {}

    def compute(module: LoraModule):
        return method.module(module, (lambda: handle.weight(module.name)) if method.needs_base else None)

    with torch.no_grad():
        for module, sheared in over(compute, modules.values(), workers if _on_cpu(modules) else 1):
            done[module.name] = sheared
            if progress is not None:
                progress(len(done), len(modules))
        sheared = method.finish([done[name] for name in modules])
        remaining(sheared)
        handle.replace([s.module for s in sheared])
    return ShearReport(config, sheared)


def _on_cpu(modules) -> bool:
    return all(module.lora_A.device.type == "cpu" for module in modules.values())


def _handle(target, adapter_name: str | None):
    if isinstance(target, Adapter):
        if adapter_name is not None:
            raise ValueError(f"shear: adapter_name must be None for an Adapter, got {adapter_name!r}")
        return _AdapterHandle(target)
    if hasattr(target, "peft_config") and hasattr(target, "base_model"):
        from ..integrations.peft import PeftHandle

        return PeftHandle(target, adapter_name)
    raise TypeError(f"shear: target must be an Adapter or a PeftModel, got {type(target).__name__}")


class _AdapterHandle:
    """An Adapter's modules of rank above 0."""

    def __init__(self, adapter: Adapter):
        adapter.check_trainable("shear")
        if adapter.method.nested:
            raise ValueError(
                "shear: target must hold plain pairs, got NoRA's nested ones (save it for PEFT and shear that)"
            )
        self.adapter = adapter

    def modules(self) -> dict[str, LoraModule]:
        factors = {name: layer.effective_factors() for name, layer in self.adapter.layers.items() if layer.rank}
        return {
            name: LoraModule(
                name=name,
                lora_A=lora_A,
                lora_B=lora_B,
                scaling=self.adapter.layers[name].scaling,
                bias=None,
                fan_in_fan_out=self.adapter.layers[name].fan_in_fan_out,
            )
            for name, (lora_A, lora_B) in factors.items()
        }

    def weight(self, name: str) -> torch.Tensor:
        return dequantised_weight(self.adapter.layers[name].base_layer)

    def replace(self, modules: list[LoraModule]) -> None:
        self.adapter.replace_factors(
            {m.name: (m.lora_A, m.lora_B) for m in modules}, {m.name: m.scaling for m in modules}
        )
