"""A rank change of every module of a model, r = 8 to ranks that average 4, with AdamW's moments.

Counted: work.rank_change, 24 bytes for each number that stays, of the factors and of two moments: 4.0 MB for MiniLM, 29 MB for
SmolLM2-135M. The floor copies these bytes from one flat buffer to another. The masks are the method as it is published: whatever comes
after them costs what it cost before.
"""

from collections.abc import Iterator

import torch
from torch import nn

from ..ranks import RankedPair, commit_ranks
from . import work
from .accuracy import WrongResultError
from .case import Case, Options
from .models import MODELS, TARGET, R

FLAT = "one flat copy of what stays"
MOMENTS = ("exp_avg", "exp_avg_sq")


def target_ranks(names) -> dict[str, int]:
    """Ranks that differ, TARGET on average."""
    ranks = {name: TARGET + (1 if i % 2 else -1) * (i // 2 % 3) for i, name in enumerate(names)}
    assert sum(ranks.values()) == TARGET * len(ranks)
    return ranks


class RankChange:
    """Every pair to its rank in `ranks`; `prepare`, which is not timed, brings all back to r = 8."""

    def __init__(self, pairs: dict[str, RankedPair], optimizer, ranks: dict[str, int], *, compact: bool = True):
        self.pairs, self.optimizer, self.ranks, self.compact = pairs, optimizer, ranks, compact

    def prepare(self) -> None:
        commit_ranks(self.pairs, dict.fromkeys(self.pairs, R))

    def __call__(self) -> None:
        commit_ranks(self.pairs, self.ranks, compact=self.compact)

    def rows(self, name: str) -> list[torch.Tensor]:
        """Rank vectors of a module and of its moments, A's and B's."""
        return _rows(self.pairs[name].lora_A, self.pairs[name].lora_B, self.optimizer)


class NewParameters:
    """What a training loop without such a thing does: for each module parameters and moments of the new size, and a new optimizer."""

    def __init__(self, pairs: dict[str, RankedPair], optimizer, ranks: dict[str, int]):
        self.old = {name: (pair.lora_A, pair.lora_B) for name, pair in pairs.items()}
        self.old_optimizer, self.ranks = optimizer, ranks
        self.prepare()

    def prepare(self) -> None:
        self.pairs, self.optimizer = self.old, self.old_optimizer

    def __call__(self) -> None:
        self.pairs, state = {}, {}
        for name, (A, B) in self.old.items():
            made = []
            for factor, kept in ((A, (slice(self.ranks[name]),)), (B, (slice(None), slice(self.ranks[name])))):
                made.append(nn.Parameter(factor.detach()[kept].clone(memory_format=torch.contiguous_format)))
                state[made[-1]] = {
                    key: value[kept].clone(memory_format=torch.contiguous_format) if value.dim() else value
                    for key, value in self.old_optimizer.state[factor].items()
                }
            self.pairs[name] = tuple(made)
        self.optimizer = torch.optim.AdamW(list(state))
        self.optimizer.state.update(state)

    def rows(self, name: str) -> list[torch.Tensor]:
        return _rows(*self.pairs[name], self.optimizer)


def _rows(A, B, optimizer) -> list[torch.Tensor]:
    sides = (A, lambda t: t), (B, torch.t)
    return [
        turn(t.detach()) for factor, turn in sides for t in (factor, *(optimizer.state[factor][m] for m in MOMENTS))
    ]


class Masks:
    """Pruned ranks as a 0 in a mask; nothing gets smaller."""

    def __init__(self, ranks: dict[str, int], device: torch.device):
        self.ranks = ranks
        self.masks = {name: torch.ones(R, device=device) for name in ranks}

    def prepare(self) -> None:
        for mask in self.masks.values():
            mask.fill_(1)

    def __call__(self) -> None:
        for name, mask in self.masks.items():
            mask[self.ranks[name] :] = 0


def make_pairs(name: str, device: torch.device) -> tuple[dict[str, RankedPair], torch.optim.AdamW]:
    """The factors of a model's modules, and AdamW with its state after one step; the same values on every call."""
    generator = torch.Generator().manual_seed(0)
    dims = MODELS[name]
    shapes = dims.block * dims.blocks
    pairs = {str(i): RankedPair(K, N, R, generator=generator, device=device) for i, (K, N) in enumerate(shapes)}
    factors = [factor for pair in pairs.values() for factor in (pair.lora_A, pair.lora_B)]
    optimizer = torch.optim.AdamW(factors)
    for pair in pairs.values():
        pair.track(optimizer)
    for factor in factors:
        factor.grad = torch.randn(factor.shape, generator=generator).to(device)
    optimizer.step()
    optimizer.zero_grad()
    return pairs, optimizer


def change_case(name: str, device: torch.device) -> Case:
    """Raises: WrongResultError (another vector or moment than the first ones of each module)."""
    pairs, optimizer = make_pairs(name, device)
    ranks = target_ranks(pairs)
    whole = {module: _rows(pair.lora_A, pair.lora_B, optimizer) for module, pair in pairs.items()}
    masks = Masks(ranks, device)
    providers = {
        "adaptlora, memory freed": RankChange(*make_pairs(name, device), ranks),
        "adaptlora, views": RankChange(*make_pairs(name, device), ranks, compact=False),
        "new parameters and optimizer": NewParameters(pairs, optimizer, ranks),
    }
    for title, change in providers.items():
        change()
        for module, rows in whole.items():
            for found, expected in zip(change.rows(module), rows, strict=True):
                if not torch.equal(found, expected[: ranks[module]]):
                    raise WrongResultError(f"{title}: module {module} does not keep its first {ranks[module]} vectors")
    masks()
    if any(mask.sum() != ranks[module] for module, mask in masks.masks.items()):
        raise WrongResultError("masks: other ranks than were asked for")
    dims = MODELS[name]
    kept = sum(ranks[str(i)] * (K + N) for i, (K, N) in enumerate(dims.block * dims.blocks))
    old = torch.ones(3 * kept, device=device)
    new = torch.empty_like(old)
    # Views move nothing that stays, nor do masks.
    return Case(
        f"{dims.title}: r = {R} → {TARGET} on average",
        {FLAT: lambda: new.copy_(old), **providers, "masks, as published": masks},
        FLAT,
        rounds=51,
        facts={"modules": len(ranks), "MB to move": round(work.rank_change(kept).bytes / 1e6, 2)},
        work=dict.fromkeys((FLAT, "adaptlora, memory freed", "new parameters and optimizer"), work.rank_change(kept)),
    )


def cases(options: Options) -> Iterator[Case]:
    for name in ("tiny",) if options.quick else ("minilm", "smollm2"):
        yield change_case(name, options.device)
