"""diffusers' files: PEFT's factors under the pipeline's names (unet.….lora_A.weight), or the names from before PEFT.

Scalings: from <stem>.alpha, or from the LoraConfigs in the metadata, else 1.  [diffusers' checkpoint format]
"""

import dataclasses
import json
import re
from pathlib import Path

from torch import Tensor

from ..files import atomic_file
from ..tensor_files import save_file
from ..text_files import parse_json
from . import peft, peft_config
from .base import LoraFile, LoraModule
from .kohya import stored_alpha

_KEY = re.compile(
    r"(?P<module>.+?)(?:"
    r"\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight"
    r"|\.lora_B(?:\.[^.]+)?\.(?P<bias>bias)"
    r"|[._]lora(?:_linear_layer)?\.(?P<half>down|up)\.weight"
    r"|(?:_lora)?\.(?P<alpha>alpha))"
)
_PARTS = {"A": "lora_A", "B": "lora_B", "down": "lora_A", "up": "lora_B", "bias": "bias", "alpha": "alpha"}
_CONFIGS = "lora_adapter_metadata"


def known_part(key: str) -> tuple[str, str] | None:
    """(stem, "lora_A" | "lora_B" | "bias" | "alpha"); None for any other tensor."""
    found = _KEY.fullmatch(key)
    return found and (found["module"], _PARTS[next(filter(None, found.group("factor", "bias", "half", "alpha")))])


def read_configs(op: str, file: Path, metadata: dict[str, str], names) -> dict[str, dict]:
    """{component, or "": its LoraConfig} from the metadata.  Raises: ValueError (no JSON object, a damaged or unsupported one)."""
    flat = parse_json(op, f"{file}: {_CONFIGS}", metadata.get(_CONFIGS, "{}"))
    configs: dict[str, dict] = {}
    for key, value in flat.items():
        component, _, field = key.rpartition(".")
        configs.setdefault(component, {})[field] = value
    for component, config in configs.items():
        peft_config.check_config(op, f"{file}: {_CONFIGS} of {component!r}", config, names)
    return configs


def component_of(configs: dict[str, dict], name: str) -> tuple[str, str] | None:
    """(component, name inside it) of a module; None if no configuration is about it."""
    for component in sorted(configs, key=len, reverse=True):
        if name.startswith(f"{component}.") or not component:
            return component, name.removeprefix(f"{component}.")
    return None


def write_component(folder: str | Path, component: str, out: str | Path) -> None:
    """
    A PEFT adapter folder as one of diffusers' files, for `pipeline.load_lora_weights`: its LoraConfig becomes metadata.

    Args: component: of the pipeline, which was adapted: "unet", "transformer".   out: a .safetensors file.
    Raises: as `lora_files.read`, and ValueError (modules_to_save, which a pipeline does not load), before anything is written.
    """
    file = peft.read(folder, "write_component")
    if file.others():
        raise ValueError(
            f"write_component: {folder} must hold lora_A and lora_B alone, for a pipeline loads nothing else, got {file.others()[0]!r}"
        )
    tensors = {f"{component}.{key.removeprefix(peft.KEY_PREFIX)}": tensor for key, tensor in file.tensors.items()}
    config = {f"{component}.{field}": value for field, value in file.config.items()}
    with atomic_file(Path(out)) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", _CONFIGS: json.dumps(config, indent=2, sort_keys=True)})


@dataclasses.dataclass
class DiffusersFile(LoraFile):
    """One .safetensors file with diffusers' keys. configs: {component: LoraConfig} from the metadata."""

    configs: dict[str, dict]

    def _stored(self, name: str, module: LoraModule) -> dict[str, Tensor]:
        key = self.keys[name].get("alpha")
        says_scaling = key or component_of(self.configs, name)
        if not says_scaling and module.scaling != 1:
            bias = module.bias if module.bias is None else module.bias * module.scaling
            module = dataclasses.replace(module, lora_B=module.lora_B * module.scaling, bias=bias, scaling=1.0)
        stored = super()._stored(name, module)
        if key:
            stored[key] = stored_alpha(self.tensors[key], module.scaling, module.lora_A.shape[0])
        return stored

    def _save(self, out: Path, tensors: dict[str, Tensor], modules: dict[str, LoraModule]) -> None:
        metadata = dict(self.metadata)
        if self.configs:
            flat = {}
            for component, config in self._configs(modules).items():
                flat |= {f"{component}.{field}" if component else field: value for field, value in config.items()}
            metadata[_CONFIGS] = json.dumps(flat, indent=2, sort_keys=True)
        with atomic_file(out) as file:
            save_file(tensors, file, metadata=metadata or None)

    def _configs(self, modules: dict[str, LoraModule]) -> dict[str, dict]:
        """The configurations of what is left; one with no module left is dropped, one with skipped modules alone stays."""
        configs = {}
        for component, config in self.configs.items():
            within = {
                name: place[1]
                for name in (*self.modules, *self.skipped)
                if (place := component_of(self.configs, name)) and place[0] == component
            }
            ranks, alphas = {}, {}
            for name, inner in within.items():
                if name in modules:
                    ranks[inner] = modules[name].lora_A.shape[0]
                    alphas[inner] = peft_config.alpha_for(config, modules[name].scaling, ranks[inner])
                elif name in self.skipped:
                    ranks[inner], alphas[inner] = (
                        peft_config.rank_of(config, inner),
                        peft_config.alpha_of(config, inner),
                    )
            if ranks:
                dropped = [inner for inner in within.values() if inner not in ranks]
                configs[component] = peft_config.for_modules(config, ranks, alphas, dropped)
        return configs
