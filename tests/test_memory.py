"""Bytes that are held are what the ranks say, and nothing grows with the number of rank changes."""

import gc
import tracemalloc

import psutil
import pytest
import torch
from models import Net, bert_batch, randomise, task_loss, tiny_bert

import adaptlora

CHANGES, WARM = 2000, 200
KIB = 1024


def storages(tensors) -> int:
    """Bytes of the distinct memory behind tensors."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


OPTIMIZERS = {  # numbers of state for each number that trains
    "AdamW": (2, lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)),
    "AdamW, amsgrad": (3, lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, amsgrad=True)),
    "SGD with momentum": (1, lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_the_clip_all_bytes_are_what_the_ranks_say(name):
    config = adaptlora.NormALConfig(r=8, target_r=3, target_modules="all-linear", t_p=2, t_c=3)
    adapter = adaptlora.attach(tiny_bert(), config)
    of_state, make = OPTIMIZERS[name]
    optimizer = make(adapter.parameters())
    adapter.track(optimizer)
    for _ in range(4):
        adapter.model(**bert_batch()).loss.backward()
        optimizer.step()
        adapter.step()
        gradients = [factor.grad for factor in adapter.factors()]
        optimizer.zero_grad(set_to_none=adapter.method.t < 4)
    numbers = sum(layer.rank * (layer.in_features + layer.out_features) for layer in adapter.layers.values())
    assert numbers < 0.45 * sum(8 * (layer.in_features + layer.out_features) for layer in adapter.layers.values())
    assert storages(adapter.factors()) == storages(gradients) == 4 * numbers
    state = [t for factor in adapter.factors() for t in optimizer.state[factor].values() if t is not None]
    assert storages(t for t in state if t.dim()) == 4 * numbers * of_state
    summary = adapter.summary()
    assert summary["adapter_bytes"] == summary["gradient_bytes"] == 4 * numbers
    assert summary["optimizer_bytes"] == 4 * numbers * of_state


class Churn:
    """La-LoRA on a small net whose factors are scaled anew in every step, so that every step changes ranks."""

    def __init__(self):
        config = adaptlora.LaLoRAConfig(
            r=12, target_modules="all-linear", group_by="module", gamma=1.0, temperature=0.5
        )
        self.adapter = adaptlora.attach(Net(), config)
        randomise(self.adapter)
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=1e-3)
        self.adapter.track(self.optimizer)
        self.generator = torch.Generator().manual_seed(0)
        self.changes = 0

    def step(self) -> None:
        task_loss(self.adapter.model).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for layer in self.adapter.layers.values():
                size = 0.5 + 4 * torch.rand((), generator=self.generator)
                for factor in (layer.lora_A, layer.lora_B):
                    factor.mul_(size / factor.norm())
        self.changes += self.adapter.step() is not None


@pytest.mark.slow
def test_nothing_grows_over_2000_rank_changes():
    churn = Churn()
    process = psutil.Process()

    def until(changes: int) -> None:
        while churn.changes < changes:
            churn.step()
        gc.collect()

    until(WARM)
    resident = process.memory_info().rss
    tracemalloc.start()
    until(2 * WARM)
    before = tracemalloc.take_snapshot()
    until(CHANGES)
    after = tracemalloc.take_snapshot()
    tracemalloc.stop()
    # The record of the changes themselves, for rank_history.json: three numbers of 8 bytes for each.
    record = 24 * len(churn.adapter.method.changes)
    grown = sum(
        entry.size_diff for entry in after.compare_to(before, "filename") if "tracemalloc" not in str(entry.traceback)
    )
    assert grown < record + 64 * KIB
    assert process.memory_info().rss - resident < record + 16 * KIB**2
