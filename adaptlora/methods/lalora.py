"""La-LoRA: a budget of ranks that grows with the norms, shared out over groups of modules.          [La-LoRA, Eq. 5–10]"""

import math
from array import array
from bisect import bisect_right

import torch

from ..config import LaLoRAConfig
from ..ops import rank_norms
from ..ranks import FACTORS
from ..targets import block_of
from .base import Method, NonFiniteError


def next_budget(budget: float, growths: list[float], gamma: float, caps: list[int]) -> float:
    """D ← clip(D · (1 + γ · mean growth), number of groups, Σ caps)          [Eq. 5]"""
    grown = budget * (1 + gamma * sum(growths) / len(growths))
    return float(min(max(grown, len(caps)), sum(caps)))


def shares(contributions: list[float], total: int, caps: list[int], temperature: float = 1.0) -> list[float]:
    """
    softmax(c / temperature) · total, held within [1, cap]: what a group has no room for goes to the others, by their own softmax.

    The numbers exp(c_i / temperature + μ), clamped to [1, cap_i], with the one μ at which they add up to `total`; where nothing is
    clamped that is the softmax itself. Computed in logarithms: a softmax that is one-hot in floating point still orders the rest.
    len(caps) ≤ total ≤ Σ caps.          [Eq. 8]
    """
    z = [c / temperature for c in contributions]
    lows, highs = [-value for value in z], [math.log(cap) - value for value, cap in zip(z, caps, strict=True)]

    def clamped(mu: float) -> list[float]:
        # Compared in logarithms first: exp could overflow.
        return [
            1.0 if mu <= low else float(cap) if mu >= high else min(max(math.exp(mu - low), 1.0), cap)
            for low, high, cap in zip(lows, highs, caps, strict=True)
        ]

    points = sorted({*lows, *highs})
    index = bisect_right(points, total, key=lambda mu: sum(clamped(mu)))
    if index == len(points):
        return clamped(points[-1])
    left, right = points[index - 1], points[index]
    parts = clamped(left)
    free = [i for i in range(len(z)) if lows[i] <= left and right <= highs[i]]
    room = total - (sum(parts) - sum(parts[i] for i in free))
    top = max(z[i] for i in free)
    weights = {i: math.exp(z[i] - top) for i in free}
    for i, weight in weights.items():
        parts[i] = min(max(room * weight / sum(weights.values()), 1.0), float(caps[i]))
    return parts


def allocate(contributions: list[float], budget: float, caps: list[int], temperature: float = 1.0) -> list[int]:
    """
    Ranks in [1, cap] that add up to round(budget): `shares` rounded down, and what is left over by the largest remainders, equal ones to
    the earlier group.          [Eq. 8]
    """
    total = round(budget)
    parts = shares(contributions, total, caps, temperature)
    # A share that is an integer but for rounding is one, so that ties do not depend on the last bit.
    parts = [round(part, 9) for part in parts]
    ranks = [math.floor(part) for part in parts]
    open_ = [i for i, rank in enumerate(ranks) if rank < caps[i]]
    for i in sorted(open_, key=lambda i: (ranks[i] - parts[i], i))[: total - sum(ranks)]:
        ranks[i] += 1
    return ranks


def _gradient(pair, factor: str) -> torch.Tensor | None:
    """Zeros for a factor that is frozen."""
    parameter = getattr(pair, factor)
    return parameter.grad if parameter.requires_grad else parameter.new_zeros(()).expand(parameter.shape)


