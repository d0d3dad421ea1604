"""`pytest bench --benchmark-only`: options, the `compare` fixture that every benchmark calls, and the report at the end."""

import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from adaptlora.benchmarks.case import WARMUP_ROUNDS, Case
from adaptlora.benchmarks.harness import Interleaved, Report
from adaptlora.benchmarks.plots import draw
from adaptlora.benchmarks.roofline import measure as measure_limits
from adaptlora.benchmarks.timing import default_device, timer_for

ROOT = Path(__file__).resolve().parents[1]
REPORT = pytest.StashKey[Report]()


def pytest_addoption(parser):
    group = parser.getgroup("adaptlora benchmarks")
    group.addoption("--quick", action="store_true", help="Small sizes and few rounds: whether it runs, not how fast.")
    group.addoption(
        "--results",
        type=Path,
        help="Folder for the JSON files (default: bench/results, with --quick runs/bench-quick).",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    # pytest-benchmark's own table shows the rounds, not the providers in them.
    config.option.benchmark_quiet = True
    config.stash[REPORT] = Report()


@pytest.fixture(scope="session")
def quick(request) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def limits(quick):
    """This machine's, measured in this session before the first case that asks for them."""
    return measure_limits(timer_for(default_device()), quick=quick)


@pytest.fixture
def measure(request, benchmark, quick):
    """measure(case): times a `Case` into the report and returns the samples, {provider: seconds of each round}."""

    def run(case: Case) -> dict[str, list[float]]:
        rounds = 3 if quick else case.rounds
        interleaved = Interleaved(case.providers, timer_for(default_device(), graphs=case.graphs))
        benchmark.pedantic(interleaved, rounds=rounds, warmup_rounds=case.warmup)
        comparison = case.comparison(interleaved, rounds, request.getfixturevalue("limits") if case.work else None)
        benchmark.extra_info.update(comparison.summary())
        request.config.stash[REPORT].add(request.path.stem, comparison)
        return comparison.samples

    return run


@pytest.fixture
def compare(measure):
    """
    compare(case, providers, floor, rounds, warmup, unavailable, facts, work, graphs): `measure` of a `Case` with these fields, `facts`
    and `work` may change until the report is written.
    """

    def run(
        case, providers, *, floor, rounds, warmup=WARMUP_ROUNDS, unavailable=None, facts=None, work=None, graphs=False
    ):
        facts, work = ({} if given is None else given for given in (facts, work))
        return measure(Case(case, providers, floor, rounds, warmup, unavailable or {}, facts, work, graphs))

    return run


@pytest.fixture(autouse=True)
def fresh():
    """Every benchmark starts from the same random numbers, with nothing compiled and without what the last one held."""
    gc.collect()
    torch.manual_seed(0)
    torch._dynamo.reset()


def pytest_terminal_summary(terminalreporter, config):
    report = config.stash[REPORT]
    if report.comparisons:
        terminalreporter.write(report.render(width=120))


def pytest_sessionfinish(session):
    config = session.config
    folder = config.getoption("--results")
    if folder is None:
        folder = ROOT / ("runs/bench-quick" if config.getoption("--quick") else "bench/results")
    report = config.stash[REPORT]
    report.write(folder)
    for bench, comparisons in report.comparisons.items():
        if any("axes" in comparison.facts for comparison in comparisons):
            draw(report.content(bench), folder, ratios=False)
