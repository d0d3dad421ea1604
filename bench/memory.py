"""
Peak of resident memory of a whole training run, each provider in a process of its own: `python bench/memory.py`.

MiniLM, 8 texts of 64 tokens, 36 modules, AdamW, r = 8: LoRA of both, and NormAL, clipped halfway; LoRA-FA of both, PEFT's with the
optimizer that it has for it; La-LoRA up to r = 32 beside PEFT's LoRA of r = 32; AdaLoRA of both from 12 triplets to an average of 4,
chosen in every step of the middle half. Every process imports both packages and loads the same model. Reported is the high-water mark
that the kernel keeps (VmHWM), in all, and beyond what the process held before its adapter was made; medians over the runs, which
alternate.

What LoRA-FA need not keep: the x of query, key and value (one tensor), of attention's output and of intermediate, 0.8 MB each in float32,
and of output, 3.1 MB; 33 MB in 6 blocks. With dropout PEFT keeps a mask of each, 1 byte an element, and ours none.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from providers import LINEARS, LR, AdaLora, Ours, Peft, batch_for, load
from rich.console import Console
from rich.table import Table

import adaptlora
from adaptlora.benchmarks.harness import environment

RESULT = Path(__file__).parent / "results" / "memory.json"
MIB = 2**20


def peft_lora(model, dropout: float, r: int):
    import peft

    config = peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=LINEARS["minilm"])
    return Peft(model, config)


class PeftLoraFa(Peft):
    def __init__(self, model, config):
        super().__init__(model, config)
        from peft.optimizers import create_lorafa_optimizer

        self.optimizer = create_lorafa_optimizer(self.model, r=config.r, lora_alpha=config.lora_alpha, lr=LR)


def peft_lorafa(model, dropout: float, r: int, steps: int):
    import peft

    config = peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=LINEARS["minilm"])
    return PeftLoraFa(model, config)


def schedule(steps: int) -> dict[str, int]:
    """AdaLoRA's: triplets go in the middle half."""
    return {"tinit": steps // 4, "tfinal": steps // 4, "total_step": steps, "deltaT": 1}


def peft_adalora(model, dropout: float, r: int, steps: int):
    import peft

    config = peft.AdaLoraConfig(
        init_r=r, target_r=4, lora_alpha=2 * r, lora_dropout=dropout, target_modules=LINEARS["minilm"], **schedule(steps)
    )  # fmt: skip
    return AdaLora(model, config)


def our_adalora(removal: str):
    def make(model, dropout: float, r: int, steps: int):
        config = adaptlora.AdaLoRAConfig(
            init_r=r, target_r=4, lora_alpha=2 * r, lora_dropout=dropout, target_modules=LINEARS["minilm"], removal=removal,
            **schedule(steps),
        )  # fmt: skip
        return Ours(model, config)

    return make


def ours(kind, **fields):
    def make(model, dropout: float, r: int, steps: int):
        timed = {key: value(steps) if callable(value) else value for key, value in fields.items()}
        config = kind(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=LINEARS["minilm"], **timed)
        return Ours(model, config)

    return make


PROVIDERS = {
    "PEFT LoRA": (8, lambda model, dropout, r, steps: peft_lora(model, dropout, r)),
    "adaptlora LoRA": (8, ours(adaptlora.LoraConfig)),
    "adaptlora NormAL": (
        8,
        ours(adaptlora.NormALConfig, target_r=4.0, t_p=lambda steps: steps // 3, t_c=lambda steps: steps // 2),
    ),
    "PEFT LoRA-FA": (8, peft_lorafa),
    "adaptlora LoRA-FA": (8, ours(adaptlora.LoraConfig, freeze_A=True)),
    "PEFT AdaLoRA": (12, peft_adalora),
    "adaptlora AdaLoRA, removal final": (12, our_adalora("final")),
    "adaptlora AdaLoRA, removal update": (12, our_adalora("update")),
    "PEFT LoRA, r = 32": (32, lambda model, dropout, r, steps: peft_lora(model, dropout, r)),
    "adaptlora La-LoRA, r = 32": (32, ours(adaptlora.LaLoRAConfig, gamma=8.0, temperature=10.0)),
}
BASELINES = {
    "adaptlora LoRA": "PEFT LoRA",
    "adaptlora NormAL": "PEFT LoRA",
    "PEFT LoRA-FA": "PEFT LoRA",
    "adaptlora LoRA-FA": "PEFT LoRA-FA",
    "adaptlora AdaLoRA, removal final": "PEFT AdaLoRA",
    "adaptlora AdaLoRA, removal update": "PEFT AdaLoRA",
    "adaptlora La-LoRA, r = 32": "PEFT LoRA, r = 32",
}


def _status(field: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def run(name: str, dropout: float, steps: int) -> None:
    """The child: prints its memory as JSON."""
    import peft  # noqa: F401  every provider's process has the same libraries

    torch.set_num_threads(1)
    model = load("minilm")
    batch = batch_for("minilm", 8, 64)
    torch.manual_seed(0)
    model.eval()
    with torch.no_grad():
        model(**batch)  # what the libraries allocate once
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    r, make = PROVIDERS[name]
    trained = make(model, dropout, r, steps)
    for group in trained.optimizer.param_groups:
        group["lr"] = LR
    for _ in range(steps):
        trained.step(batch)
    print(json.dumps({"peak": _status("VmHWM"), "before": before}))


def measure(steps: int, rounds: int) -> list[dict]:
    rows = []
    for dropout in (0.0, 0.1):
        found: dict[str, list[dict]] = {name: [] for name in PROVIDERS}
        for _ in range(rounds):
            for name in PROVIDERS:
                command = [sys.executable, __file__, "--child", name, "--dropout", str(dropout), "--steps", str(steps)]
                output = subprocess.run(
                    command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
                ).stdout
                found[name].append(json.loads(output.splitlines()[-1]))
        for name, runs in found.items():
            peaks = [run["peak"] for run in runs]
            beyond = [run["peak"] - run["before"] for run in runs]
            rows.append(
                {
                    "provider": name,
                    "dropout": dropout,
                    "peak MiB": round(statistics.median(peaks) / MIB, 1),
                    "peaks MiB": [round(peak / MIB, 1) for peak in peaks],
                    "beyond the model MiB": round(statistics.median(beyond) / MIB, 1),
                }
            )
    for row in rows:
        baseline = BASELINES.get(row["provider"])
        if baseline:
            other = next(r for r in rows if r["provider"] == baseline and r["dropout"] == row["dropout"])
            for field in ("peak MiB", "beyond the model MiB"):
                row[field.replace("MiB", "over PEFT's")] = round(row[field] / other[field], 3)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child")
    parser.add_argument("--dropout", type=float, default=0.0)
    options = parser.parse_args()
    if options.child:
        return run(options.child, options.dropout, options.steps)
    rows = measure(options.steps, options.rounds)
    table = Table(title=f"peak of resident memory, {options.steps} steps")
    columns = [
        "provider",
        "dropout",
        "peak MiB",
        "peak over PEFT's",
        "beyond the model MiB",
        "beyond the model over PEFT's",
    ]
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console(width=140).print(table)
    RESULT.write_text(json.dumps({"environment": environment(), "steps": options.steps, "rows": rows}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
