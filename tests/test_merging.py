"""Merged model folders: transformers loads them, they equal PEFT's merge_and_unload, and nothing is left of a failure."""

import dataclasses
import json

import peft
import pytest
import torch
from numerics import assert_accurate
from safetensors.torch import load_file, save_file
from test_lora_files import saved_by_peft, tiny_bert, tiny_gpt2, tiny_llama

from adaptlora import lora_files, merging
from adaptlora.base_weights import BaseWeights


def saved_base(folder, model, dtype=torch.float32, shard="2KB"):
    model().to(dtype).save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    for name in ("pytorch_model.bin", "adapter_config.json", ".lock", "flax_model.msgpack"):
        (folder / name).write_text("{}")
    return BaseWeights(folder)


def adapter(folder, model, dtype=torch.float32, **fields):
    return lora_files.read(saved_by_peft(folder, model().to(dtype), **{"target_modules": "all-linear"} | fields))


def contents(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", ["2KB", "1GB"])
@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2])
def test_merged_equals_pefts(model, shard, dtype, tmp_path):
    base = saved_base(tmp_path / "base", model, dtype, shard)
    file = adapter(tmp_path / "lora", model, use_rslora=True, rank_pattern={"q_proj": 2, "c_fc": 1})
    merging.write_merged(base, file.modules.values(), tmp_path / "out")
    merged = type(model()).from_pretrained(tmp_path / "out", dtype=dtype)
    theirs = peft.PeftModel.from_pretrained(model().to(dtype), tmp_path / "lora").merge_and_unload()
    exact = model().to(dtype).double()
    with torch.no_grad():
        for name, module in file.modules.items():
            delta = module.scaling * (module.lora_B.double() @ module.lora_A.double())
            exact.get_submodule(name).weight += delta.T if module.fan_in_fan_out else delta
    expected, eager = exact.state_dict(), theirs.state_dict()
    for key, value in merged.state_dict().items():
        assert_accurate(key, value, expected[key], eager[key])
    untouched = [
        key for key, value in merged.state_dict().items() if torch.equal(value, model().to(dtype).state_dict()[key])
    ]
    assert len(expected) - len(untouched) == len(file.modules)
    left_out = {"pytorch_model.bin", "adapter_config.json", ".lock", "flax_model.msgpack"}
    assert contents(tmp_path / "out") == contents(tmp_path / "base") - left_out


def test_weights_are_rounded_once():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(33, 65, generator=generator).bfloat16()
    lora_A, lora_B = torch.randn(7, 65, generator=generator), torch.randn(33, 7, generator=generator)
    module = lora_files.LoraModule("a", lora_A.bfloat16(), lora_B.bfloat16(), 0.3, torch.randn(33, generator=generator))
    exact = weight.double() + 0.3 * module.lora_B.double() @ module.lora_A.double()
    assert torch.equal(merging.merged_weight(weight, module), exact.float().bfloat16())
    bias = torch.randn(33, generator=generator).bfloat16()
    assert torch.equal(
        merging.merged_bias(bias, module), (bias.double() + 0.3 * module.bias.double()).float().bfloat16()
    )


