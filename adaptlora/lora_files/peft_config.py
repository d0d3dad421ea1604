"""PEFT's LoraConfig as a dict: what it says about each module, and the same for other modules, ranks and scalings."""

import math
import re
from collections import Counter
from pathlib import Path

from ..targets import check_expressions, pattern_value
from ..text_files import read_json
from .base import is_positive

_UNSUPPORTED = {
    "use_dora": "DoRA scales by a trained magnitude",
    "layer_replication": "layers are replicated",
    "trainable_token_indices": "token embeddings are trained",
    "target_parameters": "bare parameters are adapted",
    "alora_invocation_tokens": "the adapter is activated by tokens",
    "arrow_config": "the adapter is routed",
    "use_qalora": "x is pooled before lora_A",
    "use_bdlora": "the factors are block-diagonal",
    "kasa_config": "KaSA takes a part out of the base weight",
    "monteclora_config": "MonteCLoRA samples around lora_A",
}

_FLAGS = ("use_rslora", "fan_in_fan_out", "lora_bias")
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")

# PEFT derives the base's weights anew from other ones when it loads the adapter: a residual is what the factors belong to.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_config(op: str, file: Path) -> dict:
    """adapter_config.json of a LoRA adapter.  Raises: FileNotFoundError, ValueError (no JSON, another kind of adapter)."""
    config = read_json(op, file)
    if config.get("peft_type") != "LORA":
        raise ValueError(f'{op}: {file}: peft_type must be "LORA", got {config.get("peft_type")!r}')
    return config


def check_config(op: str, file: Path, config: dict, names) -> None:
    """
    Args: names: of the adapted modules.
    Raises: ValueError if ranks or scalings are damaged, patterns could take forever, or the factors are not the base's own weights'.
    """
    check_scalings(op, file, config, names)
    dropout = config.get("lora_dropout", 0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"{op}: {file}: lora_dropout must be in [0, 1), got {dropout!r}")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise ValueError(f"{op}: {file}: modules_to_save must be a list of names, got {saved!r}")
    if config.get("bias", "none") != "none":
        raise ValueError(f'{op}: {file}: bias must be "none", got {config["bias"]!r}')
    changed = changed_base(config)
    if changed is not None:
        raise ValueError(f"{op}: {file}: {changed}")


def check_scalings(op: str, file: Path, config: dict, names) -> None:
    """The part of `check_config` that `rank_of` and `scaling_of` rely on, for modules of these names.  Raises: ValueError."""
    if type(config.get("r")) is not int or not is_positive(config["r"]):
        raise ValueError(f"{op}: {file}: r must be an integer > 0, got {config.get('r')!r}")
    if not is_positive(config.get("lora_alpha")):
        raise ValueError(f"{op}: {file}: lora_alpha must be a number > 0, got {config.get('lora_alpha')!r}")
    for field in _FLAGS:
        if config.get(field) not in (None, True, False):
            raise ValueError(f"{op}: {file}: {field} must be true or false, got {config[field]!r}")
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(field) or {}
        if not isinstance(pattern, dict) or not all(map(is_positive, pattern.values())):
            raise ValueError(f"{op}: {file}: {field} must give numbers > 0 by module, got {pattern!r}")
        for key in pattern:
            try:
                re.compile(key)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"{op}: {file}: {field} must have regular expressions as keys, got {key!r}: {error}"
                ) from error
        check_expressions(op, f"{file}: {field}", pattern, names)


def changed_base(config: dict) -> str | None:
    """What is wrong if the factors belong to another base than the model's own weights; None if they do not."""
    found = config.get("init_lora_weights", True)
    if found in _PLAIN_INITS:
        return None
    return f"init_lora_weights must leave the base weights alone ({_PLAIN_INITS}), got {found!r}"


def unsupported_field(config: dict) -> str | None:
    """Why the modules of such an adapter are more than scaling · B A (and scaling · bias); None if they are not."""
    for field, why in _UNSUPPORTED.items():
        if config.get(field):
            return f"{field} is not supported ({why}), got {config[field]!r}"
    return None


def rank_of(config: dict, name: str) -> int:
    return pattern_value(config.get("rank_pattern") or {}, name, config["r"])


def alpha_of(config: dict, name: str) -> float:
    return pattern_value(config.get("alpha_pattern") or {}, name, config["lora_alpha"])


def scaling_of(config: dict, name: str, rank: int) -> float:
    """lora_alpha / r of the module, or / √r for rsLoRA."""
    return alpha_of(config, name) / divisor(rank, bool(config.get("use_rslora")))


def divisor(rank: int, use_rslora: bool) -> float:
    """What lora_alpha is divided by: r, or √r for rsLoRA."""
    return math.sqrt(rank) if use_rslora else rank


def alpha_for(config: dict, scaling: float, rank: int) -> float:
    """The alpha that PEFT divides to exactly `scaling`, an integer where one does; to its last bit where no float does."""
    by = divisor(rank, bool(config.get("use_rslora")))
    alpha = scaling * by
    candidates = (round(alpha), alpha, math.nextafter(alpha, 0), math.nextafter(alpha, math.inf))
    return next((candidate for candidate in candidates if candidate and candidate / by == scaling), alpha)


def for_modules(config: dict, ranks: dict[str, int], alphas: dict[str, float], others=()) -> dict:
    """
    `config` for exactly these modules, at these ranks and alphas.

    Args: ranks, alphas: by module name, at least one.   others: further names of the model, which must not be adapted.
    """
    r, lora_alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    changed = {
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": pattern({name: rank for name, rank in ranks.items() if rank != r}, ranks),
        "alpha_pattern": pattern({name: alpha for name, alpha in alphas.items() if alpha != lora_alpha}, ranks),
        "init_lora_weights": True,
    }
    if others:
        # A list means its suffixes too: where the first choice was not by suffix alone, the model may have others of that end.
        by_suffix = isinstance(config.get("target_modules"), (list, set, tuple)) and not any(
            map(config.get, _NARROWING)
        )
        changed["target_modules"] = target_modules(list(ranks), others, regex=not by_suffix)
        changed |= {field: None for field in _NARROWING if field in config}
    return config | changed


def pattern(values: dict, names) -> dict:
    """
    `values` keyed for PEFT, which takes a key as a regular expression for a name or a dotted suffix of it: a name that would
    also match another one of `names` is anchored at its start, and escaped.
    """
    keyed = {}
    for name, value in values.items():
        rule = re.compile(re.escape(name).replace(r"\.", "."))
        ends = [other[-len(name) :] for other in names if other != name and len(other) >= len(name)]
        if any(map(rule.fullmatch, ends)):
            keyed[f"^{re.escape(name)}"] = value
        else:
            keyed[name if rule.pattern == name else re.escape(name)] = value
    return keyed


def target_modules(names: list[str], others, *, regex: bool = False) -> list[str] | str:
    """A list of names where PEFT's suffix rule means none of `others`, else, or on demand, a regular expression for them."""
    if regex or any(other.endswith(f".{name}") for name in names for other in others):
        return "|".join(map(re.escape, names))
    return names
