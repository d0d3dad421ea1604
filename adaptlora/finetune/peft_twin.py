"""Stock PEFT beside ours: the same start trained by PEFT's LoRA, and the saved adapter read back by PEFT."""

from pathlib import Path

import torch
from torch import nn

from ._extras import need


def twin(base: nn.Module, adapter) -> nn.Module:
    """PEFT's plain LoRA on `base`, in place: same modules, rank, scaling and initial values as `adapter` has now.

    Args:
        base: a copy of the model as it was before the adapter.
        adapter: an adaptlora.Adapter on another copy of it, all modules at the configuration's r.
    """
    peft = need("peft", "the comparison with PEFT")
    config = adapter.config
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=list(adapter.layers),
            modules_to_save=config.modules_to_save,
            use_rslora=config.use_rslora,
            rank_pattern=config.rank_pattern,
            alpha_pattern=config.alpha_pattern,
        ),
    )
    with torch.no_grad():
        for name, layer in adapter.layers.items():
            theirs = model.base_model.model.get_submodule(name)
            theirs.lora_A["default"].weight.copy_(layer.lora_A)
            theirs.lora_B["default"].weight.copy_(layer.lora_B)
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


@torch.no_grad()
def reload_difference(folder: str | Path, base: nn.Module, model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """max |logits of `base` with the saved adapter, loaded by PEFT − logits of `model`| / max |logits of `model`|.

    Args:
        base: a fresh base model; PEFT changes it in place.
        batch: inputs of both; labels are left out.
    """
    peft = need("peft", "checking the saved adapter")
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    wanted = model.eval()(**inputs).logits
    found = peft.PeftModel.from_pretrained(base, str(folder)).eval()(**inputs).logits
    return ((found - wanted).abs().max() / wanted.abs().max()).item()
