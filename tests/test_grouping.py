"""Projections that share their input, computed at once by themselves: which they are, and that nothing else changes."""

import copy
import pickle

import architectures
import pytest
import torch
from architectures import made, outputs
from numerics import assert_all_accurate
from towers import CONFIG, Attention, Tower, attached, computed_layers, groups_of_any_size, step, suffixes, twins, x_of  # noqa: F401

import adaptlora
from adaptlora.nn import grouping

EXPECTED = {  # {part of a name: groups of one block}
    "bert": {"layer.1": [("query", "key", "value")]},
    "llama": {"layers.1": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]},
    "t5": {
        "encoder.block.1": [("q", "k", "v"), ("wi_0", "wi_1")],
        "decoder.block.1.layer.0": [("q", "k", "v")],
        "decoder.block.1.layer.1": [("k", "v")],
    },
    "whisper": {
        "encoder.layers.1": [("q_proj", "k_proj", "v_proj")],
        "decoder.layers.1.self_attn": [("q_proj", "k_proj", "v_proj")],
        "decoder.layers.1.encoder_attn": [("k_proj", "v_proj")],
    },
    # the same keys and queries of positions as of tokens, but no values
    "deberta_v3": {"layer.1": [("query_proj", "key_proj")]},
    "gpt_neox": {"": []},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_of_known_models(name, computed):
    model, batch = made(getattr(architectures, name))
    alone = attached(copy.deepcopy(model), group=False)
    adapter = attached(model)
    assert adapter.summary()["groups"] == alone.summary()["groups"] == []
    results = [outputs(adapter.model, batch) for _ in range(3)]
    assert {under: suffixes(adapter, under) for under in EXPECTED[name]} == EXPECTED[name]
    # computed as often as shown, each in the second and in the third forward pass
    once = len(computed) // 2
    assert computed[:once] == computed[once:] and bool(computed) == (name != "gpt_neox")
    torch.testing.assert_close(results, [outputs(alone.model, batch)] * 3, atol=1e-12, rtol=1e-12)
    gradients = []
    for each in (adapter, alone):
        sum(t.square().mean() for t in outputs(each.model, batch)).backward()
        gradients.append([factor.grad for factor in each.factors()])
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_there_are_groups_unless_one_asks_for_none(device, computed, monkeypatch):
    """Found for every x, computed on a CPU where x is large enough; wherever the model was when it had its adapter."""
    monkeypatch.undo()
    model = Tower(Attention(dtype=torch.float32))
    adapter = adaptlora.attach(copy.deepcopy(model), adaptlora.LoraConfig(**CONFIG))
    alone = adaptlora.attach(model, adaptlora.LoraConfig(**CONFIG), group_projections=False)
    with torch.no_grad():
        for factor, other in zip(adapter.factors(), alone.factors(), strict=True):
            factor.copy_(other.normal_())
    small, large = (torch.randn(1, tokens, 12, device=device) for tokens in (255, 256))
    for each in (adapter, alone):
        each.model.to(device)
    for x in (small, small, large):
        torch.testing.assert_close(adapter.model(x), alone.model(x))
    assert adapter.summary()["groups"] == [["0.q", "0.k", "0.v"]] and alone.summary()["groups"] == []


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_is_to_the_bit_what_it_is_alone(dropout, monkeypatch, computed):
    """On the reference path, but for dx, whose parts are added up in another order; random numbers included."""
    monkeypatch.setenv("ADAPTLORA_BACKEND", "reference")
    grouped, alone = twins(lora_dropout=dropout)
    for seed in range(3):
        (y, dx, *ours), (y_alone, dx_alone, *theirs) = (step(a, x_of(seed=seed), seed) for a in (grouped, alone))
        torch.testing.assert_close([y, dx, *ours], [y_alone, dx_alone, *theirs], atol=1e-12, rtol=1e-12)
        assert torch.equal(y, y_alone) and torch.equal(ours[-1], theirs[-1])
    assert computed == [3, 3] * 2
    # without dropout, and with it again
    for a in (grouped, alone):
        a.model.eval()
    torch.testing.assert_close(*(a.model(x_of()) for a in (grouped, alone)), atol=0, rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_on_the_kernels(backend, autocast):
    torch.manual_seed(3)
    model = Tower(Attention(dtype=torch.float32), Attention(dtype=torch.float32))
    adapters = [attached(copy.deepcopy(model), group, lora_dropout=0.25) for group in (True, False)]
    exact = attached(copy.deepcopy(model).double(), False, lora_dropout=0.25)
    with torch.no_grad():
        for factor, single in zip(exact.factors(), adapters[0].factors(), strict=True):
            factor.copy_(single)
    x = x_of(dtype=torch.float32)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours, eager = (step(a, x) for a in adapters)
    assert adapters[0].summary()["groups"] == [[f"{i}.{name}" for name in "qkv"] for i in (0, 1)]
    if autocast:
        torch.testing.assert_close(ours, eager, atol=1e-2, rtol=1e-2)
        return
    named = [{str(i): t for i, t in enumerate(found[:-1])} for found in (ours, step(exact, x.double()), eager)]
    assert_all_accurate(*named)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing(use_reentrant, dropout, computed):
    class Checkpointed(Tower):
        def forward(self, x):
            for block in self:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=use_reentrant)
            return x

    grouped, alone = twins(Checkpointed, lora_dropout=dropout)
    for seed in range(3):
        ours, theirs = (step(adapter, x_of(seed=seed), seed) for adapter in (grouped, alone))
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    # With hooks for saved tensors, and with masks that the recomputation must draw again, every layer computes alone.
    assert grouped.summary()["groups"] == [[f"{i}.{name}" for name in "qkv"] for i in (0, 1) if use_reentrant]
    assert computed == ([3] * 4 if use_reentrant and not dropout else [])


