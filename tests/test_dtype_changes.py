"""model.to(dtype) in the middle of a training: values are cast, and vectors, ranks and optimizer state stay whole."""

import copy

import pytest
import torch
from models import Net, batch

import adaptlora

SHARED = {"lora_alpha": 8, "target_modules": ["first", "second"]}
DTYPES = [torch.float64, torch.bfloat16, torch.float16]
# Without AdamW's decay, which torch has made of a parameter before it refuses the rest of the step.
OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=False),
    "foreach": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
    "fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


def trained(config, optimizer="Adam", steps=4):
    model = Net()
    adapter = adaptlora.attach(model, config)
    optimizer = OPTIMIZERS[optimizer](adapter.parameters())
    adapter.track(optimizer)
    for seed in range(steps):
        step(model, adapter, optimizer, seed)
    return model, adapter, optimizer


def step(model, adapter, optimizer, seed: int, dtype=torch.float32) -> None:
    x, labels = batch(seed=seed)
    loss = torch.nn.functional.cross_entropy(model(x.to(dtype)).float(), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    adapter.step(loss)


def lalora():
    return adaptlora.LaLoRAConfig(r=6, gamma=2.0, temperature=0.2, group_by="module", **SHARED)


def held(adapter) -> dict:
    """Every vector and every row of optimizer state, active or parked."""
    found = {}
    for name, layer in adapter.layers.items():
        found[name] = [side.detach().clone() for side in layer.pair.whole()]
        for factor in ("lora_A", "lora_B"):
            for optimizer in layer.pair.optimizers:
                for key, value in optimizer.state[getattr(layer, factor)].items():
                    if isinstance(value, torch.Tensor) and value.dim() == 2:
                        found[f"{name}.{factor}.{key}"] = value.clone()
        found[f"{name}.parked"] = layer.pair.parked()
    return found


def cast(found, dtype, factors_only: bool):
    """What `held` finds after a cast: factors of the new dtype; state is cast by torch's optimizers when it is loaded, not by a move."""
    result = {}
    for name, value in found.items():
        if isinstance(value, list):
            result[name] = [tensor.to(dtype) for tensor in value]
        elif isinstance(value, dict):
            result[name] = {key: rows if factors_only and "." in key else rows.to(dtype) for key, rows in value.items()}
        else:
            result[name] = value if factors_only else value.to(dtype)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_move_casts_values_and_loses_none(dtype):
    model, adapter, _ = trained(lalora())
    before, ranks = held(adapter), adapter.ranks()
    model.to(dtype)
    assert adapter.ranks() == ranks
    torch.testing.assert_close(held(adapter), cast(before, dtype, factors_only=True), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks_change_after_a_move(dtype):
    """Down, and up again: vectors and their state come back as they were, each in its dtype."""
    model, adapter, _ = trained(lalora())
    for layer in adapter.layers.values():
        layer.pair.plan(4).commit()
    model.to(dtype)
    before = held(adapter)
    for rank in (1, 3, 6, 0, 4):
        for layer in adapter.layers.values():
            layer.pair.plan(rank).commit()
            assert layer.rank == rank and layer.lora_A.dtype == layer.lora_B.dtype == dtype
    torch.testing.assert_close(held(adapter), before, atol=0, rtol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_goes_on_after_a_move_or_torch_refuses(dtype, optimizer):
    """An optimizer may refuse state of another dtype than its parameter: nothing of ours has changed then, and a new one trains on."""
    model, adapter, stepping = trained(lalora(), optimizer)
    model.to(dtype)
    before, ranks = copy.deepcopy(held(adapter)), adapter.ranks()
    try:
        for seed in range(4, 9):
            step(model, adapter, stepping, seed, dtype)
            before = None
    except RuntimeError as error:
        assert "adaptlora" not in str(error)
        assert before is not None and adapter.ranks() == ranks
        factors = {name: value for name, value in held(adapter).items() if isinstance(value, list)}
        expected = {name: value for name, value in before.items() if isinstance(value, list)}
        torch.testing.assert_close(factors, expected, atol=0, rtol=0)
        stepping.state.clear()
        stepping = torch.optim.SGD(adapter.parameters(), lr=1e-2)
        adapter.track(stepping)
        for seed in range(4, 9):
            model.zero_grad()
            step(model, adapter, stepping, seed, dtype)
    for layer in adapter.layers.values():
        for factor in (layer.lora_A, layer.lora_B):
            assert factor.dtype == dtype and factor.isfinite().all()
        A, B = layer.pair.whole()
        assert A.dtype == B.dtype == dtype and layer.rank <= layer.pair.capacity


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_clip_after_a_move(dtype):
    """NormAL keeps the vectors it would have kept, cast, with their state."""
    config = adaptlora.NormALConfig(r=6, target_r=3, t_p=2, t_c=6, **SHARED)
    model, adapter, optimizer = trained(config, "momentum", steps=5)
    twin = copy.deepcopy({name: (layer.lora_A, layer.lora_B) for name, layer in adapter.layers.items()})
    momenta = {name: optimizer.state[layer.lora_A]["momentum_buffer"].clone() for name, layer in adapter.layers.items()}
    model.to(dtype)
    change = adapter.step(1.0)
    assert change is not None and sum(change.after.values()) == 6
    for name, layer in adapter.layers.items():
        R = layer.rank
        torch.testing.assert_close(layer.lora_A.detach(), twin[name][0][:R].detach().to(dtype), atol=0, rtol=0)
        torch.testing.assert_close(layer.lora_B.detach(), twin[name][1][:, :R].detach().to(dtype), atol=0, rtol=0)
        kept = optimizer.state[layer.lora_A]["momentum_buffer"]
        torch.testing.assert_close(kept.to(momenta[name]), momenta[name][:R], atol=0, rtol=0)


def test_there_and_back_loses_what_a_cast_rounds_and_no_more():
    model, adapter, _ = trained(lalora())
    before = held(adapter)
    model.to(torch.float64).to(torch.float32)
    torch.testing.assert_close(held(adapter), before, atol=0, rtol=0)


def test_a_model_on_the_meta_device_cannot_train_and_says_so():
    model, adapter, optimizer = trained(lalora())
    ranks = adapter.ranks()
    model.to("meta")
    with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        step(model, adapter, optimizer, 9)
    assert adapter.ranks() == ranks
