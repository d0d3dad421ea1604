"""
Several processes on one machine, gloo over loopback: bytes and time of a step against the ranks, beside DistributedDataParallel's own
reducer: `python bench/bench_distributed.py [--quick] [--json]`.

BERT encoders of random weights, one text of 16 tokens for each process, every linear of the blocks adapted: MiniLM's sizes (6 blocks of
384, 36 modules) at ranks from 1 to 32, and blocks of 32 with 12, 48 and 192 modules, where gradients are many and small. Before it is
timed every provider's gradients are compared with DDP's. Bytes are counted twice, by a communication hook and by the kernel's counters
of `lo` in a network namespace of the benchmark's own, and compared with communication.py and gloo_wire.py. A round's time is that of its
slowest process.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch.distributed as dist
from distributed_bytes import check, live, sharded, traffic
from distributed_providers import FLOOR, LINEARS, MINILM, SMALL, Case, Trained
from loopback import own_network
from processes import run
from rich.console import Console
from rich.table import Table

import adaptlora
from adaptlora.benchmarks.harness import Comparison, Interleaved, environment

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = (1, 2, 4)
TIMED_RANKS = (1, 8, 32)
ALONE = ", without averaging"
QUARTILES = ("lower quartile", "median", "upper quartile")
PROVIDERS = (FLOOR, "DDP's reducer, gradients as bucket views", "adaptlora", "adaptlora in DDP")


class Step:
    """A whole step, for the timer."""

    def __init__(self, trained: Trained, barrier):
        self.trained, self.barrier = trained, barrier

    def prepare(self) -> None:
        self.barrier.wait()

    def __call__(self) -> None:
        self.trained.loss().backward()
        self.trained.optimizer.step()
        self.trained.optimizer.zero_grad()


class Backward:
    """A backward pass that all processes begin together, with the averaging of its gradients or without."""

    def __init__(self, trained: Trained, barrier, averaging: bool = True):
        self.trained, self.barrier, self.averaging = trained, barrier, averaging

    def prepare(self) -> None:
        with contextlib.nullcontext() if self.averaging else self.trained.no_sync():
            self.trained.optimizer.zero_grad()
            self.loss = self.trained.loss()
        self.barrier.wait()

    def __call__(self) -> None:
        with contextlib.nullcontext() if self.averaging else self.trained.no_sync():
            self.loss.backward()


def assert_same(trained: dict[str, Trained]) -> None:
    expected = trained[FLOOR].gradients()
    for name, other in trained.items():
        error = ((other.gradients() - expected).norm() / expected.norm()).item()
        assert error < 1e-6, f"gradients of {name} differ from those of {FLOOR} by {error:.3g}"


def timed(case: Case, barrier, rounds: int) -> dict[str, dict[str, list[float]]]:
    """{"step" or "backward": {provider: seconds of each round}} in this process."""
    trained = {name: Trained(case, name) for name in PROVIDERS}
    assert_same(trained)
    steps = {name: Step(each, barrier) for name, each in trained.items()}
    backwards = {name: Backward(each, barrier) for name, each in trained.items()}
    backwards |= {f"{name}{ALONE}": Backward(trained[name], barrier, False) for name in (FLOOR, "adaptlora")}
    samples = {}
    for kind, providers in (("step", steps), ("backward", backwards)):
        interleaved = Interleaved(providers)
        for _ in range(rounds + 3):
            interleaved()
        samples[kind] = {name: interleaved.samples[name][3:] for name in providers}
    return samples


def measure(barrier, quick: bool, times: bool) -> dict:
    """All of it in one process of several."""
    rounds, steps = (3, 3) if quick else (31, 10)
    cases = [MINILM[0], MINILM[3], SMALL[0]] if quick else [*MINILM, *SMALL]
    timed_cases = [case for case in cases if times and case.r in TIMED_RANKS]
    several = dist.get_world_size() > 1
    normal = adaptlora.NormALConfig(r=8, target_r=4, lora_alpha=16, target_modules=LINEARS, t_p=3, t_c=4)
    lalora = adaptlora.LaLoRAConfig(r=8, lora_alpha=16, target_modules=LINEARS, gamma=8.0, temperature=10.0)
    return {
        "traffic": [row for case in cases for row in traffic(case, barrier, steps)] if several else [],
        "NormAL": live(normal, barrier, 8) if several else [],
        "La-LoRA": live(lalora, barrier, 8) if several else [],
        "FSDP2": [sharded(barrier, steps)] if several else [],
        "times": [timed(case, barrier, rounds) for case in timed_cases],
        "cases": [f"{case.name}, {case.modules} modules, r = {case.r}" for case in timed_cases],
    }


def slowest(found: list[dict], index: int, kind: str) -> dict[str, list[float]]:
    """{provider: seconds of each round}, of the slowest process in that round."""
    by_process = [each["times"][index][kind] for each in found]
    return {name: [max(times) for times in zip(*(p[name] for p in by_process), strict=True)] for name in by_process[0]}


def exchange(backward: dict[str, list[float]]) -> dict[str, list[float]]:
    """Quartiles in milliseconds of what averaging adds to a backward pass, round by round."""
    found = {}
    for name, times in backward.items():
        alone = backward.get(f"{name}{ALONE}") or backward[f"adaptlora{ALONE}"]
        added = [1e3 * (time - without) for time, without in zip(times, alone, strict=True)]
        found[name] = [round(q, 4) for q in statistics.quantiles(added, n=4, method="inclusive")]
    return {name: quartiles for name, quartiles in found.items() if not name.endswith(ALONE)}


def summary(found: list[dict], n: int) -> dict:
    """What the processes found, as it is written: bytes are the same in all of them."""
    first = found[0]
    results = {"processes": n, **{key: first[key] for key in ("traffic", "NormAL", "La-LoRA", "FSDP2")}, "times": []}
    for index, case in enumerate(first["cases"]):
        step, backward = (slowest(found, index, kind) for kind in ("step", "backward"))
        results["times"].append(
            {
                "step": Comparison(f"a step, {n} processes, {case}", FLOOR, step),
                "backward": Comparison(f"a backward pass, {n} processes, {case}", FLOOR, backward),
                "averaging_ms": exchange(backward),
            }
        )
    return results


def shown(title: str, rows: list[dict]) -> Table:
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="right" if isinstance(rows[-1][column], (int, float)) else "left")
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        table.add_row(*(cell if isinstance(cell, str) else f"{cell:,.2f}".removesuffix(".00") for cell in cells))
    return table


def show(results: dict, console: Console) -> None:
    told = f"{results['processes']} processes; hook: bytes of each, wire: of all"
    for name in ("traffic", "NormAL", "La-LoRA", "FSDP2"):
        if results[name]:
            console.print(shown(f"{name}, {told}", results[name]))
    for each in results["times"]:
        console.print(each["step"].table(), each["backward"].table())
        added = [{"provider": name, **dict(zip(QUARTILES, q, strict=True))} for name, q in each["averaging_ms"].items()]
        console.print(shown("ms that averaging adds to the backward pass", added))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cases and rounds: whether it runs, not how fast")
    parser.add_argument(
        "--json", action="store_true", help="write results/bench_distributed.json, with --quick in runs/bench-quick"
    )
    parser.add_argument("--bytes", action="store_true", help="count bytes and time nothing: for a machine that is busy")
    parser.add_argument("--processes", type=int, nargs="+", default=PROCESSES)
    options = parser.parse_args()
    report = {"environment": environment("cpu"), "own_network": own_network(), "runs": []}
    console = Console(width=160)
    for n in options.processes:
        barrier = multiprocessing.get_context("forkserver").Barrier(n)
        results = summary(run(n, measure, barrier, options.quick, not options.bytes, seconds=900), n)
        check(results, report["own_network"])
        show(results, console)
        for each in results["times"]:
            each |= {kind: each[kind].summary() for kind in ("step", "backward")}
        report["runs"].append(results)
    if options.json:
        folder = ROOT / ("runs/bench-quick" if options.quick else "bench/results")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench_distributed.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
