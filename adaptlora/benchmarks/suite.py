"""All scenarios: what `adaptlora bench` runs, and the result it writes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from . import layer, memory, penalty, rank_change, roofline, step, svd
from .case import NotRun, Options
from .harness import Report
from .timing import timer_for

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


def run(scenarios, options: Options, watch: Callable[[str, str], None] = lambda scenario, case: None) -> Report:
    """
    Measures the machine's limits and then every case of the scenarios, each checked before it is timed.

    Args: watch: is told of each case when it has been timed, of the limits as ("limits", "").
    Raises: ValueError (a scenario that there is not, rounds < 1), MissingExtraError, WrongResultError.
    """
    unknown = [scenario for scenario in scenarios if scenario not in SCENARIOS]
    if unknown:
        raise ValueError(f"bench: scenario must be one of {', '.join(SCENARIOS)}, got {unknown[0]!r}")
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"bench: rounds must be an integer > 0, got {options.rounds}")
    report = Report()
    report.environment["device"] = options.device.type
    timed = [scenario for scenario in scenarios if scenario in CASES]
    limits = roofline.measure(timer_for(options.device), quick=options.quick) if timed else None
    watch("limits", "")
    for scenario in scenarios:
        if scenario == "memory":
            for comparison in memory.comparisons(options):
                report.add(scenario, comparison)
                watch(scenario, comparison.case)
            continue
        torch.manual_seed(0)
        for case in CASES[scenario](options):
            if isinstance(case, NotRun):
                report.skip(scenario, case.name, case.reason)
            else:
                report.add(scenario, case.measure(options, limits))
            watch(scenario, case.name)
            torch._dynamo.reset()
    return report
