"""Adapter: attach, train, merge, detach, state; the raw loop of the README; bad input before anything changes."""

import copy
import re
from pathlib import Path

import pytest
import torch
from models import Net, batch, bert_batch, randomise, task_loss, tiny_bert
from optimizers import RowMeans

import adaptlora
from adaptlora.nn import LoraLinear


def normal(**fields):
    base = {"r": 4, "target_r": 2, "lora_alpha": 8, "target_modules": "all-linear", "t_p": 2, "t_c": 3}
    return adaptlora.NormALConfig(**base | fields)


def lora(**fields):
    return adaptlora.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | fields)


def test_the_readmes_loop(tmp_path, monkeypatch):
    """README's example, as it stands there."""
    from peft import PeftModel

    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = (
        block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "adaptlora.attach" in block
    )
    *loop, merge = example.strip().splitlines()
    assert merge.startswith("adapter.merge()")
    monkeypatch.chdir(tmp_path)
    model = tiny_bert()
    names = {"torch": torch, "model": model, "loader": [bert_batch()] * 120}
    exec("\n".join(loop), names)

    ranks = names["adapter"].ranks()
    assert len(ranks) == 13 and sum(ranks.values()) == 4 * 13 and min(ranks.values()) >= 1
    logits = model(**bert_batch()).logits
    reloaded = PeftModel.from_pretrained(tiny_bert(), "out/").eval()
    torch.testing.assert_close(reloaded(**bert_batch()).logits, logits, rtol=1e-5, atol=1e-6)
    exec(merge, names)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    torch.testing.assert_close(model(**bert_batch()).logits, logits, rtol=1e-5, atol=1e-6)


def test_attach_changes_no_output_and_freezes_the_base():
    model = Net()
    x, _ = batch()
    before = model(x)
    adapter = adaptlora.attach(model, lora(modules_to_save=["classifier"]))
    assert torch.equal(model(x), before)
    assert list(adapter.layers) == ["first", "second"]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{layer}.pair.{f}" for layer in ("first", "second") for f in ("lora_A", "lora_B")} | {
        "classifier.weight",
        "classifier.bias",
    }
    assert {id(p) for p in adapter.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}


def test_initial_factors_depend_on_the_seed_alone():
    models = [Net() for _ in range(3)]
    torch.manual_seed(1)
    first = adaptlora.attach(models[0], lora(seed=3)).layers["second"].lora_A
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = adaptlora.attach(models[1], lora(seed=3)).layers["second"].lora_A
    assert torch.equal(first, second)
    assert not torch.equal(first, adaptlora.attach(models[2], lora(seed=4)).layers["second"].lora_A)
    assert torch.equal(state, torch.get_rng_state())


def test_patterns_and_scaling():
    adapter = adaptlora.attach(
        Net(), lora(target_modules=["first", "second"], rank_pattern={"second": 2}, alpha_pattern={"first": 12})
    )
    assert adapter.ranks() == {"first": 4, "second": 2}
    assert adapter.layers["first"].scaling == 12 / 4 and adapter.layers["second"].scaling == 8 / 2
    adapter = adaptlora.attach(Net(), lora(use_rslora=True))
    assert adapter.layers["first"].scaling == 8 / 4**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_layer_computes_the_definition(dtype):
    model = Net(dtype)
    adapter = adaptlora.attach(model, lora(target_modules=["first"]))
    randomise(adapter)
    layer = adapter.layers["first"]
    assert layer.lora_A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    x, _ = batch(dtype=dtype)
    expected = (
        x.double() @ layer.weight.double().t()
        + layer.bias.double()
        + 2.0 * x.double() @ layer.lora_A.double().t() @ layer.lora_B.double().t()
    )
    floor = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert layer(x).dtype == dtype
    assert (layer(x).double() - expected).norm() / expected.norm() < floor


def test_conv1d_layer():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base = Conv1D(6, 5).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    layer = LoraLinear(copy.deepcopy(base), 2, scaling=1.5)
    assert torch.allclose(layer(x), base(x))
    with torch.no_grad():
        layer.lora_B.normal_()
    expected = base(x) + 1.5 * x @ layer.lora_A.t() @ layer.lora_B.t()
    assert torch.allclose(layer(x), expected)
    merged = copy.deepcopy(base)
    merged.weight.data = layer.merged_weight()
    assert torch.allclose(merged(x), expected)


