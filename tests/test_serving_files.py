"""Folders for servers with one rank and one scaling: what vLLM and PEFT make of them by their rules, read with json and safetensors."""

import copy
import json
import math

import peft
import pytest
import torch
from models import Net, bert_batch, randomise, tiny_bert
from safetensors.torch import load_file
from test_merged_model import tiny_llama
from torch import nn
from typer.testing import CliRunner

import adaptlora
from adaptlora.cli import app
from adaptlora.lora_files import peft_config
from adaptlora.serving_files import export

PREFIX = "base_model.model."
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense"]


def served(folder, *, patterns=False):
    """{module: ΔW} in float64: by vLLM's rule from r and lora_alpha alone, or by PEFT's from the patterns too."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    deltas = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        A, B = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
        r = peft_config.rank_of(config, name) if patterns else config["r"]
        alpha = peft_config.alpha_of(config, name) if patterns else config["lora_alpha"]
        assert A.shape[0] == r if patterns else A.shape[0] <= r
        deltas[name] = alpha / (math.sqrt(r) if config["use_rslora"] else r) * B @ A
    return deltas


def trained(adapter):
    """{module: ΔW against the weights before attach}, in float64; modules that add nothing are left out."""
    deltas = {}
    for name, layer in adapter.layers.items():
        A, B = (factor.double() for factor in layer.effective_factors())
        delta = layer.scaling * B @ A
        if layer.residual_factors() is not None:
            A, B = (factor.double() for factor in layer.residual_factors())
            delta -= layer.scaling * B @ A
        if delta.any():
            deltas[name] = delta
    return deltas


def same(found, expected, dtype=torch.float32):
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        # lora_B is rounded once: each of the products that an element sums is off by half a unit in the last place at most.
        bound = torch.finfo(dtype).eps / 2 * max(1.0, expected[name].abs().max().item()) * 8
        torch.testing.assert_close(delta, expected[name], rtol=0, atol=bound)


CONFIGS = {
    "patterns": adaptlora.LoraConfig(
        r=4,
        lora_alpha=11,
        target_modules=TARGETS,
        rank_pattern={"layer.0.attention.self.query": 7, "value": 3},
        alpha_pattern={"key": 5},
    ),
    "rslora": adaptlora.LoraConfig(
        r=5, lora_alpha=3, use_rslora=True, target_modules="all-linear", rank_pattern={"key": 2}
    ),
    "pissa": adaptlora.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights="pissa"),
    "nora": adaptlora.NoRAConfig(r=3, r_out=8, lora_alpha=7, target_modules=TARGETS),
    "adalora": adaptlora.AdaLoRAConfig(init_r=4, target_r=2, lora_alpha=9, total_step=10, target_modules=TARGETS),
}


def adapted(kind="patterns", model=None):
    adapter = adaptlora.attach(tiny_bert() if model is None else model, CONFIGS[kind])
    randomise(adapter)
    return adapter


@pytest.mark.parametrize("pad", [False, True, 16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_one_scaling_for_all_modules_gives_what_the_model_computes(kind, pad, tmp_path):
    adapter = adapted(kind)
    expected = trained(adapter)
    adapter.save(tmp_path, format="vllm", pad=pad)
    for patterns in (False, True):
        same(served(tmp_path, patterns=patterns), expected)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key}
    assert config["lora_alpha"] == config["r"] == (16 if pad == 16 else max(ranks)) and not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    if pad:
        assert ranks == {config["r"]} and not config["rank_pattern"]
    elif kind == "patterns":
        assert ranks == {7, 4, 3}


@pytest.mark.parametrize("pad", [False, 8])
@pytest.mark.parametrize("kind", ["patterns", "nora"])
def test_peft_and_adaptlora_load_it_and_compute_the_same(kind, pad, tmp_path):
    adapter, batch = adapted(kind), bert_batch()
    with torch.no_grad():
        expected = adapter.model(**batch).logits
        adapter.save(tmp_path, format="vllm", pad=pad)
        theirs = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
        torch.testing.assert_close(theirs(**batch).logits, expected, rtol=2e-5, atol=2e-5)
        ours = adaptlora.load(tiny_bert(), tmp_path)
        torch.testing.assert_close(ours.model(**batch).logits, expected, rtol=2e-5, atol=2e-5)
    assert {layer.scaling for layer in ours.layers.values()} == {1.0}


def test_lora_b_is_scaled_in_float64_and_rounded_once(tmp_path):
    adapter = adaptlora.attach(Net(), adaptlora.LoraConfig(r=3, lora_alpha=0.7, target_modules=["first", "second"]))
    randomise(adapter)
    layer = adapter.layers["second"]
    layer.pair.lora_B.data = layer.pair.lora_B.data.to(torch.bfloat16)
    adapter.save(tmp_path, format="vllm")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name in adapter.layers:
        B = adapter.layers[name].lora_B.detach()
        exact = B.double() * (0.7 / 3)
        assert torch.equal(tensors[f"{PREFIX}{name}.lora_B.weight"], exact.to(B.dtype))
        assert torch.equal(tensors[f"{PREFIX}{name}.lora_A.weight"], adapter.layers[name].lora_A.detach())


def test_conv1d(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()
    twin = GPT2LMHeadModel(model.config).eval()
    twin.load_state_dict(model.state_dict())
    adapter = adaptlora.attach(
        model, adaptlora.LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn", "c_fc"], rank_pattern={"c_fc": 2})
    )
    randomise(adapter)
    adapter.save(tmp_path, format="vllm", pad=4)
    same(served(tmp_path), trained(adapter))
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(twin, tmp_path).eval()
        torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits)


def test_pruned_ranks_and_modules_without_any(tmp_path):
    adapter = adapted()
    (first, *_), ranks = adapter.layers, {name: 1 + i % 3 for i, name in enumerate(adapter.layers)}
    adapter._commit(ranks | {first: 0}, compact=True)
    adapter.save(tmp_path, format="vllm")
    same(served(tmp_path), trained(adapter))
    assert f"{PREFIX}{first}.lora_A.weight" not in load_file(tmp_path / "adapter_model.safetensors")
    adapter._commit(dict.fromkeys(adapter.layers, 0), compact=True)
    with pytest.raises(ValueError, match="save: at least one module must have a rank above 0, got 0 everywhere"):
        adapter.save(tmp_path, format="vllm")


def folder(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize(
    "pad, message",
    [
        (4, "save: pad must be at least the largest rank, 7 of .*layer.0.attention.self.query, got 4"),
        (0, "save: pad must be True, False or an integer > 0, got 0"),
        (8.0, "save: pad must be True, False or an integer > 0, got 8.0"),
        ("max", "save: pad must be True, False or an integer > 0, got 'max'"),
    ],
)
def test_pads_that_do_not_fit_change_nothing(pad, message, tmp_path):
    adapter = adapted()
    adapter.save(tmp_path, format="vllm")
    before = folder(tmp_path)
    with pytest.raises(ValueError, match=message):
        adapter.save(tmp_path, format="vllm", pad=pad)
    assert folder(tmp_path) == before
    with pytest.raises(ValueError, match="save: pad must be False unless format is \"vllm\", got 8 for 'peft'"):
        adapter.save(tmp_path, pad=8)


def test_what_servers_cannot_load_is_refused(tmp_path):
    model = tiny_bert()
    adapter = adaptlora.attach(
        model, adaptlora.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    )
    with pytest.raises(ValueError, match=r"save: modules_to_save must be empty for format=\"vllm\".*\['classifier'\]"):
        adapter.save(tmp_path / "out", format="vllm")
    adapter.save(tmp_path / "peft")
    with pytest.raises(ValueError, match="export: .* tensors must be lora_A and lora_B for vLLM.*classifier"):
        export(tmp_path / "peft", tmp_path / "out")
    adapter = adaptlora.attach(Net(), adaptlora.LoraConfig(target_modules=["first"], lora_bias=True))
    with pytest.raises(ValueError, match='save: lora_bias must be False for format="vllm"'):
        adapter.save(tmp_path / "out", format="vllm")
    adapter = adapted()
    with torch.no_grad():
        next(iter(adapter.layers.values())).lora_B[0, 0] = math.nan
    with pytest.raises(adaptlora.NonFiniteError, match="lora_B must be finite"):
        adapter.save(tmp_path / "out", format="vllm")
    adapter = adapted()
    layer = next(iter(adapter.layers.values()))
    layer.pair.lora_B.data = layer.pair.lora_B.data.half()
    layer.scaling = 1e6
    with pytest.raises(ValueError, match="scaling · lora_B must be finite in torch.float16, got an overflow"):
        adapter.save(tmp_path / "out", format="vllm")
    assert not (tmp_path / "out").exists()


def pefts_own(path, **options):
    """An adapter that stock PEFT saved, with a model of it."""
    model = peft.get_peft_model(Net(), peft.LoraConfig(lora_alpha=7, target_modules=["first", "second"], **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("pad", [False, 8])
@pytest.mark.parametrize("options", [{"r": 2}, {"r": 2, "rank_pattern": {"first": 5}, "use_rslora": True}], ids=str)
def test_export_of_a_folder_needs_no_model(options, pad, tmp_path):
    model = pefts_own(tmp_path / "peft", **options)
    command = ["export", str(tmp_path / "peft"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, *(["--pad", str(pad)] if pad else [])])
    assert result.exit_code == 0, result.output
    expected = {}
    for name in ("first", "second"):
        layer = model.get_base_model().get_submodule(name)
        A, B = (getattr(layer, factor)["default"].weight.detach().double() for factor in ("lora_A", "lora_B"))
        expected[name] = layer.scaling["default"] * B @ A
    for patterns in (False, True):
        same(served(tmp_path / "out", patterns=patterns), expected)


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 5, 3), nn.Linear(5, 4)

    def forward(self, x):
        return self.last(self.conv(x).mean((2, 3)))


def test_export_refuses_convolutions_by_name(tmp_path):
    peft.get_peft_model(ConvNet(), peft.LoraConfig(r=2, target_modules=["conv", "last"])).save_pretrained(
        tmp_path / "peft"
    )
    for pad in (False, 8):
        with pytest.raises(ValueError, match=r"export: .*: conv must be a linear layer .* shape \(2, 3, 3, 3\)"):
            export(tmp_path / "peft", tmp_path / "out", pad=pad)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pad", [False, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_export_leaves_out_the_base_that_peft_stores_with_a_head(tied, pad, tmp_path):
    base = tiny_llama(tied)
    twin = copy.deepcopy(base)
    targets = ["q_proj", "lm_head"]
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, rank_pattern={"q_proj": 2})
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    model.eval().save_pretrained(tmp_path / "peft")
    assert any("lm_head.base_layer" in key for key in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    export(tmp_path / "peft", tmp_path / "out", pad=pad)
    assert all(".lora_" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    layer = model.get_base_model().lm_head
    A, B = (getattr(layer, factor)["default"].weight.detach().double() for factor in ("lora_A", "lora_B"))
    found = served(tmp_path / "out")
    same({"lm_head": found["lm_head"]}, {"lm_head": layer.scaling["default"] * B @ A})
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "out").eval()
        torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("field, config", [("kasa_config", "KasaConfig"), ("monteclora_config", "MontecloraConfig")])
def test_export_refuses_variants_by_their_field(field, config, tmp_path):
    pefts_own(tmp_path / "peft", r=2, **{field: getattr(peft.tuners.lora.config, config)()})
    with pytest.raises(ValueError, match=f"{field} is not supported"):
        export(tmp_path / "peft", tmp_path / "out")


def test_export_refuses_biases_and_its_own_folder(tmp_path):
    pefts_own(tmp_path / "peft", r=2, lora_bias=True)
    with pytest.raises(ValueError, match="export: .* lora_bias must be false for vLLM.* got biases of 2 modules"):
        export(tmp_path / "peft", tmp_path / "out")
    with pytest.raises(ValueError, match="export: out must not be the adapter itself"):
        export(tmp_path / "peft", tmp_path / "peft")
    result = CliRunner().invoke(app, ["export", str(tmp_path / "peft"), "-o", str(tmp_path / "out"), "--format", "zip"])
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
