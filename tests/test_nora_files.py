"""NoRA's files: its own, compact or with the outer factors, and PEFT's; what they refuse."""

import copy
import json

import pytest
import torch
from models import bert_batch, tiny_bert

import adaptlora
from adaptlora.methods.nora import outer_factors


def trained_bert(**fields):
    model = tiny_bert()
    options = {"r": 3, "r_out": 8, "lora_alpha": 6, "target_modules": "all-linear", "modules_to_save": ["classifier"]}
    calibration = bert_batch() if fields.get("outer") == "activation" else None
    adapter = adaptlora.attach(model, adaptlora.NoRAConfig(**options | fields), calibration=calibration)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    adapter.track(optimizer)
    for t in range(3):
        model(**bert_batch(seed=t)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
    return adapter, model(**bert_batch()).logits


@pytest.mark.parametrize("save_outer", [False, True])
@pytest.mark.parametrize(
    "fields", [{}, {"outer": "activation"}, {"inner_init": "kaiming"}, {"residual": False}], ids=str
)
def test_its_own_files_give_the_same_bits(fields, save_outer, tmp_path):
    adapter, logits = trained_bert(**fields)
    adapter.save(tmp_path, format="nora", save_outer=save_outer)
    told = []
    again = adaptlora.load(tiny_bert(), tmp_path, progress=lambda *counts: told.append(counts))
    assert torch.equal(again.model(**bert_batch()).logits, logits) and told[-1] == (13, 13)
    assert type(again.config) is adaptlora.NoRAConfig and again.config == adapter.config
    twin, _ = trained_bert(**fields)
    twin.load(tmp_path)
    assert torch.equal(twin.model(**bert_batch()).logits, logits)
    size = (tmp_path / "adaptlora_model.safetensors").stat().st_size
    assert save_outer or size < 4 * (adapter.summary()["trainable_parameters"] + 13 * (2 * 8 + 24)) + 8000


@pytest.mark.parametrize("fields", [{}, {"residual": False}, {"use_rslora": True}], ids=str)
def test_peft_computes_the_same(fields, tmp_path):
    from peft import PeftModel

    adapter, logits = trained_bert(**fields)
    adapter.save(tmp_path / "folded")
    ranks = {layer.rank for layer in adapter.layers.values()}
    folded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "folded").eval()
    torch.testing.assert_close(folded(**bert_batch()).logits, logits, rtol=1e-5, atol=1e-6)
    rank = json.loads((tmp_path / "folded" / "adapter_config.json").read_text())["r"]
    assert ranks == {3} and rank == (3 if "residual" in fields else 6)
    adapter.save(tmp_path / "apart", fold_residual=False)
    base = tiny_bert()
    base.load_state_dict(adapter.base_state_dict())
    apart = PeftModel.from_pretrained(base, tmp_path / "apart").eval()
    torch.testing.assert_close(apart(**bert_batch()).logits, logits, rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "apart" / "adapter_config.json").read_text())["r"] == 3


def test_another_base_is_refused(tmp_path):
    adapter, _ = trained_bert()
    adapter.save(tmp_path, format="nora")
    model = tiny_bert(seed=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"base weight of bert.encoder.* must be the one .* trained on, SHA-256 [0-9a-f]{12}…, got"
    ):
        adaptlora.load(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert type(model.bert.pooler.dense) is torch.nn.Linear


def test_a_factorization_that_comes_out_otherwise_is_refused(tmp_path, monkeypatch):
    adapter, logits = trained_bert()
    adapter.save(tmp_path / "remade", format="nora")
    adapter.save(tmp_path / "stored", format="nora", save_outer=True)
    real = outer_factors

    def rotated(*args):
        outer = real(*args)
        return outer._replace(U=outer.U.flip(1))

    monkeypatch.setattr("adaptlora.methods.nora.outer_factors", rotated)
    with pytest.raises(ValueError, match="this machine's factorization differs; save with save_outer=True there"):
        adaptlora.load(tiny_bert(), tmp_path / "remade")
    assert torch.equal(adaptlora.load(tiny_bert(), tmp_path / "stored").model(**bert_batch()).logits, logits)


def test_plain_and_nested_files_are_not_mixed(tmp_path):
    adapter, _ = trained_bert()
    adapter.save(tmp_path / "nora", format="nora")
    adapter.save(tmp_path / "peft")
    plain = adaptlora.load(tiny_bert(), tmp_path / "peft")
    with pytest.raises(ValueError, match=r"must be a plain LoRA, got NoRA's own"):
        plain.load(tmp_path / "nora")
    with pytest.raises(ValueError, match=r"must be NoRA's own .*, got a plain LoRA"):
        adapter.load(tmp_path / "peft")
    with pytest.raises(ValueError, match='save: format must be "peft", "vllm" or "merged" for LoraConfig, got .nora.'):
        plain.save(tmp_path / "x", format="nora")
    with pytest.raises(
        ValueError, match='save: format must be "peft", "nora", "vllm" or "merged" for NoRAConfig, got .zip.'
    ):
        adapter.save(tmp_path / "x", format="zip")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="shear: target must hold plain pairs, got NoRA's nested ones"):
        adaptlora.shear(adapter)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda c: c.update(format="other"), "format must be 'adaptlora-nora-1', got 'other'"),
        (lambda c: c["config"].update(r_out=1), "r_out must be an integer ≥ r=3"),
        (lambda c: c["config"].update(rout=1), "rout"),
        (lambda c: c["modules"].clear(), "modules must name at least one module"),
        (lambda c: c["modules"].popitem(), "tensors must belong to the modules"),
        (lambda c: c["modules"].update(more=c["modules"]["bert.pooler.dense"]), r"more must have lora_A, got \[\]"),
        (lambda c: c.pop("modules"), "KeyError"),
    ],
)
def test_damaged_descriptions(spoil, text, tmp_path):
    adapter, _ = trained_bert()
    adapter.save(tmp_path, format="nora")
    file = tmp_path / "adaptlora_config.json"
    content = json.loads(file.read_text())
    spoil(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=text):
        adaptlora.load(tiny_bert(), tmp_path)


