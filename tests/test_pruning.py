"""Pruning is physical: everything that costs falls with the ranks, and the pruned model equals the masked one."""

import copy

import pytest
import torch
from models import Net, batch, task_loss
from safetensors import safe_open
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import adaptlora
import adaptlora.ops.flops
from adaptlora.nn import LoraLinear
from adaptlora.ops import lora_linear, lora_linear_ref

FULL = 8


def clipped(target_r, dtype=torch.float32, **fields):
    """A trained adapter stopped right before its clip, and the same one after it: (before, after, optimizer after)."""
    model = Net(dtype)
    config = adaptlora.NormALConfig(
        r=FULL,
        target_r=target_r,
        lora_alpha=16,
        target_modules="all-linear",
        t_p=3,
        t_c=4,
        penalty_step="proximal",
        **fields,
    )
    adapter = adaptlora.attach(model, config)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    adapter.track(optimizer)
    for step in range(4):
        loss = task_loss(model, dtype=dtype)
        loss.backward()
        optimizer.step()
        if step == 3:
            before = copy.deepcopy(model), adapter.summary()
        adapter.step(loss)
        if step < 3:
            optimizer.zero_grad()
    return before, adapter, optimizer


def rank_weighted(ranks):
    """Σ r (K + N): what every size must be proportional to."""
    return ranks["first"] * (13 + 17) + ranks["second"] * (17 + 11)


@pytest.mark.parametrize("target_r", [1, 2, 4, 7.5])
def test_parameters_storage_gradients_and_optimizer_state_fall_with_the_ranks(target_r):
    (_, before), adapter, optimizer = clipped(target_r)
    after = adapter.summary()
    size, full = rank_weighted(adapter.ranks()), rank_weighted(before["ranks"])
    assert sum(adapter.ranks().values()) == round(2 * target_r)
    assert (before["adapter_parameters"], after["adapter_parameters"]) == (full, size)
    assert (before["trainable_parameters"], after["trainable_parameters"]) == (full, size)
    assert (before["adapter_bytes"], after["adapter_bytes"]) == (4 * full, 4 * size)
    assert (before["gradient_bytes"], after["gradient_bytes"]) == (4 * full, 4 * size)
    assert (before["optimizer_bytes"], after["optimizer_bytes"]) == (8 * full, 8 * size)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for p in adapter.parameters() for t in (p, p.grad)
    }
    assert sum(storages.values()) == 8 * size
    state = [v for p in adapter.factors() for v in optimizer.state[p].values() if v.dim()]
    assert sum(v.untyped_storage().nbytes() for v in state) == 8 * size
    for layer in adapter.layers.values():
        assert layer.lora_A.shape == (layer.rank, layer.in_features)
        assert layer.lora_B.shape == (layer.out_features, layer.rank)


def test_the_file_falls_with_the_ranks(tmp_path):
    sizes = {}
    for target_r in (1, 4, FULL):
        _, adapter, _ = clipped(target_r)
        adapter.save(tmp_path / str(target_r))
        file = tmp_path / str(target_r) / "adapter_model.safetensors"
        with safe_open(file, "pt") as tensors:
            stored = sum(tensors.get_tensor(key).numel() for key in tensors.keys())  # noqa: SIM118
        assert stored == rank_weighted(adapter.ranks())
        sizes[target_r] = file.stat().st_size - 4 * stored
    assert max(sizes.values()) - min(sizes.values()) < 64  # what is left is the header


def flops(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("rank", [0, 1, 5, 8])
@pytest.mark.parametrize("x_grad", [True, False])
def test_counted_multiply_adds_are_those_of_the_plain_matmuls(rank, x_grad):
    """The counter's formula for the op, against what it counts in the reference's own matmuls."""
    layer = LoraLinear(nn.Linear(13, 17), rank)
    x = torch.randn(32, 13, requires_grad=x_grad)
    factors = layer.lora_A, layer.lora_B
    if x_grad or rank:
        assert flops(lora_linear, x, layer.weight, layer.bias, *factors) == flops(
            lora_linear_ref, x, layer.weight, layer.bias, *factors
        )


@pytest.mark.parametrize("target_r", [1, 4])
def test_multiply_adds_fall_with_the_ranks(target_r):
    (before, summary), adapter, _ = clipped(target_r)
    x = batch()[0].requires_grad_()
    # S and the expansion, dS and G, dA and dx's update: three products of M · R · K and three of M · R · N, 2 FLOPs each.
    removed = 3 * 2 * len(x) * (rank_weighted(summary["ranks"]) - rank_weighted(adapter.ranks()))
    assert flops(before, x) - flops(adapter.model, x) == removed


@pytest.mark.parametrize("target_r", [1, 3])
def test_outputs_equal_the_masked_model_in_float64(target_r):
    (masked, _), adapter, _ = clipped(target_r, torch.float64)
    for name, rank in adapter.ranks().items():
        layer = getattr(masked, name)
        mask = (torch.arange(FULL) < rank).double()
        with torch.no_grad():
            layer.lora_A.mul_(mask[:, None])
            layer.lora_B.mul_(mask)
    x, labels = batch(dtype=torch.float64)
    for model in (masked, adapter.model):
        model.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
    torch.testing.assert_close(adapter.model(x), masked(x), rtol=1e-12, atol=1e-12)
    for name, layer in adapter.layers.items():
        twin = getattr(masked, name)
        torch.testing.assert_close(layer.lora_A.grad, twin.lora_A.grad[: layer.rank], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(layer.lora_B.grad, twin.lora_B.grad[:, : layer.rank], rtol=1e-11, atol=1e-12)
