"""PEFT adapter folders in and out: adapter_config.json and adapter_model.safetensors.  [PEFT's checkpoint format]"""

import dataclasses
import json
import math
import os
import re
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .config import LoraConfig
from .targets import pattern_value

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
FACTOR_KEY = re.compile(r"(?P<module>.+)\.(?P<factor>lora_[AB])(\.[^.]+)?\.weight")
_UNSUPPORTED = {
    "use_dora": "DoRA scales by a trained magnitude",
    "lora_bias": "lora_B has a bias",
    "layer_replication": "layers are replicated",
    "trainable_token_indices": "token embeddings are trained",
    "target_parameters": "bare parameters are adapted",
    "alora_invocation_tokens": "the adapter is activated by tokens",
    "arrow_config": "the adapter is routed",
    "use_qalora": "x is pooled before lora_A",
    "use_bdlora": "the factors are block-diagonal",
}

# PEFT derives the base's weights anew from other ones when it loads the adapter: a residual is what the factors belong to.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def check_pair(op: str, name: str, lora_A, lora_B, layer) -> None:
    """lora_A (R, K) and lora_B (N, R) for the K and N of `layer`.  Raises: ValueError."""
    if lora_A.dim() != 2 or lora_A.shape[1] != layer.in_features:
        raise ValueError(f"{op}: {name}: lora_A must have shape (R, {layer.in_features}), got {tuple(lora_A.shape)}")
    if lora_B.shape != (layer.out_features, lora_A.shape[0]):
        expected = (layer.out_features, lora_A.shape[0])
        raise ValueError(f"{op}: {name}: lora_B must have shape {expected}, got {tuple(lora_B.shape)}")


@dataclasses.dataclass
class StoredAdapter:
    """A PEFT adapter folder, read and checked. factors: {module: (A (R, K), B (N, R))}; saved: {module: {name: tensor}}."""

    path: Path
    config: dict
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    saved: dict[str, dict[str, torch.Tensor]]

    def scaling(self, name: str) -> float:
        """lora_alpha / r of the module, or / √r for rsLoRA."""
        alpha = pattern_value(self.config.get("alpha_pattern") or {}, name, self.config["lora_alpha"])
        rank = self.factors[name][0].shape[0]
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def lora_config(self) -> LoraConfig:
        """A configuration that attaches to exactly the modules of the file, at their ranks."""
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
        )

    def check_fits(self, adapter) -> None:
        """Raises: ValueError if a module of the file is not adapted, or a shape differs."""
        op = f"load: {self.path}"
        for name, (lora_A, lora_B) in self.factors.items():
            if name not in adapter.layers:
                raise ValueError(f"{op}: its modules must be adapted modules of the model, got {name!r}")
            check_pair(op, name, lora_A, lora_B, adapter.layers[name])
        check_saved(op, self.saved, adapter.saved)


def check_saved(op: str, found: dict[str, dict], modules: dict[str, torch.nn.Module]) -> None:
    """`found` must hold every tensor of the adapter's modules_to_save, and nothing else.  Raises: ValueError."""
    if found.keys() != modules.keys():
        raise ValueError(f"{op}: modules_to_save must be the adapter's, {sorted(modules)}, got {sorted(found)}")
    for name, module in modules.items():
        expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        shapes = {key: tuple(value.shape) for key, value in found[name].items()}
        if expected != shapes:
            raise ValueError(f"{op}: {name} must hold {expected}, got {shapes}")


