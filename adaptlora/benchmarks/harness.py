"""Providers of the same work timed side by side: interleaved in one process, so that whatever slows the machine slows all alike.

A round calls every provider once, each round starting with another one. Ratios are taken within a round and their median
reported, beside the medians and quartiles of the times themselves.
"""

import gc
import io
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .. import doctor
from ..ops import _backend

Provider = Callable[[], object]


class Interleaved:
    """Calls the providers in turn and keeps their times. A provider's `prepare()`, if it has one, comes first and is not timed."""

    def __init__(self, providers: dict[str, Provider]):
        self.providers = list(providers.items())
        self.samples: dict[str, list[float]] = {name: [] for name in providers}

    def _elapsed(self, run: Provider) -> float:
        """Seconds that a call takes, with what it leaves to the GPU."""
        self._wait()
        start = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - start

    @staticmethod
    def _wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def __call__(self) -> None:
        first, *rest = self.providers
        # The collector would otherwise run in whichever provider fills its quota.
        gc.collect()
        gc.disable()
        for name, run in self.providers:
            if hasattr(run, "prepare"):
                run.prepare()
            self.samples[name].append(self._elapsed(run))
        gc.enable()
        self.providers = [*rest, first]


def peak_bytes(run: Provider) -> int:
    """Most bytes of tensors on the CPU at once in a call, beyond those that were there before it."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    return tuple(statistics.quantiles(values, n=4, method="inclusive")) if len(values) > 1 else (values[0],) * 3


@dataclass
class Comparison:
    """One case of a benchmark: samples in seconds by provider, in the same order of rounds for all."""

    case: str
    floor: str  # the provider that ratios are taken to
    samples: dict[str, list[float]]
    unavailable: dict[str, str] = field(default_factory=dict)  # provider: why it could not run here
    facts: dict[str, object] = field(default_factory=dict)

    def summary(self) -> dict:
        """Medians and quartiles of times in milliseconds and of ratios to the floor."""
        providers = {}
        for name, times in self.samples.items():
            low, median, high = _quartiles([1e3 * t for t in times])
            ratios = _quartiles([ours / floor for ours, floor in zip(times, self.samples[self.floor], strict=True)])
            providers[name] = {
                "median_ms": round(median, 4),
                "quartiles_ms": [round(low, 4), round(high, 4)],
                "ratio": round(ratios[1], 4),
                "ratio_quartiles": [round(ratios[0], 4), round(ratios[2], 4)],
            }
        return {
            "case": self.case,
            "floor": self.floor,
            "rounds": len(self.samples[self.floor]),
            **self.facts,
            "providers": providers,
            "unavailable": self.unavailable,
        }

    def table(self) -> Table:
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items() if not isinstance(value, dict))
        peaks = self.facts.get("peak MiB", {})
        table = Table(title=f"{self.case}{facts and f'  ({facts})'}", title_justify="left")
        table.add_column("provider")
        for column in ("median ms", "quartiles", "ratio", "quartiles", *(["peak MiB"] if peaks else [])):
            table.add_column(column, justify="right")
        for name, row in self.summary()["providers"].items():
            table.add_row(
                name,
                f"{row['median_ms']:.3f}",
                "{:.3f} – {:.3f}".format(*row["quartiles_ms"]),
                f"{row['ratio']:.3f}",
                "{:.3f} – {:.3f}".format(*row["ratio_quartiles"]),
                *([str(peaks.get(name, ""))] if peaks else []),
            )
        for name, reason in self.unavailable.items():
            table.add_row(name, f"not run: {reason}")
        return table


def usable(providers: dict[str, Provider], check: Callable[[str], None]) -> tuple[dict[str, Provider], dict[str, str]]:
    """
    The providers that pass `check(name)`, and the reasons of those that torch.compile could not compile on this machine.

    A wrong result is no reason to be left out: whatever else `check` raises goes through.
    """
    passed, failed = {}, {}
    for name, run in providers.items():
        try:
            check(name)
        except torch._dynamo.exc.TorchDynamoException as error:
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        else:
            passed[name] = run
    return passed, failed


def environment() -> dict:
    """What the times depend on: the machine, torch's threads, versions, instruction set, and how busy it was at the start."""
    extension = _backend.extension()
    return {
        "machine": doctor.machine(),
        "versions": doctor.versions(),
        "isa": extension.isa() if extension else "no C++ extension: the reference runs",
        "load_before": round(os.getloadavg()[0], 2),
    }


class Report:
    """All comparisons of a session, by benchmark file."""

    def __init__(self):
        self.environment = environment()
        self.comparisons: dict[str, list[Comparison]] = {}

    def add(self, bench: str, comparison: Comparison) -> None:
        self.comparisons.setdefault(bench, []).append(comparison)

    def render(self, width: int) -> str:
        console = Console(width=width, file=io.StringIO())
        for bench, comparisons in self.comparisons.items():
            console.rule(bench)
            for comparison in comparisons:
                console.print(comparison.table())
        return console.file.getvalue()

    def write(self, folder: Path) -> list[Path]:
        """One JSON file per benchmark file, replacing that of the last run."""
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for bench, comparisons in self.comparisons.items():
            path = folder / f"{bench}.json"
            content = {"environment": self.environment, "cases": [c.summary() for c in comparisons]}
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            written.append(path)
        return written
