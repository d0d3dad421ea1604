"""Providers of the same work timed side by side: interleaved in one process, so that whatever slows the machine slows all alike.

A round calls every provider once, each round starting with another one. Ratios are taken within a round and their median
reported, beside the medians and quartiles of the times themselves.
"""

import gc
import io
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .. import doctor
from ..files import atomic_file
from ..ops import _backend
from .roofline import Limits
from .timing import Provider, Timer, default_device, timer_for
from .work import Work


class Interleaved:
    """
    Calls the providers in turn and keeps their times. A provider's `prepare()`, if it has one, comes first and is not timed.

    Args: timer: how a call is timed, by default as the device that torch has needs it, without CUDA graphs.
    """

    def __init__(self, providers: dict[str, Provider], timer: Timer | None = None):
        self.timer = timer_for(default_device()) if timer is None else timer
        self.providers = [(name, run, self.timer.ready(name, run)) for name, run in providers.items()]
        self.samples: dict[str, list[float]] = {name: [] for name in providers}

    def __call__(self) -> None:
        first, *rest = self.providers
        # The collector would otherwise run in whichever provider fills its quota. What the last round left is young.
        gc.collect(1)
        gc.disable()
        try:
            for name, run, ready in self.providers:
                if hasattr(run, "prepare"):
                    run.prepare()
                self.samples[name].append(self.timer.seconds(ready))
        finally:
            gc.enable()
        self.providers = [*rest, first]


def peak_bytes(run: Provider, device: torch.device | str = "cpu") -> int:
    """Most bytes of tensors on the device at once in a call, beyond those that were there before it."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
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


UNITS = {"ms": 1e3, "MiB": 2**-20}


@dataclass
class Comparison:
    """
    One case of a benchmark: samples by provider, in the same order of rounds for all.

    samples: seconds, or bytes where `unit` is MiB.   work: {provider: what it has to do}, for those of which it was counted.
    """

    case: str
    floor: str  # the provider that ratios are taken to
    samples: dict[str, list[float]]
    unavailable: dict[str, str] = field(default_factory=dict)  # provider: why it could not run here
    facts: dict[str, object] = field(default_factory=dict)
    work: dict[str, Work] = field(default_factory=dict)
    limits: Limits | None = None
    not_captured: dict[str, str] = field(default_factory=dict)  # provider: why no CUDA graph of it was timed
    unit: str = "ms"

    def summary(self) -> dict:
        """Medians and quartiles of the samples in `unit` and of ratios to the floor; rates and shares where work was counted."""
        providers = {}
        for name, samples in self.samples.items():
            low, median, high = _quartiles([UNITS[self.unit] * sample for sample in samples])
            ratios = _quartiles([ours / floor for ours, floor in zip(samples, self.samples[self.floor], strict=True)])
            providers[name] = {
                f"median_{self.unit}": round(median, 4),
                f"quartiles_{self.unit}": [round(low, 4), round(high, 4)],
                "ratio": round(ratios[1], 6),
                "ratio_quartiles": [round(ratios[0], 6), round(ratios[2], 6)],
            }
            if name in self.work and self.limits is not None:
                providers[name] |= self.limits.describe(self.work[name], statistics.median(samples))
        return {
            "case": self.case,
            "floor": self.floor,
            "rounds": len(self.samples[self.floor]),
            **self.facts,
            "providers": providers,
            "unavailable": self.unavailable,
            **({"not_captured": self.not_captured} if self.not_captured else {}),
        }

    def table(self) -> Table:
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items() if not isinstance(value, dict))
        peaks = self.facts.get("peak MiB", {})
        rows = self.summary()["providers"]
        rated = any("gb_per_s" in row for row in rows.values())
        table = Table(title=f"{self.case}{facts and f'  ({facts})'}", title_justify="left")
        table.add_column("provider")
        rates = ["GB/s", "GFLOP/s", "of roofline"] if rated else []
        for column in (
            f"median {self.unit}",
            "quartiles",
            "ratio",
            "quartiles",
            *(["peak MiB"] if peaks else []),
            *rates,
        ):
            table.add_column(column, justify="right")
        for name, row in rows.items():
            table.add_row(
                name,
                f"{row[f'median_{self.unit}']:.3f}",
                "{:.3f} – {:.3f}".format(*row[f"quartiles_{self.unit}"]),
                f"{row['ratio']:.3f}",
                "{:.3f} – {:.3f}".format(*row["ratio_quartiles"]),
                *([str(peaks.get(name, ""))] if peaks else []),
                *(_rates(row) if rated else []),
            )
        for name, reason in self.unavailable.items():
            table.add_row(name, f"not run: {reason}")
        return table


def _rates(row: dict) -> tuple[str, ...]:
    if "gb_per_s" not in row:
        return ("", "", "")
    share = f"{row['roofline_share']:.0%} {row['bound']}" if "roofline_share" in row else ""
    return f"{row['gb_per_s']:.1f}", f"{row['gflop_per_s']:.1f}", share


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


def environment(device: torch.device | str | None = None) -> dict:
    """
    What the times depend on: the machine, torch's threads, versions, instruction set, and how busy it was at the start.

    Args: device: that it is about; None for the one that torch has.
    """
    extension = _backend.extension()
    return {
        "machine": doctor.machine(),
        "device": (default_device() if device is None else torch.device(device)).type,
        "versions": doctor.versions(),
        "isa": extension.isa() if extension else "no C++ extension: the reference runs",
        "load_before": round(os.getloadavg()[0], 2),
    }


class Report:
    """
    All comparisons of a session, by benchmark file or scenario, and the limits of the machine in it.

    Attributes: complete: whether all that was asked for is in it; the caller says so at the end.
    """

    def __init__(self, device: torch.device | str | None = None):
        self.environment = environment(device)
        self.complete = False
        self.comparisons: dict[str, list[Comparison]] = {}
        self.not_run: list[dict[str, str]] = []

    def skip(self, bench: str, case: str, reason: str) -> None:
        """A case that cannot run here."""
        self.not_run.append({"scenario": bench, "case": case, "reason": reason})

    def add(self, bench: str, comparison: Comparison) -> None:
        self.comparisons.setdefault(bench, []).append(comparison)
        if comparison.limits is not None:
            self.environment["limits"] = comparison.limits.content()

    def render(self, width: int) -> str:
        console = Console(width=width, file=io.StringIO())
        for bench, comparisons in self.comparisons.items():
            console.rule(bench)
            for comparison in comparisons:
                console.print(comparison.table())
        for skipped in self.not_run:
            console.print("not run: {case}: {reason}".format(**skipped), highlight=False)
        return console.file.getvalue()

    def content(self, bench: str | None = None) -> dict:
        """What a JSON file holds: the environment and the cases of one benchmark file, or of all scenarios with their names."""
        if bench is not None:
            return {"environment": self.environment, "cases": [c.summary() for c in self.comparisons[bench]]}
        cases = [{"scenario": name, **c.summary()} for name, found in self.comparisons.items() for c in found]
        return {
            "environment": self.environment,
            "complete": self.complete,
            "cases": cases,
            "not_run": self.not_run,
        }


def write_json(path: Path, content: dict) -> Path:
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
