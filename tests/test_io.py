"""PEFT files both ways: stock PEFT computes the same logits, files are written whole or not at all, bad ones are refused."""

import json
import os
import shutil

import peft
import pytest
import torch
from models import Net, bert_batch, randomise, tiny_bert
from safetensors.torch import load_file, save_file

import adaptlora
from adaptlora import adapter_folder, files
from adaptlora.lora_files import peft as peft_files
from adaptlora.ranks import commit_ranks

BASE = {"r": 6, "lora_alpha": 9, "target_modules": "all-linear"}
CONFIGS = {
    "plain": {},
    "head": {"modules_to_save": ["classifier"]},
    "patterns": {"rank_pattern": {"query": 3, "layer.1.output.dense": 1}, "alpha_pattern": {"key": 5}},
    "rslora": {"use_rslora": True, "rank_pattern": {"value": 2}},
    "some": {"target_modules": ["query", "value"]},
    "regex": {"target_modules": r".*layer\.1\..*(query|dense)"},
}


def adapted(seed=0, **fields):
    adapter = adaptlora.attach(tiny_bert(), adaptlora.LoraConfig(**BASE | fields))
    randomise(adapter, seed)
    return adapter


def logits(model):
    with torch.no_grad():
        return model(**bert_batch()).logits


def assert_same(found, expected):
    assert (found - expected).norm() / expected.norm() < 1e-5


def set_ranks(adapter, ranks):
    commit_ranks({name: adapter.layers[name].pair for name in ranks}, ranks, compact=True)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("clip", [False, True])
def test_stock_peft_computes_the_same(name, clip, tmp_path):
    adapter = adapted(**CONFIGS[name])
    if clip:
        set_ranks(adapter, {module: 1 + i % rank for i, (module, rank) in enumerate(adapter.ranks().items())})
    if adapter.saved:
        with torch.no_grad():
            adapter.saved["classifier"].weight.normal_()
    adapter.save(tmp_path)
    expected = logits(adapter.model)
    assert (expected - logits(tiny_bert())).norm() > 1e-4
    model = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    assert_same(logits(model), expected)
    assert_same(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_load_restores_ranks_scalings_and_outputs(name, tmp_path):
    adapter = adapted(**CONFIGS[name])
    set_ranks(adapter, {module: 1 + i % rank for i, (module, rank) in enumerate(adapter.ranks().items())})
    adapter.save(tmp_path)
    loaded = adaptlora.load(tiny_bert(), tmp_path)
    assert loaded.ranks() == adapter.ranks()
    for module, layer in adapter.layers.items():
        assert loaded.layers[module].scaling == pytest.approx(layer.scaling, rel=1e-14)
    assert_same(logits(loaded.model), logits(adapter.model))
    loaded.save(tmp_path / "again")
    first, second = (load_file(path / peft_files.WEIGHTS_FILE) for path in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"rank_pattern": {"query": 2}, "alpha_pattern": {"query": 7}}]
)
@pytest.mark.parametrize("targets", ["all-linear", ["key", "dense"]])
def test_loads_what_peft_saved(fields, targets, tmp_path):
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, task_type="SEQ_CLS", init_lora_weights=False, **fields
    )
    theirs = peft.get_peft_model(tiny_bert(), config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "modules_to_save" in name:
                p.normal_()
    theirs.save_pretrained(tmp_path)
    loaded = adaptlora.load(tiny_bert(), tmp_path)
    assert list(loaded.saved) == ["classifier"]
    assert_same(logits(loaded.model), logits(theirs))


def test_conv1d_both_ways(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def model():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)).eval()

    adapter = adaptlora.attach(model(), adaptlora.LoraConfig(r=3, target_modules="all-linear"))
    randomise(adapter)
    tokens = torch.arange(8)[None]
    adapter.save(tmp_path)
    assert_same(peft.PeftModel.from_pretrained(model(), tmp_path)(tokens).logits, adapter.model(tokens).logits)
    assert_same(adaptlora.load(model(), tmp_path).model(tokens).logits, adapter.model(tokens).logits)


