"""
Peak of resident memory of whole training runs, every provider with dropout and without: `python bench/memory.py`.

MiniLM's dimensions, random weights, 8 texts of 64 tokens, 36 modules. What is measured and how: adaptlora/benchmarks/memory.py, of which
`adaptlora bench memory` runs a part.
"""

import argparse
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from adaptlora.benchmarks import memory
from adaptlora.benchmarks.harness import environment, write_json

RESULT = Path(__file__).parent / "results" / "memory.json"
MIB = 2**20
BASELINES = {
    "adaptlora LoRA": "PEFT LoRA",
    "masked NormAL": "PEFT LoRA",
    "adaptlora NormAL": "PEFT LoRA",
    "PEFT LoRA-FA": "PEFT LoRA",
    "adaptlora LoRA-FA": "PEFT LoRA-FA",
    "adaptlora AdaLoRA, removal final": "PEFT AdaLoRA",
    "adaptlora AdaLoRA, removal update": "PEFT AdaLoRA",
    "adaptlora La-LoRA, r = 32": "PEFT LoRA, r = 32",
}


def row(provider: str, dropout: float, runs: list[dict[str, int]]) -> dict:
    peaks = [run["peak"] for run in runs]
    beyond = [run["peak"] - run["before"] for run in runs]
    return {
        "provider": provider,
        "dropout": dropout,
        "peak MiB": round(statistics.median(peaks) / MIB, 1),
        "peaks MiB": [round(peak / MIB, 1) for peak in peaks],
        "beyond the model MiB": round(statistics.median(beyond) / MIB, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--steps", type=int, default=memory.STEPS)
    parser.add_argument("--rounds", type=int, default=memory.ROUNDS)
    options = parser.parse_args()
    reason = memory.unusable()
    if reason:
        parser.error(f"memory: {reason}")
    rows = [
        row(provider, dropout, runs)
        for dropout in (0.0, memory.DROPOUT)
        for provider, runs in memory.measure(memory.PROVIDERS, "minilm", dropout, options.steps, options.rounds).items()
    ]
    by_place = {(found["provider"], found["dropout"]): found for found in rows}
    for found in rows:
        baseline = by_place.get((BASELINES.get(found["provider"]), found["dropout"]))
        if baseline:
            for field in ("peak MiB", "beyond the model MiB"):
                found[field.replace("MiB", "over PEFT's")] = round(found[field] / baseline[field], 3)
    table = Table(title=f"peak of resident memory, {options.steps} steps")
    columns = (
        "provider",
        "dropout",
        "peak MiB",
        "peak over PEFT's",
        "beyond the model MiB",
        "beyond the model over PEFT's",
    )
    for column in columns:
        table.add_column(column)
    for found in rows:
        table.add_row(*(str(found.get(column, "")) for column in columns))
    Console(width=140).print(table)
    write_json(RESULT, {"environment": environment("cpu"), "steps": options.steps, "rows": rows})


if __name__ == "__main__":
    main()
