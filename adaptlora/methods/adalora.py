"""AdaLoRA: triplets of B diag(E) A go by the importance of their elements, down to a budget.          [AdaLoRA, arXiv:2303.10512]"""

import copy

import torch
from torch import nn

from ..config import AdaLoRAConfig
from ..nn import AdaLoraLinear
from ..rank_slots import factor_rows
from ..targets import pattern_value
from ..triplets import TripletPair
from .base import Method, NonFiniteError


def budget_at(t: int, start: int, target: int, tinit: int, last: int) -> int:
    """Triplets after step t: ⌊target + (start − target)(1 − (t − tinit)/(last − tinit))³⌋ between tinit and `last`.          [Eq. 12]"""
    left = 1 - (min(max(t, tinit), last) - tinit) / (last - tinit)
    return int((start - target) * left**3 + target)


def lowest(scores: torch.Tensor, budget: int) -> list[int]:
    """The numbers of all but the `budget` triplets of the highest scores, ascending; of equal ones the first stay."""
    return scores.argsort(descending=True, stable=True)[budget:].sort().values.tolist()


@torch.no_grad()
def read_gradients(pairs: list[TripletPair], optimizer: torch.optim.Optimizer, beta1: float, beta2: float) -> None:
    """
    I = |w · dL/dw|,   Ī ← β₁ Ī + (1 − β₁) I,   Ū ← β₂ Ū + (1 − β₂) |I − Ī|          [Eq. 9–11]

    of every element of the factors that `optimizer` has just stepped, by its weights after the step, as PEFT's allocator finds them.
    A step that a GradScaler makes a fused optimizer skip, and whatever is not finite, leave no trace. One wait for the device.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    factors = [
        (pair, p) for pair in pairs for p in pair.parameters() if id(p) in held and p.grad is not None and p.numel()
    ]
    if not factors:
        return
    weights, grads = [p.detach() for _, p in factors], [p.grad for _, p in factors]
    sensitivities = torch._foreach_mul(weights, grads)
    torch._foreach_abs_(sensitivities)
    skipped = getattr(optimizer, "found_inf", None)
    sizes = [size.to(grads[0].device) for size in torch._foreach_norm(sensitivities)]
    counts = torch.stack(sizes).isfinite().all()
    if skipped is not None:
        counts = counts & (skipped.to(counts.device) == 0).all()
    if not counts:
        return
    kept = [pair.sensitivity.of(p) for pair, p in factors]
    means, uncertainties = [k["mean"] for k in kept], [k["uncertainty"] for k in kept]
    torch._foreach_mul_(means, beta1)
    torch._foreach_add_(means, sensitivities, alpha=1 - beta1)
    torch._foreach_sub_(sensitivities, means)
    torch._foreach_abs_(sensitivities)
    torch._foreach_mul_(uncertainties, beta2)
    torch._foreach_add_(uncertainties, sensitivities, alpha=1 - beta2)


def triplet_scores(pair: TripletPair) -> torch.Tensor:
    """(R,): Ī Ū of E's number, plus its means over the row of A and the column of B.          [Eq. 7]"""
    means = {}
    for name in pair.factor_names:
        kept = pair.sensitivity.of(getattr(pair, name))
        means[name] = factor_rows(name, kept["mean"] * kept["uncertainty"]).mean(1)
    return means["lora_E"] + (means["lora_A"] + means["lora_B"])


