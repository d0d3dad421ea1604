"""NoRA's compact files: inner factors, and the outer ones as what remakes them from the base weight, or stored."""

import dataclasses
import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from . import adapter_folder
from .config import NoRAConfig
from .lora_files.base import DTYPES, check_numbers
from .methods.base import NonFiniteError
from .methods.nora import StoredOuter, probe
from .nn import Outer
from .targets import check_expressions
from .tensor_files import read_tensors
from .text_files import read_json

CONFIG_FILE = "adaptlora_config.json"
WEIGHTS_FILE = "adaptlora_model.safetensors"
_FORMAT = "adaptlora-nora-1"
_INNER = ("lora_A", "lora_B")
_OUTER = tuple(f"outer_{name}" for name in Outer._fields)
_PARTS = (*_INNER, *_OUTER, "probe", "weighting")
_SAVED = "modules_to_save."


@dataclasses.dataclass
class StoredNoRA:
    """A NoRA folder, read and checked in itself. factors: {module: (A' (r, r_out), B' (r_out, r))}; saved: {module: {name: tensor}}."""

    path: Path
    config: NoRAConfig
    factors: dict[str, tuple[Tensor, Tensor]]
    scalings: dict[str, float]
    saved: dict[str, dict[str, Tensor]]
    outer: StoredOuter

    def residual(self, name: str) -> tuple[int, float] | None:
        """(rank, scaling) of what the adapter took out of the module's base weight, None for nothing."""
        taken = self.config.residual and self.config.inner_init == "sigma"
        return (self.factors[name][0].shape[0], self.scalings[name]) if taken else None

    def attach_options(self) -> dict:
        return {"config": self.config, "stored": self.outer, "whole": sorted(self.saved)}


def check_finite(adapter) -> None:
    """Raises: NonFiniteError if a factor, or a parameter of modules_to_save, is NaN or infinite: it names the module."""
    parts = [
        (f"{name}: {factor}", values)
        for name, layer in adapter.layers.items()
        for factor, values in zip(layer.pair.factor_names, layer.pair.whole_rows(), strict=True)
    ]
    parts += [
        (f"{name}: lora_bias", layer.lora_bias) for name, layer in adapter.layers.items() if layer.lora_bias is not None
    ]
    for name, module in adapter.saved.items():
        parts += [(f"{name}: {key}", parameter) for key, parameter in module.named_parameters()]
    for where, tensor in parts:
        if tensor.dtype in DTYPES and not tensor.isfinite().all():
            raise NonFiniteError(
                f"save: {where} must be finite, got NaN or infinity: nothing was written (go on from a checkpoint before it, with a "
                "lower learning rate or clipped gradients)"
            )


def write(adapter, path, *, save_outer: bool) -> None:
    """Write a NoRA adapter to the folder `path`, its files as one; see `Adapter.save`."""
    check_finite(adapter)
    tensors: dict[str, Tensor] = {}
    modules = {}
    for name, layer in adapter.layers.items():
        tensors |= {f"{name}.{factor}": getattr(layer, factor) for factor in _INNER}
        if save_outer:
            tensors |= {f"{name}.{key}": part for key, part in zip(_OUTER, layer.outer, strict=True)}
        else:
            tensors[f"{name}.probe"] = probe(layer.outer)
        if layer.weighting is not None:
            tensors[f"{name}.weighting"] = layer.weighting
        modules[name] = {"scaling": layer.scaling, "weight_sha256": layer.weight_checksum}
    for name, module in adapter.saved.items():
        tensors |= {f"{_SAVED}{name}:{key}": value for key, value in module.state_dict().items()}
    tensors = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    content = {"format": _FORMAT, "config": _readable(adapter), "modules": modules}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    adapter_folder.write(Path(path), WEIGHTS_FILE, tensors, {CONFIG_FILE: text}, {})


def _readable(adapter) -> dict:
    """The adapter's configuration as a dict, with modules by name where the user's expression is one that no file may hold."""
    config = dataclasses.asdict(adapter.config)
    try:
        check_expressions("save", "target_modules", _expressions(config), adapter.layers)
    except ValueError:
        config |= {"target_modules": "|".join(map(re.escape, adapter.layers)), "exclude_modules": None}
    return config


def read_files(files: adapter_folder.settled, op: str) -> tuple[dict, dict[str, Tensor], dict[str, str]]:
    """(content of the description, tensors by key, the weights' metadata), of one save.  Raises: FileNotFoundError, OSError, ValueError."""
    return read_json(op, files.path(CONFIG_FILE)), *read_tensors(op, files.path(WEIGHTS_FILE))


