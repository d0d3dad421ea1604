"""A trained bias of B: what it computes, and that it trains, merges, is saved and stays through rank changes."""

import peft
import pytest
import torch
from models import Net, batch
from numbered_model import Deep
from torch import nn

import adaptlora
from adaptlora import LoraConfig

DOUBLE = {"dtype": torch.float64}
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), **DOUBLE)


def test_a_bias_of_B_trains_merges_saves_and_stays_through_rank_changes(tmp_path):
    model = Net(**DOUBLE)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["first"], lora_bias=True)
    adapter = adaptlora.attach(model, config)
    layer = adapter.layers["first"]
    x, labels = batch(**DOUBLE)
    plain = Net(**DOUBLE)(x)
    torch.testing.assert_close(model(x), plain)
    assert any(p is layer.lora_bias for p in adapter.parameters()) and not layer.lora_bias.any()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.track(optimizer)
    for _ in range(2):
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    moments = optimizer.state[layer.lora_bias]["exp_avg"].clone()
    bias = layer.lora_bias.detach().clone()
    assert bias.abs().min() > 0
    expected = (
        nn.functional.linear(x, layer.weight, layer.bias + layer.scaling * bias)
        + layer.scaling * x @ layer.lora_A.t() @ layer.lora_B.t()
    )
    torch.testing.assert_close(layer(x), expected)
    adaptlora.shear(adapter, adaptlora.ClipConfig(target_r=2))
    assert (
        layer.rank == 2
        and torch.equal(layer.lora_bias, bias)
        and torch.equal(optimizer.state[layer.lora_bias]["exp_avg"], moments)
    )
    y, state = model(x), adapter.state_dict()
    adapter.save(tmp_path)
    other = adaptlora.attach(Net(**DOUBLE), config)
    other.load_state_dict(state)
    torch.testing.assert_close(other.model(x), y)
    with pytest.raises(ValueError, match=r"load_state_dict: first: lora_bias must have shape \(17,\), got \(3,\)"):
        other.load_state_dict(state | {"biases": {"first": bias[:3]}})
    adapter.merge()
    torch.testing.assert_close(model(x), y)
    adapter.unmerge()
    assert torch.equal(layer.bias, Net(**DOUBLE).first.bias) and torch.equal(model(x), y)
    with pytest.raises(ValueError, match="first must have a bias of lora_B if lora_bias is True, here False, got one"):
        adaptlora.attach(Net(**DOUBLE), LoraConfig(r=4, target_modules=["first"])).load(tmp_path)


def test_a_bias_keeps_its_effect_when_vectors_go_and_runs_in_groups():
    model = Deep()
    adapter = adaptlora.attach(model, LoraConfig(r=4, lora_alpha=6, target_modules=["q", "mix"], lora_bias=True))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, **DOUBLE))
    effect = {n: layer.scaling * layer.lora_bias.detach() for n, layer in adapter.layers.items()}
    first, second = list(adapter.layers.values())[:2]
    ys = adaptlora.nn.LoraGroup([first, second])(X)
    torch.testing.assert_close(ys, [first(X), second(X)])
    adaptlora.shear(adapter, adaptlora.NoRMConfig())
    assert {layer.scaling for layer in adapter.layers.values()} == {1.0}
    torch.testing.assert_close({n: layer.lora_bias.detach() for n, layer in adapter.layers.items()}, effect)
    report = adaptlora.shear(adapter, adaptlora.DropConfig("module"))
    for n, rank in report.ranks().items():
        assert bool(adapter.layers[n].lora_bias.any()) == bool(rank)


def test_a_bias_without_vectors_is_saved_and_one_over_no_bias_not_merged(tmp_path):
    model = Net(**DOUBLE)
    adapter = adaptlora.attach(model, LoraConfig(r=2, target_modules=["first", "second"], lora_bias=True))
    with torch.no_grad():
        for bias in adapter.biases():
            bias.fill_(0.5)
    adapter.replace_factors(
        {"second": (adapter.layers["second"].lora_A, adapter.layers["second"].lora_B)}, {"second": 1.0}
    )
    x, _ = batch(**DOUBLE)
    adapter.save(tmp_path)
    with pytest.warns(peft.utils.warning.PeftWarning, match="lora_bias=True"):
        again = peft.PeftModel.from_pretrained(Net(**DOUBLE), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(again(x), model(x))
    with pytest.raises(ValueError, match="merge: base_layer must have a bias for lora_bias, got none in Linear"):
        adapter.merge()
    with pytest.raises(ValueError, match='save: lora_bias must be False for format="vllm"'):
        adapter.save(tmp_path / "vllm", format="vllm")


def test_a_checkpoint_holds_it_and_a_step_that_clips_leaves_it(tmp_path):
    def start():
        config = adaptlora.NormALConfig(r=4, target_modules=["q"], lora_bias=True, target_r=2, t_p=1, t_c=3)
        adapter = adaptlora.attach(Deep(), config)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        adapter.track(optimizer)
        return adapter, optimizer

    def run(adapter, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (adapter.model(X).square().mean() + adapter.penalty()).backward()
            optimizer.step()
            adapter.step()
        return [p.detach().clone() for p in adapter.parameters()]

    adapter, optimizer = start()
    run(adapter, optimizer, 2)
    checkpoint = adaptlora.save_checkpoint(tmp_path, adapter, optimizer, step=2)
    expected = run(adapter, optimizer, 2)
    assert sum(adapter.ranks().values()) == 6 and all(bias.abs().min() > 0 for bias in adapter.biases())
    again, other = start()
    adaptlora.load_checkpoint(checkpoint, again, other)
    for ours, theirs in zip(run(again, other, 2), expected, strict=True):
        assert torch.equal(ours, theirs)
