"""Base weights from safetensors: only headers at first, names resolved to one key or refused, damage said clearly."""

import json

import pytest
import torch
from models import tiny_bert
from safetensors.torch import load_file, save_file
from test_lora_files import tiny_gpt2, tiny_llama

from adaptlora import base_weights
from adaptlora.base_weights import BaseWeights

INDEX = "model.safetensors.index.json"


def single(path, shapes, dtype=torch.float32):
    save_file({key: torch.randn(shape).to(dtype) for key, shape in shapes.items()}, path)
    return BaseWeights(path)


@pytest.fixture
def llama(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="2KB")
    assert (tmp_path / INDEX).is_file()
    return tmp_path


@pytest.mark.parametrize("shard", ["1KB", "1GB"])
@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2, tiny_bert])
def test_every_linear_weight_of_a_model(model, shard, tmp_path):
    module_of = dict(model().named_modules())
    model().save_pretrained(tmp_path, max_shard_size=shard)
    base = BaseWeights(tmp_path)
    kinds = {"Linear": False, "Conv1D": True}
    names = [name for name, module in module_of.items() if type(module).__name__ in kinds]
    assert len(base.find(names)) == len(names) > 8
    for name in names:
        fan_in_fan_out = kinds[type(module_of[name]).__name__]
        expected = module_of[name].weight.T if fan_in_fan_out else module_of[name].weight
        assert base.shape(name, fan_in_fan_out) == expected.shape
        assert torch.equal(base.load(name, fan_in_fan_out), expected)