def parse(path: Path, content: dict, tensors: dict[str, Tensor], metadata: dict[str, str]) -> StoredNoRA:
    """What `read_files` found in the folder `path`, checked.  Raises: ValueError that says what is wrong with which file."""
    weights = path / WEIGHTS_FILE
    config, modules = _described(path / CONFIG_FILE, content)
    saved: dict[str, dict[str, Tensor]] = {}
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in modules}
    for key, tensor in tensors.items():
        if key.startswith(_SAVED):
            module, _, parameter = key.removeprefix(_SAVED).rpartition(":")
            saved.setdefault(module, {})[parameter] = tensor
            continue
        name, _, part = key.rpartition(".")
        if name not in parts or part not in _PARTS:
            raise ValueError(f"load: {weights}: tensors must belong to the modules of {CONFIG_FILE}, got {key!r}")
        check_numbers("load", weights, key, tensor)
        parts[name][part] = tensor
    outers, probes, weightings, factors = {}, {}, {}, {}
    for name, found in parts.items():
        factors[name] = _inner(weights, name, found)
        if _OUTER[0] in found:
            outers[name] = _outer(weights, name, found, factors[name][0].shape[1])
        else:
            probes[name] = _needed(weights, name, found, "probe")
        if "weighting" in found:
            weightings[name] = found["weighting"]
            if weightings[name].dim() != 1 or not (weightings[name] > 0).all():
                raise ValueError(
                    f"load: {weights}: {name}.weighting must be (K,) numbers > 0, got {found['weighting']}"
                )
    checksums = {name: module["weight_sha256"] for name, module in modules.items()}
    scalings = {name: module["scaling"] for name, module in modules.items()}
    outer = StoredOuter(str(path), checksums, outers, probes, weightings)
    return StoredNoRA(path, config, factors, scalings, saved, outer)


def _described(file: Path, content: dict) -> tuple[NoRAConfig, dict]:
    try:
        if content["format"] != _FORMAT:
            raise ValueError(f"format must be {_FORMAT!r}, got {content['format']!r}")
        modules = content["modules"]
        if not isinstance(modules, dict) or not modules:
            raise ValueError("modules must name at least one module, got none")
        for name, module in modules.items():
            scaling = module["scaling"]
            finite = type(scaling) in (int, float) and math.isfinite(scaling)
            if not finite or not isinstance(module["weight_sha256"], str):
                raise ValueError(f"{name} must have a scaling and a weight_sha256, got {module!r}")
        check_expressions("load", str(file), _expressions(content["config"]), modules)
        return NoRAConfig(**content["config"]), modules
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load: {file} must describe a NoRA adapter: {error!r}") from error


def _expressions(config: dict) -> list[str]:
    """Regular expressions in a NoRAConfig's fields.  Raises: ValueError (a field of another type)."""
    found = []
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        names = config[field]
        entries = [names] if isinstance(names, str) else names or []
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise ValueError(f"{field} must be a list of names or a regular expression, got {names!r}")
        found += [names] if isinstance(names, str) else []
    return [*found, *config["rank_pattern"], *config["alpha_pattern"]]


def _needed(file: Path, name: str, found: dict[str, Tensor], part: str) -> Tensor:
    if part not in found:
        raise ValueError(f"load: {file}: {name} must have {part}, got {sorted(found)}")
    return found[part]


def _inner(file: Path, name: str, found: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    lora_A, lora_B = (_needed(file, name, found, part) for part in _INNER)
    if lora_A.dim() != 2 or lora_B.shape != lora_A.shape[::-1]:
        raise ValueError(
            f"load: {file}: {name}: lora_A (r, r_out) and lora_B (r_out, r) must fit together, got {tuple(lora_A.shape)} and "
            f"{tuple(lora_B.shape)}"
        )
    return lora_A, lora_B


def _outer(file: Path, name: str, found: dict[str, Tensor], r_out: int) -> Outer:
    outer = Outer(*(_needed(file, name, found, part) for part in _OUTER))
    shapes = [tuple(part.shape) for part in outer]
    if [len(shape) for shape in shapes] != [2, 1, 2] or not shapes[0][1] == shapes[1][0] == shapes[2][0] == r_out:
        raise ValueError(f"load: {file}: {name}: outer factors must be of rank r_out={r_out}, got {shapes}")
    return outer