def test_dropout_only_while_training():
    model = Net()
    adapter = adaptlora.attach(model, lora(lora_dropout=0.5, target_modules=["first"]))
    randomise(adapter)
    x, _ = batch()
    torch.manual_seed(0)
    first = model(x)
    torch.manual_seed(0)
    assert torch.equal(model(x), first) and not torch.equal(model(x), first)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_attach_keeps_training_mode():
    model = Net().eval()
    adapter = adaptlora.attach(model, lora(modules_to_save=["classifier"]))
    assert not any(module.training for module in model.modules())
    assert not adapter.layers["first"].training


def test_merge_and_unmerge_are_exact():
    model = Net()
    originals = {name: p.clone() for name, p in model.named_parameters()}
    adapter = adaptlora.attach(model, lora(target_modules=["first", "second"]))
    randomise(adapter)
    x, _ = batch()
    adapted = model(x)
    assert adapter.merge() is model
    assert type(model.first) is torch.nn.Linear
    torch.testing.assert_close(model(x), adapted)
    assert not torch.equal(model.first.weight, originals["first.weight"])
    adapter.unmerge()
    assert torch.equal(model(x), adapted)
    adapter.merge()
    adapter.detach()
    for name, p in model.named_parameters():
        assert torch.equal(p, originals[name]) and p.requires_grad


def test_merge_of_a_tied_weight_changes_only_the_adapted_module():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    model = Tied()
    original = model.first.weight.detach().clone()
    adapter = adaptlora.attach(model, lora(target_modules=["second"]))
    randomise(adapter)
    x = torch.randn(3, 6)
    adapted = model(x)
    adapter.merge()
    torch.testing.assert_close(model(x), adapted)
    assert torch.equal(model.first.weight, original)
    adapter.unmerge()
    assert torch.equal(model(x), adapted) and model.first.weight is model.second.base_layer.weight


def test_models_that_move_while_merged_or_adapted():
    model = Net()
    adapter = adaptlora.attach(model, lora(target_modules=["first", "second"], modules_to_save=["classifier"]))
    randomise(adapter)
    adapter.merge()
    model.double()
    adapter.unmerge()
    assert {p.dtype for p in model.first.base_layer.parameters()} == {torch.float64}
    adapter.detach()
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_torchs_transformer_layers_use_the_adapter_in_evaluation_too():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 3, 8)
    adapter = adaptlora.attach(model, lora())
    assert sorted(adapter.layers) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    randomise(adapter)
    trained_output = model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained_output)
    adapter.merge()
    assert model.layers[0].activation_relu_or_gelu == 1
    with torch.no_grad():
        torch.testing.assert_close(model(x), trained_output, rtol=1e-5, atol=1e-5)


def test_peft_models_and_peft_configurations_are_refused():
    import peft

    config = peft.LoraConfig(target_modules=["first"])
    with pytest.raises(
        TypeError,
        match="config must be one of adaptlora's LoraConfig, NormALConfig, LaLoRAConfig, NoRAConfig, "
        "AdaLoRAConfig, DyLoRAConfig, got peft",
    ):
        adaptlora.attach(Net(), config)
    with pytest.raises(ValueError, match="model must not be adapted already; 'base_model.model.first' is a Linear"):
        adaptlora.attach(peft.get_peft_model(Net(), config), lora(target_modules=["second"]))


def test_nested_modules_to_save_are_saved_once():
    model = torch.nn.ModuleDict(
        {"body": torch.nn.Linear(3, 3), "head": torch.nn.ModuleDict({"head": torch.nn.Linear(3, 2)})}
    )
    adapter = adaptlora.attach(model, lora(target_modules=["body"], modules_to_save=["head"]))
    assert list(adapter.saved) == ["head"] and len(adapter.parameters()) == len(set(adapter.parameters())) == 4


def test_detach_restores_modules_and_flags():
    model = Net()
    model.second.requires_grad_(False)
    modules = dict(model.named_modules())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    adapter = adaptlora.attach(model, lora(target_modules=["first", "second"], modules_to_save=["classifier"]))
    with torch.no_grad():
        model.classifier.weight.zero_()
    adapter.detach()
    assert dict(model.named_modules()) == modules and model.classifier.weight.any()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    with pytest.raises(ValueError, match="step: the adapter must be on its model"):
        adapter.step(1.0)
    adaptlora.attach(model, lora())


