"""Several trainings in one process: what one thread does is nothing to another's models, files or cores."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import Net, task_loss

import adaptlora
from adaptlora.pool import over

SHARED = {"lora_alpha": 8, "target_modules": ["first", "second"]}


def config(kind: str, dropout: float):
    return {
        "NormAL": adaptlora.NormALConfig(r=6, target_r=3, t_p=5, t_c=10, lora_dropout=dropout, **SHARED),
        "La-LoRA": adaptlora.LaLoRAConfig(r=6, gamma=4.0, group_by="module", lora_dropout=dropout, **SHARED),
        "NoRA": adaptlora.NoRAConfig(r=3, r_out=6, lora_dropout=dropout, **SHARED),
    }[kind]


def train(kind: str, seed: int, *, dropout=0.0, steps=20, together=None, after_step=None):
    """Ranks after every step and the factors at the end; `together` is waited at before the first step."""
    model = Net(seed=seed) if together is None else together.model(seed)
    adapter = adaptlora.attach(model, config(kind, dropout))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.track(optimizer)
    if together is not None:
        together.barrier.wait(60)
    ranks = []
    for step in range(steps):
        loss = task_loss(model, seed=step)
        (loss + adapter.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step(loss)
        ranks.append(adapter.ranks())
        if after_step is not None:
            after_step(adapter)
    return ranks, [factor.detach() for factor in adapter.factors()]


class Together:
    """Models are made one at a time: torch's own initialisation draws from the one generator that all threads share."""

    def __init__(self, count: int):
        self.barrier = threading.Barrier(count)
        self._lock = threading.Lock()

    def model(self, seed: int) -> Net:
        with self._lock:
            return Net(seed=seed)


def at_once(*calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(120) for future in [pool.submit(call) for call in calls]]


@pytest.mark.parametrize("kinds", [("NormAL", "La-LoRA"), ("La-LoRA", "La-LoRA"), ("NoRA", "NormAL")], ids="+".join)
def test_two_trainings_are_what_they_are_one_after_the_other(kinds, backend):
    expected = [train(kind, seed) for seed, kind in enumerate(kinds)]
    together = Together(2)
    found = at_once(*(lambda k=kind, s=seed: train(k, s, together=together) for seed, kind in enumerate(kinds)))
    for (ranks, factors), (expected_ranks, expected_factors) in zip(found, expected, strict=True):
        assert ranks == expected_ranks
        torch.testing.assert_close(factors, expected_factors, atol=0, rtol=0)


def test_dropout_in_two_threads_draws_different_masks():
    """Seeds come from torch's one generator, each to one of the threads, whichever asks first."""
    together = Together(2)
    found = at_once(*(lambda: train("NormAL", 0, dropout=0.5, together=together) for _ in range(2)))
    for _, factors in found:
        assert all(factor.isfinite().all() for factor in factors)
    (_, first), (_, second) = found
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_saving_in_another_thread_between_steps(tmp_path):
    """A training that hands its adapter to a thread that saves it, and goes on when it has, beside another training."""
    expected = [train("La-LoRA", 0), train("NormAL", 1)]
    together, saved = Together(2), []
    with ThreadPoolExecutor(1) as saving:

        def save(adapter):
            folder = tmp_path / str(len(saved))
            saving.submit(adapter.save, folder).result(60)
            saved.append((folder, [factor.detach().clone() for factor in adapter.factors()]))

        found = at_once(
            lambda: train("La-LoRA", 0, together=together, after_step=save),
            lambda: train("NormAL", 1, together=together),
        )
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    for folder, factors in saved:
        loaded = adaptlora.load(Net(seed=0), folder)
        torch.testing.assert_close([f.detach() for f in loaded.factors()], factors, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["NormAL", "NoRA"])
def test_attaching_in_two_threads(kind):
    models = [Net(seed=seed) for seed in (0, 1)]
    twins = [adaptlora.attach(Net(seed=seed), config(kind, 0.0)).factors() for seed in (0, 1)]
    found = at_once(*(lambda m=model: adaptlora.attach(m, config(kind, 0.0)).factors() for model in models))
    torch.testing.assert_close(found, twins, atol=0, rtol=0)


FIRST_USE = """
import threading, torch, adaptlora
from adaptlora.ops import lora_linear, rank_norms, rank_penalty
from torch import nn
barrier, results = threading.Barrier(8), [None] * 8
x, weight, A, B = torch.ones(3, 8), torch.ones(8, 8), torch.ones(2, 8), torch.ones(8, 2)
def first(i):
    barrier.wait(60)
    y = lora_linear(x, weight, None, A.clone().requires_grad_(), B)
    y.sum().backward()
    results[i] = float(y.detach().sum()), float(rank_penalty([A], [B])), float(rank_norms([A], [B])[0][0].sum())
threads = [threading.Thread(target=first, args=(i,)) for i in range(8)]
[t.start() for t in threads]
[t.join(60) for t in threads]
assert None not in results and len(set(results)) == 1, results
"""


def test_the_first_use_of_everything_in_many_threads():
    """A fresh process: the extension is loaded, and every cache is filled, by eight threads that arrive together."""
    subprocess.run([sys.executable, "-c", FIRST_USE], check=True, timeout=120)


def test_the_pool_leaves_the_cores_of_other_threads_alone():
    """Its threads use one core each; one that comes to torch meanwhile uses what the process had, and so do all afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen, others, all_there = [], [], threading.Barrier(3)

        def other():
            others.append(torch.get_num_threads())

        def work(item):
            all_there.wait(60)
            seen.append(torch.get_num_threads())
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

        for _ in over(work, range(3)):
            pass
        other()
        assert seen == [1] * 3 and others == [3] * 4
    finally:
        torch.set_num_threads(before)