class LaLoRA(Method):
    """The method while it trains.  Raises: ValueError (modules of one group with different largest ranks)."""

    start_fields = Method.start_fields - {"r", "rank_pattern"}  # what ranks may grow to

    def __init__(self, config: LaLoRAConfig, layers):
        super().__init__(config, layers)
        names = [block_of(name) if config.group_by == "block" else name for name in layers]
        self.pairs = [layer.pair for layer in layers.values()]
        self.groups = list(dict.fromkeys(names))
        numbers = {name: i for i, name in enumerate(self.groups)}
        self.group_of = [numbers[name] for name in names]
        self._group_of = torch.tensor(self.group_of, device="cpu")
        self.caps = self._per_group("r", [self.rank_and_scaling(config, name)[0] for name in layers])
        self.group_ranks = self._per_group("rank", [layer.rank for layer in layers.values()])
        self.budget = float(sum(self.group_ranks))
        self.final = False
        self.fisher: list[float] | None = None  # smoothed over the steps that were read
        self._read_at: int | None = None  # t of the last of them
        self._fisher: torch.Tensor | None = None  # the same, where the gradients are
        self.sizes: list[float] | None = None  # s_i of the last allocation, at the ranks that it was followed by
        self.truncated: list[list[float]] | None = None  # ‖A‖ and ‖B‖ of every module then, likewise
        self.start: list[int] = list(self.group_ranks)
        self._made = array("q")  # step, group, rank of every change: nothing but numbers, since it grows with the run
        self._ranks_before: list[int] = []  # of the step that is being made

    @staticmethod
    def first_rank(config, r: int) -> int:
        return 1

    def _per_group(self, what: str, values: list[int]) -> list[int]:
        """One value for each group.  Raises: ValueError (modules of a group that differ)."""
        found: dict[int, int] = {}
        for name, group, value in zip(self.layers, self.group_of, values, strict=True):
            if found.setdefault(group, value) != value:
                raise ValueError(
                    f"La-LoRA: modules of one group must have the same {what}; {self.groups[group]} has {found[group]}, "
                    f"got {value} for {name}"
                )
        return [found[group] for group in range(len(self.groups))]

    @property
    def phase(self) -> str:
        """ "adapting", and "final" once `Adapter.compact` was called."""
        return "final" if self.final else "adapting"

    def needs_optimizer(self) -> bool:
        return not self.final

    def may_change(self) -> bool:
        return not self.final and (self.t + 1) % self.config.interval == 0

    @property
    def parks(self) -> bool:
        return not self.final

    def compacted(self) -> None:
        self.final = True

    def largest_ranks(self) -> dict[str, int]:
        return {name: self.caps[group] for name, group in zip(self.layers, self.group_of, strict=True)}

    def check_ranks(self, ranks: dict[str, int]) -> None:
        if self.final:
            return
        found = self._per_group("rank", [ranks[name] for name in self.layers])
        for group, rank, cap in zip(self.groups, found, self.caps, strict=True):
            if not 1 <= rank <= cap:
                raise ValueError(f"La-LoRA: the rank of {group} must be in [1, {cap}], got {rank}")

    def start_from(self, ranks: dict[str, int]) -> None:
        if self.final:
            return
        self.group_ranks = self._per_group("rank", [ranks[name] for name in self.layers])
        self.budget = float(sum(self.group_ranks))
        self.start, self._made, self.fisher, self._fisher = list(self.group_ranks), array("q"), None, None
        self._measure(self._norms())

    def begin(self) -> None:
        self._measure(self._norms())
        super().begin()

    def before_optimizer_step(self, optimizer) -> None:
        """
        Σ of squared gradients of each group's active vectors, smoothed, once a step; nothing is copied to the host. A fused optimizer
        gets gradients that a GradScaler has scaled, and steps that it will skip: these, and whatever is not finite, leave no trace.
        """
        if self.config.contribution != "fisher" or self.final or self._read_at == self.t:
            return
        used = [i for i, pair in enumerate(self.pairs) if all(_gradient(pair, f) is not None for f in FACTORS)]
        if not used:
            return
        self._read_at = self.t
        with torch.no_grad():
            grads = [[_gradient(self.pairs[i], f) for i in used] for f in FACTORS]
            sums = torch.stack([torch.cat(norms).double().square() for norms in rank_norms(*grads)]).sum(0)
            owners = self._group_of[used].repeat_interleave(
                torch.tensor([self.pairs[i].rank for i in used], device="cpu")
            )
            found = sums.new_zeros(len(self.groups)).index_add_(0, owners.to(sums.device, non_blocking=True), sums)
            scale = getattr(optimizer, "grad_scale", None)
            if scale is not None:
                found = found / scale.to(found).square()
            if self._fisher is None:
                # NaN for a group that no gradient was read of yet
                known = [math.nan] * len(self.groups) if self.fisher is None else self.fisher
                self._fisher = found.new_tensor(known)
            smoothed = self.config.ema * self._fisher + (1 - self.config.ema) * found
            keep = ~found.isfinite().all()
            found_inf = getattr(optimizer, "found_inf", None)
            if found_inf is not None:
                keep = keep | (found_inf.to(found.device) > 0).any()
            new = torch.where(self._fisher.isfinite(), smoothed, found)
            self._fisher = torch.where(keep, self._fisher, new)

    def step(self, loss, optimizers) -> dict[str, int] | None:
        self.t += 1
        if self.final or self.t % self.config.interval:
            return None
        # The model's state may have been loaded meanwhile.
        self.group_ranks = self._per_group("rank", [pair.rank for pair in self.pairs])
        norms = self._norms()
        if self.config.contribution == "fisher" and not all(map(math.isfinite, self.fisher or [math.nan])):
            return None  # every step so far was skipped, or had no gradients
        growths = self._growths(norms)
        contributions = self._contributions(norms)
        self.budget = next_budget(self.budget, growths, self.config.gamma, self.caps)
        ranks = allocate(contributions, self.budget, self.caps, self.config.temperature)
        own_sizes = self._sizes(norms)
        self._ranks_before, self.group_ranks = self.group_ranks, ranks
        self._measure(norms)
        if self.config.growth == "own":
            self.sizes = own_sizes
        if ranks == self._ranks_before:
            return None
        return {name: ranks[group] for name, group in zip(self.layers, self.group_of, strict=True)}

    def _norms(self) -> torch.Tensor:
        """
        ‖A_{|k}‖ and ‖B_{|k}‖ of every module for every k, (2, modules, largest r + 1) float64 on the host: one `rank_norms`, and one copy
        from the device. Vectors that a module has no room for count as zeros.  Raises: NonFiniteError.
        """
        with torch.no_grad():
            norms_A, norms_B = rank_norms(*zip(*(pair.whole() for pair in self.pairs), strict=True))
            pieces = [torch.cat(norms_A), torch.cat(norms_B)]
            if self._fisher is not None:
                pieces.append(self._fisher.to(pieces[0].dtype))
            flat = torch.cat(pieces).cpu().double()
        held = [len(norms) for norms in norms_A]
        if self._fisher is not None:
            self.fisher = flat[2 * sum(held) :].tolist()
        flat = flat[: 2 * sum(held)].view(2, -1)
        if not flat.isfinite().all():
            bad = (~flat.isfinite()).any(0).nonzero()[0].item()
            index = bisect_right([sum(held[: i + 1]) for i in range(len(held))], bad)
            raise NonFiniteError(
                f"La-LoRA: {list(self.layers)[index]}: norms of the rank vectors must be finite, got {flat[:, bad].tolist()}"
            )
        squares = flat.new_zeros(2, len(held), max(*held, *self.caps) + 1)
        if len(set(held)) == 1:
            squares[:, :, 1 : held[0] + 1] = flat.view(2, len(held), -1).square()
        else:
            for i, part in enumerate(flat.square().split(held, dim=1)):
                squares[:, i, 1 : held[i] + 1] = part
        return squares.cumsum_(-1).sqrt_()

    def _at(self, norms: torch.Tensor) -> torch.Tensor:
        """Norms at today's ranks, (2, modules)."""
        ranks = torch.tensor(self.group_ranks, device="cpu")[self._group_of]
        return norms.gather(2, ranks[None, :, None].expand(2, -1, 1))[..., 0]

    def _by_group(self, values: torch.Tensor) -> list[float]:
        return values.new_zeros(len(self.groups)).index_add_(0, self._group_of, values).tolist()

    def _sizes(self, norms: torch.Tensor) -> list[float]:
        """s_i = (1/r_i) Σ_modules (‖B_{|r_i}‖ + ‖A_{|r_i}‖)          [Eq. 7]"""
        sums = self._by_group(self._at(norms).sum(0))
        return [total / rank for total, rank in zip(sums, self.group_ranks, strict=True)]

    def changed(self, ranks: dict[str, int]) -> None:
        for group, (rank, before) in enumerate(zip(self.group_ranks, self._ranks_before, strict=True)):
            if rank != before:
                self._made.extend((self.t, group, rank))

    @property
    def changes(self) -> list[list[int]]:
        """[step, group, rank] of every change so far."""
        return [list(change) for change in zip(*[iter(self._made)] * 3, strict=True)]

    def _measure(self, norms: torch.Tensor) -> None:
        """Keep of this step what the next allocation compares with, at the ranks it will find."""
        self.sizes = self._sizes(norms)
        if self.config.fidelity == "previous":
            self.truncated = self._at(norms).tolist()

    def _growths(self, norms: torch.Tensor) -> list[float]:
        """(s_i^t − s_i^{t−1}) / s_i^{t−1}; 0 where nothing was there before.          [Eq. 6]"""
        now = self._sizes(norms)
        before = self.sizes if self.sizes is not None else now
        return [(s - old) / old if old else 0.0 for s, old in zip(now, before, strict=True)]

    def _contributions(self, norms: torch.Tensor) -> list[float]:
        """c_i = Σ_modules (f_A ‖B_{|r_i}‖ + f_B ‖A_{|r_i}‖), or the squared gradients.          [Eq. 9]"""
        if self.config.contribution == "fisher":
            return self.fisher
        at = self._at(norms)
        kept, whole = {
            "truncation": (at, norms[..., -1]),
            "previous": (at if self.truncated is None else at.new_tensor(self.truncated), at),
            "off": (at, at),
        }[self.config.fidelity]
        fidelity = torch.where(whole > 0, kept / whole, 1.0)
        return self._by_group((fidelity * at.flip(0)).sum(0))

    def summary(self) -> dict:
        return super().summary() | {"budget": self.budget}

    def log_values(self) -> dict[str, float]:
        return {"budget": self.budget}

    def history(self) -> dict:
        """{"groups": {group: its modules}, "start": the groups' first ranks, "changes": [[step, group's number, rank], …], "steps"}"""
        members: dict[str, list[str]] = {group: [] for group in self.groups}
        for name, group in zip(self.layers, self.group_of, strict=True):
            members[self.groups[group]].append(name)
        return {"groups": members, "start": self.start, "changes": self.changes, "steps": self.t}

    def step_state(self) -> dict:
        return self._numbers() | {"_ranks_before": self._ranks_before}

    def _numbers(self) -> dict:
        names = ("t", "budget", "group_ranks", "sizes", "truncated", "fisher", "final")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict:
        if self._fisher is not None:
            self.fisher = self._fisher.tolist()
        return self._numbers() | {"start": self.start, "changes": self.changes}

    def check_state(self, state: dict) -> None:
        L, modules = len(self.groups), len(self.layers)
        lengths = {"group_ranks": [L], "start": [L], "sizes": [L], "fisher": [L, None], "truncated": [2, None]}
        for field, expected in lengths.items():
            value = state[field]
            found = len(value) if isinstance(value, list) else None if value is None else -1
            if found not in expected:
                raise ValueError(f"method's {field} must be a list of {expected[0]}, one for each group, got {value!r}")
        if state["truncated"] is not None and any(len(row) != modules for row in state["truncated"]):
            raise ValueError(f"method's truncated must be of {modules} modules, got {state['truncated']!r}")
        numbers = [*state["group_ranks"], *state["sizes"], *(state["fisher"] or []), state["budget"], state["t"]]
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise ValueError(f"method's state must hold numbers, got {numbers!r}")
        for change in state["changes"] if isinstance(state["changes"], list) else [state["changes"]]:
            if not (isinstance(change, list) and len(change) == 3 and all(isinstance(n, int) for n in change)):
                raise ValueError(f"method's changes must be [step, group, rank] each, got {change!r}")

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict({name: value for name, value in state.items() if name != "changes"})
        if "changes" in state:
            self._fisher = self._read_at = None
            self._made = array("q", (number for change in state["changes"] for number in change))
