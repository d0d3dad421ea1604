"""Stock PEFT beside ours: the same start trained by PEFT's LoRA, and the saved adapter read back by PEFT."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..ranks import FACTORS
from ._extras import need


def rank(adapter) -> int:
    """PEFT's rank beside `adapter`: the configuration's r, for NoRA the one at which LoRA comes nearest to as many parameters."""
    if not adapter.method.nested:
        return adapter.config.r
    a_rank = sum(layer.in_features + layer.out_features for layer in adapter.layers.values())
    return max(1, round(adapter.summary()["adapter_parameters"] / a_rank))


def twin(base: nn.Module, adapter) -> nn.Module:
    """PEFT's plain LoRA on `base`, in place: same modules and scaling as `adapter`, its largest ranks and initial values.

    Beside NoRA it has `rank(adapter)` everywhere, lora_alpha / r as the configuration's, and PEFT's own initial values; these too
    beside AdaLoRA, PiSSA and MiLoRA, whose factors are no plain LoRA's at the start.

    Args:
        base: a copy of the model as it was before the adapter.
        adapter: an adaptlora.Adapter on another copy of it, as `attach` made it.
    """
    peft = need("peft", "the comparison with PEFT")
    config, nested = adapter.config, adapter.method.nested
    r = rank(adapter)
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=r,
            lora_alpha=config.lora_alpha * (config.scaling(config.r, 1.0) / config.scaling(r, 1.0)),
            lora_dropout=config.lora_dropout,
            target_modules=list(adapter.layers),
            modules_to_save=config.modules_to_save,
            use_rslora=config.use_rslora,
            rank_pattern={} if nested else config.rank_pattern,
            alpha_pattern={} if nested else config.alpha_pattern,
        ),
    )
    plain = all(layer.pair.factor_names == FACTORS and layer.residual is None for layer in adapter.layers.values())
    if nested or not plain:
        return model
    with torch.no_grad():
        for name, layer in adapter.layers.items():
            theirs = model.base_model.model.get_submodule(name)
            lora_A, lora_B = layer.pair.whole()
            theirs.lora_A["default"].weight.copy_(lora_A)
            theirs.lora_B["default"].weight.copy_(lora_B)
    return model


def sizes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """The numbers of Adapter.summary for a PEFT model: all that trains, and what of it are LoRA factors."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = [parameter for name, parameter in trained.items() if ".lora_" in name]
    state = [
        value
        for parameter in factors
        for value in optimizer.state[parameter].values()
        if torch.is_tensor(value) and value.shape == parameter.shape
    ]
    return {
        "trainable_parameters": sum(parameter.numel() for parameter in trained.values()),
        "adapter_parameters": sum(parameter.numel() for parameter in factors),
        "adapter_bytes": sum(parameter.nbytes for parameter in factors),
        "optimizer_bytes": sum(tensor.nbytes for tensor in state),
    }


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's logits for a batch, whose labels are left out."""
    return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


@torch.no_grad()
def reload_difference(
    folder: str | Path, base: nn.Module, model: nn.Module, batch: dict[str, torch.Tensor], output: Callable = logits
) -> float:
    """max |y of `base` with the saved adapter, loaded by PEFT − y of `model`| / max |y of `model`|, y = output(model, batch).

    Args:
        base: a fresh base model; PEFT changes it in place.
    """
    peft = need("peft", "checking the saved adapter")
    wanted = output(model.eval(), batch)
    found = output(peft.PeftModel.from_pretrained(base, str(folder)).eval(), batch)
    return ((found - wanted).abs().max() / wanted.abs().max()).item()
