"""
Peak of resident memory of whole training runs, each provider in a process of its own, a model with random weights, AdamW.

LoRA of both packages, and NormAL, with masks and clipped halfway; LoRA-FA of both, PEFT's with the optimizer that it has for it; La-LoRA up
to r = 32 beside PEFT's LoRA of r = 32; AdaLoRA of both from 12 triplets to an average of 4, chosen in every step of the middle half. Every
process imports both packages and builds the same model. Reported is the high-water mark that the kernel keeps (VmHWM), in all, and beyond
what the process held before its adapter was made; runs of the providers alternate.

What LoRA-FA need not keep on MiniLM, 8 texts of 64 tokens: the x of query, key and value (one tensor), of attention's output and of
intermediate, 0.8 MB each in float32, and of output, 3.1 MB; 33 MB in 6 blocks. With dropout PEFT keeps a mask of each, 1 byte an element,
and ours none.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..config import AdaLoRAConfig, LaLoRAConfig, LoraConfig, NormALConfig
from ..finetune._extras import need
from .case import NotRun, Options
from .harness import Comparison
from .models import LINEARS, LR, MODELS, AdaLora, MaskedNormal, Ours, Peft, batch_for, build

NEEDS = ("transformers", "peft")
HIGHEST, BEYOND = "peak of resident memory", "peak beyond the model"
STEPS, ROUNDS, DROPOUT = 60, 3, 0.1


class PeftLoraFa(Peft):
    def __init__(self, model, config):
        super().__init__(model, config)
        optimizers = need("peft.optimizers", "bench: the provider PEFT LoRA-FA")
        self.optimizer = optimizers.create_lorafa_optimizer(self.model, r=config.r, lora_alpha=config.lora_alpha, lr=LR)


def _schedule(steps: int) -> dict[str, int]:
    """AdaLoRA's: triplets go in the middle half."""
    return {"tinit": steps // 4, "tfinal": steps // 4, "total_step": steps, "deltaT": 1}


def _peft(kind, config: str, rank: str = "r", schedule=lambda steps: {}, **fields):
    def make(model, name: str, dropout: float, r: int, steps: int):
        configs = need("peft", "bench: the provider PEFT")
        common = {rank: r, "lora_alpha": 2 * r, "lora_dropout": dropout, "target_modules": LINEARS[name]}
        return kind(model, getattr(configs, config)(**common, **fields, **schedule(steps)))

    return make


def _ours(kind, rank: str = "r", schedule=lambda steps: {}, **fields):
    def make(model, name: str, dropout: float, r: int, steps: int):
        common = {rank: r, "lora_alpha": 2 * r, "lora_dropout": dropout, "target_modules": LINEARS[name]}
        return Ours(model, kind(**common, **fields, **schedule(steps)))

    return make


class MaskedClipped(MaskedNormal):
    """Half of every mask is 0 from half of the steps on; the penalty ends then."""

    def __init__(self, model, name: str, dropout: float, r: int, steps: int):
        super().__init__(model, dropout, penalised=True, name=name)
        self.left = steps // 2

    def after_step(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.penalised = False
            for layer in self.layers.values():
                layer.mask[len(layer.mask) // 2 :] = 0


def _halfway(steps: int) -> dict[str, int]:
    return {"t_p": steps // 3, "t_c": steps // 2}


# {provider: (r, maker of what is trained)}
PROVIDERS: dict[str, tuple[int, Callable]] = {
    "PEFT LoRA": (8, _peft(Peft, "LoraConfig")),
    "adaptlora LoRA": (8, _ours(LoraConfig)),
    "masked NormAL": (8, MaskedClipped),
    "adaptlora NormAL": (8, _ours(NormALConfig, schedule=_halfway, target_r=4.0)),
    "PEFT LoRA-FA": (8, _peft(PeftLoraFa, "LoraConfig")),
    "adaptlora LoRA-FA": (8, _ours(LoraConfig, freeze_A=True)),
    "PEFT AdaLoRA": (12, _peft(AdaLora, "AdaLoraConfig", "init_r", _schedule, target_r=4)),
    "adaptlora AdaLoRA, removal final": (12, _ours(AdaLoRAConfig, "init_r", _schedule, target_r=4, removal="final")),
    "adaptlora AdaLoRA, removal update": (12, _ours(AdaLoRAConfig, "init_r", _schedule, target_r=4, removal="update")),
    "PEFT LoRA, r = 32": (32, _peft(Peft, "LoraConfig")),
    "adaptlora La-LoRA, r = 32": (32, _ours(LaLoRAConfig, gamma=8.0, temperature=10.0)),
}
# What `adaptlora bench memory` runs; bench/memory.py runs all.
SHORT = ("PEFT LoRA", "adaptlora LoRA", "masked NormAL", "adaptlora NormAL")


class ProcessError(RuntimeError):
    """A process whose memory was to be measured did not come to its end."""


def _status(field: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def _new_mark() -> None:
    """The high-water mark starts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def unusable() -> str | None:
    """Why memory cannot be measured here; None where the kernel keeps a high-water mark and lets it start anew."""
    if sys.platform != "linux":
        return f"needs Linux, whose kernel keeps the high-water mark, got {sys.platform}"
    try:
        _new_mark()
        _status("VmHWM")
    except (OSError, TypeError) as error:  # a sandbox without one of the two
        return f"the high-water mark VmHWM cannot be read or start anew: {error}"
    return None


def child(provider: str, name: str, dropout: float, steps: int) -> dict[str, int]:
    """What a process that trains does: its highest resident bytes, and those that it held before."""
    need("peft", "bench: memory")  # every provider's process has the same libraries
    torch.set_num_threads(1)
    model = build(name)
    dims = MODELS[name]
    batch = batch_for(name, dims.texts, dims.tokens)
    torch.manual_seed(0)
    model.eval()
    with torch.no_grad():
        model(**batch)  # what the libraries allocate once
    _new_mark()
    before = _status("VmRSS")
    r, make = PROVIDERS[provider]
    trained = make(model, name, dropout, r, steps)
    for group in trained.optimizer.param_groups:
        group["lr"] = LR
    for _ in range(steps):
        trained.step(batch)
    return {"peak": _status("VmHWM"), "before": before}


def run(provider: str, name: str, dropout: float, steps: int) -> dict[str, int]:
    """`child` in a process of its own.  Raises: ProcessError (with the end of what the process said)."""
    command = [sys.executable, "-m", __name__, provider, name, str(dropout), str(steps)]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    if ended.returncode:
        raise ProcessError(f"bench: memory: {provider} ended with {ended.returncode}: {ended.stderr.strip()[-500:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def measure(providers, name: str, dropout: float, steps: int, rounds: int) -> dict[str, list[dict[str, int]]]:
    """`run` of every provider in turn, `rounds` times."""
    found: dict[str, list[dict[str, int]]] = {provider: [] for provider in providers}
    for _ in range(rounds):
        for provider, runs in found.items():
            runs.append(run(provider, name, dropout, steps))
    return found


def comparisons(options: Options) -> Iterator[Comparison | NotRun]:
    """The highest resident bytes in all, and beyond what the process held before the adapter; the floor is PEFT's LoRA.

    It is the CPU's memory, whatever the device is.  Raises: ProcessError.
    """
    reason = unusable()
    if reason:
        yield NotRun(HIGHEST, reason)
        return
    name, steps = ("tiny", 4) if options.quick else ("minilm", STEPS)
    providers, rounds = (SHORT[:2], 1) if options.quick else (SHORT, ROUNDS)
    rounds = options.rounds or rounds
    found = measure(providers, name, DROPOUT, steps, rounds)
    dims = MODELS[name]
    facts = {"model": dims.title, "texts": dims.texts, "tokens": dims.tokens, "steps": steps, "dropout": DROPOUT}
    for case, value in ((HIGHEST, lambda run: run["peak"]), (BEYOND, lambda run: run["peak"] - run["before"])):
        samples = {provider: [value(run) for run in runs] for provider, runs in found.items()}
        yield Comparison(f"{dims.title}: {case}", "PEFT LoRA", samples, facts=facts, unit="MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description="One training run, for its memory; prints it as JSON.")
    for field, kind in (("provider", str), ("name", str), ("dropout", float), ("steps", int)):
        parser.add_argument(field, type=kind)
    print(json.dumps(child(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
