"""LoRA-FA: adapters whose lora_A does not train."""

import pytest
import torch
from models import Net, batch, randomise, task_loss
from test_saved_for_backward import Kept
from torch import nn

import adaptlora


def attached(config=adaptlora.LoraConfig, **fields):
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["first", "second"], "freeze_A": True} | fields
    return adaptlora.attach(Net(), config(**fields))


def train(adapter, optimizer, steps=1, seed=0):
    for step in range(steps):
        loss = task_loss(adapter.model, seed=seed + step)
        (loss + adapter.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step(loss)


def factors(adapter, name: str) -> list[torch.Tensor]:
    return [getattr(layer, name).detach().clone() for layer in adapter.layers.values()]


def test_lora_A_is_left_out_of_what_trains():
    adapter = attached(modules_to_save=["classifier"])
    lora_Bs = [layer.lora_B for layer in adapter.layers.values()]
    head = list(adapter.saved["classifier"].parameters())
    assert [id(p) for p in adapter.parameters()] == [id(p) for p in lora_Bs + head]
    numbers = 4 * (17 + 11) + sum(p.numel() for p in head)
    summary = adapter.summary()
    assert summary["trainable_parameters"] == numbers
    assert summary["adapter_parameters"] == 4 * (13 + 17 + 17 + 11)
    assert adaptlora.trained_parameters(Net(), adapter.config) == numbers
    grouped = {id(p) for group in adapter.parameter_groups(1e-3, loraplus_lr_ratio=4) for p in group["params"]}
    assert grouped == {id(p) for p in adapter.parameters()}


def test_training_is_that_of_B_alone():
    """The same steps as those of a product written out in torch, with A a constant."""
    adapter = attached()
    lora_As, plain = factors(adapter, "lora_A"), Net()
    plain.requires_grad_(False)
    lora_Bs = [torch.zeros(17, 4, requires_grad=True), torch.zeros(11, 4, requires_grad=True)]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    theirs = torch.optim.SGD(lora_Bs, lr=0.5)
    for step in range(4):
        x, labels = batch(seed=step)
        hidden = torch.relu(plain.first(x) + 2 * x @ lora_As[0].t() @ lora_Bs[0].t())
        hidden = torch.relu(plain.second(hidden) + 2 * hidden @ lora_As[1].t() @ lora_Bs[1].t())
        nn.functional.cross_entropy(plain.classifier(hidden), labels).backward()
        theirs.step()
        theirs.zero_grad()
    train(adapter, optimizer, 4)
    for ours, expected in zip(factors(adapter, "lora_B"), lora_Bs, strict=True):
        torch.testing.assert_close(ours, expected.detach())
    assert all(map(torch.equal, factors(adapter, "lora_A"), lora_As))


def test_no_activation_is_kept():
    """Of a row of three layers that share a frozen base's input width, x is saved by none."""
    plain = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    adapter = adaptlora.attach(plain, adaptlora.LoraConfig(r=2, target_modules="all-linear", freeze_A=True))
    randomise(adapter)
    with Kept() as kept:
        plain(torch.randn(64, 16, requires_grad=True) * 1)
    assert (64, 16) not in kept.shapes and kept.shapes.count((64, 2)) == 3


@pytest.mark.parametrize("over", ["parameters", "everything"])
@pytest.mark.parametrize("penalty_step", ["gradient", "proximal"])
def test_normal(penalty_step, over):
    """The penalty shrinks B; ranks change; an optimizer that holds the frozen A changes none of it."""
    fields = {"t_p": 2, "t_c": 3, "target_r": 2, "eta_p": 0.1, "penalty_step": penalty_step}
    adapter = attached(adaptlora.NormALConfig, **fields)
    randomise(adapter)
    lora_As, lora_Bs = factors(adapter, "lora_A"), factors(adapter, "lora_B")
    optimizer = torch.optim.AdamW(adapter.parameters() if over == "parameters" else adapter.model.parameters(), lr=0.1)
    adapter.track(optimizer)
    train(adapter, optimizer, 2)
    assert all(map(torch.equal, factors(adapter, "lora_A"), lora_As))
    assert not any(map(torch.equal, factors(adapter, "lora_B"), lora_Bs))
    train(adapter, optimizer)
    assert sum(adapter.ranks().values()) == 4
    for layer, lora_A in zip(adapter.layers.values(), lora_As, strict=True):
        assert torch.equal(layer.lora_A, lora_A[: layer.rank]) and not layer.lora_A.requires_grad
        assert not optimizer.state[layer.lora_A]
        assert optimizer.state[layer.lora_B]["exp_avg"].shape == layer.lora_B.shape
    train(adapter, optimizer)


def test_the_proximal_step_leaves_a_frozen_factor():
    """B alone is shrunk, by its own learning rate."""
    adapter = attached(adaptlora.NormALConfig, t_p=2, t_c=3, target_r=2, eta_p=0.5, penalty_step="proximal")
    randomise(adapter)
    expected = [
        B * (1 - 0.05 * torch.arange(1, 5).sqrt() / B.norm(dim=0)).clamp(min=0) for B in factors(adapter, "lora_B")
    ]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    adapter.track(optimizer)
    adapter.step()
    for ours, exact in zip(factors(adapter, "lora_B"), expected, strict=True):
        torch.testing.assert_close(ours, exact)


def test_an_optimizer_must_hold_what_trains():
    adapter = attached(adaptlora.NormALConfig, t_p=1, t_c=1, target_r=2)
    optimizer = torch.optim.AdamW([adapter.layers["first"].lora_B], lr=0.1)
    adapter.track(optimizer)
    with pytest.raises(ValueError, match=r"got none for second.lora_B"):
        adapter.step(1.0)


@pytest.mark.parametrize("contribution", ["norm", "fisher"])
def test_lalora(contribution):
    """Ranks grow, and with them A: by vectors that were drawn at the start and never train."""
    adapter = attached(adaptlora.LaLoRAConfig, r=6, gamma=8.0, group_by="module", contribution=contribution)
    whole = [layer.pair.whole()[0].clone() for layer in adapter.layers.values()]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    adapter.track(optimizer)
    train(adapter, optimizer, 6)
    assert max(adapter.ranks().values()) > 1
    assert all(torch.equal(layer.pair.whole()[0], A) for layer, A in zip(adapter.layers.values(), whole, strict=True))


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (adaptlora.LoraConfig, {"freeze_A": 1}, "LoraConfig: freeze_A must be True or False, got 1"),
        (adaptlora.AdaLoRAConfig, {"total_step": 9, "r": None}, "AdaLoRAConfig: freeze_A must be False: .* got True"),
        (adaptlora.NoRAConfig, {}, "NoRAConfig: freeze_A must be False: .* got True"),
    ],
    ids=["LoRA", "AdaLoRA", "NoRA"],
)
def test_refuses(config, fields, message):
    with pytest.raises(ValueError, match=message):
        attached(config, **fields)


