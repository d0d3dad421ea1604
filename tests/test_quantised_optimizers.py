"""Rank changes with quantised optimizer state, bitsandbytes' and torchao's: exact where a block stays whole, measured where not."""

import copy
import io

import bitsandbytes as bnb
import pytest
import torch
import torchao.optim
from models import Net, task_loss

import adaptlora
from adaptlora import RankedPair
from adaptlora.ranks import FACTORS
from adaptlora.state_layouts import dequantise, quantise

BLOCK = 256
TABLES = {signed: bnb.functional.create_dynamic_map(signed=signed) for signed in (True, False)}
# Half the widest gap between two entries of a table, that is the largest error of a number in units of its block's scale.
GAP = max(float(table.diff().max()) / 2 for table in TABLES.values())

BITSANDBYTES = {
    "adamw": lambda p: bnb.optim.AdamW8bit(p, lr=0.01),
    "adam": lambda p: bnb.optim.Adam8bit(p, lr=0.01),
    "paged-adamw": lambda p: bnb.optim.PagedAdamW8bit(p, lr=0.01),
    "lion": lambda p: bnb.optim.Lion8bit(p, lr=0.001),
    "sgd": lambda p: bnb.optim.SGD8bit(p, lr=0.01, momentum=0.9),
    "rmsprop": lambda p: bnb.optim.RMSprop8bit(p, lr=0.01),
    "adagrad": lambda p: bnb.optim.Adagrad8bit(p, lr=0.01),
    "lamb": lambda p: bnb.optim.LAMB8bit(p, lr=0.01),
    "ademamix": lambda p: bnb.optim.AdEMAMix8bit(p, lr=0.01),
    "adamw-32": lambda p: bnb.optim.AdamW(p, lr=0.01),
    "ademamix-32": lambda p: bnb.optim.AdEMAMix(p, lr=0.01),
}
TORCHAO = {
    "adamw-8": lambda p: torchao.optim.AdamW8bit(p, lr=0.01),
    "adamw-4": lambda p: torchao.optim.AdamW4bit(p, lr=0.01),
    "adamw-float8": lambda p: torchao.optim.AdamWFp8(p, lr=0.01),
}
ALL = BITSANDBYTES | TORCHAO


@pytest.fixture(autouse=True)
def eager():
    """torchao compiles its step for every shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def make_pair(rank, K=1024, N=516, capacity=None, seed=0):
    pair = RankedPair(K, N, rank, capacity=capacity)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for store in pair._stores.values():
            store.copy_(torch.randn(store.shape, generator=generator))
    return pair


def train_step(pair, optimizer, seed=0):
    """The gradient of a rank depends on that rank alone, and differs in size between elements."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(pair.lora_A.shape[1], generator=generator).exp()
    z = torch.randn(pair.lora_B.shape[0], generator=generator).exp()
    ((pair.lora_A * x).cos().sum() + (pair.lora_B * z[:, None]).sin().sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


def make_trained(build, rank=8, steps=3, **sizes):
    pair = make_pair(rank, **sizes)
    optimizer = build(list(pair.parameters()))
    pair.track(optimizer)
    for step in range(steps):
        train_step(pair, optimizer, step)
    return pair, optimizer


def numbers(optimizer, parameter):
    """Every state of a parameter as floats shaped like it (or as several of it), read by the library itself."""
    state, found = optimizer.state[parameter], {}
    for key, value in state.items():
        if key in ("state1", "state2") and value.dtype == torch.uint8:
            scales, table = state[f"absmax{key[-1]}"], state[f"qmap{key[-1]}"]
            parts = zip(value, scales, strict=True) if scales.dim() == 2 else [(value, scales)]
            read = [bnb.functional.dequantize_blockwise(v, absmax=s, code=table, blocksize=BLOCK) for v, s in parts]
            found[key] = torch.stack(read).view(value.shape)
        elif isinstance(value, torch.Tensor) and value.dim() >= 2 and not key.startswith("absmax"):
            found[key] = value.dequantize() if hasattr(value, "dequantize") else value.clone()
    return found


def cut(tensor, factor, keep):
    return tensor.index_select(tensor.dim() - (2 if factor == "lora_A" else 1), torch.tensor(keep))


@pytest.mark.parametrize("signed", TABLES)
@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 5000])
def test_quantise_is_the_inverse_of_what_bitsandbytes_stores(signed, n):
    """Codes come back as they were; numbers read are bitsandbytes' own; errors are no larger than its."""
    table = TABLES[signed]
    values = torch.randn(n, generator=torch.Generator().manual_seed(0)) ** 3
    values = values if signed else values.abs()
    if n == 0:
        codes, scale = quantise(values, table, BLOCK)
        assert codes.shape == scale.shape == (0,) and dequantise(codes, scale, table, BLOCK).shape == (0,)
        return
    codes, state = bnb.functional.quantize_blockwise(values, code=table, blocksize=BLOCK)
    read = dequantise(codes, state.absmax, table, BLOCK)
    theirs = bnb.functional.dequantize_blockwise(codes, absmax=state.absmax, code=table, blocksize=BLOCK)
    assert torch.equal(read, theirs)
    again, scale = quantise(read, table, BLOCK)
    assert torch.equal(again, codes)
    torch.testing.assert_close(scale, state.absmax, rtol=2e-7, atol=0)
    mine = dequantise(*quantise(values, table, BLOCK), table, BLOCK)
    assert (mine - values).norm() <= (theirs - values).norm() * 1.02
    assert ((mine - values).abs() <= GAP * 1.01 * scale.repeat_interleave(BLOCK)[:n]).all()


