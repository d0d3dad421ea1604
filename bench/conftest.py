"""`pytest bench --benchmark-only`: options, the `compare` fixture that every benchmark calls, and the report at the end."""

import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from adaptlora.benchmarks.case import WARMUP_ROUNDS, Case
from adaptlora.benchmarks.harness import Interleaved, Report, write_json
from adaptlora.benchmarks.plots import draw
from adaptlora.benchmarks.roofline import measure as measure_limits
from adaptlora.benchmarks.timing import default_device, timer_for

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PARTIAL = ROOT / "bench" / "results", ROOT / "runs" / "bench-partial"
REPORT = pytest.StashKey[Report]()
OPEN = pytest.StashKey[dict[str, set[str]]]()  # {file: tests that have not passed, or been skipped, yet}
WRITTEN = pytest.StashKey[list[str]]()


def pytest_addoption(parser):
    group = parser.getgroup("adaptlora benchmarks")
    group.addoption("--quick", action="store_true", help="Small sizes and few rounds: whether it runs, not how fast.")
    group.addoption(
        "--results",
        type=Path,
        help="Folder for the JSON files (default: bench/results, or runs/bench-partial for files of which a test was left out or failed;"
        " with --quick runs/bench-quick).",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    # pytest-benchmark's own table shows the rounds, not the providers in them.
    config.option.benchmark_quiet = True
    config.stash[REPORT] = Report()
    config.stash[OPEN] = {}
    config.stash[WRITTEN] = []


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    unfinished = config.stash[OPEN]
    for item in items:
        unfinished.setdefault(item.path.stem, set()).add(item.nodeid)
    for argument in config.args:  # of bench_x.py::test_y the rest of the file was not even collected
        if "::" in argument:
            unfinished.setdefault(Path(argument.split("::")[0]).stem, set()).add("what the command line left out")


def pytest_deselected(items):
    for item in items:
        item.config.stash[OPEN].setdefault(item.path.stem, set()).add(item.nodeid)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.failed:
        item.config.stash[OPEN][item.path.stem].add(f"{item.nodeid}, {report.when}")
    if report.when == "teardown":
        item.config.stash[OPEN][item.path.stem].discard(item.nodeid)


@pytest.fixture(scope="session")
def quick(request) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def limits(quick):
    """This machine's, measured before the first case."""
    return measure_limits(timer_for(default_device(), graphs=True), quick=quick)


@pytest.fixture
def measure(request, benchmark, quick, limits):
    """measure(case): times a `Case` into the report and returns the samples, {provider: seconds of each round}."""

    def run(case: Case) -> dict[str, list[float]]:
        rounds = 3 if quick else case.rounds
        interleaved = Interleaved(case.providers, timer_for(default_device(), graphs=case.graphs))
        benchmark.pedantic(interleaved, rounds=rounds, warmup_rounds=case.warmup)
        comparison = case.comparison(interleaved, rounds, limits)
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
        for line in config.stash[WRITTEN]:
            terminalreporter.write_line(line)


def pytest_sessionfinish(session):
    config = session.config
    chosen = config.getoption("--results") or (
        ROOT / "runs" / "bench-quick" if config.getoption("--quick") else RESULTS
    )
    report = config.stash[REPORT]
    for bench, comparisons in report.comparisons.items():
        # What is kept of a file is all of it: some cases of a file that was not run to its end would replace all of them.
        partial = chosen.resolve() == RESULTS and config.stash[OPEN].get(bench)
        folder = PARTIAL if partial else chosen
        path = write_json(folder / f"{bench}.json", report.content(bench))
        why = (
            f": of its tests {len(partial)} did not run or failed, {RESULTS / path.name} is as it was"
            if partial
            else ""
        )
        config.stash[WRITTEN].append(f"results in {path}{why}")
        if any("axes" in comparison.facts for comparison in comparisons):
            draw(report.content(bench), folder, ratios=False)
