"""`pytest bench --benchmark-only`: options, the `compare` fixture that every benchmark calls, and the report at the end."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from adaptlora.benchmarks.harness import Comparison, Interleaved, Report

ROOT = Path(__file__).resolve().parents[1]
REPORT = pytest.StashKey[Report]()
WARMUP_ROUNDS = 3


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


@pytest.fixture
def compare(request, benchmark, quick):
    """
    compare(case, providers, floor, rounds, warmup, unavailable, facts): times the providers, interleaved, into the report, and returns
    the samples, {provider: seconds of each round}.
    """

    def run(case, providers, *, floor, rounds, warmup=WARMUP_ROUNDS, unavailable=None, facts=None):
        rounds = 3 if quick else rounds
        interleaved = Interleaved(providers)
        benchmark.pedantic(interleaved, rounds=rounds, warmup_rounds=warmup)
        samples = {name: interleaved.samples[name][-rounds:] for name in providers}
        comparison = Comparison(case, floor, samples, unavailable or {}, facts if facts is not None else {})
        benchmark.extra_info.update(comparison.summary())
        request.config.stash[REPORT].add(request.path.stem, comparison)
        return samples

    return run


@pytest.fixture(autouse=True)
def fresh():
    """Every benchmark starts from the same random numbers and with nothing compiled."""
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
    config.stash[REPORT].write(folder)
