"""accelerate(model): PEFT's LoRA layers computed by this package's ops, with PEFT's parameters; restore(model) undoes it."""

import dataclasses
import functools

from torch import nn


@dataclasses.dataclass(frozen=True)
class Acceleration:
    """
    What `accelerate` found.

    accelerated: names of the layers that the ops compute.
    kept: name of a layer of PEFT's: why PEFT computes it. A layer of which some adapters are plain and some are not is in both.
    """

    accelerated: tuple[str, ...]
    kept: dict[str, str]


@functools.cache
def _classes(of_bitsandbytes: bool) -> dict[type, type]:
    """PEFT's classes: those that take their place."""
    if of_bitsandbytes:
        from .peft_bnb_layers import CLASSES
    else:
        from .peft_layers import CLASSES
    return CLASSES


def _swap(layer: nn.Module) -> tuple[type | None, type | None]:
    """(PEFT's class of the layer, its accelerated one); None for both where there is no such pair."""
    of_bitsandbytes = any(cls.__module__ == "peft.tuners.lora.bnb" for cls in type(layer).__mro__)
    for original, accelerated in _classes(of_bitsandbytes).items():
        if type(layer) in (original, accelerated):
            return original, accelerated
    return None, None


def _layers(op: str, model) -> dict[str, nn.Module]:
    """
    PEFT's layers of every kind by their names, which are those in the base model of a PeftModel.

    Raises: TypeError (not a module), ValueError (none of them is LoRA).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a PeftModel, or a module with LoRA layers, got {type(model).__name__}")
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    within = model.base_model if isinstance(model, (PeftModel, PeftMixedModel)) else model
    within = within.model if isinstance(within, BaseTuner) else within
    layers = {name: module for name, module in within.named_modules() if isinstance(module, BaseTunerLayer)}
    if not any(isinstance(layer, LoraLayer) for layer in layers.values()):
        raise ValueError(f"{op}: model must have LoRA layers of PEFT, got a {type(model).__name__} without")
    return layers


def accelerate(model: nn.Module) -> Acceleration:
    """
    Compute the LoRA layers of a PEFT model with this package's ops.

    Layers that PEFT made of linear layers, plain or quantised by bitsandbytes or torchao, get another class, a subclass of their
    own, and with it another forward pass; parameters, buffers, names and files stay what they are, and all that PEFT does with
    adapters (activate, merge, add, delete, save) goes on as it was. What the forward pass cannot do it leaves to PEFT's, call by call:
    merged and disabled adapters, DoRA and other variants, mixed batches. Masks of dropout are other ones than torch would draw.

    Args:
        model: a PeftModel or PeftMixedModel, or a model with adapters injected, as by transformers' or diffusers' add_adapter. Call it
            again after an adapter was added to other modules.
    Returns: an `Acceleration`: names of the layers accelerated, now or before, and of those that are not, with reasons.
    Raises: TypeError (not a module), ValueError (no LoRA layers).
    A model pickled whole while it is accelerated needs this package to be loaded; adapters and checkpoints do not.
    """
    layers = _layers("accelerate", model)
    from .peft_layers import adapter_obstacle, layer_obstacle

    accelerated, kept = [], {}
    for name, layer in layers.items():
        original, fast = _swap(layer)
        if fast is None:
            kept[name] = (
                f"{type(layer).__module__}.{type(layer).__qualname__} is no LoRA of a linear layer that is known"
            )
            continue
        if (obstacle := layer_obstacle(layer)) is not None:
            kept[name] = obstacle
            continue
        obstacles = [adapter_obstacle(layer, adapter) for adapter in layer.lora_A]
        if not obstacles:
            kept[name] = "it holds no adapter"
            continue
        layer.__class__ = fast if None in obstacles else original
        if None in obstacles:
            accelerated.append(name)
        if reasons := [obstacle for obstacle in obstacles if obstacle is not None]:
            kept[name] = "; ".join(reasons)
    return Acceleration(tuple(accelerated), kept)


def restore(model: nn.Module) -> tuple[str, ...]:
    """
    Undo `accelerate`: every layer has its class of PEFT's again.

    Returns: names of the layers that were accelerated.
    Raises: TypeError (not a module), ValueError (no LoRA layers).
    """
    restored = []
    for name, layer in _layers("restore", model).items():
        original, fast = _swap(layer)
        if fast is not None and type(layer) is fast:
            layer.__class__ = original
            restored.append(name)
    return tuple(restored)
