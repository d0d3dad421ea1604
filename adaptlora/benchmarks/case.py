"""One case of a benchmark, checked and ready to be timed, and what a run of several is asked for."""

from dataclasses import dataclass, field

import torch

from .harness import Comparison, Interleaved
from .roofline import Limits
from .timing import Provider, timer_for
from .work import Work

WARMUP_ROUNDS = 3


@dataclass(frozen=True)
class Options:
    """device: to run on.   quick: sizes that take seconds; they show that all runs, not how fast.   rounds: for each case's own."""

    device: torch.device
    quick: bool = False
    rounds: int | None = None

    def rounds_of(self, rounds: int) -> int:
        return self.rounds or (3 if self.quick else rounds)


@dataclass(frozen=True)
class NotRun:
    """A case that this machine cannot run, and why."""

    case: str
    reason: str


@dataclass
class Case:
    """
    Providers that have been seen to compute the same.

    Args:
        floor: the provider that ratios are taken to.   rounds: how often all are called.
        work: of every provider, or {provider: its own}.   graphs: whether a GPU may replay a captured graph instead of a call.
    """

    name: str
    providers: dict[str, Provider]
    floor: str
    rounds: int
    warmup: int = WARMUP_ROUNDS
    unavailable: dict[str, str] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)
    work: Work | dict[str, Work] = field(default_factory=dict)
    graphs: bool = False

    def measure(self, options: Options, limits: Limits | None) -> Comparison:
        interleaved = Interleaved(self.providers, timer_for(options.device, graphs=self.graphs))
        rounds = options.rounds_of(self.rounds)
        for _ in range(self.warmup + rounds):
            interleaved()
        return self.comparison(interleaved, rounds, limits)

    def comparison(self, interleaved: Interleaved, rounds: int, limits: Limits | None) -> Comparison:
        """Of the last `rounds` rounds."""
        samples = {name: interleaved.samples[name][-rounds:] for name in self.providers}
        work = dict.fromkeys(self.providers, self.work) if isinstance(self.work, Work) else self.work
        not_captured = getattr(interleaved.timer, "not_captured", {})
        return Comparison(
            self.name, self.floor, samples, self.unavailable, self.facts, work, limits, not_captured=not_captured
        )