def test_a_checkpoint_around_one_member(computed):
    class Partly(Attention):
        def forward(self, x):
            q = self.q(x)
            k = torch.utils.checkpoint.checkpoint(self.k, x, use_reentrant=False) if self.training else self.k(x)
            return self.o((q * k).tanh() + self.v(x))

    grouped, alone = twins(lambda: Tower(Partly()).eval())
    for adapter in (grouped, alone):
        adapter.model(x_of())
        adapter.model.train()
        torch.testing.assert_close(step(adapter, x_of()), step(alone, x_of()), atol=1e-12, rtol=1e-12)
    assert computed


def test_transforms_and_compilation_see_the_layers_one_by_one(computed):
    grouped, alone = twins()
    for adapter in (grouped, alone):
        adapter.model(x_of())
    for transform in (
        lambda model: torch.func.vmap(model)(x_of()),
        lambda model: torch.func.jvp(model, (x_of(),), (x_of(seed=2),)),
        lambda model: torch.compile(model, backend="eager", fullgraph=True)(x_of()),
    ):
        torch.testing.assert_close(transform(grouped.model), transform(alone.model), atol=1e-12, rtol=1e-12)
    assert not computed
    torch._dynamo.reset()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_start_without_groups(clone, computed):
    grouped = attached()
    grouped.model(x_of())
    copied = clone(grouped.model)
    layer = clone(grouped.model[0].q)
    assert layer.grouping is None and len(list(layer.modules())) == 3
    count = len(computed)
    for _ in range(3):
        torch.testing.assert_close(copied(x_of()), grouped.model(x_of()), atol=1e-12, rtol=1e-12)
    assert len(computed) == count + 3 * 2


def test_merging_and_detaching_drop_them(computed):
    model = Tower()
    plain = model(x_of())
    grouped = attached(model)
    expected = [model(x_of()) for _ in range(2)]
    count = len(computed)
    torch.testing.assert_close(grouped.merge()(x_of()), expected[0], atol=1e-12, rtol=1e-12)
    assert grouped.summary()["groups"] == [] and not model._forward_hooks and not model._forward_pre_hooks
    grouped.unmerge()
    for _ in range(2):
        torch.testing.assert_close(model(x_of()), expected[0], atol=1e-12, rtol=1e-12)
    assert len(computed) == count + 2 and suffixes(grouped) == [("q", "k", "v")] * 2
    grouped.detach()
    torch.testing.assert_close(model(x_of()), plain, atol=0, rtol=0)
    assert not model._forward_hooks and not model._forward_pre_hooks and grouped.summary()["groups"] == []