@pytest.mark.parametrize(
    "fields", [{"lora_alpha": 5}, {"residual": False}, {"r": 2, "lora_alpha": 4}, {"inner_init": "kaiming"}], ids=str
)
def test_a_file_of_another_start_is_refused(fields, tmp_path):
    source, _ = trained_bert()
    source.save(tmp_path, format="nora")
    target, logits = trained_bert(**fields)
    with pytest.raises(ValueError, match=r"what was taken out of the base|lora_A must have shape"):
        target.load(tmp_path)
    assert torch.equal(target.model(**bert_batch()).logits, logits)


def test_stored_outer_factors_take_the_place_of_an_adapters_own(tmp_path):
    source, logits = trained_bert(outer="activation")
    source.save(tmp_path / "stored", format="nora", save_outer=True)
    target, _ = trained_bert()
    target.load(tmp_path / "stored")
    torch.testing.assert_close(target.model(**bert_batch()).logits, logits, rtol=1e-5, atol=1e-6)
    target.save(tmp_path / "again", format="nora")
    remade = adaptlora.load(tiny_bert(), tmp_path / "again")
    assert torch.equal(remade.model(**bert_batch()).logits, target.model(**bert_batch()).logits)


def test_a_resumed_activation_run_saves_what_can_be_read(tmp_path):
    source, logits = trained_bert(outer="activation")
    other, _ = trained_bert(outer="activation")
    other.layers["bert.pooler.dense"].weighting.mul_(2)  # as from another calibration batch
    other.load_state_dict(copy.deepcopy(source.state_dict()))
    other.save(tmp_path, format="nora")
    assert torch.equal(adaptlora.load(tiny_bert(), tmp_path).model(**bert_batch()).logits, logits)


def test_a_folder_holds_one_adapter(tmp_path):
    adapter, _ = trained_bert()
    adapter.save(tmp_path, format="nora")
    adapter.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    adapter.save(tmp_path, format="nora")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adaptlora_config.json", "adaptlora_model.safetensors"]


def test_a_model_with_one_more_matching_layer_is_refused(tmp_path):
    adapter, _ = trained_bert()
    adapter.save(tmp_path, format="nora")
    model = tiny_bert()
    model.extra = torch.nn.Linear(8, 8)
    with pytest.raises(ValueError, match="its modules must be all that are adapted, got none for 'extra'"):
        adaptlora.load(model, tmp_path)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda t, k: t.update({k + "lora_A": t[k + "lora_A"].long()}), "must hold finite floating-point numbers"),
        (
            lambda t, k: t.update({k + "lora_B": t[k + "lora_B"] * float("nan")}),
            "must hold finite floating-point numbers",
        ),
        (lambda t, k: t.update({k + "magnitude": torch.ones(3)}), "tensors must belong to the modules"),
        (lambda t, k: t.update({k + "probe": torch.ones(2, 5)}), "outer factors of .* must come out as where"),
        (
            lambda t, k: t.update({k + "weighting": torch.ones(5)}),
            r"weighting of .* must have shape \(16,\), got \(5,\)",
        ),
        (lambda t, k: t.update({k + "lora_B": torch.ones(3, 3)}), "must fit together"),
    ],
)
def test_damaged_tensors(spoil, text, tmp_path):
    from safetensors.torch import load_file, save_file

    adapter, _ = trained_bert()
    adapter.save(tmp_path, format="nora")
    file = tmp_path / "adaptlora_model.safetensors"
    tensors = load_file(file)
    spoil(tensors, "bert.pooler.dense.")
    save_file(tensors, file)
    model = tiny_bert()
    with pytest.raises(ValueError, match=text):
        adaptlora.load(model, tmp_path)
    assert type(model.bert.pooler.dense) is torch.nn.Linear