class AdaLoRA(Method):
    """The method while it trains; `config` is checked against the modules here.  Raises: ValueError (a target_r above the ranks)."""

    layer_class = AdaLoraLinear
    start_fields = Method.start_fields | {"init_r"}

    def __init__(self, config: AdaLoRAConfig, layers):
        super().__init__(config, layers)
        self.pairs: list[TripletPair] = [layer.pair for layer in layers.values()]
        self.target = round(config.target_r * len(layers))
        self.last = config.total_step - config.tfinal
        self.final = False
        self.start: list[int] = []
        self.changes: list[list[int]] = []  # [step, module's number, rank]
        self._orders: dict[str, list[int]] = {}
        self._masked: list[int] = []  # of all triplets, one module's after the other's
        ranks = {name: layer.rank for name, layer in layers.items()}
        self.check_ranks(ranks)
        self.start_from(ranks)

    @staticmethod
    def rank_and_scaling(config, name: str) -> tuple[int, float]:
        """PEFT's scaling, lora_alpha / (r + 1e-5)."""
        r, _ = Method.rank_and_scaling(config, name)
        return r, pattern_value(config.alpha_pattern, name, config.lora_alpha) / (r + 1e-5)

    @classmethod
    def parameters(cls, config, name: str, module: nn.Module) -> int:
        r, _ = cls.rank_and_scaling(config, name)
        return super().parameters(config, name, module) + r

    @property
    def phase(self) -> str:
        """ "warmup" until tinit, "pruning" until the last choice, then "final"."""
        if self.final:
            return "final"
        return "warmup" if self.t < self.config.tinit else "pruning"

    @property
    def budget(self) -> int:
        """Triplets that the schedule leaves at this step."""
        return budget_at(self.t, sum(self.start), self.target, self.config.tinit, self.last)

    @property
    def orders(self) -> dict[str, list[int]]:
        return self._orders

    def _chooses(self, t: int) -> bool:
        """Whether triplets are masked or removed at the end of step t."""
        return not self.final and (t >= self.last or (t > self.config.tinit and t % self.config.deltaT == 0))

    def _removes(self, t: int) -> bool:
        return self._chooses(t) and (t >= self.last or self.config.removal == "update")

    def needs_optimizer(self) -> bool:
        return not self.final

    def may_change(self) -> bool:
        return self._chooses(self.t + 1)

    def awaits_clip(self) -> bool:
        return not self.final

    def check_ranks(self, ranks: dict[str, int]) -> None:
        total = sum(ranks.values())
        if not self.final and total < self.target:
            raise ValueError(
                f"AdaLoRA: target_r must leave at most the {total} triplets that there are, got {self.config.target_r} for each of "
                f"{len(ranks)} modules, {self.target} in all"
            )

    def start_from(self, ranks: dict[str, int]) -> None:
        self.start, self.changes = list(ranks.values()), []
        self._forget()

    def _forget(self) -> None:
        for pair in self.pairs:
            pair.take_statistics({})

    def penalty(self) -> torch.Tensor | None:
        """orth_reg_weight · mean over all P = A, Bᵀ of ‖P Pᵀ − I‖_F"""
        if not self.config.orth_reg_weight:
            return None
        grams: dict[tuple, list[torch.Tensor]] = {}
        for pair in self.pairs:
            for rows in (pair.lora_A, pair.lora_B.t()):
                grams.setdefault((pair.rank, rows.device), []).append(rows @ rows.t())
        terms = []
        for (rank, device), of_rank in grams.items():
            errors = torch.stack(of_rank) - torch.eye(rank, dtype=of_rank[0].dtype, device=device)
            terms.append(torch.linalg.vector_norm(errors, dim=(1, 2)).sum())
        total = sum(term.to(terms[0].device) for term in terms)
        return self.config.orth_reg_weight * total / (2 * len(self.pairs))

    def after_optimizer_step(self, optimizer) -> None:
        # PEFT's last choice goes by the sensitivities of the step before.
        if not self.final and self.t + 1 < self.last:
            read_gradients(self.pairs, optimizer, self.config.beta1, self.config.beta2)

    def step(self, loss, optimizers) -> dict[str, int] | None:
        self.t += 1
        if not self._chooses(self.t):
            return None
        removes, self.final = self._removes(self.t), self.t >= self.last
        goes = lowest(self._scores(), self.budget)
        if not removes:
            self._masked = goes
            return None
        flags = self._flags(goes)
        # Those that stay first, in the order they had.
        self._orders = {name: gone.int().argsort(stable=True).tolist() for name, gone in flags.items() if gone.any()}
        return {name: int((~gone).sum()) for name, gone in flags.items()} if goes else None

    def _flags(self, numbers: list[int], device="cpu") -> dict[str, torch.Tensor]:
        """{module: (R,) bool}, true for these of all triplets."""
        ranks = [pair.rank for pair in self.pairs]
        flags = torch.zeros(sum(ranks), dtype=torch.bool, device=device)
        flags[numbers] = True
        return dict(zip(self.layers, flags.split(ranks), strict=True))

    def masked(self) -> dict[str, list[int]]:
        flags = self._flags(self._masked) if self._masked else {}
        return {name: gone.nonzero()[:, 0].tolist() for name, gone in flags.items() if gone.any()}

    @torch.no_grad()
    def unchanged(self) -> None:
        if self._masked:
            flags = {device: self._flags(self._masked, device) for device in {p.lora_E.device for p in self.pairs}}
            for name, pair in zip(self.layers, self.pairs, strict=True):
                pair.lora_E.masked_fill_(flags[pair.lora_E.device][name][:, None], 0.0)
            self._masked = []
        self._forget_at_end()

    def changed(self, ranks: dict[str, int]) -> None:
        for number, name in enumerate(self.layers):
            if name in self._orders:
                self.changes.append([self.t, number, ranks[name]])
        self._orders = {}
        self._forget_at_end()

    def _forget_at_end(self) -> None:
        if self.final and any(pair.sensitivity.state for pair in self.pairs):
            self._forget()

    @torch.no_grad()
    def _scores(self) -> torch.Tensor:
        """Of all triplets, one module's after the other's, on the host.  Raises: NonFiniteError, ValueError (nothing read)."""
        if not any(pair.sensitivity.state for pair in self.pairs):
            raise ValueError(
                f"AdaLoRA: gradients must have been read before triplets are chosen at step {self.t}, and none were: the optimizer must be "
                "tracked (adapter.track) before its first step"
            )
        scores = [triplet_scores(pair) for pair in self.pairs]
        on_host = torch.cat([of_pair.to(scores[0].device) for of_pair in scores]).cpu()
        if not on_host.isfinite().all():
            bad = next(name for name, of_pair in zip(self.layers, scores, strict=True) if not of_pair.isfinite().all())
            raise NonFiniteError(f"AdaLoRA: {bad}: importance of the triplets must be finite, got NaN or infinity")
        return on_host

    def summary(self) -> dict:
        return {"budget": self.budget}

    def log_values(self) -> dict[str, float]:
        """budget: of triplets; penalty: the orthogonal one, 0 without."""
        with torch.no_grad():
            term = self.penalty()
        return {"budget": self.budget, "penalty": 0.0 if term is None else float(term)}

    def history(self) -> dict | None:
        """{"groups": {module: [module]}, "start": their first ranks, "changes": [[step, module's number, rank], …], "steps"}"""
        if self.config.removal != "update":
            return None
        return {
            "groups": {name: [name] for name in self.layers},
            "start": self.start,
            "changes": self.changes,
            "steps": self.t,
        }

    def step_state(self) -> dict:
        return {"t": self.t, "final": self.final, "_orders": self._orders, "_masked": self._masked}

    def state_dict(self) -> dict:
        return {
            "t": self.t,
            "final": self.final,
            "start": list(self.start),
            "changes": [list(change) for change in self.changes],
        }

    def check_state(self, state: dict) -> None:
        if not isinstance(state["final"], bool):
            raise ValueError(f"method's final must be true or false, got {state['final']!r}")
        start, changes = state["start"], state["changes"]
        whole = isinstance(start, list) and len(start) == len(self.layers) and all(type(rank) is int for rank in start)
        if not whole:
            raise ValueError(f"method's start must be a list of {len(self.layers)} ranks, got {start!r}")
        for change in changes if isinstance(changes, list) else [changes]:
            if not (isinstance(change, list) and len(change) == 3 and all(type(number) is int for number in change)):
                raise ValueError(f"method's changes must be [step, module, rank] each, got {change!r}")

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(copy.deepcopy(state))