def test_biases(tmp_path):
    base = saved_base(tmp_path / "base", tiny_gpt2)
    file = adapter(tmp_path / "lora", tiny_gpt2, lora_bias=True, target_modules=["c_attn"])
    merging.write_merged(base, file.modules.values(), tmp_path / "out")
    merged = type(tiny_gpt2()).from_pretrained(tmp_path / "out").eval()
    theirs = peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "lora").eval()
    tokens = torch.arange(8)[None]
    assert (theirs(tokens).logits - tiny_gpt2()(tokens).logits).abs().max() > 0.1
    torch.testing.assert_close(merged(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)


def test_convolutions(tmp_path):
    (tmp_path / "base").mkdir()
    weight = torch.randn(4, 3, 2, 2)
    save_file({"conv.weight": weight}, tmp_path / "base" / "model.safetensors")
    module = lora_files.LoraModule("lora_unet_conv", torch.randn(2, 12), torch.randn(4, 2), 0.5)
    merging.write_merged(BaseWeights(tmp_path / "base"), [module], tmp_path / "out")
    expected = weight + 0.5 * (module.lora_B @ module.lora_A).reshape(weight.shape)
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors")["conv.weight"], expected)


def test_one_shard_is_held_at_a_time(tmp_path, monkeypatch):
    base = saved_base(tmp_path / "base", tiny_llama)
    written = []
    real = merging.save_file

    def save(tensors, path, metadata):
        written.append(path.name)
        real(tensors, path, metadata)
        tensors.clear()

    monkeypatch.setattr(merging, "save_file", save)
    merging.write_merged(base, [], tmp_path / "out")
    assert written == [file.name for file in base.files] and len(written) > 2
    for file in base.files:
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_refused_before_anything_is_written(tmp_path):
    base = saved_base(tmp_path / "base", tiny_llama)
    module = adapter(tmp_path / "lora", tiny_llama).modules["model.layers.0.self_attn.q_proj"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    out = tmp_path / "out"
    cases = {
        "out must not exist or be an empty folder, got .*full": (base, [], tmp_path / "full"),
        "out must not exist or be an empty folder, got .*base": (base, [], tmp_path / "base"),
        "out must not exist or be an empty folder, got .*a.safe": (base, [], tmp_path / "a.safetensors"),
        "out must lie outside the base": (base, [], tmp_path / "base" / "merged"),
        "base must be a model folder, got the file": (BaseWeights(tmp_path / "a.safetensors"), [], out),
        "must hold one weight for every module, got x .none": (base, [dataclasses.replace(module, name="x")], out),
        r"q_proj must have shape \(8, 5\), got \(8, 8\)": (
            base,
            [dataclasses.replace(module, lora_A=module.lora_A[:, :5])],
            out,
        ),
        "must be the only module of its weight": (base, [module, module], out),
        "must have a bias in the base for lora_B's bias": (
            base,
            [dataclasses.replace(module, bias=torch.zeros(8))],
            out,
        ),
    }
    before = contents(tmp_path)
    for text, arguments in cases.items():
        with pytest.raises(ValueError, match=text):
            merging.write_merged(*arguments)
    assert contents(tmp_path) == before and not out.exists()


@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2])
def test_a_tied_head_is_refused(model, tmp_path):
    base = saved_base(tmp_path / "base", model)
    file = adapter(tmp_path / "lora", model, target_modules=["lm_head"])
    if model is tiny_llama:
        merging.write_merged(base, file.modules.values(), tmp_path / "untied")
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="merge: lm_head must have a weight of its own, got one tied to the embedding"):
        merging.write_merged(BaseWeights(base.path), file.modules.values(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("whole", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("stated", [True, None])
def test_a_weight_trained_whole_that_is_tied_is_refused(stated, whole, tmp_path):
    def model(tied=True):
        base = tiny_llama()
        base.config.tie_word_embeddings = tied
        if tied:
            base.lm_head.weight = base.model.embed_tokens.weight
        return base

    fields = {"target_modules": ["q_proj"], "modules_to_save": [whole]}
    saved_by_peft(tmp_path / "lora", model(), **fields)
    model().save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    if stated is None:
        del config["tie_word_embeddings"]
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    text = f"merge: modules_to_save must change weights that stand alone, got .*{whole}.weight, which the model ties to"
    with pytest.raises(ValueError, match=text):
        merging.merge_files(tmp_path / "lora", tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()

    model(tied=False).save_pretrained(tmp_path / "untied")
    merging.merge_files(tmp_path / "lora", tmp_path / "untied", tmp_path / "out")
    merged = type(tiny_llama()).from_pretrained(tmp_path / "out").eval()
    theirs = peft.PeftModel.from_pretrained(model(tied=False), tmp_path / "lora").eval()
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(merged(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)


def test_an_embedding_without_a_head_is_tied_to_nothing(tmp_path):
    saved_by_peft(tmp_path / "lora", tiny_bert(), modules_to_save=["word_embeddings"])
    config = tiny_bert().config
    assert config.tie_word_embeddings
    tiny_bert().save_pretrained(tmp_path / "base")
    merging.merge_files(tmp_path / "lora", tmp_path / "base", tmp_path / "out")
    key = "bert.embeddings.word_embeddings.weight"
    trained = load_file(tmp_path / "lora" / "adapter_model.safetensors")[f"base_model.model.{key}"]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[key], trained)


@pytest.mark.parametrize("victim", ["save_file", "overflow"])
def test_nothing_is_left_of_a_failure(victim, tmp_path, monkeypatch):
    base = saved_base(tmp_path / "base", tiny_llama, torch.float16)
    modules = list(adapter(tmp_path / "lora", tiny_llama).modules.values())
    real, calls = merging.save_file, []

    def fail(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("disk full")
        real(*arguments, **options)

    error, text = OSError, "disk full"
    if victim == "save_file":
        monkeypatch.setattr(merging, "save_file", fail)
    else:
        modules[-1] = dataclasses.replace(modules[-1], scaling=1e9)
        error, text = ValueError, "must be finite in torch.float16 once merged"
    before = contents(tmp_path)
    with pytest.raises(error, match=text):
        merging.write_merged(base, modules, tmp_path / "out")
    assert contents(tmp_path) == before and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    merging.write_merged(base, [], tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == (tmp_path / "base").stat().st_mode & 0o777