def read(path) -> StoredAdapter:
    """Read a PEFT LoRA adapter folder.  Raises: FileNotFoundError, ValueError that says what is wrong with which file."""
    path = Path(path)
    config = read_config("load", path / CONFIG_FILE)
    _check_supported(path / CONFIG_FILE, config)
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        raise FileNotFoundError(f"load: {weights} is missing (only safetensors are read)")
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"load: {weights} must be a whole safetensors file: {error}") from error
    halves: dict[str, dict[str, torch.Tensor]] = {}
    saved: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(KEY_PREFIX)
        factor = FACTOR_KEY.fullmatch(name)
        if factor:
            halves.setdefault(factor["module"], {})[factor["factor"]] = tensor
        else:
            module, parameter = _saved_key(weights, name, config.get("modules_to_save") or ())
            saved.setdefault(module, {})[parameter] = tensor
    factors = pair_up("load", weights, halves)
    for name, (lora_A, _) in factors.items():
        expected = pattern_value(config.get("rank_pattern") or {}, name, config["r"])
        if lora_A.shape[0] != expected:
            raise ValueError(
                f"load: {weights}: {name} must have the rank that {CONFIG_FILE} gives, {expected}, got {lora_A.shape[0]}"
            )
    return StoredAdapter(path, config, factors, saved)


