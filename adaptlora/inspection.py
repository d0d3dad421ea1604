"""What is in a PEFT LoRA folder: ranks, shapes and scores, read from its two files without a model."""

import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from . import io
from .methods.normal import scores
from .ops import rank_norms


@dataclass(frozen=True)
class InspectedModule:
    name: str
    rank: int
    shape_A: tuple[int, int]  # (R, K)
    shape_B: tuple[int, int]  # (N, R)
    parameters: int
    scores: list[float]  # NormAL's s_r: ‖a_r‖ + ‖b_r‖ as shares of the first vector's, at most 1


@dataclass(frozen=True)
class Inspection:
    config: dict
    modules: list[InspectedModule]
    others: dict[str, int]  # parameters of whatever else is saved: whole modules, embeddings, magnitudes
    file_bytes: int


def inspect_adapter(folder: str | Path) -> Inspection:
    """Read a PEFT adapter's adapter_config.json and adapter_model.safetensors.

    Raises: ValueError (not such a folder, a damaged file, factors that do not fit together).
    """
    folder = Path(folder)
    config_file, weights = folder / io.CONFIG_FILE, folder / io.WEIGHTS_FILE
    for file in (config_file, weights):
        if not file.is_file():
            raise ValueError(f"inspect: adapter must be a folder with {file.name}, got {str(folder)!r}")
    config = io.read_config("inspect", config_file)
    # not io.read: what cannot be loaded (DoRA's magnitudes, biases, …) can be looked at all the same
    halves: dict[str, dict] = {}
    others: dict[str, int] = {}
    try:
        with safe_open(weights, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                name = key.removeprefix(io.KEY_PREFIX)
                match = io.FACTOR_KEY.fullmatch(name)
                if match:
                    halves.setdefault(match["module"], {})[match["factor"]] = file.get_tensor(key)
                else:
                    others[name] = math.prod(file.get_slice(key).get_shape())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"inspect: {weights} must be a whole safetensors file: {error}") from error
    factors = io.pair_up("inspect", weights, halves)
    names = sorted(factors, key=_natural)
    lora_As, lora_Bs = ([factors[name][which] for name in names] for which in (0, 1))
    norms_A, norms_B = rank_norms(lora_As, lora_Bs)
    modules = [
        InspectedModule(
            name=name,
            rank=lora_A.shape[0],
            shape_A=tuple(lora_A.shape),
            shape_B=tuple(lora_B.shape),
            parameters=lora_A.numel() + lora_B.numel(),
            scores=scores(a.tolist(), b.tolist()),
        )
        for name, lora_A, lora_B, a, b in zip(names, lora_As, lora_Bs, norms_A, norms_B, strict=True)
    ]
    return Inspection(config, modules, others, weights.stat().st_size)


def _natural(name: str) -> list:
    """Sort key by which layer 10 comes after layer 9."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in name.split(".")]