def test_rank_zero_modules_are_left_out_and_come_back(tmp_path):
    adapter = adapted(target_modules=["query", "value"])
    names = list(adapter.layers)
    set_ranks(adapter, {names[0]: 0, names[1]: 2})
    adapter.save(tmp_path)
    config = json.loads((tmp_path / peft_files.CONFIG_FILE).read_text())
    assert names[0] not in config["target_modules"] and config["rank_pattern"] == {names[1]: 2}
    model = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    assert_same(logits(model), logits(adapter.model))
    other = adapted(seed=4, target_modules=["query", "value"])
    other.load(tmp_path)
    assert other.ranks() == adapter.ranks()
    set_ranks(adapter, dict.fromkeys(names, 0))
    with pytest.raises(ValueError, match="save: at least one module must have a rank above 0"):
        adapter.save(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_names_that_end_other_names_are_anchored(tmp_path):
    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.proj = torch.nn.Linear(4, 4)
            self.inner = torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4), "left": torch.nn.Linear(4, 4)})

        def forward(self, x):
            return self.inner["left"](self.inner["proj"](self.proj(x)))

    adapter = adaptlora.attach(Nested(), adaptlora.LoraConfig(r=4, target_modules=r"(inner\.)?proj"))
    randomise(adapter)
    set_ranks(adapter, {"proj": 1, "inner.proj": 3})
    adapter.save(tmp_path)
    x = torch.randn(2, 4)
    assert_same(peft.PeftModel.from_pretrained(Nested(), tmp_path)(x), adapter.model(x))
    assert adaptlora.load(Nested(), tmp_path).ranks() == {"proj": 1, "inner.proj": 3}
    set_ranks(adapter, {"inner.proj": 0})
    adapter.save(tmp_path)
    assert_same(peft.PeftModel.from_pretrained(Nested(), tmp_path)(x), adapter.model(x))


# Written whole or not at all


@pytest.mark.parametrize("victim", ["save_file", "replace", "fsync"])
def test_a_failed_save_leaves_the_old_adapter(victim, tmp_path, monkeypatch):
    adapter = adapted()
    adapter.save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    randomise(adapter, seed=7)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(
        *{"save_file": (adapter_folder, "save_file"), "replace": (os, "replace"), "fsync": (os, "fsync")}[victim], fail
    )
    with pytest.raises(OSError, match="disk full"):
        adapter.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_atomic_file_replaces_only_on_success(tmp_path):
    file = tmp_path / "new" / "file.txt"
    with files.atomic_file(file) as temporary:
        temporary.write_text("first")
        assert not file.exists()
    assert file.read_text() == "first"
    with pytest.raises(KeyError), files.atomic_file(file) as temporary:
        temporary.write_text("second")
        raise KeyError("interrupted")
    assert file.read_text() == "first" and [f.name for f in file.parent.iterdir()] == ["file.txt"]


# Refused with the reason


def edit_config(path, **changes):
    file = path / peft_files.CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(path, change):
    tensors = load_file(path / peft_files.WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, path / peft_files.WEIGHTS_FILE)


def first_key(tensors, factor):
    return next(key for key in sorted(tensors) if factor in key)