def pair_up(op: str, file: Path, halves: dict[str, dict]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{module: (A, B)} from {module: {"lora_A": …, "lora_B": …}}.  Raises: ValueError (a half is missing, other ranks, no module)."""
    for name, pair in halves.items():
        shapes = {factor: tuple(tensor.shape) for factor, tensor in pair.items()}
        two_dims = pair.keys() == {"lora_A", "lora_B"} and all(len(shape) == 2 for shape in shapes.values())
        if not two_dims or shapes["lora_A"][0] != shapes["lora_B"][1]:
            raise ValueError(
                f"{op}: {file}: {name} must hold lora_A (R, K) and lora_B (N, R) of one rank, got {shapes}"
            )
        for factor, tensor in pair.items():
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                raise ValueError(
                    f"{op}: {file}: {name}: {factor} must hold finite floating-point numbers, got {tensor.dtype}"
                )
    if not halves:
        raise ValueError(f"{op}: {file} must hold lora_A and lora_B of at least one module, got none")
    return {name: (pair["lora_A"], pair["lora_B"]) for name, pair in halves.items()}


def read_config(op: str, file: Path) -> dict:
    """adapter_config.json of a LoRA adapter.  Raises: FileNotFoundError, ValueError (no JSON, another kind of adapter)."""
    if not file.is_file():
        raise FileNotFoundError(f"{op}: {file} is missing")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{op}: {file} must be JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f'{op}: {file}: peft_type must be "LORA", got {found!r}')
    return config


def _positive(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _check_supported(file: Path, config: dict) -> None:
    """Raises: ValueError if the configuration is damaged, or means something that the factors alone do not hold."""
    if not _positive(config.get("r")) or config["r"] != int(config["r"]):
        raise ValueError(f"load: {file}: r must be an integer > 0, got {config.get('r')!r}")
    if not _positive(config.get("lora_alpha")):
        raise ValueError(f"load: {file}: lora_alpha must be a number > 0, got {config.get('lora_alpha')!r}")
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(field) or {}
        if not isinstance(pattern, dict) or not all(map(_positive, pattern.values())):
            raise ValueError(f"load: {file}: {field} must give numbers > 0 by module, got {pattern!r}")
        for key in pattern:
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(
                    f"load: {file}: {field} must have regular expressions as keys, got {key!r}: {error}"
                ) from error
    if config.get("bias", "none") != "none":
        raise ValueError(f'load: {file}: bias must be "none", got {config["bias"]!r}')
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        found = config["init_lora_weights"]
        raise ValueError(
            f"load: {file}: init_lora_weights must leave the base weights alone ({_PLAIN_INITS}), got {found!r}"
        )
    for field, reason in _UNSUPPORTED.items():
        if config.get(field):
            raise ValueError(f"load: {file}: {field} is not supported ({reason}), got {config[field]!r}")


def _saved_key(file: Path, name: str, modules_to_save) -> tuple[str, str]:
    """(module, parameter) of a tensor that belongs to one of modules_to_save."""
    for entry in modules_to_save:
        found = re.fullmatch(rf"(?P<module>(.+\.)?{re.escape(entry)})\.(?P<parameter>.+)", name)
        if found:
            return found["module"], found["parameter"]
    raise ValueError(f"load: {file}: tensors must be lora_A, lora_B or belong to modules_to_save, got {name!r}")


def _peft_config(adapter) -> dict:
    config = adapter.config
    ranks = {name: rank for name, rank in adapter.ranks().items() if rank}
    if not ranks:
        raise ValueError("save: at least one module must have a rank above 0, got 0 everywhere")
    alphas = {name: adapter.layers[name].scaling / config.scaling(rank, 1.0) for name, rank in ranks.items()}
    model_config = getattr(adapter.model, "config", None)
    return {
        "peft_type": "LORA",
        "task_type": _task_type(adapter),
        "base_model_name_or_path": getattr(model_config, "_name_or_path", None),
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": _target_modules(adapter, list(ranks)),
        "modules_to_save": list(adapter.saved) or None,
        "rank_pattern": _pattern({name: rank for name, rank in ranks.items() if rank != config.r}, ranks),
        "alpha_pattern": _pattern(
            {
                name: alpha
                for name, alpha in alphas.items()
                if not math.isclose(alpha, config.lora_alpha, rel_tol=1e-12)
            },
            ranks,
        ),
        "use_rslora": config.use_rslora,
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in adapter.layers.values()),
        "bias": config.bias,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _task_type(adapter) -> str | None:
    """PEFT's task type where it is sure to load: for SEQ_CLS PEFT demands that the file holds the classification head."""
    kinds = {"ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    if {"classifier", "score"} & adapter.saved.keys():
        kinds["ForSequenceClassification"] = "SEQ_CLS"
    return next((kind for suffix, kind in kinds.items() if type(adapter.model).__name__.endswith(suffix)), None)


def _pattern(values: dict, names) -> dict:
    """`values` keyed for PEFT, which matches suffixes: a name that ends another adapted name is anchored at its start."""
    return {
        f"^{name}" if any(other.endswith(f".{name}") for other in names) else name: value
        for name, value in values.items()
    }


def _target_modules(adapter, names: list[str]) -> list[str] | str:
    """A list of names where PEFT's suffix rule means exactly these modules in the model, else a regular expression for them."""
    others = [name for name, _ in adapter.model.named_modules() if name not in names]
    if any(other.endswith(f".{name}") for name in names for other in others):
        return "|".join(map(re.escape, names))
    return names


def write(adapter, path) -> None:
    """Write an Adapter as a PEFT adapter folder; see `Adapter.save`."""
    path = Path(path)
    config = json.dumps(_peft_config(adapter), indent=2, ensure_ascii=False) + "\n"
    tensors = {}
    for name, layer in adapter.layers.items():
        if layer.rank:
            tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = layer.lora_A
            tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = layer.lora_B
    for name, module in adapter.saved.items():
        tensors |= {f"{KEY_PREFIX}{name}.{key}": value for key, value in module.state_dict().items()}
    tensors = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
    path.mkdir(parents=True, exist_ok=True)
    with atomic_file(path / WEIGHTS_FILE) as weights_file, atomic_file(path / CONFIG_FILE) as config_file:
        save_file(tensors, weights_file, metadata={"format": "pt"})
        config_file.write_text(config, encoding="utf-8")


class atomic_file:
    """
    with atomic_file(path) as temporary: write to `temporary`, a Path beside `path`; it replaces `path` on success, synced
    to disk, and is removed if the block raises, leaving `path` as it was.
    """

    def __init__(self, path):
        self.path = Path(path)

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        os.close(handle)
        self.temporary = Path(name)
        return self.temporary

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                self._replace()
        finally:
            self.temporary.unlink(missing_ok=True)

    def _replace(self) -> None:
        mask = os.umask(0)
        os.umask(mask)
        self.temporary.chmod(0o666 & ~mask)
        with open(self.temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self.temporary, self.path)
