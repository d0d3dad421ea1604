"""NormAL LoRA: penalise rank vectors by their place, then keep the prefix that their norms earn.  [NormAL LoRA, Eq. 5–6, Alg. 2–3]"""

import heapq
import math

import torch

from ..config import NormALConfig
from ..nn import LoraLinear
from ..ops import rank_norms, rank_penalty, rank_shrink_
from .base import Method, NonFiniteError


def scores(norms_A: list[float], norms_B: list[float]) -> list[float]:
    """s_r = min(1, (‖a_r‖ + ‖b_r‖) / (‖a_1‖ + ‖b_1‖)) of one module; s_1 = 1 and the rest 0 where the denominator is 0."""
    sums = [a + b for a, b in zip(norms_A, norms_B, strict=True)]
    if not sums:
        return []
    if sums[0] == 0:
        return [1.0] + [0.0] * (len(sums) - 1)
    return [min(1.0, value / sums[0]) for value in sums]


def budget_ranks(module_scores: list[list[float]], budget: int) -> list[int]:
    """
    Rank of each module when `budget` vectors are kept in total.          [NormAL LoRA, Algorithm 3]

    Greedy: one more rank to the module whose next vector scores highest; ties to the lower rank, then the earlier module.
    Since s_1 = 1 is the highest score there is and rank 0 the lowest, every module gets its first vector first.

    A module without vectors (rank 0) stays without.
    Raises: ValueError (budget below the number of modules or above all ranks together).
    """
    modules, total = sum(map(bool, module_scores)), sum(map(len, module_scores))
    if not modules <= budget <= total:
        raise ValueError(
            f"NormAL: budget must be between {modules} (one rank for each module) and {total} (all ranks together), got {budget}"
        )
    ranks = [0] * len(module_scores)
    heap = [(-of_module[0], 0, index) for index, of_module in enumerate(module_scores) if of_module]
    heapq.heapify(heap)
    for _ in range(budget):
        _, rank, index = heapq.heappop(heap)
        ranks[index] = rank + 1
        if rank + 1 < len(module_scores[index]):
            heapq.heappush(heap, (-module_scores[index][rank + 1], rank + 1, index))
    return ranks


def threshold_ranks(module_scores: list[list[float]], threshold: float, first_below: bool = False) -> list[int]:
    """Rank of each module: up to the last score > `threshold`, or (`first_below`) before the first ≤ it.  [Algorithm 2]"""
    ranks = []
    for of_module in module_scores:
        above = [r for r, score in enumerate(of_module, start=1) if score > threshold]
        below = [r for r, score in enumerate(of_module, start=1) if score <= threshold]
        if first_below:
            ranks.append(below[0] - 1 if below else len(of_module))
        else:
            ranks.append(max(above, default=0))
    return ranks


