"""What a group computed is returned once, to whom would compute just that, and outlives nothing."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from towers import Attention, Tower, attached, computed_layers, groups_of_any_size, step, suffixes, twins, x_of  # noqa: F401


class Between:
    """Done once between the calls of q and k; returns the x that k and v are given."""

    def __init__(self, action):
        self.action, self.armed = action, False

    def __call__(self, attention, x):
        if not self.armed:
            return x
        self.armed = False
        found = self.action(attention, x)
        return x if found is None else found


def write_in_place(attention, x):
    with torch.no_grad():
        x.add_(0.1)


def another_object(attention, x):
    return x * 1.5


def equal_object(attention, x):
    return x.view_as(x)


def optimizer_step(attention, x):
    optimizer = torch.optim.SGD(attention.k.pair.parameters(), lr=0.5)
    for factor in attention.k.pair.parameters():
        factor.grad = torch.ones_like(factor)
    optimizer.step()
    optimizer.zero_grad()


def narrower(attention, x):
    attention.k.pair.narrow(2)


def other_memory(attention, x):
    attention.k.lora_B.data = attention.k.lora_B.data * 2


def other_base(attention, x):
    attention.k.base_layer.weight = nn.Parameter(attention.k.weight * 2, requires_grad=False)


def other_scaling(attention, x):
    attention.k.scaling = 0.5


def written_base(attention, x):
    attention.k.bias.add_(1)


def another_layer(attention, x):
    attention.o(x)


def called_twice(attention, x):
    attention.q(x)


def out_of_turn(attention, x):
    attention.v(x)


CHANGES = [
    write_in_place, another_object, equal_object, optimizer_step, narrower, other_memory, other_base, other_scaling, written_base,
    another_layer, called_twice, out_of_turn,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_nothing_stale_is_returned(change, computed):
    grouped, alone = twins(lambda: Tower(Attention(between=Between(change))))
    for adapter in (grouped, alone):
        adapter.model(x_of())
        adapter.model(x_of())
        adapter.model[0].between.armed = True
    assert computed == [3]
    torch.testing.assert_close(grouped.model(x_of()), alone.model(x_of()), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(grouped.model(x_of()), alone.model(x_of()), atol=1e-12, rtol=1e-12)
    assert len(computed) >= 3


class Mixed(Attention):
    def forward(self, x, *contexts):
        results = []
        for layer, context in zip((self.q, self.k, self.v), contexts, strict=True):
            with context():
                results.append(layer(x))
        return results


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


MODES = [torch.no_grad, torch.inference_mode, bfloat16]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_modes_that_change_between_the_calls(mode, which):
    """What q computed with a graph is not k's without one, nor the other way round."""
    grouped, alone = twins(lambda: Mixed(dtype=torch.float32))
    x, plain = x_of(dtype=torch.float32), [torch.enable_grad] * 3
    contexts = [mode if i in which else torch.enable_grad for i in range(3)]
    for given in (plain, plain, contexts, plain, contexts):
        for y, expected in zip(grouped.model(x, *given), alone.model(x, *given), strict=True):
            for attribute in ("dtype", "requires_grad", "is_inference"):
                found = [getattr(tensor, attribute) for tensor in (y, expected)]
                assert found[0] == found[1] or found[0]() == found[1]()
            torch.testing.assert_close(y, expected)
    assert suffixes(grouped) == [("q", "k", "v")]


def test_outputs_are_each_their_own(backend):
    """Changed in place, as some models do, an output takes nothing from its siblings."""
    grouped, alone = twins(lambda: Tower(Attention(dtype=torch.float32)))
    x = x_of(dtype=torch.float32)
    grouped.model(x)
    for name in "qkv":
        getattr(grouped.model[0], name).register_forward_hook(lambda module, args, y: y.mul_(3))
        getattr(alone.model[0], name).register_forward_hook(lambda module, args, y: y * 3)
    torch.testing.assert_close(step(grouped, x), step(alone, x))
    for name in "qkv":  # and alone
        getattr(alone.model[0], name).register_forward_hook(lambda module, args, y: y.mul_(2))
        getattr(grouped.model[0], name).register_forward_hook(lambda module, args, y: y * 2)
    torch.testing.assert_close(step(grouped, x), step(alone, x))


