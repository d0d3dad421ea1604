"""PEFT adapters read and written by lora_files: stock PEFT computes W + scaling · B A, the rest is as it was, bad ones are refused."""

import dataclasses
import json
import math
import warnings

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import tiny_bert
from safetensors.torch import load_file, save_file
from torch import nn

from adaptlora import adapter_folder, lora_files
from adaptlora.lora_files import peft as peft_files
from adaptlora.lora_files import peft_config

CONFIGS = {
    "plain": {},
    "patterns": {"rank_pattern": {"query": 3, "layer.1.output.dense": 1}, "alpha_pattern": {"key": 5}},
    "rslora": {"use_rslora": True, "rank_pattern": {"value": 2}, "alpha_pattern": {"value": 3}},
    "bias": {"lora_bias": True},
    "regex": {"target_modules": r".*layer\.1\..*(query|dense)", "rank_pattern": {"dense": 2}},
    "layers": {"target_modules": ["query", "dense"], "layers_to_transform": [1], "layers_pattern": "layer"},
    "exclude": {"target_modules": ["query", "dense"], "exclude_modules": ["pooler.dense"]},
}


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=8)).eval()


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()


def saved_by_peft(folder, model=None, seed=0, dtype=None, **fields):
    """A folder that stock PEFT saved, every factor random."""
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "key", "value", "dense"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model or tiny_bert(), peft.LoraConfig(**defaults | fields))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / 4)
    (adapted.to(dtype) if dtype else adapted).save_pretrained(folder)
    return folder


def peft_updates(folder, model):
    """{module: (ΔW (N, K), Δbias or None)} of stock PEFT, in float64."""
    adapted = peft.PeftModel.from_pretrained(model.double(), folder, autocast_adapter_dtype=False).double()
    updates = {}
    for name, layer in adapted.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            delta, bias = layer.get_delta_weight("default"), layer.lora_B["default"].bias
            update = None if bias is None else bias.detach() * layer.scaling["default"]
            updates[name] = (delta.T if getattr(layer, "fan_in_fan_out", False) else delta).detach(), update
    return updates


def assert_peft_computes(folder, model, modules):
    updates = peft_updates(folder, model)
    assert updates.keys() == modules.keys()
    for name, module in modules.items():
        delta, bias = updates[name]
        torch.testing.assert_close(delta, module.scaling * (module.lora_B.double() @ module.lora_A.double()))
        if module.bias is not None:
            torch.testing.assert_close(bias, module.scaling * module.bias.double())


def resized(module, rank, scaling, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(module.lora_A.dtype)

    return dataclasses.replace(
        module,
        lora_A=normal(rank, module.lora_A.shape[1]),
        lora_B=normal(rank, module.lora_B.shape[0]).T,
        scaling=scaling,
    )


def varied(file, keep=lambda i: True):
    """Other ranks and scalings for some of the modules."""
    chosen = [module for i, module in enumerate(file.modules.values()) if keep(i)]
    scalings = (1, 0.3, 2 / 3)
    return {m.name: resized(m, 1 + i % 5, scalings[i % 3], i) if i % 2 else m for i, m in enumerate(chosen)}


@pytest.mark.parametrize("name", CONFIGS)
def test_stock_peft_computes_the_scaled_product(name, tmp_path):
    file = lora_files.read(saved_by_peft(tmp_path / "in", **CONFIGS[name]))
    assert file.kind == "peft" and not file.skipped
    assert all((module.bias is not None) == (name == "bias") for module in file.modules.values())
    assert_peft_computes(tmp_path / "in", tiny_bert(), file.modules)
    for case, keep in {"all": lambda i: True, "some": lambda i: i % 3}.items():
        modules = varied(file, keep)
        file.write(tmp_path / case, modules)
        assert_peft_computes(tmp_path / case, tiny_bert(), modules)
        again = lora_files.read(tmp_path / case)
        assert list(again.modules) == list(modules)
        for key, module in modules.items():
            assert again.modules[key].scaling == module.scaling
            assert torch.equal(again.modules[key].lora_B, module.lora_B)


@pytest.mark.parametrize(
    "fields", [{"target_modules": "proj|left"}, {"target_modules": ["proj", "left"], "exclude_modules": "inner.*"}]
)
def test_no_module_comes_in_by_its_suffix(fields, tmp_path):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.left = nn.Linear(4, 4), nn.Linear(4, 4)
            self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4)})

    file = lora_files.read(saved_by_peft(tmp_path / "in", Nested(), **fields))
    assert set(file.modules) == {"proj", "left"}
    file.write(tmp_path / "out", {"proj": file.modules["proj"]})
    assert set(peft_updates(tmp_path / "out", Nested())) == {"proj"}


