"""Quality of the methods over seeds, one table a command, beside PEFT's LoRA, AdaLoRA, DoRA and PiSSA:

    python bench/quality.py trec-methods                 # choose the learning rates, run what is missing, print, plot
    python bench/quality.py trec-methods --report        # only print and plot what is there
    python bench/quality.py --list

Equal steps and batches for all rows, and final parameters as near to equal as a method can be set. The learning rate of each of
the methods is the best of those tried on training data held out for that, one seed; ablations take that of the row they vary. Runs
are stored as they end, by what they are (method, fields, rate, task, seed), so that a run that two tables share is made once and a
command that was stopped goes on. One thread unless told otherwise. Data: `make data data-e2e data-cifar10`.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import quality_methods
import quality_report
import quality_tasks
import torch
from quality_tables import FACTOR, METHODS, MOST_RATES, RATE_SEED, RATES, TABLES, Table, Variant

from adaptlora import doctor
from adaptlora.files import atomic_file, locked
from adaptlora.finetune.train import lr_factor, seed_everything

# Raised when the training loop, a schedule's shares of the steps or the tasks' preparation change: older runs are then made again.
LOOP = 1
RESULTS = Path(__file__).parent / "results"
FILE = "quality.json"


class Store:
    """The runs there are, in one file that several processes may share."""

    def __init__(self, file: Path):
        self.file = file

    def _content(self) -> dict:
        return json.loads(self.file.read_text()) if self.file.is_file() else {"runs": {}}

    @staticmethod
    def key(spec: dict) -> str:
        return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]

    def find(self, spec: dict) -> dict | None:
        return self._content()["runs"].get(self.key(spec))

    def add(self, spec: dict, result: dict) -> None:
        def change(content: dict) -> None:
            content["machine"], content["versions"] = doctor.machine(), doctor.versions()
            content["runs"][self.key(spec)] = {"spec": spec, **result}

        self._change(change)

    def summarise(self, name: str, summary: dict) -> None:
        self._change(lambda content: content.setdefault("tables", {}).update({name: summary}))

    def _change(self, change: Callable[[dict], object]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.file.parent):
            content = self._content()
            change(content)
            with atomic_file(self.file) as temporary:
                temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def spec_of(task: str, fixed: quality_tasks.QualityTask, variant: Variant, lr: float, seed: int) -> dict:
    """All that a run's result depends on, versions of packages and the rows' names left out."""
    return {
        "task": task, "steps": fixed.steps, "batch_size": fixed.batch_size, "targets": fixed.targets, "data": fixed.data,
        "method": variant.method, "fields": variant.fields, "lr": lr, "seed": seed, "validating": seed == RATE_SEED,
        "loop": LOOP,
    }  # fmt: skip


def train(task, spec: dict) -> dict:
    """One run: the score at the end, None where the loss was no longer finite."""
    fixed, seed = task.fixed, spec["seed"]
    started = time.perf_counter()
    model = task.model(seed)
    seed_everything(seed)
    run = quality_methods.start(
        model,
        spec["method"],
        spec["fields"],
        heads=task.heads(model),
        targets=fixed.targets,
        steps=fixed.steps,
        seed=seed,
    )
    optimizer = torch.optim.AdamW(run.parameters(), lr=spec["lr"], weight_decay=0.01)
    run.track(optimizer)
    run.model.train()
    for step, batch in enumerate(task.batches(seed), 1):
        for group in optimizer.param_groups:
            group["lr"] = spec["lr"] * lr_factor(step, fixed.steps, decay=True)
        loss = run.model(**batch).loss
        value = loss.item()
        if not math.isfinite(value):
            return {"score": None, "stopped_at": step}
        (loss + run.penalty()).backward()
        optimizer.step()
        run.with_gradients(step)
        optimizer.zero_grad()
        run.after(value)
    score = task.score(run.model)
    return {
        "score": score if math.isfinite(score) else None,
        **run.result(),
        "seconds": round(time.perf_counter() - started, 1),
    }


class Bench:
    """Runs what is missing, and knows the learning rates once they are chosen."""

    def __init__(self, store: Store, data_dir: str, until: float):
        self.store, self.data_dir, self.until = store, data_dir, until
        self._tasks: dict = {}

    def task(self, name: str, validating: bool):
        if (name, validating) not in self._tasks:
            self._tasks[name, validating] = quality_tasks.build(name, self.data_dir, validating=validating)
        return self._tasks[name, validating]

    def fixed(self, name: str) -> quality_tasks.QualityTask:
        return quality_tasks.FIXED[name]

    def run(self, name: str, label: str, variant: Variant, lr: float, seed: int) -> None:
        spec = spec_of(name, self.fixed(name), variant, lr, seed)
        if self.store.find(spec) is None and time.monotonic() < self.until:
            result = train(self.task(name, spec["validating"]), spec)
            self.store.add(spec, result)
            print(f"{name}, {label}, seed {seed}: {result['score']} ({result.get('seconds')} s)", flush=True)

    def rate(self, name: str, row: str) -> float | None:
        """The learning rate of a row of the task's methods, tried as far as time allows; None while the search has not ended."""
        fixed, variant = self.fixed(name), METHODS[name][row]
        scores: dict[float, float] = {}
        worst = -math.inf if fixed.higher_is_better else math.inf
        wanted = list(RATES[name])
        while wanted:
            for lr in wanted:
                self.run(name, f"{row} at {lr:g}", variant, lr, RATE_SEED)
                found = self.store.find(spec_of(name, fixed, variant, lr, RATE_SEED))
                if found is None:
                    return None
                scores[lr] = worst if found["score"] is None else found["score"]
            best = (max if fixed.higher_is_better else min)(scores, key=scores.get)
            if math.isinf(scores[best]):
                raise RuntimeError(
                    f"quality: {row} on {name} must be trainable at one of {sorted(scores)}, all diverged"
                )
            beyond = {min(scores): best / FACTOR, max(scores): best * FACTOR}
            wanted = [beyond[best]] if best in beyond and len(scores) < MOST_RATES else []
        return best

    def rates(self, name: str) -> dict[str, float] | None:
        """{row of the task's methods: its learning rate}; None while one is missing."""
        chosen = {row: self.rate(name, row) for row in METHODS[name]}
        return None if None in chosen.values() else chosen

    def fill(self, table: Table, seeds: int) -> None:
        rates = self.rates(table.task)
        for seed in range(seeds if rates else 0):
            for label, variant in table.rows.items():
                self.run(table.task, label, variant, rates[variant.rate_of], seed)

    def runs(self, table: Table, seeds: int) -> dict[str, dict[int, dict]]:
        """{row: {seed: its run}}, of those that there are."""
        rates, fixed = self.rates(table.task) or {}, self.fixed(table.task)
        found: dict[str, dict[int, dict]] = {}
        for label, variant in table.rows.items():
            lr = rates.get(variant.rate_of)
            runs = {s: self.store.find(spec_of(table.task, fixed, variant, lr, s)) for s in range(seeds)} if lr else {}
            found[label] = {seed: run | {"lr": lr} for seed, run in runs.items() if run is not None}
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="of --list; none: all of them")
    parser.add_argument("--list", action="store_true", help="the tables, and how many runs each has")
    parser.add_argument("--seeds", type=int, help="instead of the table's own number")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many")
    parser.add_argument("--report", action="store_true", help="run nothing; print and draw what is there")
    parser.add_argument("--data-dir", default=".data")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of quality.json and the plots")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if unknown := sorted(set(options.tables) - set(TABLES)):
        parser.error(f"TABLE must be one of {', '.join(TABLES)}, got {', '.join(unknown)}")
    if options.list:
        for name, table in TABLES.items():
            print(f"{name:16} {table.task:8} {len(table.rows)} rows × {table.seeds} seeds: {table.title}")
        return
    if options.seeds is not None and not 1 <= options.seeds <= RATE_SEED:
        parser.error(f"--seeds must be 1 to {RATE_SEED}, got {options.seeds}")
    torch.set_num_threads(options.threads)
    until = 0.0 if options.report else time.monotonic() + 60 * options.minutes
    bench = Bench(Store(options.results / FILE), options.data_dir, until)
    for name in options.tables or TABLES:
        table = TABLES[name]
        seeds = options.seeds or table.seeds
        bench.fill(table, seeds)
        summary = quality_report.summary(table, bench.fixed(table.task), bench.runs(table, seeds))
        if not any(row["mean"] is not None for row in summary["rows"].values()):
            print(f"{name}: no runs yet")
            continue
        print(f"{name}: {table.title}\n\n{quality_report.markdown(summary)}\n")
        if seeds != table.seeds:
            print("not kept: --seeds is not the table's own number\n")
            continue
        bench.store.summarise(name, summary)
        with atomic_file(options.results / f"quality_{name}.png") as partial:
            quality_report.figure(summary).savefig(partial, dpi=150, format="png")


if __name__ == "__main__":
    main()
