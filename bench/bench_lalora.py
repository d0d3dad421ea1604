"""A run of La-LoRA from r_i = 1 with largest rank 32, beside PEFT's LoRA of rank 32, step by step; float32, AdamW.

MiniLM: 8 texts of 64 tokens, 36 modules in 6 blocks. SmolLM2-135M: 4 texts of 64 tokens, 210 modules in 30 blocks. What the factors
cost at rank R: 6·M·R Σ (K + N) FLOPs, for MiniLM with M = 512 4.1 G at R = 32 beside the 21.7 G of the base products, and 12 bytes a
number of AdamW. The allocation reads all factors once, parked ones included: 5.3 MB for MiniLM, 39 MB for SmolLM2-135M, and little else;
predicted 1 % of a step. The ratio to quote is that of the sums over the run, "mean over the run", since a step's cost follows its ranks.
"""

import statistics
import time

import pytest
from providers import load

import adaptlora
from adaptlora.benchmarks.models import LINEARS, Ours, Peft, batch_for, frozen_step, shared_copy

R = 32


class OursTimed(Ours):
    """Notes what the method itself takes in every step."""

    def __init__(self, model, config, lr):
        super().__init__(model, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.allocation: list[float] = []
        self.average_rank: list[float] = []

    def after_step(self):
        start = time.perf_counter()
        self.adapter.step()
        self.allocation.append(time.perf_counter() - start)
        self.average_rank.append(statistics.mean(self.adapter.ranks().values()))


def peft_lora(name: str, p: float):
    import peft

    return peft.LoraConfig(r=R, lora_alpha=R, lora_dropout=p, target_modules=LINEARS[name])


def la_lora(name: str, p: float, gamma: float):
    return adaptlora.LaLoRAConfig(
        r=R, lora_alpha=R, lora_dropout=p, target_modules=LINEARS[name], gamma=gamma, temperature=10.0
    )


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_run(compare, quick, name, p):
    if quick and (name != "minilm" or p):
        pytest.skip("--quick runs MiniLM without dropout alone")
    texts, tokens = {"minilm": (2, 16) if quick else (8, 64), "smollm2": (4, 64)}[name]
    rounds = {"minilm": 100, "smollm2": 12}[name]
    model = load(name)
    batch = batch_for(name, texts, tokens)
    theirs = Peft(shared_copy(model), peft_lora(name, p))
    # The learning rate and γ are those at which the budget goes up early in the run: it should be paid for.
    ours = OursTimed(shared_copy(model), la_lora(name, p, gamma=8.0), lr=1e-3)
    assert set(ours.adapter.ranks().values()) == {1}
    providers = {
        "frozen, forward and dx": frozen_step(model, batch),
        f"PEFT LoRA, r = {R}": lambda: theirs.step(batch),
        f"adaptlora La-LoRA, r ≤ {R}": lambda: ours.step(batch),
    }
    facts = {"texts": texts, "tokens": tokens, "modules": len(ours.adapter.layers), "dropout": p}
    samples = compare(name, providers, floor=f"PEFT LoRA, r = {R}", rounds=rounds, warmup=1, facts=facts)
    ranks, allocation = ours.average_rank[-len(samples[f"PEFT LoRA, r = {R}"]) :], ours.allocation
    steps = samples[f"adaptlora La-LoRA, r ≤ {R}"]
    # `facts` is what is written at the end of the session.
    facts |= {
        "mean over the run": round(sum(steps) / sum(samples[f"PEFT LoRA, r = {R}"]), 3),
        "allocation, of a step": round(sum(allocation[-len(steps) :]) / sum(steps), 4),
        "average rank": f"{ranks[0]:.1f} … {ranks[len(ranks) // 2]:.1f} … {ranks[-1]:.1f}",
    }