def test_state_dict_round_trip_restores_ranks_and_method():
    adapter, optimizer = trained(steps=4)
    state = copy.deepcopy(adapter.state_dict())
    other = adaptlora.attach(Net(), normal(modules_to_save=["classifier"]))
    other.load_state_dict(state)
    assert other.ranks() == adapter.ranks() and other.method.state_dict() == adapter.method.state_dict()
    for mine, theirs in zip(other.parameters(), adapter.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert optimizer.state


def test_model_state_dict_round_trip_across_a_clip():
    adapter, _ = trained(steps=4)
    other = adaptlora.attach(Net(seed=9), normal(modules_to_save=["classifier"]))
    other.model.load_state_dict(adapter.model.state_dict())
    x, _ = batch()
    assert other.ranks() == adapter.ranks() and torch.equal(other.model(x), adapter.model(x))


def test_load_state_dict_of_another_model_changes_nothing():
    adapter, _ = trained(steps=1)
    state = copy.deepcopy(adapter.state_dict())
    state["factors"]["second"]["lora_A"] = torch.zeros(4, 99)
    state["factors"]["first"]["lora_A"].zero_()
    with pytest.raises(ValueError, match=r"load_state_dict: second: lora_A must have shape \(R, 17\), got \(4, 99\)"):
        adapter.load_state_dict(state)
    assert adapter.layers["first"].lora_A.any()
    del state["factors"]["second"]
    with pytest.raises(ValueError, match="factors must name the adapter's modules, got a difference in .'second'"):
        adapter.load_state_dict(state)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda s: s["modules_to_save"].clear(), "modules_to_save must be the adapter's, .'classifier'., got "),
        (lambda s: s["modules_to_save"]["classifier"].update(weight=torch.zeros(1, 1)), "classifier must hold"),
        (
            lambda s: s["scalings"].pop("first"),
            "scalings must have the adapter's entries, got a difference in .'first'",
        ),
        (
            lambda s: s["method"].pop("clipped"),
            "method must have the adapter's entries, got a difference in .'clipped'",
        ),
    ],
)
def test_load_state_dict_is_all_or_nothing(spoil, text):
    clipped, _ = trained(steps=4)
    state = copy.deepcopy(clipped.state_dict())
    spoil(state)
    adapter, _ = trained(steps=1)
    before = copy.deepcopy(adapter.state_dict())
    with pytest.raises(ValueError, match=text):
        adapter.load_state_dict(state)
    after = adapter.state_dict()
    assert set(adapter.ranks().values()) == {4} and after["method"] == before["method"]
    assert torch.equal(after["factors"]["first"]["lora_A"], before["factors"]["first"]["lora_A"])


def test_a_restored_adapter_is_as_small_as_its_ranks():
    clipped, _ = trained(steps=4)
    for restore in (
        lambda adapter: adapter.load_state_dict(clipped.state_dict()),
        lambda adapter: adapter.model.load_state_dict(clipped.model.state_dict()),
    ):
        adapter = adaptlora.attach(Net(), normal(modules_to_save=["classifier"]))
        restore(adapter)
        assert adapter.summary()["adapter_bytes"] == clipped.summary()["adapter_bytes"]


def test_a_step_that_fails_to_clip_leaves_the_factors_unshrunk(monkeypatch):
    adapter = adaptlora.attach(Net(), normal(penalty_step="proximal", t_p=1, t_c=1))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    adapter.track(optimizer)
    randomise(adapter)
    before = [factor.detach().clone() for factor in adapter.factors()]

    def fail(*args, **kwargs):
        raise MemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("adaptlora.ranks.RankedPair.plan", fail)
        with pytest.raises(MemoryError, match="out of memory"):
            adapter.step(1.0)
    assert all(torch.equal(old, new) for old, new in zip(before, adapter.factors(), strict=True))
    assert adapter.method.t == 0 and adapter.step(1.0) is not None


def test_an_optimizer_that_cannot_follow_is_refused_at_the_first_step():
    adapter = adaptlora.attach(Net(), normal(t_p=5, t_c=6))
    optimizer = RowMeans(adapter.parameters(), lr=0.01)
    adapter.track(optimizer)
    task_loss(adapter.model).backward()
    optimizer.step()
    with pytest.raises(TypeError, match="optimizer state must be shaped like its parameter.*RowMeans keeps"):
        adapter.step(1.0)


