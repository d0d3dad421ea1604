"""An Adapter's files: a PEFT folder out, and back into the modules of a model.  [PEFT's checkpoint format]"""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import torch

from . import adapter_folder, nora_files
from .config import LoraConfig
from .lora_files import peft, peft_config
from .lora_files.base import check_numbers
from .nora_files import check_finite

__all__ = ["StoredAdapter", "check_factors", "check_fits", "check_pair", "check_saved", "read", "write"]


def check_pair(op: str, name: str, lora_A, lora_B, layer) -> None:
    """lora_A (R, K) and lora_B (N, R) for the K and N of `layer`, or r_out for a nested pair.  Raises: ValueError."""
    K, N = layer.lora_A.shape[1], layer.lora_B.shape[0]
    if lora_A.dim() != 2 or lora_A.shape[1] != K:
        raise ValueError(f"{op}: {name}: lora_A must have shape (R, {K}), got {tuple(lora_A.shape)}")
    if lora_B.shape != (N, lora_A.shape[0]):
        expected = (N, lora_A.shape[0])
        raise ValueError(f"{op}: {name}: lora_B must have shape {expected}, got {tuple(lora_B.shape)}")


def check_factors(op: str, name: str, factors: dict[str, torch.Tensor], layer) -> None:
    """All of the layer's factors, by name and of one rank, which may be another than today's.  Raises: ValueError."""
    if factors.keys() != {*layer.pair.factor_names}:
        raise ValueError(f"{op}: {name}: factors must be {', '.join(layer.pair.factor_names)}, got {sorted(factors)}")
    check_pair(op, name, factors["lora_A"], factors["lora_B"], layer)
    expected = (factors["lora_A"].shape[0], 1)
    if "lora_E" in factors and factors["lora_E"].shape != expected:
        raise ValueError(f"{op}: {name}: lora_E must have shape {expected}, got {tuple(factors['lora_E'].shape)}")


def check_bias(op: str, name: str, bias: torch.Tensor, layer) -> None:
    """lora_bias (N,) for the N of `layer`.  Raises: ValueError."""
    if tuple(bias.shape) != (layer.out_features,):
        raise ValueError(f"{op}: {name}: lora_bias must have shape ({layer.out_features},), got {tuple(bias.shape)}")


@dataclasses.dataclass
class StoredAdapter:
    """
    A PEFT adapter, read and checked.

    Attributes:
        factors: {module: (A (R, K), B (N, R))}.   biases: {module: (N,)}, of all of them if the configuration has lora_bias.
        saved: {module trained whole: {name: tensor}}.   bases: {name in the model: tensor}, of the base, where PEFT stores such as well.
    """

    path: Path | str
    config: dict
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scalings: dict[str, float]
    saved: dict[str, dict[str, torch.Tensor]]
    biases: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    bases: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def scaling(self, name: str) -> float:
        """lora_alpha / r of the module, or / √r for rsLoRA."""
        return self.scalings[name]

    def attach_options(self) -> dict:
        """For `attach`: exactly the modules of the file, at their ranks."""
        return {"config": self.lora_config(), "whole": sorted(self.saved)}

    def lora_config(self) -> LoraConfig:
        return LoraConfig(
            r=self.config["r"],
            lora_alpha=self.config["lora_alpha"],
            lora_dropout=self.config.get("lora_dropout", 0.0),
            target_modules="|".join(map(re.escape, self.factors)),
            modules_to_save=sorted(self.saved) or None,
            rank_pattern={
                f"^{re.escape(name)}": A.shape[0]
                for name, (A, _) in self.factors.items()
                if A.shape[0] != self.config["r"]
            },
            use_rslora=bool(self.config.get("use_rslora")),
            lora_bias=bool(self.config.get("lora_bias")),
        )