@pytest.mark.parametrize("model", [tiny_gpt2, tiny_llama])
def test_other_architectures(model, tmp_path):
    file = lora_files.read(saved_by_peft(tmp_path / "in", model(), target_modules="all-linear"))
    assert {module.fan_in_fan_out for module in file.modules.values()} == {model is tiny_gpt2}
    modules = varied(file, lambda i: i != 3)
    file.write(tmp_path / "out", modules)
    assert_peft_computes(tmp_path / "out", model(), modules)


def test_outputs_are_those_of_the_merged_weights(tmp_path):
    file = lora_files.read(saved_by_peft(tmp_path / "in", tiny_gpt2(), target_modules="all-linear"))
    modules = varied(file)
    file.write(tmp_path / "out", modules)
    merged, tokens = tiny_gpt2(), torch.arange(8)[None]
    with torch.no_grad():
        for name, module in modules.items():
            merged.get_submodule(name).weight += module.scaling * (module.lora_B @ module.lora_A).T
        loaded = peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "out").eval()
        torch.testing.assert_close(loaded(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-5)


def test_nothing_changes_when_nothing_is_changed(tmp_path):
    folder = saved_by_peft(
        tmp_path / "in", modules_to_save=["classifier"], rank_pattern={"query": 2}, target_modules=["query", "value"]
    )
    file = lora_files.read(folder)
    file.write(tmp_path / "out", file.modules)
    before, after = (load_file(path / peft_files.WEIGHTS_FILE) for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert any("classifier" in key for key in after)
    configs = [json.loads((path / peft_files.CONFIG_FILE).read_text()) for path in (folder, tmp_path / "out")]
    changed = {key for key in configs[0] if configs[0][key] != configs[1][key]}
    assert configs[0].keys() == configs[1].keys() and changed <= {"r", "rank_pattern", "init_lora_weights"}


@pytest.mark.parametrize("kept", [("lm_head", "model.layers.0.mlp.up_proj"), ("model.layers.0.mlp.up_proj",)])
def test_base_weights_that_peft_stores_with_a_head(kept, tmp_path):
    folder = saved_by_peft(tmp_path / "in", tiny_llama(), target_modules=["lm_head", "up_proj"])
    head = "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(folder / peft_files.WEIGHTS_FILE)
    tensors[head] = torch.randn_like(tensors[head])  # as after a resized vocabulary
    save_file(tensors, folder / peft_files.WEIGHTS_FILE)
    file = lora_files.read(folder)
    assert "lm_head" in file.modules and head in file.others()
    file.write(tmp_path / "out", {name: file.modules[name] for name in kept})
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").base_model.model
    assert hasattr(loaded.lm_head, "lora_A") == ("lm_head" in kept)
    assert torch.equal(getattr(loaded.lm_head, "base_layer", loaded.lm_head).weight, tensors[head])


def test_convolutions_keep_their_shape(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1))

    file = lora_files.read(saved_by_peft(tmp_path / "in", model(), target_modules=["0", "1"], r=3))
    assert file.modules["0"].lora_A.shape == (3, 27) and file.modules["0"].lora_B.shape == (5, 3)
    modules = {name: resized(module, 2, 0.7) for name, module in file.modules.items()}
    file.write(tmp_path / "out", modules)
    for name, (delta, _) in peft_updates(tmp_path / "out", model()).items():
        expected = 0.7 * modules[name].lora_B.double() @ modules[name].lora_A.double()
        torch.testing.assert_close(delta.flatten(1), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_stays_and_overflow_is_refused(dtype, tmp_path):
    file = lora_files.read(saved_by_peft(tmp_path / "in", dtype=dtype))
    name, module = next(iter(file.modules.items()))
    wide = dataclasses.replace(module, lora_A=module.lora_A.float() + 1e-9, lora_B=module.lora_B.float())
    file.write(tmp_path / "out", {name: wide})
    written = lora_files.read(tmp_path / "out").modules[name]
    assert written.lora_A.dtype == written.lora_B.dtype == dtype and torch.equal(written.lora_B, module.lora_B)
    huge = dataclasses.replace(module, lora_A=module.lora_A.double() * 1e300)
    with pytest.raises(ValueError, match=rf"write: .*{name}: .*lora_A.weight must be finite in {dtype}"):
        file.write(tmp_path / "huge", {name: huge})
    assert not (tmp_path / "huge").exists()


NAMES = st.lists(st.from_regex(r"[ab](\.[ab]|_[ab]){0,3}", fullmatch=True), min_size=1, max_size=8, unique=True)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(NAMES, st.data(), st.booleans())
def test_for_modules_says_each_rank_and_scaling(names, data, rslora):
    config = {"r": 8, "lora_alpha": 8, "use_rslora": rslora}
    ranks = {name: data.draw(st.integers(1, 3)) for name in names}
    scalings = {name: data.draw(st.floats(1e-3, 1e3)) for name in names}
    alphas = {name: peft_config.alpha_for(config, scalings[name], ranks[name]) for name in names}
    dropped = data.draw(st.lists(st.sampled_from(["a", "b", "a.b", "a_b.a", "b.a.b", "b.b"]), unique=True))
    dropped = [name for name in dropped if name not in ranks]
    config["target_modules"] = [*names, *dropped]
    changed = peft_config.for_modules(config, ranks, alphas, dropped)
    peft_lora = peft.LoraConfig(**changed)
    for name in names:
        keys = [peft.utils.other.get_pattern_key(p, name) for p in (changed["rank_pattern"], changed["alpha_pattern"])]
        assert changed["rank_pattern"].get(keys[0], changed["r"]) == ranks[name]
        assert changed["alpha_pattern"].get(keys[1], changed["lora_alpha"]) == alphas[name]
        assert peft_config.scaling_of(changed, name, ranks[name]) == pytest.approx(scalings[name], rel=1e-15)
        assert peft.tuners.tuners_utils.check_target_module_exists(peft_lora, name)
    for name in dropped:
        assert not peft.tuners.tuners_utils.check_target_module_exists(peft_lora, name)


def test_alpha_divides_back_to_the_scaling():
    assert peft_config.alpha_for({}, 16 / 3, 3) == 16
    for alpha, rank in ((0.3, 3), (1.7, 7), (1e-5, 13), (1 / 3, 49)):
        assert peft_config.alpha_for({}, alpha / rank, rank) / rank == alpha / rank
    no_float_does = peft_config.alpha_for({}, 0.1, 3) / 3
    assert abs(no_float_does - 0.1) <= math.ulp(0.1)


def test_a_failed_write_leaves_the_old_adapter(tmp_path, monkeypatch):
    file = lora_files.read(saved_by_peft(tmp_path / "in"))
    file.write(tmp_path / "out", file.modules)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(adapter_folder, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        file.write(tmp_path / "out", varied(file))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_write_refuses_what_does_not_fit(tmp_path):
    file = lora_files.read(saved_by_peft(tmp_path / "in"))
    name, module = next(iter(file.modules.items()))
    cases = {
        "must be modules of .*, got 'x'": {"x": module},
        "must hold at least one module, got none": {},
        r"must have shapes \[\(2, 16\), \(16, 2\), None\]": {
            name: dataclasses.replace(module, lora_A=module.lora_A[:2])
        },
        "rank above 0": {name: dataclasses.replace(module, lora_A=module.lora_A[:0], lora_B=module.lora_B[:, :0])},
        "got .*, \\(16,\\)\\]": {name: dataclasses.replace(module, bias=torch.zeros(16))},
        "scaling must be a number > 0, got nan": {name: dataclasses.replace(module, scaling=float("nan"))},
    }
    for text, modules in cases.items():
        with pytest.raises(ValueError, match=f"write: .*{text}"):
            file.write(tmp_path / "out", modules)
    assert not (tmp_path / "out").exists()


def test_unsupported_modules_pass_through_untouched(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.tokens, self.up, self.down = nn.Embedding(9, 6), nn.Linear(6, 7), nn.Linear(7, 3)

        def forward(self, x):
            return self.down(self.up(self.tokens(x)))

    folder = saved_by_peft(
        tmp_path / "in",
        Net(),
        target_modules=["tokens", "up", "down"],
        alpha_pattern={"tokens": 11},
        rank_pattern={"tokens": 2},
    )
    with pytest.raises(
        ValueError, match="read: .*: tokens: lora_embedding_A is not supported .an embedding is adapted"
    ):
        lora_files.read(folder)
    file = lora_files.read(folder, skip_unsupported=True)
    assert list(file.skipped) == ["tokens"] and list(file.modules) == ["down", "up"]
    file.write(tmp_path / "out", {"up": resized(file.modules["up"], 1, 0.5)})
    before, after = (load_file(path / peft_files.WEIGHTS_FILE) for path in (folder, tmp_path / "out"))
    tokens = [key for key in before if "tokens" in key]
    assert len(tokens) >= 2 and all(torch.equal(before[key], after[key]) for key in tokens)
    x = torch.arange(9)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path / "out")
    original = peft.PeftModel.from_pretrained(Net(), folder)
    torch.testing.assert_close(loaded.base_model.model.tokens(x), original.base_model.model.tokens(x))


def test_dora_is_skipped_as_a_whole(tmp_path):
    folder = saved_by_peft(tmp_path / "in", use_dora=True)
    with pytest.raises(ValueError, match="attention.output.dense: use_dora is not supported .DoRA scales"):
        lora_files.read(folder)
    file = lora_files.read(folder, skip_unsupported=True)
    assert not file.modules and all("DoRA" in why for why in file.skipped.values())
    file.write(tmp_path / "out", {})
    before, after = (load_file(path / peft_files.WEIGHTS_FILE) for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert lora_files.read(tmp_path / "out", skip_unsupported=True).config == file.config


def edit(folder, change):
    tensors = load_file(folder / peft_files.WEIGHTS_FILE)
    change(tensors, min(key for key in tensors if "lora_A" in key))
    save_file(tensors, folder / peft_files.WEIGHTS_FILE)


DAMAGE = {
    "fp8": (lambda t, k: t.update({k: t[k].to(torch.float8_e4m3fn)}), "of 16 bits or more, got torch.float8_e4m3fn"),
    "nan": (lambda t, k: t[k].fill_(torch.nan), "lora_A must hold finite floating-point numbers"),
    "half": (lambda t, k: t.pop(k.replace("lora_A", "lora_B")), r"must hold lora_A \(R, K\) and lora_B"),
    "ranks": (lambda t, k: t.update({k: t[k][:2].clone()}), r"of one rank, got .*\(2, 16\)"),
    "twice": (lambda t, k: t.update({k.replace("lora_A", "lora_A.other"): t[k].clone()}), "must have one lora_A, got"),
    "experts": (
        lambda t, k: t.update({k.replace("lora_A", "base_layer.lora_A"): t[k].clone()}),
        "bare parameters are adapted",
    ),
    "magnitude": (
        lambda t, k: t.update({k.replace("lora_A", "lora_magnitude_vector"): t[k][0].clone()}),
        "DoRA scales",
    ),
    "bias": (
        lambda t, k: t.update({k.replace("lora_A.weight", "lora_B.bias"): torch.zeros(16)}),
        "unless lora_bias is true",
    ),
    "nothing": (
        lambda t, k: [t.pop(key) for key in list(t) if "lora" in key] + [t.update(x=t.get("x", torch.ones(1)))],
        "got none",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_tensors_are_refused(name, tmp_path):
    change, text = DAMAGE[name]
    edit(saved_by_peft(tmp_path), change)
    with pytest.raises(ValueError, match=rf"read: .*adapter_model.safetensors.*{text}"):
        lora_files.read(tmp_path)


def test_damaged_folders_are_refused(tmp_path):
    folder = saved_by_peft(tmp_path / "in")
    weights = folder / peft_files.WEIGHTS_FILE
    with pytest.raises(ValueError, match="must be given as its folder, with adapter_config.json"):
        lora_files.read(weights)
    whole = weights.read_bytes()
    for data in (whole[:-1], whole[:40], whole[:3], b"\xff" * 100):
        weights.write_bytes(data)
        with pytest.raises(ValueError, match="read: .*adapter_model.safetensors must be a whole safetensors file"):
            lora_files.read(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors is missing .only safetensors are read"):
        lora_files.read(folder)
    with pytest.raises(ValueError, match="adapter_model.bin must be a .safetensors file .pickles run code"):
        lora_files.read(folder / "adapter_model.bin")
    (folder / peft_files.CONFIG_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        lora_files.read(folder)