def test_a_file_of_other_ranks_is_where_the_method_starts_from(tmp_path):
    source = adaptlora.attach(Net(), lora(target_modules=["first", "second"], rank_pattern={"first": 2}))
    source.save(tmp_path / "small")
    only = adaptlora.attach(Net(), lora(target_modules=["first"]))
    only.save(tmp_path / "one")
    adapter = adaptlora.attach(
        Net(), normal(target_modules=["first", "second"], t_p=1, t_c=1, rescale=True, penalty="none")
    )
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    adapter.track(optimizer)
    adapter.load(tmp_path / "small")
    scaling = adapter.layers["first"].scaling
    after = adapter.step(1.0).after
    assert sum(after.values()) == 4
    assert adapter.layers["first"].scaling == pytest.approx(scaling * 2 / after["first"])
    strict = adaptlora.attach(Net(), normal(target_modules=["first", "second"], target_r=None, budget=5))
    with pytest.raises(ValueError, match="budget must be between 1 .* and 4 .*, got 5"):
        strict.load(tmp_path / "one")
    assert strict.ranks() == {"first": 4, "second": 4}
    by_threshold = adaptlora.attach(
        Net(), normal(target_modules=["first", "second"], target_r=None, threshold=0.5, t_p=1, t_c=1)
    )
    by_threshold.track(torch_optimizer := torch.optim.AdamW(by_threshold.parameters()))
    by_threshold.load(tmp_path / "one")
    assert by_threshold.step(1.0).after["second"] == 0 and torch_optimizer.state is not None


def trained(steps, **fields):
    model = Net()
    adapter = adaptlora.attach(model, normal(modules_to_save=["classifier"], **fields))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    adapter.track(optimizer)
    for _ in range(steps):
        loss = task_loss(model)
        (loss + adapter.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step(loss)
    return adapter, optimizer


# Bad input


def test_a_model_already_adapted():
    model = Net()
    adapter = adaptlora.attach(model, lora())
    with pytest.raises(ValueError, match="attach: model must not be adapted already; 'first' is a LoraLinear"):
        adaptlora.attach(model, lora())
    assert model.first is adapter.layers["first"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), torch.tensor(float("nan"))])
def test_step_refuses_a_loss_that_is_not_finite(bad):
    adapter, _ = trained(steps=2)
    before = adapter.ranks(), adapter.method.state_dict()
    with pytest.raises(ValueError, match="step: loss must be finite, got"):
        adapter.step(bad)
    assert (adapter.ranks(), adapter.method.state_dict()) == before


@pytest.mark.parametrize("penalty_step", ["gradient", "proximal"])
def test_an_optimizer_that_is_not_tracked_stops_the_step_before_anything_changes(penalty_step):
    adapter = adaptlora.attach(Net(), normal(penalty_step=penalty_step, t_p=1, t_c=1))
    randomise(adapter)
    before = copy.deepcopy(adapter.state_dict())
    with pytest.raises(ValueError, match=r"optimizer must be tracked before ranks change .* got none for first.lora_A"):
        adapter.step(1.0)
    after = adapter.state_dict()
    assert after["method"] == before["method"]
    assert all(
        torch.equal(after["factors"][n][f], before["factors"][n][f])
        for n in adapter.layers
        for f in ("lora_A", "lora_B")
    )
    optimizer = torch.optim.AdamW(adapter.parameters())
    adapter.track(optimizer)
    assert adapter.step(1.0) is not None


def test_an_optimizer_over_a_part_of_the_factors_is_named():
    adapter = adaptlora.attach(Net(), normal(t_p=1, t_c=1))
    optimizer = torch.optim.AdamW([adapter.layers["first"].lora_A, adapter.layers["first"].lora_B])
    adapter.track(optimizer)
    with pytest.raises(ValueError, match=r"got none for second.lora_A"):
        adapter.step(1.0)


def test_track_errors():
    adapter = adaptlora.attach(Net(), lora())
    with pytest.raises(TypeError, match=r"track: optimizer must be a torch.optim.Optimizer, got int"):
        adapter.track(3)
    other = torch.optim.AdamW(Net().parameters())
    with pytest.raises(ValueError, match=r"track: optimizer must hold the adapter's factors"):
        adapter.track(other)


def test_track_unwraps():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    adapter = adaptlora.attach(Net(), lora())
    optimizer = torch.optim.AdamW(adapter.parameters())
    adapter.track(Wrapper(Wrapper(optimizer)))
    assert adapter.layers["first"].pair.optimizers == [optimizer]


def test_merged_adapters_do_not_train():
    adapter, _ = trained(steps=1)
    adapter.merge()
    for call in (lambda: adapter.step(1.0), adapter.merge):
        with pytest.raises(ValueError, match="the adapter must not be merged"):
            call()
    adapter.unmerge()
    with pytest.raises(ValueError, match="unmerge: the adapter must be merged"):
        adapter.unmerge()