def test_saved_and_loaded(tmp_path):
    """A file holds both factors; an adapter that takes it keeps its A frozen."""
    adapter = attached()
    randomise(adapter)
    adapter.save(tmp_path)
    other = attached(seed=5)
    other.load(tmp_path)
    assert all(map(torch.equal, factors(other, "lora_A"), factors(adapter, "lora_A")))
    assert [id(p) for p in other.parameters()] == [id(layer.lora_B) for layer in other.layers.values()]
    x = batch()[0]
    loaded = adaptlora.load(Net(), tmp_path)
    assert torch.equal(loaded.model(x), adapter.model(x)) and torch.equal(other.model(x), adapter.model(x))


@pytest.mark.parametrize("over", ["parameters", "everything"])
def test_checkpoint(tmp_path, over):
    """Training that goes on from a checkpoint, at ranks that changed, is training that never stopped."""

    def loop():
        adapter = attached(adaptlora.NormALConfig, t_p=1, t_c=2, target_r=2)
        held = adapter.parameters() if over == "parameters" else adapter.model.parameters()
        optimizer = torch.optim.AdamW(held, lr=0.05)
        adapter.track(optimizer)
        return adapter, optimizer

    adapter, optimizer = loop()
    train(adapter, optimizer, 3)
    adaptlora.save_checkpoint(tmp_path, adapter, optimizer, step=3)
    train(adapter, optimizer, 2, seed=9)
    resumed, resumed_optimizer = loop()
    adaptlora.load_checkpoint(tmp_path / "checkpoint-3", resumed, resumed_optimizer)
    train(resumed, resumed_optimizer, 2, seed=9)
    for name in ("lora_A", "lora_B"):
        assert all(map(torch.equal, factors(resumed, name), factors(adapter, name))), name
    assert not any(layer.lora_A.requires_grad for layer in resumed.layers.values())
