"""The training loop, once for every task: models that learn the same batches side by side, each step timed.

learner = Learner(model, adapter.parameters(), lr=1e-3, adapter=adapter)
for step in train({"ours": learner}, batches, steps=100):
    print(step.number, step.results["ours"].loss)
"""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor, nn


class NonFiniteLossError(ValueError):
    """A loss that is NaN or infinite; the weights are those before its step."""


@dataclass(frozen=True)
class StepResult:
    """What one learner did in one step."""

    loss: float  # task loss, before the step and without a penalty
    seconds: float  # forward, backward, optimizer and adapter.step
    change: object | None  # adapter.step's RankChange


@dataclass(frozen=True)
class Step:
    number: int  # from 1
    results: Mapping[str, StepResult]


def whole_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The loss that the model returns for the batch, in one piece."""
    yield model(**batch).loss


class Learner:
    """A model, its trainable parameters (or groups of them with learning rates of their own) under AdamW, and its adapter if it has one.

    `losses(model, batch)` gives the loss in addends; each is differentiated before the next is computed, so that a batch may be larger
    than what fits into memory at once. `max_grad_norm`: gradients are scaled down to this norm, taken over all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[nn.Parameter] | Iterable[dict],
        *,
        lr: float,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = None,
        adapter=None,
        losses: Callable[[nn.Module, Mapping[str, Tensor]], Iterable[Tensor]] = whole_loss,
    ):
        self.model = model
        self.losses = losses
        self.adapter = adapter
        self.lr = lr
        self.optimizer = torch.optim.AdamW(list(parameters), lr=lr, weight_decay=weight_decay)
        self.max_grad_norm = max_grad_norm
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.first_summary: dict | None = None  # the adapter's sizes at its first ranks, optimizer state included
        if adapter is not None:
            adapter.track(self.optimizer)

    def step(self, batch: Mapping[str, Tensor], lr_factor: float = 1.0) -> StepResult:
        """losses(batch) + penalty → backward → optimizer → adapter.step, timed.

        Raises: NonFiniteLossError, a ValueError.
        """
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * lr_factor
        self.model.train()
        start = _now(batch)
        value = 0.0
        for number, loss in enumerate(self.losses(self.model, batch)):
            value += loss.item()
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"train: the loss must be finite, got {value}; a lower learning rate than {self.lr} may help"
                )
            penalised = self.adapter is not None and number == 0
            (loss + self.adapter.penalty() if penalised else loss).backward()
        if self.max_grad_norm is not None:
            trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = _now(batch) - start
        change = None
        if self.adapter is not None:
            if self.first_summary is None:
                self.first_summary = self.adapter.summary()
            start = _now(batch)
            change = self.adapter.step(value)
            seconds += _now(batch) - start
        return StepResult(value, seconds, change)


def _now(batch: Mapping[str, Tensor]) -> float:
    device = next(iter(batch.values())).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seed_everything(seed: int) -> None:
    """Python's, numpy's and torch's global generators."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def lr_factor(number: int, steps: int, *, warmup: int = 0, decay: bool = False) -> float:
    """Factor of the learning rate at step `number` (from 1).

    It rises linearly from 1/warmup to 1, and then stays or (`decay`) falls linearly to 1/(steps − warmup).
    """
    if number <= warmup:
        return number / warmup
    return (steps - number + 1) / (steps - warmup) if decay else 1.0


def train(
    learners: Mapping[str, Learner],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    steps: int,
    seed: int = 0,
    warmup: int = 0,
    decay: bool = False,
) -> Iterator[Step]:
    """Train all learners on the same batches, a step of each in turn; yields after every step.

    Each learner's step starts from the same random state, so that dropout in equal models falls on the same elements.
    Which learner goes first alternates, so that neither always has the warmer caches.
    """
    names = list(learners)
    for number, batch in zip(range(1, steps + 1), batches, strict=False):
        factor = lr_factor(number, steps, warmup=warmup, decay=decay)
        results = {}
        for name in names if number % 2 else reversed(names):
            seed_everything(seed * 1_000_003 + number)
            results[name] = learners[name].step(batch, factor)
        yield Step(number, results)