def test_blocks_of_zeros_and_repeated_changes_lose_nothing():
    """The entry nearest to −1 of a signed table is −0.993: scaled by the largest magnitude, a block would shrink with every change."""
    values = -torch.ones(300)
    values[256:] = 0
    for _ in range(20):
        values = dequantise(*quantise(values, TABLES[True], BLOCK), TABLES[True], BLOCK)
    torch.testing.assert_close(values[:256], -torch.ones(256), rtol=1e-5, atol=0)
    assert not values[256:].any()


CHANGES = {
    "narrow": (lambda pair: pair.narrow(3), [0, 1, 2]),
    "clip": (lambda pair: pair.plan(2, compact=True).commit(), [0, 1]),
    "permute": (lambda pair: pair.permute([3, 0, 5, 7, 1, 4, 6, 2]), [3, 0, 5, 7, 1, 4, 6, 2]),
    "choose": (lambda pair: pair.plan(2, order=[4, 1, 0, 2, 3, 5, 6, 7], compact=True).commit(), [4, 1]),
}


@pytest.mark.parametrize("K", [1024, 600])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ALL)
def test_the_numbers_follow(name, change, K):
    """Factors are exact; state is, in units of its largest number, no further off than one quantisation makes it."""
    pair, optimizer = make_trained(ALL[name], K=K)
    apply, keep = CHANGES[change]
    before = {f: (getattr(pair, f).detach().clone(), numbers(optimizer, getattr(pair, f))) for f in FACTORS}
    apply(pair)
    exact = "32" in name
    bound = 0.0 if exact else {"adamw-4": 0.2, "adamw-float8": 2**-4}.get(name, GAP * 1.01)
    for factor in FACTORS:
        parameter = getattr(pair, factor)
        assert torch.equal(parameter, cut(before[factor][0], factor, keep))
        found = numbers(optimizer, parameter)
        assert found.keys() == before[factor][1].keys() and found
        for key, value in found.items():
            expected = cut(before[factor][1][key], factor, keep)
            assert value.shape == expected.shape
            assert (value - expected).abs().max() <= bound * expected.abs().max(), key
    for step in range(3, 5):
        train_step(pair, optimizer, step)
    assert all(p.isfinite().all() for p in pair.parameters())


