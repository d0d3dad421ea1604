"""DyLoRA: every step trains a prefix of the vectors, of a length that is drawn, so that every prefix is an adapter."""

import random

import torch

from ..config import DyLoRAConfig
from ..nn import DyLoraLinear
from ..rank_slots import factor_rows
from .base import Method


def drawn_rank(seed: int, step: int, least: int, most: int) -> int:
    """b of an optimizer step, from 0: uniform over least … most, and a function of these numbers alone.   [DyLoRA, algorithm 1]"""
    return random.Random(f"dylora {seed} {step}").randint(least, most)


class DyLoRA(Method):
    """
    The method while it trains. All modules have the rank that was drawn, or their own r if that is smaller.

    Attributes: evaluated: rank of evaluation, merging and saving, None for all vectors.
    """

    layer_class = DyLoraLinear
    start_fields = Method.start_fields - {"seed"}  # which the ranks of all steps are drawn from

    def __init__(self, config: DyLoRAConfig, layers):
        super().__init__(config, layers)
        most = max(layer.full_rank for layer in layers.values())
        if config.r_min > most:
            raise ValueError(f"DyLoRA: r_min must be at most the largest rank of a module, {most}, got {config.r_min}")
        self.final = False
        self.evaluated: int | None = None
        # views of frozen vectors, and their values before the step
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    @classmethod
    def build(cls, config: DyLoRAConfig, attachment) -> dict[str, DyLoraLinear]:
        layers = super().build(config, attachment)
        for layer in layers.values():
            layer.frozen = config.frozen
            layer.exponent = (0.5 if config.use_rslora else 1.0) if config.rescale else 0.0
        return layers

    @property
    def phase(self) -> str:
        """ "drawing", and "final" once `Adapter.compact` was called."""
        return "final" if self.final else "drawing"

    def needs_optimizer(self) -> bool:
        return not self.final

    def may_change(self) -> bool:
        return not self.final

    @property
    def parks(self) -> bool:
        return not self.final

    def largest_ranks(self) -> dict[str, int]:
        return {name: layer.full_rank for name, layer in self.layers.items()}

    def final_ranks(self) -> dict[str, int]:
        return {name: layer.evaluated for name, layer in self.layers.items()}

    def compacted(self) -> None:
        self.final = True
        for layer in self.layers.values():
            layer.fill(layer.rank, layer.scaling)
            layer.frozen = False

    def set_rank(self, rank: int | None) -> None:
        most = max(self.largest_ranks().values())
        if rank is not None and not (type(rank) is int and 1 <= rank <= most):
            raise ValueError(f"set_rank: rank must be None or an integer in [1, {most}], got {rank!r}")
        self.evaluated = rank
        for layer in self.layers.values():
            layer.evaluate_at(layer.full_rank if rank is None else rank)

    def check_ranks(self, ranks: dict[str, int]) -> None:
        for name, layer in self.layers.items():
            if not self.final and ranks[name] != layer.full_rank:
                raise ValueError(
                    f"DyLoRA: {name} must have all of its {layer.full_rank} vectors, got {ranks[name]} (adaptlora.load(model, path) "
                    "takes an adapter of a chosen rank)"
                )

    def start_from(self, ranks: dict[str, int]) -> None:
        self.evaluated = None
        for name, layer in self.layers.items():
            layer.fill(ranks[name], layer.scaling)
        self._narrow()

    def begin(self) -> None:
        super().begin()
        self._narrow()

    def _narrow(self) -> None:
        if not self.final:
            for name, rank in self._drawn().items():
                self.layers[name].pair.narrow(rank)

    def _drawn(self) -> dict[str, int]:
        """Ranks of the optimizer step that comes next."""
        full = self.largest_ranks()
        b = drawn_rank(self.config.seed, self.t, self.config.r_min, max(full.values()))
        return {name: min(b, rank) for name, rank in full.items()}

    def step(self, loss, optimizers) -> dict[str, int] | None:
        self.t += 1
        if self.final:
            return None
        if not any(layer.training for layer in self.layers.values()):
            raise ValueError(
                "step: the model must be in training mode, in which DyLoRA trains a prefix, got evaluation mode: call model.train()"
            )
        ranks = self._drawn()
        return None if all(self.layers[name].rank == rank for name, rank in ranks.items()) else ranks

    def before_optimizer_step(self, optimizer) -> None:
        """The frozen vectors get no gradient, but momentum and weight decay would move them."""
        self._kept = []  # an optimizer that failed left some
        if not self.config.frozen or self.final:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for layer in self.layers.values():
            for name in layer.pair.factor_names:
                factor = getattr(layer.pair, name)
                if id(factor) in held:
                    rows = factor_rows(name, factor.detach())[: layer.rank - 1]
                    self._kept.append((rows, rows.clone()))

    def after_optimizer_step(self, optimizer) -> None:
        for rows, values in self._kept:
            rows.copy_(values)
        self._kept.clear()

    def summary(self) -> dict:
        return super().summary() | {"evaluated_ranks": self.final_ranks()}

    def state_dict(self) -> dict:
        full = {name: [layer.full_rank, layer.full_scaling] for name, layer in self.layers.items()}
        return {"t": self.t, "final": self.final, "evaluated": self.evaluated, "full": full}

    def step_state(self) -> dict:
        return {"t": self.t}

    def check_state(self, state: dict) -> None:
        evaluated, full = state["evaluated"], state["full"]
        if type(state["t"]) is not int or type(state["final"]) is not bool or type(evaluated) not in (int, type(None)):
            raise ValueError(
                f"method's t, final and evaluated must be a number, a bool and a rank or None, got {state!r}"
            )
        if not isinstance(full, dict) or full.keys() != self.layers.keys():
            raise ValueError(f"method's full must be of this adapter's modules, got {full!r}")
        for name, entry in full.items():
            if not (isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int and type(entry[1]) is float):
                raise ValueError(f"method's full must be [rank, scaling] of {name}, got {entry!r}")

    def load_state_dict(self, state: dict) -> None:
        self.t = state["t"]
        if "full" not in state:
            return
        self.final = state["final"]
        for name, (rank, scaling) in state["full"].items():
            self.layers[name].fill(rank, scaling)
            self.layers[name].frozen = self.config.frozen and not self.final
        self.set_rank(state["evaluated"])
