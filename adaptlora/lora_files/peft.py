"""PEFT adapter folders: adapter_config.json and adapter_model.safetensors.  [PEFT's checkpoint format]"""

import dataclasses
import json
import re
from pathlib import Path

from torch import Tensor

from .. import adapter_folder
from ..tensor_files import read_tensors
from . import peft_config
from .base import LoraFile, LoraModule, find_parts, pair, split_supported, unsupported_part

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
KEY_PREFIX = "base_model.model."
_BASE = ("weight", "bias")
_KEY = re.compile(r"(?P<module>.+?)\.(?P<factor>lora_[AB])(\.[^.]+)?\.(?P<kind>weight|bias)")


def known_part(name: str) -> tuple[str, str] | None:
    """(module, "lora_A" | "lora_B" | "bias") of a key without its prefix; None for any other tensor."""
    found = _KEY.fullmatch(name)
    if found is None or (found["factor"], found["kind"]) == ("lora_A", "bias") or ".base_layer." in name:
        return None
    return found["module"], found["factor"] if found["kind"] == "weight" else "bias"


@dataclasses.dataclass
class PeftFile(LoraFile):
    """A PEFT adapter folder. config: adapter_config.json."""

    config: dict

    def saved(self) -> dict[str, Tensor]:
        """{name in the model: tensor} of what is saved beside the factors: modules_to_save and the like."""
        keys = {key.removeprefix(KEY_PREFIX): key for key in self.others()}
        return {name: self.tensors[key] for name, key in keys.items() if not self._adapted(name)}

    def stored_bases(self) -> dict[str, Tensor]:
        """{adapted module: its base weight}, of those whose base weight PEFT stores with the adapter (heads)."""
        found = {}
        for key in self.others():
            name = key.removeprefix(KEY_PREFIX)
            if self._adapted(name) and name.endswith(".weight"):
                found[name.removesuffix(".base_layer.weight")] = self.tensors[key]
        return found

    def _adapted(self, name: str) -> bool:
        """Whether a tensor is the base's of an adapted module."""
        return name.rpartition(".base_layer.")[0] in self.modules

    def _save(self, out: Path, tensors: dict, modules: dict[str, LoraModule]) -> None:
        dropped = [name for name in self.modules if name not in modules]
        config = self._config(modules, dropped) if self.modules else self.config
        # PEFT stores the base weight of an adapted head: without its factors the head is a plain module again
        plain = {
            f"{KEY_PREFIX}{name}.base_layer.{part}": f"{KEY_PREFIX}{name}.{part}" for name in dropped for part in _BASE
        }
        write_folder(out, config, {plain.get(key, key): tensor for key, tensor in tensors.items()}, self.metadata)

    def _config(self, modules: dict[str, LoraModule], dropped: list[str]) -> dict:
        ranks = {name: module.lora_A.shape[0] for name, module in modules.items()}
        alphas = {name: peft_config.alpha_for(self.config, modules[name].scaling, rank) for name, rank in ranks.items()}
        for name in self.skipped:
            if any(key.startswith(f"{KEY_PREFIX}{name}.lora_") for key in self.tensors):
                ranks[name] = peft_config.rank_of(self.config, name)
                alphas[name] = peft_config.alpha_of(self.config, name)
        return peft_config.for_modules(self.config, ranks, alphas, dropped)


def read(path, op: str = "read", *, skip_unsupported: bool = False) -> PeftFile:
    """Read a PEFT LoRA adapter folder; see `lora_files.read`."""
    with adapter_folder.settled(Path(path)) as files:
        found = read_files(files, op)
    return parse(Path(path), op, *found, skip_unsupported=skip_unsupported)


def parse(
    path: Path, op: str, config: dict, tensors: dict, metadata: dict, *, skip_unsupported: bool = False
) -> PeftFile:
    """What `read_files` found in the folder `path`, checked; see `lora_files.read`."""
    weights = path / WEIGHTS_FILE
    parts = find_parts(op, weights, {key: key.removeprefix(KEY_PREFIX) for key in tensors}, known_part)
    peft_config.check_config(op, path / CONFIG_FILE, config, parts)
    whole = peft_config.unsupported_field(config)
    keys, skipped = split_supported(
        op, weights, parts, lambda name: whole or unsupported_part(parts[name]), skip=skip_unsupported
    )
    modules = {}
    for name, found in keys.items():
        lora_A, lora_B, bias = pair(op, weights, name, {part: tensors[key] for part, key in found.items()})
        rank, expected = lora_A.shape[0], peft_config.rank_of(config, name)
        if rank != expected:
            raise ValueError(
                f"{op}: {weights}: {name} must have the rank that {CONFIG_FILE} gives, {expected}, got {rank}"
            )
        if bias is not None and not config.get("lora_bias"):
            raise ValueError(f"{op}: {weights}: {name} must have no bias of lora_B unless lora_bias is true, got one")
        scaling = peft_config.scaling_of(config, name, rank)
        flags = (bool(config.get(field)) for field in ("fan_in_fan_out", "use_rslora"))
        modules[name] = LoraModule(name, lora_A, lora_B, scaling, bias, *flags)
    return PeftFile(path, "peft", modules, skipped, metadata, tensors, keys, config)


def read_files(files: adapter_folder.settled, op: str) -> tuple[dict, dict[str, Tensor], dict[str, str]]:
    """(config, tensors by key, the weights' metadata), of one save.  Raises: FileNotFoundError, OSError, ValueError."""
    config = peft_config.read_config(op, files.path(CONFIG_FILE))
    if not files.has(WEIGHTS_FILE) and files.has(PICKLE_FILE):
        raise FileNotFoundError(
            f"{op}: {files.path(WEIGHTS_FILE)} is missing (only safetensors are read: {PICKLE_FILE} is a pickle, which runs code)"
        )
    return config, *read_tensors(op, files.path(WEIGHTS_FILE))


def factor_tensors(factors: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """{key as PEFT writes it: tensor} of {module: (A, B)}."""
    keyed = {}
    for name, (lora_A, lora_B) in factors.items():
        keyed[f"{KEY_PREFIX}{name}.lora_A.weight"] = lora_A
        keyed[f"{KEY_PREFIX}{name}.lora_B.weight"] = lora_B
    return keyed


def write_folder(out: Path, config: dict, tensors: dict, metadata: dict[str, str], texts: dict[str, str] | None = None):
    """An adapter's folder, as one; `texts` are further files of it, {name: text}.  Raises: as `adapter_folder.write`."""
    texts = {CONFIG_FILE: json.dumps(config, indent=2, ensure_ascii=False) + "\n"} | (texts or {})
    adapter_folder.write(out, WEIGHTS_FILE, tensors, texts, {"format": "pt"} | metadata)
