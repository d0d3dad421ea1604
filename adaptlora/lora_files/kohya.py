"""kohya's files: <stem>.lora_down.weight, <stem>.lora_up.weight and <stem>.alpha.  [sd-scripts' checkpoint format]"""

import dataclasses
import re
from pathlib import Path

import torch
from torch import Tensor

from ..files import atomic_file
from ..tensor_files import save_file
from .base import LoraFile, LoraModule

_KEY = re.compile(r"(?P<module>.+?)\.(?:lora_(?P<half>down|up)\.weight|alpha)")
_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


def known_part(key: str) -> tuple[str, str] | None:
    """(stem, "lora_A" | "lora_B" | "alpha"); None for any other tensor."""
    found = _KEY.fullmatch(key)
    return found and (found["module"], {"down": "lora_A", "up": "lora_B", None: "alpha"}[found["half"]])


def stored_alpha(old: Tensor | None, scaling: float, rank: int) -> Tensor:
    """alpha = scaling · r, 0-dimensional unless `old` is not; in float32 where the dtype of `old` would round it."""
    exact = torch.tensor(scaling * rank, dtype=torch.float32, device="cpu")
    if old is None:
        return exact
    dtype = old.dtype if exact.to(old.dtype).float() == exact else torch.float32
    return exact.to(dtype).reshape(old.shape)


@dataclasses.dataclass
class KohyaFile(LoraFile):
    """One .safetensors file with kohya's keys; a module without alpha has scaling 1."""

    def _stored(self, name: str, module: LoraModule) -> dict[str, Tensor]:
        stored = super()._stored(name, module)
        key = self.keys[name].get("alpha")
        if key or module.scaling != 1:
            stored[key or f"{name}.alpha"] = stored_alpha(self.tensors.get(key), module.scaling, module.lora_A.shape[0])
        return stored

    def _save(self, out: Path, tensors: dict[str, Tensor], modules: dict[str, LoraModule]) -> None:
        metadata = {key: value for key, value in self.metadata.items() if key not in _HASHES}
        ranks = {module.lora_A.shape[0] for module in modules.values()}
        alphas = {module.scaling * module.lora_A.shape[0] for module in modules.values()}
        for key, values in (("ss_network_dim", ranks), ("ss_network_alpha", alphas)):
            if key in metadata and modules:
                metadata[key] = str(*values) if len(values) == 1 and not self.skipped else "Dynamic"
        with atomic_file(out) as file:
            save_file(tensors, file, metadata=metadata or None)
