"""All scenarios: what `adaptlora bench` runs, and the result it writes."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..finetune._extras import need
from . import layer, memory, penalty, rank_change, roofline, step, svd
from .case import NotRun, Options
from .harness import Comparison, Report
from .roofline import Limits
from .timing import timer_for

# What a scenario imports beyond adaptlora, asked for before anything is timed.
NEEDS = {"layer": ("peft",), "step": ("transformers", "peft"), "memory": memory.NEEDS}
CASES = {
    "layer": layer.cases,
    "penalty": penalty.cases,
    "rank-change": rank_change.cases,
    "svd": svd.cases,
    "step": step.cases,
}
SCENARIOS = (*CASES, "memory")


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """That many threads of torch in the block; None: as many as before.  Raises: ValueError (threads < 1)."""
    if threads is not None and threads < 1:
        raise ValueError(f"bench: threads must be an integer > 0, got {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check(scenarios, options: Options) -> None:
    """Whether `run` can begin.  Raises: ValueError (a scenario that there is not, rounds < 1), MissingExtraError."""
    unknown = [scenario for scenario in scenarios if scenario not in SCENARIOS]
    if unknown:
        raise ValueError(f"bench: scenario must be one of {', '.join(SCENARIOS)}, got {unknown[0]!r}")
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"bench: rounds must be an integer > 0, got {options.rounds}")
    for scenario in scenarios:
        for package in NEEDS.get(scenario, ()):
            need(package, f"bench: {scenario}")


def run(
    scenarios, options: Options, watch: Callable[[str, Comparison | NotRun, Report], None] = lambda *_: None
) -> Report:
    """
    Measures the machine's limits and then every case of the scenarios, each checked before it is timed.

    Args: watch: is given the scenario, what was found and the report of all until then, case by case.
    Raises: as `check`; WrongResultError, memory.ProcessError.
    """
    check(scenarios, options)
    report = Report(options.device)
    timed = any(scenario in CASES for scenario in scenarios)
    limits = roofline.measure(timer_for(options.device, graphs=True), quick=options.quick) if timed else None
    for scenario in scenarios:
        for found in memory.comparisons(options) if scenario == "memory" else _timed(CASES[scenario], options, limits):
            if isinstance(found, NotRun):
                report.skip(scenario, found.case, found.reason)
            else:
                report.add(scenario, found)
            watch(scenario, found, report)
    report.complete = True
    return report


def _timed(cases, options: Options, limits: Limits) -> Iterator[Comparison | NotRun]:
    for case in cases(options):
        yield case if isinstance(case, NotRun) else case.measure(options, limits)
        torch._dynamo.reset()  # what one case has compiled and held is no burden on the next
        if not options.quick:
            gc.collect()