class NormAL(Method):
    """The method while it trains; `config` is checked against the modules here.  Raises: ValueError (budget out of range)."""

    start_fields = Method.start_fields | {"t_p", "t_c"}

    def __init__(self, config: NormALConfig, layers: dict[str, LoraLinear]):
        super().__init__(config, layers)
        self.full_ranks: dict[str, int] = {}
        self.budget = config.budget
        if config.target_r is not None:
            self.budget = round(config.target_r * len(layers))
        self.clipped = False
        ranks = {name: layer.rank for name, layer in layers.items()}
        self.check_ranks(ranks)
        self.start_from(ranks)
        self.t_p, self.t_c = config.t_p, config.t_c
        self.change: float | None = None  # smoothed |L_t − L_{t−1}|
        self.last_loss: float | None = None

    @property
    def phase(self) -> str:
        """ "penalty" until t_p, "waiting" until t_c, then "clipped"."""
        if self.clipped:
            return "clipped"
        return "penalty" if self.t_p is None or self.t < self.t_p else "waiting"

    def _factors(self):
        return [layer.lora_A for layer in self.layers.values()], [layer.lora_B for layer in self.layers.values()]

    def needs_loss(self) -> bool:
        return self.config.schedule == "adaptive" and not self.clipped

    def _shrinks(self) -> bool:
        return self.config.penalty_step == "proximal" and self.config.penalty != "none" and self.phase == "penalty"

    def needs_optimizer(self) -> bool:
        return not self.clipped

    def awaits_clip(self) -> bool:
        return not self.clipped

    def may_change(self) -> bool:
        if self.clipped:
            return False
        adaptive = self.config.schedule == "adaptive" and self.t + 1 >= self.config.min_steps
        return adaptive or self.t + 1 == self.t_c

    def writes_before_change(self) -> bool:
        return self._shrinks() and self.may_change()

    def check_ranks(self, ranks: dict[str, int]) -> None:
        if self.budget is not None and not self.clipped:
            budget_ranks([[1.0] * rank for rank in ranks.values()], self.budget)

    def start_from(self, ranks: dict[str, int]) -> None:
        self.full_ranks = dict(ranks)

    def penalty(self) -> torch.Tensor | None:
        """η_p · P while t < t_p, for penalty_step="gradient".          [Eq. 5]"""
        return self._term() if self.config.penalty_step == "gradient" else None

    def _term(self) -> torch.Tensor | None:
        if self.phase != "penalty" or self.config.penalty == "none":
            return None
        eta = self.config.eta_p / (max(self.full_ranks.values()) if self.config.penalty_mean else 1)
        return eta * rank_penalty(*self._factors(), kind=self.config.penalty)

    def step(self, loss: float | None, optimizers) -> dict[str, int] | None:
        if self._shrinks():
            self._shrink(optimizers)
        self.t += 1
        if self.clipped:
            return None
        if self.config.schedule == "adaptive":
            self._adapt(loss)
        if self.t != self.t_c:
            return None
        self.clipped = True
        return self._ranks()

    def _shrink(self, optimizers) -> None:
        """The proximal step of lr · η_p · P; each factor has the learning rate of its parameter group, one that is frozen 0."""
        rates = {
            p: float(group["lr"])
            for optimizer in optimizers
            for group in optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        }
        by_rates: dict[tuple[float, float], tuple[list, list]] = {}
        for layer in self.layers.values():
            own = tuple(rates[p] if p.requires_grad else 0.0 for p in (layer.lora_A, layer.lora_B))
            lora_As, lora_Bs = by_rates.setdefault(own, ([], []))
            lora_As.append(layer.lora_A)
            lora_Bs.append(layer.lora_B)
        for (rate_A, rate_B), (lora_As, lora_Bs) in by_rates.items():
            eta = self.config.eta_p
            rank_shrink_(lora_As, lora_Bs, (rate_A * eta, rate_B * eta), kind=self.config.penalty)

    def _adapt(self, loss: float) -> None:
        """Decide t_p, then t_c, when the smoothed change of the loss falls below λ_p, then λ_c.          [Eq. 6]"""
        config = self.config
        if self.last_loss is not None:
            change = abs(loss - self.last_loss)
            self.change = change if self.change is None else config.ema * self.change + (1 - config.ema) * change
        self.last_loss = loss
        forced = config.max_steps is not None and self.t >= config.max_steps
        if self.t_p is None:
            calm = self.change is not None and self.change < config.lambda_p
            if forced or (self.t >= config.min_steps and calm):
                self.t_p, self.change = self.t, None
        if self.t_p is not None and (forced or (self.change is not None and self.change < config.lambda_c)):
            self.t_c = self.t

    def log_values(self) -> dict[str, float]:
        """penalty: η_p · P, of the proximal step too; 0 once there is none."""
        with torch.no_grad():
            term = self._term()
        return {"penalty": 0.0 if term is None else float(term)}

    def scores(self) -> dict[str, list[float]]:
        """Scores of every module's vectors now; one `rank_norms` call.  Raises: NonFiniteError."""
        norms_A, norms_B = rank_norms(*self._factors())
        result = {}
        for name, *norms in zip(self.layers, norms_A, norms_B, strict=True):
            of_A, of_B = (n.tolist() for n in norms)
            if not all(map(math.isfinite, of_A + of_B)):
                raise NonFiniteError(f"NormAL: {name}: norms of the rank vectors must be finite, got {of_A} and {of_B}")
            result[name] = scores(of_A, of_B)
        return result

    def _ranks(self) -> dict[str, int]:
        of_modules = list(self.scores().values())
        if self.config.threshold is not None:
            ranks = threshold_ranks(of_modules, self.config.threshold, self.config.first_below)
        else:
            ranks = budget_ranks(of_modules, self.budget)
        return dict(zip(self.layers, ranks, strict=True))

    def scaling(self, name: str, layer: LoraLinear, rank: int) -> float:
        if not self.config.rescale:
            return layer.scaling
        full = self.full_ranks[name]
        return (
            layer.scaling * self.config.scaling(rank, 1.0) / self.config.scaling(full, 1.0) if full else layer.scaling
        )

    def state_dict(self) -> dict:
        names = ("t", "t_p", "t_c", "clipped", "change", "last_loss", "full_ranks")
        return {name: getattr(self, name) for name in names}