def test_conv1d_is_known_whatever_the_flag_says(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    base, block = BaseWeights(tmp_path), "transformer.h.0.attn.c_proj"
    expected = tiny_gpt2().get_submodule(block).weight.T
    assert all(torch.equal(base.load(block, flag), expected) for flag in (False, True))
    assert base.shape("lm_head", True) == (20, 8)
    square = single(tmp_path / "a.safetensors", {"a.weight": (4, 4)})
    assert torch.equal(square.load("a", fan_in_fan_out=True), square.load("a").T)


def test_only_headers_are_read_at_first(llama, monkeypatch):
    opened = []
    real = base_weights.open_tensors

    class Counting(real):
        def __enter__(self):
            handle = super().__enter__()
            opened.append(self.file.name)
            return handle

    monkeypatch.setattr(base_weights, "open_tensors", Counting)
    base = BaseWeights(llama)
    assert len(opened) == len(base.files) > 2
    base.find(["lm_head"])
    base.shape("lm_head")
    assert len(opened) == len(base.files)
    base.load("lm_head")
    assert opened[len(base.files) :] == [base.entries["lm_head.weight"].file.name]


NAMES = {
    "exact before longer": ("b", ["b", "a.b"], "b"),
    "prefix in the base": (
        "encoder.layer.0.query",
        ["bert.encoder.layer.0.query", "x.layer.0.query"],
        "bert.encoder.layer.0.query",
    ),
    "prefix in the name": ("bert.encoder.layer.0.query", ["encoder.layer.0.query", "query"], "encoder.layer.0.query"),
    "two in the name": ("base.model.layers.0.q", ["layers.0.q"], "layers.0.q"),
    "whole components": ("0.q", ["a.10.q", "a.0.q"], "a.0.q"),
    "kohya": ("lora_unet_down_blocks_0_to_q", ["down_blocks.0.to_q", "down_blocks.1.to_q"], "down_blocks.0.to_q"),
    "kohya te1": ("lora_te1_text_model_q_proj", ["text_model.q_proj", "q_proj"], "text_model.q_proj"),
    "kohya in a checkpoint": ("lora_unet_out_0_q", ["model.diffusion_model.out.0.q"], "model.diffusion_model.out.0.q"),
    "diffusers": ("unet.down.0.to_q", ["down.0.to_q"], "down.0.to_q"),
    "processor": ("unet.down.0.processor.to_q", ["down.0.to_q"], "down.0.to_q"),
    "processor out": ("unet.down.0.processor.to_out", ["down.0.to_out.0"], "down.0.to_out.0"),
    "tied": ("lm_head", ["model.embed_tokens"], "model.embed_tokens"),
    "tied bert": (
        "cls.predictions.decoder",
        ["bert.embeddings.word_embeddings", "a.position"],
        "bert.embeddings.word_embeddings",
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_are_resolved(case, tmp_path):
    name, modules, found = NAMES[case]
    base = single(tmp_path / "a.safetensors", {f"{module}.weight": (2, 3) for module in modules})
    assert base.find([name]) == {name: f"{found}.weight"}
    assert base.is_tied(name) == case.startswith("tied")


def test_one_error_names_every_module_that_is_not_found_once(tmp_path):
    base = single(
        tmp_path / "a.safetensors",
        {
            key: (2, 3)
            for key in ("x.a.b.weight", "y.a.b.weight", "a.c.weight", "p.c_d.weight", "q.c.d.weight", "layer.q.bias")
        },
    )
    with pytest.raises(ValueError) as error:
        base.find(["a.b", "a.c", "model.layers.0.nothing", "lora_te_c_d", "lm_head", "layer.q"])
    expected = [
        "a.b (x.a.b.weight, y.a.b.weight)",
        "model.layers.0.nothing (none)",
        "lora_te_c_d (p.c_d.weight, q.c.d.weight)",
        "lm_head (none)",
        "layer.q (none)",
    ]
    assert (
        str(error.value)
        == f"base: {tmp_path / 'a.safetensors'} must hold one weight for every module, got {'; '.join(expected)}"
    )


def test_a_head_is_not_tied_where_the_config_says_so(llama):
    shard = BaseWeights(llama).entries["lm_head.weight"].file
    tensors = load_file(shard)
    del tensors["lm_head.weight"]
    save_file(tensors, shard)
    index = json.loads((llama / INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    (llama / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"got lm_head \(none\)"):
        BaseWeights(llama).find(["lm_head"])
    (llama / "config.json").write_text("{}")
    assert BaseWeights(llama).find(["lm_head"]) == {"lm_head": "model.embed_tokens.weight"}


def test_convolutions_and_dtypes(tmp_path):
    base = single(tmp_path / "a.safetensors", {"c.weight": (4, 3, 2, 2)}, torch.bfloat16)
    assert base.shape("c") == (4, 12) == base.load("c").shape and base.load("c").dtype == torch.bfloat16
    for dtype in (torch.int8, torch.float8_e4m3fn):
        base = single(tmp_path / "a.safetensors", {"c.weight": (4, 3)}, dtype)
        for call in (base.shape, base.load):
            with pytest.raises(ValueError, match="c.weight must be one of .*, not quantised, got (I8|F8_E4M3)"):
                call("c")
    base = single(tmp_path / "a.safetensors", {"norm.weight": (4,)})
    with pytest.raises(ValueError, match=r"norm.weight must have 2 dimensions or more, got shape \(4,\)"):
        base.load("norm")


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


DAMAGE = {
    "cut shard": (
        lambda p: cut(sorted(p.glob("*-00002-*"))[0], -1),
        ValueError,
        "model-00002-of-.*must be a whole safetensors",
    ),
    "cut header": (
        lambda p: cut(sorted(p.glob("*-00002-*"))[0], 20),
        ValueError,
        "model-00002-of-.*must be a whole safetensors",
    ),
    "no shard": (lambda p: sorted(p.glob("*-00002-*"))[0].unlink(), FileNotFoundError, "model-00002-of-.* is missing"),
    "up": (lambda p: edit_index(p, lambda m: m.update(x="../x.safetensors")), ValueError, "files beside it, got '../x"),
    "absolute": (
        lambda p: edit_index(p, lambda m: m.update(x="/x.safetensors")),
        ValueError,
        "files beside it, got '/x",
    ),
    "back": (lambda p: edit_index(p, lambda m: m.update(x="..\\x.safetensors")), ValueError, "files beside it"),
    "pickle": (lambda p: edit_index(p, lambda m: m.update(x="x.bin")), ValueError, "files beside it, got 'x.bin'"),
    "number": (lambda p: edit_index(p, lambda m: m.update(x=3)), ValueError, "files beside it, got 3"),
    "other tensor": (
        lambda p: edit_index(p, lambda m: m.update(x=m["lm_head.weight"])),
        ValueError,
        "model-0000.* must hold x, as model.safetensors.index.json says",
    ),
    "other shard": (
        lambda p: edit_index(p, lambda m: m.update({"lm_head.weight": "model-00001-of-00004.safetensors"})),
        ValueError,
        "must hold lm_head.weight",
    ),
    "empty index": (lambda p: edit_index(p, lambda m: m.clear()), ValueError, "weight_map must map tensors to files"),
    "no json": (lambda p: (p / INDEX).write_text("{"), ValueError, "index.json must be JSON"),
    "list": (lambda p: (p / "config.json").write_text("[]"), ValueError, "config.json must hold an object, got list"),
    "quantised": (
        lambda p: (p / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}'),
        ValueError,
        "must not be quantised, got quantization_config in config.json",
    ),
    "no index": (
        lambda p: (p / INDEX).unlink(),
        FileNotFoundError,
        "must hold model.safetensors or model.safetensors.index",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_said(name, llama):
    spoil, error, text = DAMAGE[name]
    spoil(llama)
    with pytest.raises(error, match=f"base: .*{text}"):
        BaseWeights(llama)


def test_no_base_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="base: .*none is missing"):
        BaseWeights(tmp_path / "none")


def test_fingerprint_follows_the_files(llama):
    first = BaseWeights(llama).fingerprint()
    assert BaseWeights(llama).fingerprint() == first
    shard = BaseWeights(llama).files[1]
    shard.write_bytes(shard.read_bytes())
    assert BaseWeights(llama).fingerprint() != first