def check_fits(stored, adapter) -> None:
    """Raises: ValueError if a module of a stored adapter is not adapted, its kind is another one, or a shape differs."""
    op = f"load: {stored.path}"
    nested = isinstance(stored, nora_files.StoredNoRA)
    if nested != adapter.method.nested:
        kinds = {True: "NoRA's own (save(format='nora'))", False: "a plain LoRA"}
        raise ValueError(f"{op}: files for this adapter must be {kinds[adapter.method.nested]}, got {kinds[nested]}")
    for name, (lora_A, lora_B) in stored.factors.items():
        if name not in adapter.layers:
            raise ValueError(f"{op}: its modules must be adapted modules of the model, got {name!r}")
        check_pair(op, name, lora_A, lora_B, adapter.layers[name])
        if not nested and (name in stored.biases) != adapter.config.lora_bias:
            got = "one" if name in stored.biases else "none"
            raise ValueError(
                f"{op}: {name} must have a bias of lora_B if lora_bias is True, here {adapter.config.lora_bias}, got {got}"
            )
    if not nested:
        _check_bases(op, stored.bases, adapter)
    if nested:
        for name, layer in adapter.layers.items():
            stored.outer.check_weight(name, layer.weight_checksum)
            stored.outer.check_outer(name, layer.outer)
            if name in stored.outer.outers:
                layer.check_outer(stored.outer.outers[name])
            residual = stored.residual(name)
            if residual != layer.residual:
                raise ValueError(
                    f"{op}: what was taken out of the base of {name} must be of (rank, scaling) {layer.residual}, got {residual}"
                )
    check_saved(op, stored.saved, adapter.saved)


def _check_bases(op: str, bases: dict[str, torch.Tensor], adapter) -> None:
    """What PEFT stores of the base must be what the model has.  Raises: ValueError."""
    own = adapter.base_state_dict() if bases else {}
    for name, tensor in bases.items():
        if name not in own:
            raise ValueError(
                f"{op}: tensors must be lora_A, lora_B or belong to modules_to_save, got {name!r}, which is not the base model's either"
            )
        if own[name].shape != tensor.shape or not torch.equal(own[name].cpu().to(tensor.dtype), tensor):
            raise ValueError(
                f"{op}: {name} of the file must be the base model's own, as it is not trained, got other values or another shape "
                f"{tuple(tensor.shape)} (of a model with other embeddings, or resized ones: give the model these first)"
            )


def check_saved(op: str, found: dict[str, dict], modules: dict[str, torch.nn.Module]) -> None:
    """`found` must hold every tensor of the adapter's modules_to_save, and nothing else.  Raises: ValueError."""
    if found.keys() != modules.keys():
        raise ValueError(f"{op}: modules_to_save must be the adapter's, {sorted(modules)}, got {sorted(found)}")
    for name, module in modules.items():
        expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        shapes = {key: tuple(value.shape) for key, value in found[name].items()}
        if expected != shapes:
            raise ValueError(f"{op}: {name} must hold {expected}, got {shapes}")


def read(path) -> "StoredAdapter | nora_files.StoredNoRA":
    """Read an adapter folder, PEFT's or NoRA's own.  Raises: FileNotFoundError, ValueError that says what is wrong with which file."""
    path = Path(path)
    with adapter_folder.settled(path) as files:
        # No save of ours leaves both: where PEFT's files lie beside NoRA's, somebody has saved with PEFT since.
        peft_too = files.has(peft.CONFIG_FILE) and files.has(peft.WEIGHTS_FILE)
        nested = files.has(nora_files.CONFIG_FILE) and not peft_too
        found = (nora_files if nested else peft).read_files(files, "load")
    if nested:
        return nora_files.parse(path, *found)
    file = peft.parse(path, "load", *found)
    saved: dict[str, dict[str, torch.Tensor]] = {}
    bases = {}
    for key in file.others():
        name, tensor = key.removeprefix(peft.KEY_PREFIX), file.tensors[key]
        if tensor.is_floating_point():
            check_numbers("load", file.path / peft.WEIGHTS_FILE, name, tensor)
        place = _saved_place(name, file.config.get("modules_to_save") or ())
        if place is None:
            bases[name.replace(".base_layer.", ".")] = tensor
        else:
            saved.setdefault(place[0], {})[place[1]] = tensor
    modules = file.modules
    return StoredAdapter(
        file.path,
        file.config,
        {name: (module.lora_A, module.lora_B) for name, module in modules.items()},
        {name: module.scaling for name, module in modules.items()},
        saved,
        {name: module.bias for name, module in modules.items() if module.bias is not None},
        bases,
    )


