"""What a model's forward passes show of layers that share their input: what counts, what does not, and that it is kept."""

import copy
import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from towers import Attention, Tower, attached, computed_layers, groups_of_any_size, step, suffixes, twins, x_of  # noqa: F401

import adaptlora
from adaptlora.nn import grouped_outputs

BOTH = [("q", "k", "v")] * 2


class Drawing(Attention):
    """Draws a random number between q and k, once it is told to."""

    draws = False

    def forward(self, x):
        q = self.q(x)
        if self.draws:
            torch.rand(())
        return self.o((q * self.k(x)).tanh() + self.v(x))


class Checkpointed(Tower):
    def forward(self, x):
        for block in self:
            x = checkpoint(block, x, use_reentrant=True)
        return x


def test_a_checkpoint_that_draws_more_than_it_did_finds_its_masks():
    """The recomputation runs layer by layer: a mask must not depend on what the first passes drew."""
    grouped, alone = twins(lambda: Checkpointed(Drawing(), Drawing()), lora_dropout=0.3)
    for seed in range(3):
        for adapter in (grouped, alone):
            for block in adapter.model:
                block.draws = seed > 0
        ours, theirs = (step(adapter, x_of(seed=seed), seed) for adapter in (grouped, alone))
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_passes_without_records_show_nothing(computed):
    adapter = attached()
    for _ in range(12):
        with torch.inference_mode():
            adapter.model(x_of())
    assert suffixes(adapter) == []
    for seed in range(2):
        step(adapter, x_of(seed=seed))
    assert suffixes(adapter) == BOTH and computed == [3, 3]


def test_transforms_in_the_first_pass():
    grouped, alone = twins(lora_dropout=0.3)
    found = []
    for adapter in (grouped, alone):
        torch.manual_seed(0)
        found.append(torch.func.jvp(adapter.model, (x_of(),), (x_of(seed=2),)))
        torch.manual_seed(0)
        found.append(torch.jit.trace(adapter.model.eval(), x_of(), check_trace=False)(x_of()))
    torch.testing.assert_close(found[:2], found[2:], atol=1e-12, rtol=1e-12)


def test_replicas_are_not_kept():
    adapter, kept = attached(), []
    for _ in range(3):
        replica = copy.copy(adapter.model)
        replica._modules = {name: copy.copy(block) for name, block in adapter.model._modules.items()}
        for block in replica:
            block._modules = {name: copy.copy(layer) for name, layer in block._modules.items()}
            kept += [weakref.ref(layer) for layer in block._modules.values()]
            for layer in block._modules.values():
                object.__setattr__(layer, "grouping", weakref.ref(adapter._groups))
        replica(x_of())
        del replica, block, layer
    gc.collect()
    assert all(reference() is None for reference in kept) and suffixes(adapter) == []
    for seed in range(2):
        adapter.model(x_of(seed=seed))
    assert suffixes(adapter) == BOTH


def test_a_default_device_keeps_nobody_apart(computed):
    adapter = attached()
    with torch.device("cpu"):
        for _ in range(2):
            adapter.model(x_of())
    assert computed == [3, 3]


def test_a_model_that_returns_nothing(computed):
    class Silent(Tower):
        def forward(self, x):
            self.y = super().forward(x)

    adapter = attached(Silent())
    for _ in range(2):
        adapter.model(x_of())
    assert computed == [3, 3]


def test_an_interrupt_leaves_nothing_behind(computed):
    adapter = attached()
    for _ in range(2):
        adapter.model(x_of())
    layer = adapter.layers["1.q"]
    layer.pair.register_forward_pre_hook(lambda *_: None)
    original, before = grouped_outputs.Group.compute, len(computed)

    def interrupted(*_):
        raise KeyboardInterrupt

    grouped_outputs.Group.compute = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            adapter.model(x_of())
    finally:
        grouped_outputs.Group.compute = original
    adapter.layers["0.q"](x_of())
    assert len(computed) == before


def test_what_is_no_tensor_is_answered_by_the_op():
    for group in (True, False):
        adapter = attached(Tower(Attention()), group)
        with pytest.raises(TypeError, match="lora_linear: x must be a floating-point tensor, got list"):
            adapter.model([1.0])


def test_old_backward_hooks_see_a_layer_alone(computed):
    shapes = []
    for adapter in twins():
        seen = []
        hook = lambda module, inputs, outputs, seen=seen: seen.append((len(inputs), len(outputs)))  # noqa: E731
        adapter.layers["0.k"].register_backward_hook(hook)
        for seed in range(3):
            step(adapter, x_of(seed=seed))
        shapes.append(seen)
    assert shapes[0] == shapes[1] and computed == [3] * 2


def test_a_copy_has_no_hooks_left_when_its_adapter_is_off():
    adapter = copy.deepcopy(attached())
    adapter.detach()
    assert not adapter.model._forward_hooks and not adapter.model._forward_pre_hooks


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_training_is_the_uninterrupted_one(dropout, tmp_path, computed):
    def made():
        adapter = attached(lora_dropout=dropout)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        adapter.track(optimizer)
        return adapter, optimizer

    def train(adapter, optimizer, seeds):
        for seed in seeds:
            adapter.model(x_of(seed=seed)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            adapter.step()

    whole, optimizer = made()
    train(whole, optimizer, range(3))
    adaptlora.save_checkpoint(tmp_path, whole, optimizer, step=3)
    train(whole, optimizer, range(3, 6))
    resumed, optimizer = made()
    adaptlora.load_checkpoint(adaptlora.last_checkpoint(tmp_path), resumed, optimizer)
    before = len(computed)
    train(resumed, optimizer, range(3, 6))
    assert computed[before:] == [3] * 6 and resumed.summary()["groups"] == whole.summary()["groups"] != []
    for ours, theirs in zip(resumed.factors(), whole.factors(), strict=True):
        assert torch.equal(ours, theirs)


def test_states_of_other_modules_are_refused():
    adapter = attached()
    adapter.model(x_of())
    state = adapter.state_dict()
    state["groups"]["without dropout"]["groups"][0]["layers"][0] = "0.elsewhere"
    with pytest.raises(ValueError, match=r"groups must be of the adapter's modules, got \['0.elsewhere'\]"):
        adapter.load_state_dict(state)
    found = state["groups"]["without dropout"]
    found["groups"][0]["layers"] = ["0.q", "1.k"]
    with pytest.raises(ValueError, match=r"groups must be of siblings, got \['0.q', '1.k'\]"):
        adapter.load_state_dict(state)
    for wrong in ({"without dropout": []}, {"without dropout": found | {"observed": "1"}}, {"without dropout": {}}):
        with pytest.raises(ValueError, match="groups must be what a state holds of them, got (Key|Type)Error"):
            adapter.load_state_dict(state | {"groups": wrong})
    del state["groups"]
    adapter.load_state_dict(state)
    assert suffixes(adapter) == []
