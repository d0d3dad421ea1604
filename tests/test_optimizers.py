"""Rank changes under every optimizer: its state follows, and training goes on as if the factors had always had these ranks."""

import copy
import warnings

import pytest
import torch
from models import Net, task_loss
from transformers.optimization import Adafactor as TransformersAdafactor

import adaptlora
from adaptlora import RankedPair
from adaptlora.ranks import FACTORS

K, N = 7, 5


def transformers_adafactor(parameters, **options):
    return TransformersAdafactor(parameters, lr=0.01, relative_step=False, scale_parameter=False, **options)


ELEMENTWISE = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1, t0=0),
}
WHOLE = {  # a step of one element depends on others
    "muon": lambda p: torch.optim.Muon(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "adafactor-foreach": lambda p: torch.optim.Adafactor(p, lr=0.1, foreach=True),
    "transformers-adafactor": transformers_adafactor,
    "transformers-adafactor-moment": lambda p: transformers_adafactor(p, beta1=0.9),
}
ALL = ELEMENTWISE | WHOLE


def factored_dim(factor, key):
    """Where the rank dimension of a factored statistic is; None: it has none."""
    row = "row" in key
    return {("lora_A", True): 0, ("lora_B", False): -1}.get((factor, row))


def make_pair(rank, capacity=None, dtype=torch.float64, seed=0):
    pair = RankedPair(K, N, rank, capacity=capacity, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for store in pair._stores.values():
            store.copy_(torch.randn(store.shape, generator=generator, dtype=dtype))
    return pair


def train_step(pair, optimizer, seed=0):
    """The gradient of a rank depends on that rank alone, so that every rank has a trajectory of its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(K, generator=generator, dtype=torch.float64).to(pair.lora_A.dtype)
    z = torch.randn(N, generator=generator, dtype=torch.float64).to(pair.lora_A.dtype)
    ((pair.lora_A * x).cos().sum() + (pair.lora_B * z[:, None]).sin().sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


def make_trained(build, rank=6, capacity=None, dtype=torch.float64, steps=3):
    pair = make_pair(rank, capacity, dtype)
    optimizer = build(list(pair.parameters()))
    pair.track(optimizer)
    for step in range(steps):
        train_step(pair, optimizer, step)
    return pair, optimizer


def cut(tensor, factor, key, keep):
    """The part of a factor, or of its state, that belongs to the ranks `keep`."""
    if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0:
        return copy.deepcopy(tensor)
    dim = factored_dim(factor, key) if "row" in key or "col" in key else {"lora_A": 0, "lora_B": 1}[factor]
    if dim is None:
        return tensor.clone()
    return tensor.index_select(dim, torch.as_tensor(keep)).clone()


def rank_major(value):
    return value.t().contiguous().t() if isinstance(value, torch.Tensor) and value.dim() == 2 else value


def sliced(pair, optimizer, build, keep):
    """A pair that never had other ranks than `keep`, and its optimizer with the state cut by hand."""
    small = RankedPair(K, N, len(keep), dtype=pair.lora_A.dtype)
    other = build(list(small.parameters()))
    for name in FACTORS:
        old, new = getattr(pair, name), getattr(small, name)
        with torch.no_grad():
            new.copy_(cut(old.detach(), name, "", keep))
        if old in optimizer.state:
            state = {key: cut(value, name, key, keep) for key, value in optimizer.state[old].items()}
            # Fused optimizers go by memory: state must lie as its parameter does.
            other.state[new] = {key: rank_major(value) if name == "lora_B" else value for key, value in state.items()}
    return small, other


def assert_same(pair, optimizer, other, other_optimizer):
    for name in FACTORS:
        mine, theirs = getattr(pair, name), getattr(other, name)
        assert torch.equal(mine, theirs), name
        state, expected = optimizer.state.get(mine, {}), other_optimizer.state.get(theirs, {})
        assert state.keys() == expected.keys()
        for key, value in state.items():
            same = torch.equal(value, expected[key]) if isinstance(value, torch.Tensor) else value == expected[key]
            assert same, (name, key)


CHANGES = {
    "narrow": (lambda pair: pair.narrow(3), [0, 1, 2]),
    "clip": (lambda pair: pair.plan(2, compact=True).commit(), [0, 1]),
    "to-rank-1": (lambda pair: pair.narrow(1), [0]),
    "permute": (lambda pair: pair.permute([3, 0, 5, 1, 4, 2]), [3, 0, 5, 1, 4, 2]),
    "choose": (lambda pair: pair.plan(2, order=[4, 1, 0, 2, 3, 5], compact=True).commit(), [4, 1]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ALL)
def test_training_goes_on_as_with_state_cut_by_hand(name, change, dtype):
    pair, optimizer = make_trained(ALL[name], dtype=dtype)
    apply, keep = CHANGES[change]
    small, other = sliced(pair, optimizer, ALL[name], keep)
    apply(pair)
    assert_same(pair, optimizer, small, other)
    for step in range(3, 6):
        train_step(pair, optimizer, step)
        train_step(small, other, step)
        assert_same(pair, optimizer, small, other)


@pytest.mark.parametrize("name", ALL)
def test_parked_ranks_come_back_with_their_state(name):
    pair, optimizer = make_trained(ALL[name])
    whole, other = sliced(pair, optimizer, ALL[name], range(6))
    pair.narrow(2)
    pair.grow(6)
    assert_same(pair, optimizer, whole, other)
    train_step(pair, optimizer, 3)
    train_step(whole, other, 3)
    assert_same(pair, optimizer, whole, other)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_masked_rank_and_a_removed_one_are_the_same_to_the_others(name):
    """Elementwise optimizers: the kept ranks of an unpruned pair go the same way, step by step."""
    pair, optimizer = make_trained(ELEMENTWISE[name])
    whole, other = sliced(pair, optimizer, ELEMENTWISE[name], range(6))
    pair.plan(3, compact=True).commit()
    for step in range(3, 6):
        train_step(pair, optimizer, step)
        train_step(whole, other, step)
    # The fused kernel rounds the last elements, too few for a vector, in another way, and these are others here.
    tolerance = {"rtol": 1e-14, "atol": 1e-14} if name == "adamw-fused" else {"rtol": 0, "atol": 0}
    for factor in FACTORS:
        kept = cut(getattr(whole, factor).detach(), factor, "", range(3))
        torch.testing.assert_close(getattr(pair, factor).detach(), kept, **tolerance)


@pytest.mark.parametrize("name", ALL)
def test_state_that_began_at_rank_1_grows(name):
    """La-LoRA's start: what is born at rank 1 has the shapes of scalars and of statistics over the other dimension, and is neither."""
    pair, optimizer = make_trained(ALL[name], rank=1, capacity=6)
    first, other = sliced(pair, optimizer, ALL[name], [0])
    pair.grow(4)
    for factor in FACTORS:
        parameter = getattr(pair, factor)
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            kept = other.state[getattr(first, factor)][key]
            assert not isinstance(kept, torch.Tensor) or torch.equal(cut(value, factor, key, [0]), kept)
            fresh = {"step_size": 0.01, "sum": 0.5}.get(key, 0.0)
            if key == "ax":
                fresh = cut(parameter.detach(), factor, "", [1, 2, 3])
            if isinstance(value, torch.Tensor) and 4 in value.shape:
                assert (cut(value, factor, key, [1, 2, 3]) == fresh).all(), key
    train_step(pair, optimizer, 3)
    train_step(first, other, 3)
    if name in ELEMENTWISE:
        torch.testing.assert_close(pair.lora_A[:1], first.lora_A, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(pair.lora_B[:, :1], first.lora_B, rtol=1e-14, atol=1e-14)
    assert all(p.isfinite().all() for p in pair.parameters())


@pytest.mark.parametrize("name", ALL)
def test_rank_0_takes_no_step_and_comes_back(name):
    pair, optimizer = make_trained(ALL[name])
    shapes = [p.shape for p in pair.parameters()]
    pair.narrow(0)
    train_step(pair, optimizer, 3)
    pair.compact()
    train_step(pair, optimizer, 4)
    pair.grow(6, generator=torch.Generator().manual_seed(0))
    train_step(pair, optimizer, 5)
    assert all(p.isfinite().all() for p in pair.parameters())
    assert [p.shape for p in pair.parameters()] == shapes


@pytest.mark.parametrize("name", ALL)
def test_an_optimizers_state_dict_after_a_change_continues_bit_for_bit(name):
    # In float32: `load_state_dict` gives NAdam's float32 scalars the parameter's dtype.
    pair, optimizer = make_trained(ALL[name], dtype=torch.float32)
    pair.narrow(3)
    train_step(pair, optimizer, 3)
    twin = make_pair(1, dtype=torch.float32, seed=9)
    resumed = ALL[name](list(twin.parameters()))
    twin.track(resumed)
    twin.load_state_dict(copy.deepcopy(pair.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step, rank in ((4, 5), (5, 2), (6, 6)):
        for one, its in ((pair, optimizer), (twin, resumed)):
            one.plan(rank).commit()
            train_step(one, its, step)
    assert_same(pair, optimizer, twin, resumed)


@pytest.mark.parametrize("name", ALL)
def test_bytes_held(name):
    """Everything with an entry for each rank, element or feature; not the scalars."""
    pair, optimizer = make_trained(ALL[name])
    pair.plan(2, compact=True).commit()
    state = [v for p in pair.parameters() for v in optimizer.state.get(p, {}).values() if isinstance(v, torch.Tensor)]
    assert pair.nbytes()["optimizer"] == sum(v.nbytes for v in state if v.dim())


# Whole adapters


def schedule(optimizer, steps):
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - 3)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [3])


def lora_plus(adapter, build):
    groups = [
        {"params": [getattr(layer, name) for layer in adapter.layers.values()], "lr": lr}
        for name, lr in zip(FACTORS, (0.01, 0.04), strict=True)
    ]
    return build(groups)


METHODS = {
    "normal": {"r": 6, "target_r": 2, "target_modules": ["first", "second"], "t_p": 2, "t_c": 4},
    "lalora": {"r": 6, "target_modules": ["first", "second"], "gamma": 0.0, "group_by": "module"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ALL)
def test_an_adapter_with_two_learning_rates_and_a_schedule(name, method):
    """Param objects, groups and rates are as they were after ranks changed; the rates are those of a run without any adapter."""
    config = {"normal": adaptlora.NormALConfig, "lalora": adaptlora.LaLoRAConfig}[method](**METHODS[method])
    adapter = adaptlora.attach(Net(torch.float64), config)
    optimizer = lora_plus(adapter, ALL[name])
    plain = lora_plus(
        adaptlora.attach(Net(), adaptlora.LoraConfig(target_modules=["first", "second"])), torch.optim.SGD
    )
    adapter.track(optimizer)
    schedules = schedule(optimizer, 8), schedule(plain, 8)
    held, start, steps = [list(group["params"]) for group in optimizer.param_groups], adapter.ranks(), 0
    for step in range(8):
        loss = task_loss(adapter.model, dtype=torch.float64, seed=step) + adapter.penalty()
        loss.backward()
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain.step()
        optimizer.zero_grad()
        if method == "lalora":
            adapter.method.budget = (2.0, 5.0, 12.0, 7.0)[step % 4]
        steps += adapter.step(loss) is not None
        for one in schedules:
            one.step()
        assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx(
            [group["lr"] for group in plain.param_groups]
        )
    assert steps == (1 if method == "normal" else 7) and adapter.ranks() != start
    for group, parameters in zip(optimizer.param_groups, held, strict=True):
        assert len(group["params"]) == len(parameters) and all(map(lambda a, b: a is b, group["params"], parameters))
    assert all(p.isfinite().all() for p in adapter.parameters())


@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "adafactor", "transformers-adafactor", "sgd-nesterov"])
def test_a_grad_scaler(name):
    """Scaled by a power of two, nothing changes but the skipped step."""
    config = adaptlora.NormALConfig(**METHODS["normal"])
    found = []
    for scaled in (False, True):
        adapter = adaptlora.attach(Net(torch.float64), config)
        optimizer = ALL[name](adapter.parameters())
        adapter.track(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(7):
            loss = task_loss(adapter.model, dtype=torch.float64, seed=step) + adapter.penalty()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            adapter.step(loss)
        found.append(adapter)
    assert found[0].ranks() == found[1].ranks() and found[0].method.clipped
    for one, other in zip(*(adapter.factors() for adapter in found), strict=True):
        assert torch.equal(one, other)
