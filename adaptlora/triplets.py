"""TripletPair: B diag(E) A with a rank that changes physically, and what AdaLoRA knows of its elements; that follows the ranks too."""

import torch
from torch import nn

from .rank_slots import factor_rows
from .ranks import FACTORS, RankedPair

_SENSITIVITY = "sensitivity."  # in a module's state_dict
_KEYS = ("mean", "uncertainty")


class Sensitivity:
    """
    Smoothed sensitivity and uncertainty of every element that trains.          [AdaLoRA, arXiv:2303.10512, Eq. 10–11]

    state: {factor: {"mean": Ī, "uncertainty": Ū}}, tensors of the factor's shape; nothing for a factor that was never read. That is an
    optimizer's state in all that concerns ranks, so that a pair makes it follow them, and counts its bytes, as it does with one.
    """

    def __init__(self):
        self.state: dict[nn.Parameter, dict[str, torch.Tensor]] = {}

    def of(self, factor: nn.Parameter) -> dict[str, torch.Tensor]:
        """The live tensors of a factor, at first zeros."""
        if factor not in self.state:
            self.state[factor] = {key: torch.zeros_like(factor, requires_grad=False) for key in _KEYS}
        return self.state[factor]


class TripletPair(RankedPair):
    """
    A pair with a third factor, lora_E (R, 1): the triplets (column of B, number of E, row of A) come and go together.

    Args: as `RankedPair`. A and B are drawn from N(0, 0.02²) and E is zero, as in PEFT, new vectors too.
    Attributes: sensitivity: of its elements; empty until a method reads it.
    """

    factor_names = (*FACTORS, "lora_E")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sensitivity = Sensitivity()
        self.track(self.sensitivity)

    @staticmethod
    def drawn_rows(factor: str, count: int, width: int, generator: torch.Generator | None) -> torch.Tensor | None:
        if factor == "lora_E":
            return None
        return torch.empty(count, width, dtype=torch.float32, device="cpu").normal_(0, 0.02, generator=generator)

    def statistics(self) -> dict[str, torch.Tensor]:
        found = {}
        for name in self.factor_names:
            kept = self.sensitivity.state.get(getattr(self, name), {})
            found |= {f"{name}.{key}": factor_rows(name, tensor) for key, tensor in kept.items()}
        return found

    def check_statistics(self, statistics: dict[str, torch.Tensor], rank: int) -> None:
        known = {f"{name}.{key}": name for name in self.factor_names for key in _KEYS}
        for place, rows in statistics.items():
            if place not in known or any(f"{known[place]}.{key}" not in statistics for key in _KEYS):
                raise ValueError(f"statistics: keys must be {' and '.join(_KEYS)} of factors, got {sorted(statistics)}")
            expected = (rank, factor_rows(known[place], getattr(self, known[place])).shape[1])
            if tuple(rows.shape) != expected:
                raise ValueError(f"statistics: {place} must have shape {expected}, got {tuple(rows.shape)}")

    def take_statistics(self, statistics: dict[str, torch.Tensor]) -> None:
        self.check_statistics(statistics, self.rank)
        self._forget_stores()
        self.sensitivity.state.clear()
        for place, rows in statistics.items():
            name, _, key = place.partition(".")
            factor = getattr(self, name)
            own = torch.empty_like(factor)
            factor_rows(name, own).copy_(rows)
            self.sensitivity.state.setdefault(factor, {})[key] = own

    def _forget_stores(self) -> None:
        """What is kept of the sensitivity's memory; it parks nothing."""
        self._tracked[self.sensitivity].clear()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._forget_stores()
        for kept in self.sensitivity.state.values():
            kept.update({key: fn(tensor) for key, tensor in kept.items()})
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        found = {f"{prefix}{_SENSITIVITY}{key}": rows.clone() for key, rows in self.statistics().items()}
        destination.update(found)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        start = prefix + _SENSITIVITY
        found = {key.removeprefix(start): state_dict.pop(key) for key in list(state_dict) if key.startswith(start)}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if f"{prefix}lora_A" in state_dict:
            try:
                self.take_statistics(found)
            except ValueError as error:
                errors.append(f"{prefix}{error}")

    def __setstate__(self, state):
        super().__setstate__(state)
        self.track(self.sensitivity)