def test_sharded_bases_have_none(computed):
    """Sharded after they were found: their weights are no parameters of the module then."""
    grouped = attached()
    expected = [grouped.model(x_of()) for _ in range(2)]
    count = len(computed)
    for block in grouped.model:
        base = block.k.base_layer
        weight = base._parameters.pop("weight")
        base.weight, base._is_fsdp_managed_module = weight.detach(), True
    for _ in range(2):
        torch.testing.assert_close(grouped.model(x_of()), expected[0], atol=1e-12, rtol=1e-12)
    assert len(computed) == count and grouped.summary()["groups"] == [] and grouped.model[0].q.grouping is None


METHODS = {
    "NormAL": lambda: adaptlora.NormALConfig(**CONFIG, target_r=2, t_p=2, t_c=4, lora_dropout=0.1),
    "La-LoRA": lambda: adaptlora.LaLoRAConfig(**CONFIG, gamma=4.0, group_by="module"),
    "freeze_A": lambda: adaptlora.LoraConfig(**CONFIG, freeze_A=True),
}


@pytest.mark.parametrize("name", METHODS)
def test_training_is_the_same_while_ranks_change(name, computed, monkeypatch):
    monkeypatch.setenv("ADAPTLORA_BACKEND", "reference")
    results = []
    for group in (True, False):
        torch.manual_seed(3)
        model = Tower()
        adapter = adaptlora.attach(model, METHODS[name](), group_projections=group)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        adapter.track(optimizer)
        torch.manual_seed(4)
        ranks = []
        for seed in range(8):
            loss = model(x_of(seed=seed)).square().mean()
            (loss + adapter.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            adapter.step(loss)
            ranks.append(adapter.ranks())
        results.append((ranks, [factor.detach() for factor in adapter.factors()]))
    (ranks, factors), (ranks_alone, factors_alone) = results
    assert ranks == ranks_alone and (len({str(r) for r in ranks}) > 1 or name == "freeze_A")
    torch.testing.assert_close(factors, factors_alone, atol=1e-12, rtol=1e-12)
    assert computed == [3, 3] * 7


def test_random_numbers_between_the_calls_keep_layers_apart(computed):
    """With dropout a group draws at once; where somebody draws in between, that would be another sequence."""
    between = lambda attention, x: (torch.rand(()), x)[1]  # noqa: E731
    grouped, alone = twins(lambda: Tower(Attention(between=between)), lora_dropout=0.3)
    for seed in range(3):
        ours, theirs = (step(adapter, x_of(seed=seed), seed) for adapter in (grouped, alone))
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    assert suffixes(grouped) == [("k", "v")]
    for adapter in (grouped, alone):
        adapter.model.eval()
    for _ in range(2):
        torch.testing.assert_close(grouped.model(x_of()), alone.model(x_of()), atol=1e-12, rtol=1e-12)
    assert computed[-1] == 3


def test_layers_that_are_called_late_are_waited_for(computed):
    """For a while: an encoder-decoder that is given its encoder's outputs calls half of its layers."""

    class Late(Tower):
        used = 1

        def forward(self, x):
            for block in list(self)[: self.used]:
                x = block(x)
            return x

    grouped = attached(Late())
    for _ in range(3):
        grouped.model(x_of())
    assert suffixes(grouped) == [("q", "k", "v")]
    grouped.model.used = 2
    for _ in range(3):
        grouped.model(x_of())
    assert suffixes(grouped) == [("q", "k", "v")] * 2
    late = attached(Late())
    for _ in range(grouping._OBSERVED):
        late.model(x_of())
    late.model.used = 2
    for _ in range(3):
        late.model(x_of())
    assert suffixes(late) == [("q", "k", "v")]
