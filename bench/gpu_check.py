"""Compile every Triton kernel in every configuration that is shipped, for GPUs that need not be there, and read the machine code.

    make gpu-check, or PYTHONPATH=tests python bench/gpu_check.py [--capability 80] [--only shrink] [--jobs 2]

The kernels of csrc/cuda too, from the library as setup.py builds it, where there is nvcc (sm_80 and sm_90).

Fails on a spilled register, on more shared memory than the device has, and on a matrix kernel without matrix instructions or
asynchronous copies. Prints the sum of it by kernel and target and writes every configuration to bench/results/gpu_check.json, where a
part of the kernels or targets takes the place of what the file had of them.
"""

import argparse
import collections
import functools
import json
import multiprocessing
import os
import sys
from pathlib import Path

import cuda_targets
import torch
import triton
from gpu_configurations import cases, layer_launches, needs, other_launches
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from triton_targets import SHARED, compile_launch, faults

RESULTS = Path(__file__).resolve().parent / "results" / "gpu_check.json"


@functools.cache
def configurations(capability: int) -> dict[str, tuple]:
    """(what it is, launch, what its code must have) by signature: launches that compile to the same code stand once."""
    found = {}
    for case in cases():
        for launched in layer_launches(case, capability):
            found.setdefault(launched.signature(), (str(case), launched, needs(case, launched)))
    for launched in other_launches(capability):
        found.setdefault(launched.signature(), ("", launched, {"matrix": False, "asynchronous": False}))
    return found


def tile(launched) -> str:
    """Block sizes, warps and stages of a launch."""
    blocks = [f"{name[-1]}{value}" for name, value in launched.args.items() if name.startswith("BLOCK_")]
    blocks = blocks or [str(launched.args["BLOCK"])] if "BLOCK" in launched.args or blocks else []
    return " ".join([*blocks, f"w{launched.options.get('num_warps', 4)}", f"s{launched.options.get('num_stages', 3)}"])


def check(job: tuple[int, str]) -> dict:
    """One configuration: what it is, what the compiler made of it, and its faults."""
    capability, signature = job
    case, launched, required = configurations(capability)[signature]
    row = {"kernel": launched.name, "target": f"sm_{capability}", "case": case, "tile": tile(launched)}
    return row | facts(launched.name, compile_launch(launched, capability), required)


def facts(name: str, compiled, required: dict[str, bool]) -> dict:
    """What the compiler made of a configuration, and its faults."""
    return {
        "registers": compiled.registers,
        "stack": compiled.stack,
        "shared": compiled.shared,
        "occupancy": compiled.occupancy,
        "matrix": compiled.matrix,
        "asynchronous": compiled.asynchronous,
        "faults": faults(name, compiled, **required),
    }


def cuda_rows(capability: int, only: str) -> list[dict]:
    """The kernels of the CUDA library, at sizes that lie in shared memory whole, in part and not at all."""
    rows = []
    for kernel, size in ((kernel, size) for kernel, sizes in cuda_targets.SIZES.items() for size in sizes):
        if only in (name := f"{kernel}_kernel"):
            compiled = cuda_targets.compiled(kernel, capability, size)
            row = {"kernel": name, "target": f"sm_{capability}", "case": f"R{size}", "tile": f"w{compiled.warps}"}
            rows.append(row | facts(name, compiled, {"matrix": False, "asynchronous": False}))
    return rows


def summary(rows: list[dict]) -> Table:
    """Kernels × targets: configurations, and the extremes over them."""
    table = Table(title="Compiled for GPUs without one")
    for column in (
        "kernel",
        "target",
        "configurations",
        "registers",
        "shared KiB",
        "spills",
        "programs an SM",
        "matrix",
        "async copies",
    ):
        table.add_column(column, justify="left" if column in ("kernel", "target") else "right")
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row["kernel"], row["target"]].append(row)
    for (kernel, target), members in sorted(groups.items(), key=lambda item: (item[0][0], int(item[0][1][3:]))):

        def span(field, members=members, unit=1):
            values = [member[field] / unit for member in members]
            low, high = f"{min(values):.0f}", f"{max(values):.0f}"
            return low if low == high else f"{low}–{high}"

        spilled = sum(any("spills" in fault for fault in member["faults"]) for member in members)
        table.add_row(
            kernel.strip("_"), target, str(len(members)), span("registers"), span("shared", unit=1024), str(spilled),
            span("occupancy"), span("matrix"), span("asynchronous"),
        )  # fmt: skip
    return table


def write(rows: list[dict]) -> None:
    """Put the rows in the place of those that the file has of the same kernels and targets."""
    checked = {(row["kernel"], row["target"]) for row in rows}
    if RESULTS.exists():
        stored = json.loads(RESULTS.read_text())
        kept = [dict(zip(stored["columns"], row, strict=True)) for row in stored["rows"]]
        rows = rows + [row for row in kept if (row["kernel"], row["target"]) not in checked]
    rows.sort(key=lambda row: (row["kernel"], row["target"], row["case"], row["tile"]))
    versions = json.dumps({"torch": torch.__version__, "triton": triton.__version__})
    lines = ",\n".join(json.dumps(list(row.values()), ensure_ascii=False) for row in rows)
    RESULTS.write_text(f'{{"versions": {versions}, "columns": {json.dumps(list(rows[0]))}, "rows": [\n{lines}\n]}}\n')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, choices=list(SHARED), action="append", help="default: all")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    capabilities = arguments.capability or list(SHARED)
    jobs = [
        (capability, signature)
        for capability in capabilities
        for signature, (_, launched, _) in configurations(capability).items()
        if arguments.only in launched.name
    ]
    if not jobs and not any(arguments.only in f"{kernel}_kernel" for kernel in cuda_targets.SIZES):
        parser.error(f"--only must be part of a kernel's name, got {arguments.only!r}")
    console, rows = Console(width=120), []
    if cuda_targets.nvcc() is None:
        console.print("no nvcc in CUDA_HOME or on the PATH: the kernels of csrc/cuda are left out")
    else:
        for capability in set(capabilities) & set(cuda_targets.CAPABILITIES):
            rows += cuda_rows(capability, arguments.only)
    with multiprocessing.get_context("fork").Pool(arguments.jobs) as pool, Progress(console=console) as progress:
        task = progress.add_task("compiling", total=len(jobs))
        for row in pool.imap_unordered(check, jobs, chunksize=4):
            rows.append(row)
            progress.advance(task)
            if row["faults"]:
                progress.console.print("[red]" + " · ".join(str(value) for value in row.values()), soft_wrap=True)
    console.print(summary(rows))
    faulty = sum(bool(row["faults"]) for row in rows)
    console.print(f"{len(rows)} configurations, {faulty} with faults")
    write(rows)
    console.print(f"written: {RESULTS}")
    return 1 if faulty else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
