"""Base weights read one module at a time from safetensors: a transformers folder, sharded or not, or a single file."""

import hashlib
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from .tensor_files import open_tensors
from .text_files import read_json

_STEMS = ("model", "diffusion_pytorch_model")
_DTYPES = ("F64", "F32", "F16", "BF16")
_HEADS = ("lm_head", "embed_out", "output_layer", "proj_out", "predictions.decoder")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")
# Classes of transformers without an output head, whatever their configuration says of tying.
_HEADLESS = re.compile(
    r".*For(Sequence|Token|Image|Audio)Classification|.*For(QuestionAnswering|MultipleChoice)|.*(?<!LMHead)(?<!DoubleHeads)Model"
)
# transformers.pytorch_utils.Conv1D: the weight is (K, N), whatever PEFT's one flag for a mixed model says.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
_KOHYA_PREFIX = re.compile(r"lora_[a-z0-9]+_")
_MOST_BYTES = 1 << 28  # of an index
_MAX_PREFIX = 2  # components of a module's name that the base may lack, as in base.model.layers


@dataclass(frozen=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: str


class BaseWeights:
    """
    The weights of a model on disk, of which only the headers are read at first.

    path: a folder with model.safetensors or model.safetensors.index.json (or diffusers' diffusion_pytorch_model.…), or one
    .safetensors file. A module's weight is found by its name; else by the one key that has more in front, or up to two components
    less (bert.encoder ↔ encoder); an output head that is tied, by its embedding; kohya's stems by the one key that differs in dots.
    Raises: FileNotFoundError, ValueError (a shard that is cut, missing or outside the folder, a quantised model).
    """

    def __init__(self, path):
        self.path = Path(path)
        self.config = _read_config(self.path / "config.json")
        if self.config.get("quantization_config"):
            raise ValueError(f"base: {self.path} must not be quantised, got quantization_config in config.json")
        self.index, self.files, weight_map = _files(self.path)
        self.entries: dict[str, _Entry] = {}
        for file in self.files:
            with open_tensors("base", file) as handle:
                for key in handle.keys():  # noqa: SIM118
                    part = handle.get_slice(key)
                    if key in self.entries:
                        raise ValueError(
                            f"base: {file}: {key} must be in one shard, also in {self.entries[key].file.name}"
                        )
                    self.entries[key] = _Entry(file, tuple(part.get_shape()), part.get_dtype())
        for key, name in weight_map.items():
            if key not in self.entries or self.entries[key].file.name != name:
                raise ValueError(f"base: {self.path / name} must hold {key}, as {self.index.name} says")
        self._ends: dict[str, set[str]] = defaultdict(set)  # {every dotted end of a module's path: its keys}
        self._flat: dict[str, set[str]] = defaultdict(set)  # the same with underscores for dots
        for key in self.entries:
            if key.endswith(".weight"):
                parts = key.split(".")[:-1]
                for start in range(len(parts)):
                    self._ends[".".join(parts[start:])].add(key)
                    self._flat["_".join(parts[start:])].add(key)

    def find(self, names) -> dict[str, str]:
        """{name: key of its weight}.  Raises: ValueError that names every module without one, or with more than one."""
        found = {name: self._candidates(name) for name in names}
        bad = {name: keys for name, keys in found.items() if len(keys) != 1}
        if bad:
            lines = [f"{name} ({', '.join(sorted(keys)) or 'none'})" for name, keys in bad.items()]
            raise ValueError(f"base: {self.path} must hold one weight for every module, got {'; '.join(lines)}")
        return {name: min(keys) for name, keys in found.items()}

    def is_tied(self, name: str) -> bool:
        """Whether the module is an output head or an input embedding whose weight is, or is loaded as, that of the other."""
        tied = self.config.get("tie_word_embeddings", self._text_config().get("tie_word_embeddings"))
        if _ends_with(name, _HEADS):
            keys = {key.removesuffix(".weight") for key in self._candidates(name)}
            return tied is True or any(_ends_with(key, _EMBEDDINGS) for key in keys)
        if _ends_with(name, _EMBEDDINGS):
            tied = tied is True or (self._may_tie() and not self._stores_head())
            return _ends_with(name, ("shared",)) or (tied and not self._is_headless())
        return False

    def is_transposed(self, key: str, fan_in_fan_out: bool = False) -> bool:
        """Whether the weight is stored as (K, N): `fan_in_fan_out`, unless the model is known to use Conv1D or not to, here."""
        if self.config.get("model_type") in _CONV1D_MODELS:
            return _ends_with(key.removesuffix(".weight"), _CONV1D)
        return fan_in_fan_out

    def shape(self, name: str, fan_in_fan_out: bool = False) -> tuple[int, int]:
        """(N, K) of a module's weight; a convolution's K is C_in · kh · kw.  Raises: ValueError (not found, not a matrix, quantised)."""
        key = self.find([name])[name]
        entry = self._checked(key)
        first, rest = entry.shape[0], math.prod(entry.shape[1:])
        return (rest, first) if self.is_transposed(key, fan_in_fan_out) else (first, rest)

    def load(self, name: str, fan_in_fan_out: bool = False) -> torch.Tensor:
        """The (N, K) weight of a module in its own dtype, mapped from disk and not kept.  Raises: as `shape`."""
        key = self.find([name])[name]
        with open_tensors("base", self._checked(key).file) as handle:
            weight = handle.get_tensor(key).flatten(1)
        return weight.T if self.is_transposed(key, fan_in_fan_out) else weight

    def fingerprint(self) -> str:
        """SHA-256 of the names, sizes and modification times of the files."""
        digest = hashlib.sha256()
        for file in (*self.files, *((self.index,) if self.index else ())):
            status = file.stat()
            digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return digest.hexdigest()

    def _checked(self, key: str) -> _Entry:
        entry = self.entries[key]
        if entry.dtype not in _DTYPES:
            raise ValueError(f"base: {entry.file}: {key} must be one of {_DTYPES}, not quantised, got {entry.dtype}")
        if len(entry.shape) < 2:
            raise ValueError(f"base: {entry.file}: {key} must have 2 dimensions or more, got shape {entry.shape}")
        return entry

    def _candidates(self, name: str) -> set[str]:
        """Keys that may be the module's weight: the first of the rules, in the class's order, that finds any."""
        if f"{name}.weight" in self.entries:
            return {f"{name}.weight"}
        path = name.replace(".processor.", ".")
        if path != name and path.endswith(".to_out"):
            path += ".0"  # diffusers before PEFT: …processor.to_out_lora adapts to_out.0
        parts = path.split(".")
        shorter = {f"{'.'.join(parts[cut:])}.weight" for cut in range(min(_MAX_PREFIX + 1, len(parts)))}
        keys = self._ends.get(path, set()) | shorter & self.entries.keys()
        if not keys and _ends_with(name, _HEADS) and self._may_tie():
            keys = {key for end in _EMBEDDINGS for key in self._ends.get(end, ())}
        if not keys and (prefix := _KOHYA_PREFIX.match(name)):
            keys = self._flat.get(name[prefix.end() :], set())
        return keys

    def _may_tie(self) -> bool:
        # transformers' older files leave the field out where the model's default is to tie
        return self.config.get("tie_word_embeddings", self._text_config().get("tie_word_embeddings", True)) is not False

    def _is_headless(self) -> bool:
        return any(_HEADLESS.fullmatch(str(name)) for name in self.config.get("architectures") or ())

    def _stores_head(self) -> bool:
        return any(_ends_with(key.removesuffix(".weight"), _HEADS) for key in self.entries)

    def _text_config(self) -> dict:
        return self.config.get("text_config") or {}


def _ends_with(name: str, ends: tuple[str, ...]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _read_config(file: Path) -> dict:
    """config.json, {} where there is none. Some hold Infinity."""
    config = read_json("base", file, strict=False) if file.exists() else {}
    if not isinstance(config.get("text_config") or {}, dict):
        raise ValueError(f"base: {file}: text_config must be an object, got {config['text_config']!r:.80}")
    return config


def _files(path: Path) -> tuple[Path | None, list[Path], dict[str, str]]:
    """(index file or None, weight files, weight_map)."""
    if not path.is_dir():
        return None, [path], {}
    for stem in _STEMS:
        index, single = path / f"{stem}.safetensors.index.json", path / f"{stem}.safetensors"
        if single.is_file():
            return None, [single], {}
        if index.is_file():
            weight_map = read_json("base", index, most_bytes=_MOST_BYTES).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"base: {index}: weight_map must map tensors to files, got {weight_map!r}")
            for name in weight_map.values():
                if not isinstance(name, str) or re.fullmatch(r"[^/\\\0]+\.safetensors", name) is None:
                    raise ValueError(f"base: {index}: weight_map must name .safetensors files beside it, got {name!r}")
            return index, [path / name for name in sorted(set(weight_map.values()))], weight_map
    raise FileNotFoundError(
        f"base: {path} must hold model.safetensors or model.safetensors.index.json (only safetensors are read)"
    )
