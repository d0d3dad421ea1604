"""LoRA adapters as they are in the wild: PEFT folders, kohya's and diffusers' safetensors, read and written in kind."""

from pathlib import Path

from ..tensor_files import read_tensors
from . import diffusers, kohya, peft, peft_config
from .base import LoraFile, LoraModule, find_parts, pair, split_supported, unsupported_part

__all__ = ["LoraFile", "LoraModule", "read"]


def read(path, *, skip_unsupported: bool = False) -> LoraFile:
    """
    Read an adapter: a folder is PEFT's, a .safetensors file kohya's or diffusers'.

    Args: skip_unsupported: put modules that are more than scaling · B A (DoRA, LoHa, LoKr, embeddings, …) into `.skipped` and write
        them as they are, instead of refusing the file.
    Raises: FileNotFoundError, ValueError, which name the file, the module and what is wrong: a file that is cut, damaged or a pickle,
        half a pair, shapes that do not fit, numbers that are not finite or of 8 bits, no module, an unsupported one.
    """
    path = Path(path)
    if path.is_dir():
        return peft.read(path, skip_unsupported=skip_unsupported)
    tensors, metadata = read_tensors("read", path)
    if any(key.startswith(peft.KEY_PREFIX) for key in tensors):
        raise ValueError(f"read: {path} must be given as its folder, with {peft.CONFIG_FILE}: its keys are PEFT's")
    is_diffusers = not any(".lora_down." in key for key in tensors) and any(
        diffusers.known_part(key) and not key.endswith(".alpha") for key in tensors
    )
    kind = diffusers if is_diffusers else kohya
    parts = find_parts("read", path, {key: key for key in tensors}, kind.known_part)
    configs = diffusers.read_configs("read", path, metadata, parts) if is_diffusers else {}

    def reason(name: str) -> str | None:
        place = diffusers.component_of(configs, name)
        return unsupported_part(parts[name]) or (place and peft_config.unsupported_field(configs[place[0]]))

    keys, skipped = split_supported("read", path, parts, reason, skip=skip_unsupported)
    modules = {
        name: _module(path, name, {part: tensors[key] for part, key in found.items()}, configs)
        for name, found in keys.items()
    }
    fields = (path, kind.__name__.rpartition(".")[2], modules, skipped, metadata, tensors, keys)
    return diffusers.DiffusersFile(*fields, configs) if is_diffusers else kohya.KohyaFile(*fields)


def _module(path: Path, name: str, found: dict, configs: dict[str, dict]) -> LoraModule:
    lora_A, lora_B, bias = pair("read", path, name, found)
    rank, alpha, place = lora_A.shape[0], found.get("alpha"), diffusers.component_of(configs, name)
    if alpha is not None:
        if alpha.numel() != 1 or not alpha.item() > 0 or place:
            rule = "one number > 0, and the only source of the scaling"
            raise ValueError(f"read: {path}: {name}: alpha must be {rule}, got {alpha.tolist()}")
        return LoraModule(name, lora_A, lora_B, alpha.item() / rank, bias)
    if place is None:
        return LoraModule(name, lora_A, lora_B, 1.0, bias)
    config = configs[place[0]]
    scaling = peft_config.scaling_of(config, place[1], rank)
    return LoraModule(name, lora_A, lora_B, scaling, bias, use_rslora=bool(config.get("use_rslora")))
