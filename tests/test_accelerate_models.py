"""accelerate and restore on models: what PEFT does with adapters goes on as if nothing had happened."""

import copy
import io
import json
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from accelerated_layers import Calls, Holder, layer_of, linear_model, quantised_model, with_lora
from models import Net, batch, bert_batch, tiny_bert
from test_quantised_bases import bitsandbytes_int8, bitsandbytes_nf4, torchao_int8
from torch import nn

import adaptlora
from adaptlora.integrations.peft_layers import AcceleratedLinear

TARGETS = ["first", "second"]


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def config(**options):
    given = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False}
    return peft.LoraConfig(**(given | options))


def twins(*adapters, dtype=torch.float32, **options):
    """(A model of PEFT's, an accelerated one of the same values); the first adapter is active."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(dtype), config(**options), adapter_name=(adapters or ("default",))[0])
    for name in adapters[1:]:
        model.add_adapter(name, config(**options))
    theirs = model.eval()
    ours = copy.deepcopy(theirs)
    assert adaptlora.accelerate(ours) == adaptlora.Acceleration(tuple(TARGETS), {})
    return theirs, ours


def assert_same(theirs, ours) -> None:
    """The same outputs, and values that are bit for bit the same, by the same names."""
    x = batch()[0]
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    states = theirs.state_dict(), ours.state_dict()
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def classes(model) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def test_only_classes_change_and_restore_brings_them_back(calls):
    theirs, ours = twins()
    before, after = classes(theirs), classes(ours)
    changed = {name for name in before if before[name] is not after[name]}
    assert changed == {f"base_model.model.{name}" for name in TARGETS}
    assert all(isinstance(layer, peft.tuners.lora.Linear) for layer in (ours.base_model.model.first,))
    marked = repr(ours.base_model.model.first).splitlines()
    assert marked[:2] == ["lora.Linear(", "  accelerated"]
    assert [marked[0], *marked[2:]] == repr(theirs.base_model.model.first).splitlines()
    assert_same(theirs, ours)
    assert len(calls.take()) == 2
    assert adaptlora.accelerate(ours).accelerated == tuple(TARGETS)
    assert classes(ours) == after
    assert adaptlora.restore(ours) == tuple(TARGETS)
    assert classes(ours) == before and repr(ours) == repr(theirs)
    assert adaptlora.restore(ours) == ()
    x = batch()[0]
    assert torch.equal(ours(x), theirs(x)) and not calls.take()


@pytest.mark.parametrize("quantise", [bitsandbytes_nf4, bitsandbytes_int8, torchao_int8], ids=lambda q: q.__name__)
def test_quantised_layers_have_classes_of_their_own(quantise):
    model = with_lora(quantised_model(quantise))
    original = type(layer_of(model))
    adaptlora.accelerate(model)
    assert type(layer_of(model)).__name__ == f"Accelerated{original.__name__}"
    assert type(layer_of(model)).__mro__[2] is original
    assert type(layer_of(copy.deepcopy(model))) is type(layer_of(model))
    assert adaptlora.restore(model) == ("linear",)
    assert type(layer_of(model)) is original


def test_set_adapter_disable_merge_and_delete(calls):
    theirs, ours = twins("default", "other")
    models = theirs, ours

    def both(method, *args, **kwargs):
        for model in models:
            getattr(model, method)(*args, **kwargs)
        assert_same(theirs, ours)
        return len(calls.take())

    assert both("set_adapter", "other") == 2
    with theirs.disable_adapter(), ours.disable_adapter():
        assert_same(theirs, ours)
        assert not calls.take()
    assert both("merge_adapter") == 0
    assert both("unmerge_adapter") == 2
    assert both("add_weighted_adapter", ["default", "other"], [0.3, 0.9], "mixed", combination_type="cat") == 2
    assert both("set_adapter", "mixed") == 2
    assert both("delete_adapter", "other") == 2
    for model in models:
        model.base_model.set_adapter(["default", "mixed"])
    assert_same(theirs, ours)
    assert calls.take() == ["lora_delta_"] * 4
    assert both("delete_adapter", "mixed") == 2


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_unloading_leaves_plain_layers(how):
    theirs, ours = (getattr(model, how)() for model in twins())
    assert classes(ours) == classes(theirs)
    assert_same(theirs, ours)
    with pytest.raises(ValueError, match="accelerate: model must have LoRA layers of PEFT, got a Net without"):
        adaptlora.accelerate(ours)


def test_files_are_those_of_the_model_as_it_was(tmp_path):
    theirs, ours = twins(modules_to_save=["classifier"])
    for model, name in ((theirs, "theirs"), (ours, "ours")):
        model.save_pretrained(tmp_path / name)
    weights, configs = (
        [(tmp_path / name / file).read_bytes() for name in ("ours", "theirs")]
        for file in ("adapter_model.safetensors", "adapter_config.json")
    )
    assert weights[0] == weights[1]
    # PEFT writes a set: two equal ones may list their names in two orders.
    ours_config, their_config = map(json.loads, configs)
    assert (
        sorted(ours_config.pop("target_modules")) == sorted(their_config.pop("target_modules")) == ["first", "second"]
    )
    assert ours_config == their_config
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours").eval()
    adaptlora.accelerate(loaded)
    assert_same(theirs, loaded)
    ours.load_adapter(tmp_path / "theirs", "again")
    ours.set_adapter("again")
    torch.testing.assert_close(ours(batch()[0]), theirs(batch()[0]), rtol=1e-4, atol=1e-5)


def test_copies_and_pickles_stay_accelerated(calls):
    theirs, ours = twins()
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for model in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
        assert_same(theirs, model)
        assert calls.take() == ["lora_linear"] * 2
        assert adaptlora.restore(model) == tuple(TARGETS)
        assert classes(model) == classes(theirs)


def test_an_adapter_on_other_modules():
    ours = peft.get_peft_model(Net(), config(target_modules=["first"]))
    assert adaptlora.accelerate(ours).accelerated == ("first",)
    ours.add_adapter("other", config())
    assert type(ours.base_model.model.second) is peft.tuners.lora.Linear
    assert adaptlora.accelerate(ours).accelerated == tuple(TARGETS)
    assert type(ours.base_model.model.second) is AcceleratedLinear


def test_trained_as_peft_trains():
    theirs, ours = twins(modules_to_save=["classifier"])
    x, labels = batch()
    for model in (theirs.train(), ours.train()):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(5):
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("mixed", [False, True], ids=["injected", "PeftMixedModel"])
def test_models_that_are_no_peft_model(calls, mixed):
    if mixed:
        model = peft.PeftMixedModel(Net(), config(target_modules=["first"]), "default")
        model.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["second"], init_weights=False))
        model.set_adapter(["default", "other"])
        kept = {"second": "peft.tuners.loha.layer.Linear is no LoRA of a linear layer that is known"}
    else:
        model, kept = tiny_bert(), {}
        model.add_adapter(config(target_modules=["query", "value"], lora_dropout=0.5))
    x = batch()[0] if mixed else bert_batch()["input_ids"]
    before = model.eval()(x)
    found = adaptlora.accelerate(model)
    assert found.kept == kept and len(found.accelerated) == (1 if mixed else 4)
    after = model(x)
    assert len(calls.take()) == len(found.accelerated)
    torch.testing.assert_close(*((after, before) if mixed else (after.logits, before.logits)), rtol=1e-4, atol=1e-5)
    assert adaptlora.restore(model) == found.accelerated


def test_what_is_no_model():
    for function in (adaptlora.accelerate, adaptlora.restore):
        with pytest.raises(TypeError, match=f"{function.__name__}: model must be a PeftModel, or .*, got dict"):
            function({})
        with pytest.raises(ValueError, match=f"{function.__name__}: model must have LoRA layers .* a Net without"):
            function(Net())
    loha = peft.get_peft_model(Net(), peft.LoHaConfig(r=2, target_modules=TARGETS))
    with pytest.raises(ValueError, match="must have LoRA layers of PEFT, got a PeftModel without"):
        adaptlora.accelerate(loha)


class Mixture(nn.Module):
    """A layer of each kind that PEFT adapts."""

    def __init__(self):
        super().__init__()
        self.linear, self.embedding = nn.Linear(16, 16), nn.Embedding(5, 16)
        self.conv, self.attention = nn.Conv1d(16, 16, 3), nn.MultiheadAttention(16, 2)


def found_in_mixture(**options) -> adaptlora.Acceleration:
    return adaptlora.accelerate(peft.inject_adapter_in_model(config(**options), Mixture()))


def test_layers_of_other_kinds_are_kept():
    unknown = " is no LoRA of a linear layer that is known"
    module = "peft.tuners.lora.layer."
    never_called = "nn.MultiheadAttention reads the weight of its out_proj and never calls it"
    found = found_in_mixture(target_modules=["linear", "embedding", "conv", "attention"])
    assert found == adaptlora.Acceleration(
        ("linear",),
        {
            "embedding": f"{module}Embedding{unknown}",
            "conv": f"{module}Conv1d{unknown}",
            "attention": f"{module}MultiheadAttention{unknown}",
            "attention.base_layer.out_proj": never_called,
        },
    )
    found = found_in_mixture(target_modules=["attention.out_proj"])
    assert found == adaptlora.Acceleration((), {"attention.out_proj": never_called})
    found = found_in_mixture(target_modules=[], target_parameters=["linear.weight"])
    assert found == adaptlora.Acceleration((), {"linear": f"{module}ParamWrapper{unknown}"})


@pytest.mark.parametrize(
    ("options", "variant"),
    [
        ({"use_dora": True}, "DoraLinearVariant"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "ALoraLinearVariant"),
        (
            {"use_bdlora": peft.tuners.lora.BdLoraConfig(target_modules_bd_a=["linear"], nblocks=2)},
            "BdLoraLinearVariant",
        ),
        ({"velora_config": peft.tuners.lora.VeloraConfig()}, "VeloraLinearVariant"),
    ],
    ids=str,
)
def test_variants_are_kept(options, variant):
    found = found_in_mixture(target_modules=["linear"], **options)
    assert found == adaptlora.Acceleration((), {"linear": f"adapter 'default' is a variant of LoRA, {variant}"})


def test_a_layer_with_a_variant_among_its_adapters(calls):
    theirs, ours = twins("plain")
    for model in (theirs, ours):
        torch.manual_seed(1)
        model.add_adapter("dora", config(use_dora=True))
    reason = "adapter 'dora' is a variant of LoRA, DoraLinearVariant"
    assert adaptlora.accelerate(ours) == adaptlora.Acceleration(tuple(TARGETS), dict.fromkeys(TARGETS, reason))
    for active, made in (("plain", 2), ("dora", 0), (["plain", "dora"], 0)):
        theirs.base_model.set_adapter(active)
        ours.base_model.set_adapter(active)
        assert_same(theirs, ours)
        assert len(calls.take()) == made
    ours.delete_adapter("plain")
    assert adaptlora.accelerate(ours) == adaptlora.Acceleration((), dict.fromkeys(TARGETS, reason))
    assert type(ours.base_model.model.first) is peft.tuners.lora.Linear


def test_importing_adaptlora_imports_no_peft():
    code = "import sys, adaptlora; adaptlora.accelerate; assert not {'peft', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_those_in_the_base_model():
    model = with_lora(linear_model())
    assert adaptlora.accelerate(model).accelerated == ("linear",)
    assert adaptlora.accelerate(model.base_model).accelerated == ("linear",)
    assert adaptlora.accelerate(Holder(model)).accelerated == ("linear.base_model.model.linear",)
