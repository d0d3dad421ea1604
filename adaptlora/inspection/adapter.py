"""What is in an adapter's files: ranks, shapes, norms, scalings, and ranks over the steps, read without a model."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .. import adapter_folder, lora_files
from ..io import HISTORY_FILE
from ..lora_files import peft, peft_config
from ..lora_files.base import natural, pair
from ..methods.normal import scores
from ..ops import rank_norms
from ..rank_history import RankHistory
from .record import REPORT_FILE, clip_history


@dataclass(frozen=True)
class InspectedModule:
    """
    norms: ‖a_r‖ + ‖b_r‖ of each vector, as they are stored.
    scores: NormAL's s_r, the norms as shares of the first vector's, at most 1.
    """

    name: str
    rank: int
    shape_A: tuple[int, int]  # (R, K)
    shape_B: tuple[int, int]  # (N, R)
    parameters: int
    norms: list[float]
    scores: list[float]


@dataclass(frozen=True)
class Inspection:
    """
    An adapter that was looked at.

    kind: "peft", "kohya" or "diffusers".   config: PEFT's; {} for a file without one.
    others: parameters of whatever else is saved: whole modules, embeddings, magnitudes.   skipped: {module: why it is no plain LoRA},
    of kohya's and diffusers' files.
    history: ranks over the steps, from `history_file`: the folder's rank_history.json, or the report.json of `adaptlora finetune`
    beside the folder, where ranks were clipped at one step.
    factors: {module: (A (R, K), B (N, R))} as stored.
    """

    path: Path
    kind: str
    config: dict
    modules: list[InspectedModule]
    others: dict[str, int]
    skipped: dict[str, str]
    file_bytes: int
    history: RankHistory | None
    history_file: str | None
    factors: dict[str, tuple[Tensor, Tensor]] = field(repr=False, compare=False)
    stored_scalings: dict[str, float] | None = field(repr=False)  # None: the configuration gives them

    def ranks(self) -> dict[str, int]:
        return {module.name: module.rank for module in self.modules}

    def parameters(self) -> int:
        """Of lora_A and lora_B of all modules."""
        return sum(module.parameters for module in self.modules)

    def scalings(self) -> dict[str, float]:
        """{module: s of ΔW = s · B A}.  Raises: ValueError (a configuration that does not give them)."""
        if self.stored_scalings is not None:
            return self.stored_scalings
        ranks = self.ranks()
        peft_config.check_scalings("inspect", self.path / peft.CONFIG_FILE, self.config, list(ranks))
        return {name: peft_config.scaling_of(self.config, name, rank) for name, rank in ranks.items()}

    def caveat(self) -> str | None:
        """What to say beside a ΔW that is more than the scaling · B A of `inspection` (DoRA's magnitudes, …); None if it is not."""
        reason = peft_config.unsupported_field(self.config)
        return None if reason is None else f"ΔW is taken as scaling · B A alone: {reason}"


def inspect_adapter(path: str | Path) -> Inspection:
    """
    Read an adapter: a PEFT folder with its adapter_config.json, adapter_model.safetensors and, where there is one,
    rank_history.json; or a .safetensors file of kohya's or diffusers'.

    Raises: ValueError (no adapter, a damaged file, factors that do not fit together, another adapter's history), FileNotFoundError.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and not path.is_dir():
        return _single_file(path)
    config_file, weights = path / peft.CONFIG_FILE, path / peft.WEIGHTS_FILE
    for file in (config_file, weights):
        if not file.exists():
            raise ValueError(f"inspect: adapter must be a folder with {file.name}, got {str(path)!r}")
    with adapter_folder.settled(path) as files:
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
    names = sorted(halves, key=natural)
    factors = {name: pair("inspect", weights, name, halves[name])[:2] for name in names}
    modules = _modules(factors)
    history, source = _history(path, {module.name: module.rank for module in modules})
    size = weights.stat().st_size
    return Inspection(path, "peft", config, modules, others, {}, size, history, source, factors, None)


def _single_file(path: Path) -> Inspection:
    found = lora_files.read(path, skip_unsupported=True)
    if not found.modules:
        name, why = next(iter(found.skipped.items()))
        raise ValueError(f"inspect: {path} must hold lora_A and lora_B of at least one module, got {name}: {why}")
    factors = {name: (module.lora_A, module.lora_B) for name, module in found.modules.items()}
    scalings = {name: module.scaling for name, module in found.modules.items()}
    others = {key: found.tensors[key].numel() for key in found.others()}
    modules, size = _modules(factors), path.stat().st_size
    return Inspection(path, found.kind, {}, modules, others, found.skipped, size, None, None, factors, scalings)


def _modules(factors: dict[str, tuple[Tensor, Tensor]]) -> list[InspectedModule]:
    lora_As, lora_Bs = map(list, zip(*factors.values(), strict=True))
    if any(factor.dtype == torch.float64 for factor in lora_As + lora_Bs):  # which the op does not mix with others
        lora_As, lora_Bs = ([factor.double() for factor in of] for of in (lora_As, lora_Bs))
    norms = rank_norms(lora_As, lora_Bs)
    modules = []
    for (name, (lora_A, lora_B)), a, b in zip(factors.items(), *norms, strict=True):
        of_A, of_B = a.tolist(), b.tolist()
        modules.append(
            InspectedModule(
                name=name,
                rank=lora_A.shape[0],
                shape_A=tuple(lora_A.shape),
                shape_B=tuple(lora_B.shape),
                parameters=lora_A.numel() + lora_B.numel(),
                norms=[x + y for x, y in zip(of_A, of_B, strict=True)],
                scores=scores(of_A, of_B),
            )
        )
    return modules


def _history(folder: Path, ranks: dict[str, int]) -> tuple[RankHistory | None, str | None]:
    """(ranks over the steps, the file that has them), or (None, None).  Raises: ValueError (a damaged file, another adapter's)."""
    history = RankHistory.read(folder)
    if history is None:
        history = clip_history(folder.resolve().parent / REPORT_FILE, ranks)
        return history, None if history is None else REPORT_FILE
    final = history.final_ranks()
    # a module of rank 0 is not in the file
    name = next((name for name in sorted(final.keys() | ranks) if final.get(name, 0) != ranks.get(name, 0)), None)
    if name is not None:
        raise ValueError(
            f"inspect: {folder / HISTORY_FILE} must end with the adapter's own ranks, got {final.get(name)} "
            f"for {name}, of rank {ranks.get(name)}"
        )
    return history, HISTORY_FILE
