"""What cost_growth.py measures: stacks of frozen linears with adapters of both packages, and the calls that are timed on them."""

from dataclasses import dataclass
from types import SimpleNamespace

import peft
import torch
from torch import nn

import adaptlora
from adaptlora.benchmarks.accuracy import WrongResultError
from adaptlora.benchmarks.harness import peak_bytes
from adaptlora.benchmarks.models import ALPHA, Ours, Peft, shared_copy
from adaptlora.benchmarks.rank_change import NewParameters, RankChange
from adaptlora.ops import rank_penalty
from adaptlora.ranks import commit_ranks

ETA = 1e-3
TARGETS = r"layers\.\d+"
FROZEN, PEFT, OURS = "frozen", "PEFT", "adaptlora"


@dataclass(frozen=True)
class Point:
    """What a cost is measured at: rank of every module, square modules in a row, tokens of a step, in_features = out_features."""

    rank: int = 8
    modules: int = 12
    tokens: int = 256
    width: int = 256


class Stack(nn.Module):
    """Linears one after the other with random weights of unit gain; returns an object with .loss, as providers.py steps it."""

    def __init__(self, point: Point):
        super().__init__()
        like = {"bias": False, "dtype": torch.float32}
        self.layers = nn.ModuleList(nn.Linear(point.width, point.width, **like) for _ in range(point.modules))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=point.width**-0.5)
        self.requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(loss=x.square().mean())


def fill(trained: Ours | Peft) -> None:
    """The same factors in both; B small, so that a thousand layers neither explode nor vanish."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for A, B in trained.factors().values():
            A.copy_(torch.randn(A.shape, generator=generator) / A.shape[1] ** 0.5)
            B.copy_(1e-3 * torch.randn(B.shape, generator=generator))


def published_penalty(lora_As, lora_Bs):
    """Module by module in autograd, as NormAL was published."""
    total, weights = 0.0, torch.arange(1, lora_As[0].shape[0] + 1).sqrt()
    for A, B in zip(lora_As, lora_Bs, strict=True):
        total = total + (weights * (A.norm(dim=1) + B.norm(dim=0))).sum()
    return total


class OurChange(RankChange):
    """Every module to half its rank, gradients and AdamW's state included, and the rest freed; `prepare` brings the old rank back."""

    def __init__(self, trained: Ours, rank: int):
        pairs = {name: layer.pair for name, layer in trained.adapter.layers.items()}
        super().__init__(pairs, trained.optimizer, dict.fromkeys(pairs, rank // 2))
        self.rank = rank

    def prepare(self) -> None:
        commit_ranks(self.pairs, dict.fromkeys(self.pairs, self.rank))


def check_changes(changes: dict[str, RankChange | NewParameters], names, kept: int) -> None:
    """
    Make each change once: every module keeps its first `kept` vectors of both factors and of AdamW's moments, to the last bit.

    Raises: WrongResultError.
    """
    for title, change in changes.items():
        change.prepare()
        whole = {name: [rows.clone() for rows in change.rows(name)] for name in names}
        change()
        for name, before in whole.items():
            for found, expected in zip(change.rows(name), before, strict=True):
                if not torch.equal(found, expected[:kept]):
                    raise WrongResultError(f"{title}: {name} does not keep its first {kept} vectors")


def held_bytes(trained: Ours | Peft) -> int:
    """Factors and optimizer state between two steps."""
    factors = [factor for pair in trained.factors().values() for factor in pair]
    states = [t for state in trained.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in (*factors, *states))


class Models:
    """All providers at one point, over the same weights, with AdamW's state there."""

    def __init__(self, point: Point):
        torch.manual_seed(0)
        self.point = point
        self.x = torch.randn(point.tokens, point.width).requires_grad_()
        self.stack = Stack(point)
        self.peft, self.ours = self._peft(), self._ours()
        self.changing = {OURS: self._ours(), PEFT: self._peft()}
        for trained in (self.peft, self.ours, *self.changing.values()):
            fill(trained)
        self._check_gradients()
        for trained in (self.peft, self.ours, *self.changing.values()):
            trained.step({"x": self.x})

    def _peft(self) -> Peft:
        config = peft.LoraConfig(r=self.point.rank, lora_alpha=ALPHA, target_modules=TARGETS)
        return Peft(shared_copy(self.stack), config)

    def _ours(self) -> Ours:
        config = adaptlora.LoraConfig(r=self.point.rank, lora_alpha=ALPHA, target_modules=TARGETS)
        return Ours(shared_copy(self.stack), config)

    def _check_gradients(self) -> None:
        found = []
        for trained in (self.peft, self.ours):
            trained.model(x=self.x).loss.backward()
            found.append([factor.grad for _, pair in sorted(trained.factors().items()) for factor in pair])
            trained.optimizer.zero_grad()
        for theirs, ours in zip(*found, strict=True):
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), "adaptlora and PEFT differ in a gradient"
        self.x.grad = None

    def _frozen_step(self) -> None:
        self.x.grad = None
        self.stack(self.x).loss.backward()

    def steps(self) -> dict:
        """Forward, backward to x and the factors, AdamW's step; of the frozen model what no adapter can save."""

        def step(trained):
            def run():
                self.x.grad = None
                trained.step({"x": self.x})

            return run

        return {FROZEN: self._frozen_step, PEFT: step(self.peft), OURS: step(self.ours)}

    def peaks(self) -> dict[str, int]:
        """
        Bytes of tensors at the worst moment of a step, without the base weights and x: factors and AdamW's state, gradients,
        activations, and what passes.
        """
        self.x.grad = None
        held = {FROZEN: 0, PEFT: held_bytes(self.peft), OURS: held_bytes(self.ours)}
        return {name: held[name] + peak_bytes(run) for name, run in self.steps().items()}

    def penalties(self) -> dict:
        """NormAL's penalty over all modules with its gradient: one op, and the published loop over PEFT's factors."""

        def run(penalty, trained):
            sides = [list(side) for side in zip(*trained.factors().values(), strict=True)]

            def call():
                trained.optimizer.zero_grad()
                (ETA * penalty(*sides)).backward()

            return call

        return {PEFT: run(published_penalty, self.peft), OURS: run(rank_penalty, self.ours)}

    def rank_changes(self) -> dict:
        """
        Every module to half its rank with AdamW's state; none at rank 1. PEFT has no call for it: beside ours is what one writes by hand.
        """
        if self.point.rank < 2:
            return {}
        theirs = self.changing[PEFT]
        pairs = {name: SimpleNamespace(lora_A=A, lora_B=B) for name, (A, B) in theirs.factors().items()}
        changes = {
            PEFT: NewParameters(pairs, theirs.optimizer, dict.fromkeys(pairs, self.point.rank // 2)),
            OURS: OurChange(self.changing[OURS], self.point.rank),
        }
        check_changes(changes, list(pairs), self.point.rank // 2)
        return changes
