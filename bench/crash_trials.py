"""
Training runs that are killed at random moments and go on: losses of all steps and the final state must be those of a run that nobody
killed, bit for bit.

    python bench/crash_trials.py --trials 200 --loop raw --method normal --json
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from trials import PHASES, Journal, digest, start_random, wait

import adaptlora
from adaptlora.integrations import trainer_checkpoint

STEPS = 12
ACCUMULATION = 2
RESULTS = Path(__file__).parent / "results" / "crash_trials.json"


def make_adapter(method: str):
    """A small BERT with dropout in its own layers and in the adapters, whose ranks change on the way."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=20, num_labels=3,
    )  # fmt: skip
    common = {
        "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "modules_to_save": ["classifier"], "lora_dropout": 0.1
    }  # fmt: skip
    fields = {
        "normal": {"target_r": 2, "schedule": "adaptive", "ema": 0.8, "min_steps": 3, "lambda_p": 9.0, "lambda_c": 9.0},
        "lalora": {"contribution": "fisher", "ema": 0.7, "gamma": 4.0},
    }
    kind = {"normal": adaptlora.NormALConfig, "lalora": adaptlora.LaLoRAConfig}[method]
    return adaptlora.attach(BertForSequenceClassification(config), kind(**common, **fields[method]))


def examples(count: int = 48) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 50, (count, 9), generator=generator)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return [{"input_ids": w, "labels": label} for w, label in zip(words, labels, strict=True)]


def train_raw(method: str, folder: Path, journal: Journal) -> dict[str, str]:
    adapter = make_adapter(method)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    adapter.track(optimizer)
    adapter.model.train()
    data, step, order = examples(), 0, []
    start_random()
    path = adaptlora.last_checkpoint(folder)
    if path is not None:
        step, order = adaptlora.load_checkpoint(path, adapter, optimizer, scheduler=scheduler)
    while step < STEPS:
        journal.phase("step")
        order = order or torch.randperm(len(data)).tolist()
        total = 0.0
        for _ in range(ACCUMULATION):
            rows, order = [data[i] for i in order[:4]], order[4:]
            noise = 1 + 0.01 * random.random() + 0.01 * float(np.random.rand())
            inputs = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            loss = noise * adapter.model(**inputs).loss / ACCUMULATION
            loss.backward()
            total += loss.item()
        penalty = adapter.penalty()
        if penalty.requires_grad:
            penalty.backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        journal.phase("clip")
        adapter.step(total)
        scheduler.step()
        step += 1
        journal.loss(step, total)
        journal.phase("save")
        adaptlora.save_checkpoint(folder, adapter, optimizer, step=step, scheduler=scheduler, extra=order)
    return digest(adapter, optimizer)


class Watch(TrainerCallback):
    """Phases and losses of Trainer's run. Added before the adapter's callback, it hears of each event first."""

    def __init__(self, journal: Journal):
        self.journal = journal

    def on_step_begin(self, args, state, control, **kwargs):
        self.journal.phase("step")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.journal.phase("clip")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.journal.loss(state.global_step, logs["loss"])

    def on_step_end(self, args, state, control, **kwargs):
        self.journal.phase("save")


class Sealed(TrainerCallback):
    """What the adapter's callback does with trainer_checkpoint, for a callback that does not."""

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        trainer_checkpoint.check_resumed(args.output_dir, state, optimizer, lr_scheduler)

    def on_save(self, args, state, control, **kwargs):
        trainer_checkpoint.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def train_trainer(method: str, folder: Path, journal: Journal) -> dict[str, str]:
    adapter = make_adapter(method)
    start_random()
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, gradient_accumulation_steps=ACCUMULATION,
        learning_rate=1e-2, save_strategy="steps", save_steps=1, save_total_limit=2, logging_steps=1,
        logging_nan_inf_filter=False, report_to=[], use_cpu=True, disable_tqdm=True, seed=1,
    )  # fmt: skip
    callbacks = [Watch(journal), adapter.callback(), Sealed()]
    trainer = Trainer(adapter.model, arguments, train_dataset=examples(), callbacks=callbacks)
    path = adaptlora.last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=path)
    if path is not None and trainer.state.global_step == int(path.name.removeprefix("checkpoint-")):
        trainer._load_rng_state(str(path))  # Trainer leaves it to the next batch, and there was none
    return digest(adapter, trainer.optimizer)


LOOPS = {"raw": train_raw, "trainer": train_trainer}