def truncate(path):
    data = (path / peft_files.WEIGHTS_FILE).read_bytes()
    (path / peft_files.WEIGHTS_FILE).write_bytes(data[: len(data) // 2])


DAMAGE = {
    "no config": (lambda p: (p / peft_files.CONFIG_FILE).unlink(), FileNotFoundError, "adapter_config.json is missing"),
    "no weights": (
        lambda p: (p / peft_files.WEIGHTS_FILE).unlink(),
        FileNotFoundError,
        r"adapter_model.safetensors is missing \(only",
    ),
    "config cut": (
        lambda p: (p / peft_files.CONFIG_FILE).write_text('{"r": '),
        ValueError,
        "adapter_config.json must be JSON",
    ),
    "weights cut": (truncate, ValueError, "adapter_model.safetensors must be a whole safetensors file"),
    "other method": (lambda p: edit_config(p, peft_type="IA3"), ValueError, "peft_type must be \"LORA\", got 'IA3'"),
    "dora": (lambda p: edit_config(p, use_dora=True), ValueError, "use_dora is not supported .DoRA scales"),
    "bias": (lambda p: edit_config(p, bias="all"), ValueError, "bias must be \"none\", got 'all'"),
    "no rank": (lambda p: edit_config(p, r=0), ValueError, "r must be an integer > 0, got 0"),
    "other rank": (
        lambda p: edit_config(p, r=5),
        ValueError,
        "must have the rank that adapter_config.json gives, 5, got 6",
    ),
    "pissa": (
        lambda p: edit_config(p, init_lora_weights="pissa"),
        ValueError,
        "init_lora_weights must leave the base weights alone .*got 'pissa'",
    ),
    "pattern": (
        lambda p: edit_config(p, alpha_pattern="x"),
        ValueError,
        "alpha_pattern must give numbers > 0 by module, got 'x'",
    ),
    "pattern value": (
        lambda p: edit_config(p, alpha_pattern={"query": "8"}),
        ValueError,
        "alpha_pattern must give numbers > 0",
    ),
    "pattern key": (
        lambda p: edit_config(p, rank_pattern={"*": 3}),
        ValueError,
        "rank_pattern must have regular expressions as keys",
    ),
    "not numbers": (
        lambda p: edit_tensors(p, lambda t: t[first_key(t, "lora_A")].fill_(float("nan"))),
        ValueError,
        "lora_A must hold finite floating-point numbers",
    ),
    "integers": (
        lambda p: edit_tensors(p, lambda t: t.update({first_key(t, "lora_A"): t[first_key(t, "lora_A")].int()})),
        ValueError,
        "lora_A must hold finite floating-point numbers of 16 bits or more, got torch.int32",
    ),
    "half a pair": (
        lambda p: edit_tensors(p, lambda t: t.pop(first_key(t, "lora_B"))),
        ValueError,
        r"must hold lora_A \(R, K\) and lora_B \(N, R\) of one rank",
    ),
    "foreign tensor": (
        lambda p: edit_tensors(p, lambda t: t.update(extra=torch.zeros(2))),
        ValueError,
        "tensors must be lora_A, lora_B or belong to modules_to_save, got 'extra'",
    ),
    "other width": (
        lambda p: edit_tensors(p, lambda t: t.update({first_key(t, "lora_A"): torch.zeros(6, 99)})),
        ValueError,
        r"lora_A must have shape \(R, 16\), got \(6, 99\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_files_are_refused_and_nothing_changes(damage, tmp_path):
    spoil, error, text = DAMAGE[damage]
    adapted(seed=5).save(tmp_path)
    spoil(tmp_path)
    adapter = adapted()
    before = logits(adapter.model)
    with pytest.raises(error, match=text):
        adapter.load(tmp_path)
    assert torch.equal(logits(adapter.model), before)
    model = tiny_bert()
    plain = logits(model)
    with pytest.raises(error, match=text):
        adaptlora.load(model, tmp_path)
    assert type(model.bert.encoder.layer[0].attention.self.query) is torch.nn.Linear
    assert torch.equal(logits(model), plain) and all(p.requires_grad for p in model.parameters())


def test_an_adapter_for_another_model(tmp_path):
    adapted().save(tmp_path)
    with pytest.raises(ValueError, match="target_modules must match at least one module"):
        adaptlora.load(Net(), tmp_path)
    narrow = adapted(target_modules=["query"])
    with pytest.raises(ValueError, match="its modules must be adapted modules of the model, got 'bert"):
        narrow.load(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        adaptlora.load(tiny_bert(), tmp_path)