def codes_and_scales(state):
    found = {}
    for key, value in state.items():
        if hasattr(value, "codes"):
            found[key] = value.codes.clone(), value.scale.clone()
        elif isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
            found[key] = value.clone(), state[f"absmax{key[-1]}"].clone()
    return found


@pytest.mark.parametrize("name", ["adamw", "lion", "ademamix", "adamw-8"])
@pytest.mark.parametrize("change", CHANGES)
def test_ranks_that_are_whole_blocks_keep_their_codes(name, change):
    """K = 1024 = 4 blocks: lora_A goes on as if its codes and scales had been cut by hand."""
    pair, optimizer = make_trained(ALL[name])
    apply, keep = CHANGES[change]
    old = codes_and_scales(optimizer.state[pair.lora_A])
    apply(pair)
    new = codes_and_scales(optimizer.state[pair.lora_A])
    assert new.keys() == old.keys() and old
    for key, (codes, scales) in old.items():
        assert torch.equal(new[key][0], cut(codes, "lora_A", keep))
        by_rank = scales.view(*scales.shape[:-1], 8, 4).index_select(-2, torch.tensor(keep)).flatten(-2)
        torch.testing.assert_close(new[key][1], by_rank, rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", ["adamw", "lion", "ademamix", "adamw-8"])
def test_parked_ranks_come_back_with_their_codes(name):
    pair, optimizer = make_trained(ALL[name])
    before = numbers(optimizer, pair.lora_A)
    pair.narrow(3)
    for step in range(3, 6):
        train_step(pair, optimizer, step)
    trained = numbers(optimizer, pair.lora_A)
    pair.grow(8)
    for key, value in numbers(optimizer, pair.lora_A).items():
        torch.testing.assert_close(cut(value, "lora_A", range(3, 8)), cut(before[key], "lora_A", range(3, 8)))
        torch.testing.assert_close(cut(value, "lora_A", range(3)), trained[key])


def test_a_pair_of_both_kinds():
    """bitsandbytes keeps parameters below min_8bit_size in float32: those are exact, whichever factor it is."""
    pair, optimizer = make_trained(BITSANDBYTES["adamw"], N=100)
    kinds = {f: optimizer.state[getattr(pair, f)]["state1"].dtype for f in FACTORS}
    assert kinds == {"lora_A": torch.uint8, "lora_B": torch.float32}
    before = numbers(optimizer, pair.lora_B)
    pair.narrow(2)
    pair.grow(8)
    assert {f: optimizer.state[getattr(pair, f)]["state1"].dtype for f in FACTORS} == kinds
    assert all(torch.equal(value, before[key]) for key, value in numbers(optimizer, pair.lora_B).items())
    train_step(pair, optimizer, 3)


def test_32_bit_state_of_bitsandbytes_goes_on_bit_for_bit():
    pair, optimizer = make_trained(BITSANDBYTES["adamw-32"], K=30, N=20)
    small = RankedPair(30, 20, 2)
    other = BITSANDBYTES["adamw-32"](list(small.parameters()))
    for factor in FACTORS:
        mine, theirs = getattr(pair, factor), getattr(small, factor)
        with torch.no_grad():
            theirs.copy_(cut(mine.detach(), factor, [4, 1]))
        other.state[theirs] = {
            key: cut(value, factor, [4, 1]).contiguous() if isinstance(value, torch.Tensor) else value
            for key, value in optimizer.state[mine].items()
        }
    pair.plan(2, order=[4, 1, 0, 2, 3, 5, 6, 7], compact=True).commit()
    for step in range(3, 6):
        train_step(pair, optimizer, step)
        train_step(small, other, step)
        assert torch.equal(pair.lora_A, small.lora_A) and torch.equal(pair.lora_B, small.lora_B)


@pytest.mark.parametrize("name", ALL)
def test_from_rank_1_to_rank_0_and_back(name):
    pair, optimizer = make_trained(ALL[name], rank=1, capacity=8)
    for step, (rank, compact) in enumerate([(5, False), (8, False), (2, False), (0, False), (0, True), (4, False)]):
        pair.plan(rank, compact=compact).commit()
        train_step(pair, optimizer, step)
        assert pair.rank == rank and all(p.isfinite().all() for p in pair.parameters())


@pytest.mark.parametrize("name", ["adamw", "ademamix", "adamw-32", "adamw-8"])
def test_state_dicts_after_a_change_continue_bit_for_bit(name):
    pair, optimizer = make_trained(ALL[name])
    pair.narrow(3)
    train_step(pair, optimizer, 3)
    twin = make_pair(1, seed=9)
    resumed = ALL[name](list(twin.parameters()))
    twin.track(resumed)
    twin.load_state_dict(copy.deepcopy(pair.state_dict()))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=False))
    for step, rank in ((4, 6), (5, 2), (6, 8)):
        for one, its in ((pair, optimizer), (twin, resumed)):
            one.plan(rank).commit()
            train_step(one, its, step)
    assert torch.equal(pair.lora_A, twin.lora_A) and torch.equal(pair.lora_B, twin.lora_B)