def _saved_place(name: str, modules_to_save) -> tuple[str, str] | None:
    """(module, parameter) of a tensor that belongs to one of modules_to_save, by PEFT's rule; None for another one."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        module = ".".join(parts[:end])
        if any(module.endswith(entry) for entry in modules_to_save):
            return module, ".".join(parts[end:])
    return None


def peft_description(adapter, ranks: dict[str, int]) -> dict:
    """adapter_config.json of the adapter with these ranks, all above 0.  Raises: ValueError (no module)."""
    config = adapter.config
    if not ranks:
        raise ValueError("save: at least one module must have a rank above 0, got 0 everywhere")
    alphas = {
        name: peft_config.alpha_for({"use_rslora": config.use_rslora}, adapter.layers[name].scaling, rank)
        for name, rank in ranks.items()
        if adapter.layers[name].scaling != config.scaling(rank, config.lora_alpha)
    }
    r = config.r if config.r in ranks.values() else Counter(ranks.values()).most_common(1)[0][0]
    others = [name for name, _ in adapter.model.named_modules() if name not in ranks]
    model_config = getattr(adapter.model, "config", None)
    return {
        "peft_type": "LORA",
        "task_type": _task_type(adapter),
        "base_model_name_or_path": getattr(model_config, "_name_or_path", None),
        "r": r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": peft_config.target_modules(list(ranks), others),
        "modules_to_save": list(adapter.saved) or None,
        "rank_pattern": peft_config.pattern({name: rank for name, rank in ranks.items() if rank != r}, ranks),
        "alpha_pattern": peft_config.pattern(alphas, ranks),
        "use_rslora": config.use_rslora,
        "lora_bias": config.lora_bias,
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in adapter.layers.values()),
        "bias": config.bias,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _task_type(adapter) -> str | None:
    """
    PEFT's task type where it is sure to load: for SEQ_CLS PEFT demands that the file holds the classification head, and what it makes of
    language models hands them input_ids, which Whisper does not take.
    """
    if getattr(adapter.model, "main_input_name", "input_ids") != "input_ids":
        return None
    kinds = {"ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    if {"classifier", "score"} & adapter.saved.keys():
        kinds["ForSequenceClassification"] = "SEQ_CLS"
    return next((kind for suffix, kind in kinds.items() if type(adapter.model).__name__.endswith(suffix)), None)


HISTORY_FILE = "rank_history.json"


def write(adapter, path, *, fold_residual: bool = True) -> None:
    """Write an Adapter as a PEFT adapter folder; see `Adapter.save`."""
    check_finite(adapter)
    factors = plain_factors(adapter, fold_residual=fold_residual)
    config = peft_description(adapter, {name: lora_A.shape[0] for name, (lora_A, _) in factors.items()})
    tensors = peft.factor_tensors(factors)
    tensors |= {
        f"{peft.KEY_PREFIX}{name}.lora_B.bias": adapter.layers[name].lora_bias
        for name in factors
        if config["lora_bias"]
    }
    for name, module in adapter.saved.items():
        tensors |= {f"{peft.KEY_PREFIX}{name}.{key}": value for key, value in module.state_dict().items()}
    tensors = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
    history = adapter.method.history()
    texts = {} if history is None else {HISTORY_FILE: json.dumps(history) + "\n"}
    peft.write_folder(Path(path), config, tensors, {}, texts)


def plain_factors(adapter, *, fold_residual: bool) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    {module: (A (R, K), B (N, R))} of a plain LoRA that adds what the adapter adds, scaling · B A; modules of rank 0 are left out, but
    for those with a lora_bias that is not zero, which get a vector of zeros to go with it.

    Args: fold_residual: what was taken out of the base, as r more rank vectors.
    """
    factors = {}
    for name, layer in adapter.layers.items():
        lora_A, lora_B = layer.effective_factors()
        residual = layer.residual_factors() if fold_residual else None
        if residual is not None:
            lora_A, lora_B = torch.cat([lora_A, residual[0]]), torch.cat([lora_B, -residual[1]], dim=1)
        if not lora_A.shape[0] and layer.lora_bias is not None and layer.lora_bias.any():
            lora_A, lora_B = lora_A.new_zeros(1, lora_A.shape[1]), lora_B.new_zeros(len(lora_B), 1)
        if lora_A.shape[0]:
            factors[name] = lora_A, lora_B
    return factors