def test_hooks_of_members_run():
    grouped, seen = attached(), []
    for name in "qkv":
        layer = getattr(grouped.model[0], name)
        layer.register_forward_pre_hook(lambda module, args, name=name: seen.append(f"before {name}"))
        layer.register_forward_hook(lambda module, args, y, name=name: seen.append(f"after {name}"))
    for _ in range(2):
        grouped.model(x_of())
    assert seen == [f"{when} {name}" for name in "qkv" for when in ("before", "after")] * 2


class Optional(Attention):
    """Its k and v are called only while `whole`, as those of cross-attention are until their results are kept."""

    whole = True

    def forward(self, x):
        q = self.q(x)
        return q * self.k(x) + self.v(x) if self.whole else q


@torch.no_grad()
def test_a_group_that_is_not_used_dissolves(computed):
    grouped = attached(Tower(Optional()))
    for _ in range(4):
        grouped.model(x_of())
    assert len(computed) == 3 and suffixes(grouped) == [("q", "k", "v")]
    grouped.model[0].whole = False
    for _ in range(10):
        grouped.model(x_of())
    assert len(computed) == 6 and suffixes(grouped) == []
    grouped.model[0].whole = True
    for _ in range(3):
        grouped.model(x_of())
    assert len(computed) == 6


@torch.no_grad()
def test_a_forward_pass_that_fails(computed):
    def fail(attention, x):
        raise RuntimeError("between")

    grouped, alone = twins(lambda: Tower(Attention(between=Between(fail)), Attention()))
    # the first one shows nothing, and in later ones it counts for nothing
    for _ in range(5):
        grouped.model[0].between.armed = True
        with pytest.raises(RuntimeError, match="between"):
            grouped.model(x_of())
        found = grouped.model(x_of())
        torch.testing.assert_close(found, alone.model(x_of()), atol=1e-12, rtol=1e-12)
    assert suffixes(grouped) == [("q", "k", "v")] * 2
    before = len(computed)
    grouped.model[0].q(x_of())
    assert len(computed) == before


def test_no_tensor_outlives_the_forward_pass():
    grouped, kept = attached(Tower(Optional())), []
    grouped.model(x_of())
    grouped.model[0].whole = False
    local = grouped._groups._local

    def keep(module, args, y):
        kept.extend(map(weakref.ref, (y, local.running.pending.x, *local.running.pending.outputs)))

    hook = grouped.model[0].q.register_forward_hook(keep)
    gc.disable()
    try:
        with torch.no_grad():
            grouped.model(x_of())
        hook.remove()
        assert len(kept) == 4 and all(reference() is None for reference in kept)
    finally:
        gc.enable()


def test_a_model_goes_when_it_is_forgotten():
    """Layers and their grouping do not keep each other alive: memory is free at once, not when the collector comes."""
    model = Tower()
    adapter = attached(model)
    for _ in range(2):
        model(x_of())
    optimizer = torch.optim.SGD(adapter.parameters())
    adapter.track(optimizer)
    kept = [weakref.ref(model), weakref.ref(model[0].k), weakref.ref(adapter._groups)]
    gc.collect()
    gc.disable()
    try:
        del adapter, model
        assert all(reference() is None for reference in kept)
        optimizer.step()
    finally:
        gc.enable()


def test_threads_have_their_own(computed):
    grouped, alone = twins()
    for adapter in (grouped, alone):
        adapter.model(x_of())
    inputs = [x_of(seed=seed) for seed in range(4)]
    expected = [alone.model(x).detach() for x in inputs]
    barrier, wrong = threading.Barrier(4), []

    def run(x, y):
        barrier.wait(60)
        for _ in range(10):
            found = grouped.model(x)
            if not torch.allclose(found, y, atol=1e-12, rtol=1e-12):
                wrong.append(x)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and len(computed) == 4 * 10 * 2