@pytest.mark.parametrize("name", ["adamw", "adamw-8"])
def test_bytes_held(name):
    """Codes and scales, parked numbers in float32, and tables where they are not shared: torchao has one for each tensor."""
    pair, _optimizer = make_trained(ALL[name], N=512)
    each = 2 * (1024 + 512) * (1 + 4 / BLOCK)
    tables = 0 if name == "adamw" else 4 * 4 * 256
    assert pair.nbytes()["optimizer"] == 8 * each + tables
    pair.narrow(2)
    assert pair.nbytes()["optimizer"] == 2 * each + tables + 2 * 6 * (1024 + 512) * 4
    pair.compact()
    assert pair.nbytes()["optimizer"] == 2 * each + tables


def test_running_out_of_memory_while_packing_changes_nothing(monkeypatch):
    pair, optimizer = make_trained(BITSANDBYTES["adamw"])
    before = {f: (getattr(pair, f).detach().clone(), copy.deepcopy(optimizer.state[getattr(pair, f)])) for f in FACTORS}
    parked = pair.parked()
    calls = []

    def fails(*args):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("out of memory")
        return quantise(*args)

    monkeypatch.setattr("adaptlora.state_layouts.quantise", fails)
    with pytest.raises(MemoryError, match="out of memory"):
        pair.narrow(2)
    assert pair.rank == pair.capacity == 8 and pair.parked().keys() == parked.keys()
    for factor, (values, state) in before.items():
        assert torch.equal(getattr(pair, factor), values)
        for key, value in optimizer.state[getattr(pair, factor)].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[key])), key
    pair.narrow(2)


@pytest.mark.parametrize("name", ["adamw", "adamw-8"])
@pytest.mark.parametrize(
    "config",
    [
        adaptlora.NormALConfig(r=6, target_r=2, target_modules=["first", "second"], t_p=2, t_c=4),
        adaptlora.LaLoRAConfig(r=6, target_modules=["first", "second"], gamma=50.0, group_by="module"),
    ],
    ids=["normal", "lalora"],
)
def test_an_adapter_trains_through_its_rank_changes(name, config):
    adapter = adaptlora.attach(Net(), config)
    optimizer = {
        "adamw": lambda p: bnb.optim.AdamW8bit(p, lr=0.01, min_8bit_size=1),
        "adamw-8": TORCHAO["adamw-8"],
    }[name](adapter.parameters())
    adapter.track(optimizer)
    losses, changed = [], 0
    for step in range(12):
        if config.__class__ is adaptlora.LaLoRAConfig:
            adapter.method.budget = (4.0, 9.0, 12.0, 6.0)[step % 4]
        loss = task_loss(adapter.model)
        (loss + adapter.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        changed += adapter.step(loss) is not None
        losses.append(loss.item())
    assert changed and losses[-1] < losses[0]
