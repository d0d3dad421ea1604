"""What is in a PEFT LoRA folder: ranks, shapes and scores, and La-LoRA's ranks over the steps, read from its files without a model."""

from dataclasses import dataclass
from pathlib import Path

from . import adapter_folder
from .io import HISTORY_FILE
from .lora_files import peft
from .lora_files.base import natural, pair
from .methods.normal import scores
from .ops import rank_norms
from .rank_history import RankHistory


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
    history: RankHistory | None


def inspect_adapter(folder: str | Path) -> Inspection:
    """Read a PEFT adapter's adapter_config.json and adapter_model.safetensors, and rank_history.json where there is one.

    Raises: ValueError (not such a folder, a damaged file, factors that do not fit together, another adapter's history).
    """
    folder = Path(folder)
    config_file, weights = folder / peft.CONFIG_FILE, folder / peft.WEIGHTS_FILE
    for file in (config_file, weights):
        if not file.exists():
            raise ValueError(f"inspect: adapter must be a folder with {file.name}, got {str(folder)!r}")
    with adapter_folder.settled(folder) as files:
        config, tensors, _ = peft.read_files(files, "inspect")
    # not peft.read: what cannot be loaded (DoRA's magnitudes, …) can be looked at all the same
    halves: dict[str, dict] = {}
    others: dict[str, int] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(peft.KEY_PREFIX)
        module, part = peft.known_part(name) or ("", "")
        if part in ("lora_A", "lora_B"):
            halves.setdefault(module, {})[part] = tensor
        else:
            others[name] = tensor.numel()
    if not halves:
        raise ValueError(f"inspect: {weights} must hold lora_A and lora_B of at least one module, got none")
    factors = {name: pair("inspect", weights, name, found) for name, found in halves.items()}
    names = sorted(factors, key=natural)
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
    history = RankHistory.read(folder)
    ranks = {module.name: module.rank for module in modules}
    if history is not None and history.final_ranks() != ranks:
        different = sorted(name for name, _ in history.final_ranks().items() ^ ranks.items())[0]
        raise ValueError(
            f"inspect: {folder / HISTORY_FILE} must end with the adapter's own ranks, got {history.final_ranks().get(different)} "
            f"for {different}, of rank {ranks.get(different)}"
        )
    return Inspection(config, modules, others, weights.stat().st_size, history)