def spawn(loop: str, method: str, folder: Path, journal: Journal, before=None) -> int:
    """A forked child that trains to the end and leaves its digest in folder.digest.  Returns: its process id."""
    journal.phase("start")
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Trainer prints every log
        warnings.simplefilter("ignore")
        if before is not None:
            before()
        result = LOOPS[loop](method, folder, journal)
        folder.with_suffix(".digest").write_text(json.dumps(result), encoding="utf-8")
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


class Reference:
    """The run that nobody kills.  Attributes: losses, digest, seconds."""

    def __init__(self, loop: str, method: str, folder: Path):
        self.loop, self.method = loop, method
        journal = Journal(folder.with_suffix(".losses"))
        start = time.monotonic()
        status = wait(spawn(loop, method, folder, journal))
        self.seconds = time.monotonic() - start
        if status != 0:
            raise RuntimeError(f"the reference run of {loop}, {method} ended with {status}")
        self.losses, self.digest = journal.losses(), self._digest(folder)

    @staticmethod
    def _digest(folder: Path) -> dict[str, str]:
        return json.loads(folder.with_suffix(".digest").read_text(encoding="utf-8"))

    def faults(self, folder: Path, journal: Journal) -> list[str]:
        """What differs in a run that was killed and went on to its end."""
        found = []
        losses = journal.losses()
        if losses != self.losses:
            steps = [step for step in self.losses if losses.get(step) != self.losses[step]]
            found.append(f"losses differ at steps {steps}")
        final = self._digest(folder)
        found += [
            f"the final state of {part} differs" for part, expected in self.digest.items() if final[part] != expected
        ]
        return found


def trial(reference: Reference, folder: Path, draw: random.Random, kills: int = 3) -> dict:
    """
    Kill a run up to `kills` times, each at a moment drawn over what a whole run takes, and let it go on to its end.

    Returns: phases in which it was killed, and faults: a checkpoint that was lost or could not be loaded, a loss or a state that differs.
    """
    journal = Journal(folder.with_suffix(".losses"))
    phases, faults, best = [], [], 0
    for attempt in range(kills + 1):
        pid = spawn(reference.loop, reference.method, folder, journal)
        status = wait(pid, draw.uniform(0, reference.seconds) if attempt < kills else None)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            wait(pid)
            phases.append(journal.where())
        elif status:
            faults.append(f"attempt {attempt} ended with {status}")
            break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = adaptlora.last_checkpoint(folder)
        step = 0 if path is None else int(path.name.removeprefix("checkpoint-"))
        if step < best:
            faults.append(f"checkpoint-{best} was whole, and after a kill the last is {path}")
        best = max(best, step)
        if status == 0:
            break
    return {"phases": phases, "faults": faults or reference.faults(folder, journal)}


def run(loop: str, method: str, trials: int, seed: int = 0, until: float | None = None) -> dict:
    """`trials` of `trial`, or as many as there are until the time `until`."""
    draw = random.Random(seed)
    phases, faults, done = dict.fromkeys(PHASES, 0), [], 0
    with tempfile.TemporaryDirectory(prefix="crash-trials-") as place:
        reference = Reference(loop, method, Path(place) / "reference")
        while done < trials and (until is None or time.time() < until):
            folder = Path(place) / f"trial{done}"
            result = trial(reference, folder, draw)
            for phase in result["phases"]:
                phases[phase] += 1
            faults += [f"trial {done}: {fault}" for fault in result["faults"]]
            shutil.rmtree(folder, ignore_errors=True)
            done += 1
    kills = sum(phases.values())
    return {
        "loop": loop, "method": method, "steps": STEPS, "trials": done, "seed": seed, "kills": kills,
        "kills_by_phase": phases, "lost": len(faults), "faults": faults, "reference_seconds": round(reference.seconds, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--loop", choices=LOOPS, action="append")
    parser.add_argument("--method", choices=("normal", "lalora"), action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop each combination after this long")
    parser.add_argument("--json", action="store_true", help=f"write {RESULTS.name} beside the other results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    from adaptlora.benchmarks.harness import environment

    report = {"environment": environment(), "cases": []}
    for loop in options.loop or LOOPS:
        for method in options.method or ("normal", "lalora"):
            until = None if options.minutes is None else time.time() + 60 * options.minutes
            report["cases"].append(run(loop, method, options.trials, options.seed, until))
            print(json.dumps(report["cases"][-1]), flush=True)
            if options.json:
                RESULTS.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.exit(any(case["lost"] for case in report["cases"]))


if __name__ == "__main__":
    main()
