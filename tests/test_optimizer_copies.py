"""State that is a copy of the parameter (slow weights, z, x0): ranks that it never had begin with the factor's own values."""

import pytest
import torch
from test_optimizers import cut, make_pair, train_step

from adaptlora.ranks import FACTORS


def keeps(key, package, name):
    """An optimizer of that package and class name whose state `key` began as a copy of the parameter and moves slowly."""

    def step(self, closure=None):
        torch.optim.SGD.step(self, closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].setdefault(key, p.detach().clone()).lerp_(p.detach(), 0.25)

    cls = type(name, (torch.optim.SGD,), {"__module__": f"{package}.module", "step": step})
    return lambda parameters: cls(parameters, lr=0.01, momentum=0.9)


COPIES = {
    "asgd": ("ax", lambda p: torch.optim.ASGD(p, lr=0.01, t0=0)),
    "schedule-free-adamw": ("z", keeps("z", "schedulefree", "AdamWScheduleFree")),
    "schedule-free-sgd": ("y", keeps("y", "schedulefree", "SGDScheduleFreeReference")),
    "schedule-free-radam": ("z", keeps("z", "pytorch_optimizer", "ScheduleFreeRAdam")),
    "madgrad": ("x0", keeps("x0", "timm", "MADGRAD")),
    "madgrad-subclass": ("x0", keeps("x0", "madgrad", "MirrorMADGRAD")),
    "lookahead": ("slow_param", keeps("slow_param", "torch_optimizer", "Lookahead")),
    "lookahead-inside": ("lookahead_slow_buff", keeps("lookahead_slow_buff", "own", "Any")),
}
ROWS = {"lora_A": 0, "lora_B": 1}


def trained(name, rank, capacity=None):
    key, build = COPIES[name]
    pair = make_pair(rank, capacity)
    optimizer = build(list(pair.parameters()))
    pair.track(optimizer)
    for step in range(3):
        train_step(pair, optimizer, step)
    return pair, optimizer, key


def of(optimizer, pair, factor, key, rows):
    return cut(optimizer.state[getattr(pair, factor)][key], factor, "", rows)


def own(pair, factor, rows):
    return cut(getattr(pair, factor).detach(), factor, "", rows)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(("rank", "capacity", "grown"), [(1, 6, 4), (3, 3, 6), (2, 4, 7), (0, 3, 5)])
@pytest.mark.parametrize("name", COPIES)
def test_new_ranks_begin_with_the_factors_values(name, rank, capacity, grown, compact):
    pair, optimizer, key = trained(name, rank, capacity)
    before = {factor: of(optimizer, pair, factor, key, range(rank)) for factor in FACTORS if rank}
    pair.plan(grown, compact=compact, order=list(reversed(range(rank)))).commit()
    for factor in FACTORS if rank else ():
        assert torch.equal(of(optimizer, pair, factor, key, range(rank)), before[factor].flip(ROWS[factor]))
        assert torch.equal(of(optimizer, pair, factor, key, range(rank, grown)), own(pair, factor, range(rank, grown)))
    assert pair.lora_A[rank:].norm(dim=1).min() > 0


@pytest.mark.parametrize("name", COPIES)
def test_parked_ranks_keep_their_copy_and_those_without_one_get_it(name):
    pair, optimizer, key = trained(name, 4, capacity=6)
    before = {factor: of(optimizer, pair, factor, key, range(4)) for factor in FACTORS}
    pair.narrow(2)
    train_step(pair, optimizer, 5)
    pair.grow(6)
    for factor in FACTORS:
        assert torch.equal(of(optimizer, pair, factor, key, [2, 3]), cut(before[factor], factor, "", [2, 3]))
        assert torch.equal(of(optimizer, pair, factor, key, [4, 5]), own(pair, factor, [4, 5]))


@pytest.mark.parametrize("name", COPIES)
def test_ranks_parked_before_there_was_state_get_it_too(name):
    """Rows of a checkpoint lie behind rank 4; narrowed to 2, the optimizer begins, and ranks 2 and 3 have never had any."""
    source, _, key = trained(name, 6)
    source.narrow(4)
    parked = source.parked()
    pair = make_pair(4, seed=1)
    pair.park(parked)
    other = COPIES[name][1](list(pair.parameters()))
    pair.track(other)
    pair.narrow(2)
    train_step(pair, other)
    pair.grow(6)
    for factor in FACTORS:
        assert torch.equal(of(other, pair, factor, key, [2, 3]), own(pair, factor, [2, 3]))
        rows = parked[f"{factor}.{key}"]
        assert torch.equal(of(other, pair, factor, key, [4, 5]), rows if factor == "lora_A" else rows.t())


def test_a_rank_that_trains_on_is_not_pulled_to_zero():
    """Gradients near 0: what pulls a new row anywhere is its copy."""
    pair = make_pair(1, capacity=4)
    optimizer = keeps("slow_param", "own", "Any")(list(pair.parameters()))
    pair.track(optimizer)
    for step in range(12):
        if step == 5:
            pair.grow(4)
            begun = pair.lora_A.detach().clone()
        (1e-9 * (pair.lora_A.sum() + pair.lora_B.sum())).backward()
        optimizer.step()
        for p in pair.parameters():
            p.data.copy_(optimizer.state[p]["slow_param"])
        optimizer.zero_grad()
    torch.testing.assert_close(pair.lora_A.detach()[1:], begun[1:], rtol=1e-5, atol=1e-6)
