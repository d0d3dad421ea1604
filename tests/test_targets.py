"""target_modules, exclude_modules, modules_to_save and the pattern keys, by PEFT's rules."""

import peft
import pytest
import torch
from models import Net, tiny_bert
from torch import nn

import adaptlora
from adaptlora.nn import is_linear
from adaptlora.targets import block_of, find_targets, matches_pattern, pattern_value

SPECS = [
    "all-linear",
    ["query", "value"],
    ["attention.self.query", "output.dense"],
    ["bert.encoder.layer.0.attention.self.key"],
    r".*layer\.1\..*dense",
    r".*\.(query|key)",
]


def config(**fields):
    return adaptlora.LoraConfig(**{"target_modules": "all-linear"} | fields)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("exclude", [None, ["layer.1.output.dense", "key"], r".*layer\.0.*"])
def test_same_modules_as_peft(spec, exclude):
    reference = peft.LoraConfig(r=2, target_modules=spec, exclude_modules=exclude, task_type="SEQ_CLS")
    try:
        wrapped = peft.get_peft_model(tiny_bert(), reference)
    except ValueError:
        with pytest.raises(ValueError, match="target_modules must match at least one module"):
            find_targets(tiny_bert(), config(target_modules=spec, exclude_modules=exclude))
        return
    prefix = "base_model.model."
    expected = [
        name.removeprefix(prefix)
        for name, module in wrapped.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    ]
    assert list(find_targets(tiny_bert(), config(target_modules=spec, exclude_modules=exclude))) == expected


def test_all_linear_leaves_the_output_embedding():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    )
    names = list(find_targets(model, config()))
    assert len(names) == 7 and "lm_head" not in names


def test_conv1d_is_linear():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    assert set(find_targets(model, config())) == {
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_modules_to_save_are_not_adapted():
    targets = find_targets(Net(), config(target_modules=["first", "classifier"], modules_to_save=["classifier"]))
    assert list(targets) == ["first"]


@pytest.mark.parametrize(
    ("key", "name", "found"),
    [
        ("q", "layers.0.q", True),
        ("0.q", "layers.0.q", True),
        ("layers.0.q", "layers.0.q", True),
        ("q", "layers.0.qq", False),
        ("0.q", "layers.10.q", False),
        (r"layers\.[0-3]\..*", "layers.2.q", True),
        ("^layers.0.q", "decoder.layers.0.q", False),
    ],
)
def test_pattern_keys(key, name, found):
    assert matches_pattern(key, name) is found
    assert peft.utils.other.get_pattern_key([key], name) == (key if found else name)


def test_first_matching_pattern_wins():
    assert pattern_value({"0.q": 1, "q": 2}, "layers.0.q", 8) == 1
    assert pattern_value({"q": 2, "0.q": 1}, "layers.0.q", 8) == 2
    assert pattern_value({"k": 2}, "layers.0.q", 8) == 8


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        (
            {"target_modules": ["frist"]},
            ValueError,
            "attach: target_modules must name modules.*got 'frist'; linear ones: first, second",
        ),
        ({"target_modules": ["first", "nope"]}, ValueError, "got 'nope'"),
        ({"target_modules": "nope.*"}, ValueError, "target_modules must match at least one module, got 'nope"),
        ({"target_modules": ["first"], "exclude_modules": ["first"]}, ValueError, "must match at least one module"),
        ({"modules_to_save": ["head"]}, ValueError, "modules_to_save must name modules of the model, got 'head'"),
        ({"rank_pattern": {"third": 2}}, ValueError, "rank_pattern must name adapted modules, got 'third'"),
        ({"alpha_pattern": {"third": 2}}, ValueError, "alpha_pattern must name adapted modules, got 'third'"),
    ],
)
def test_bad_targets_leave_the_model_alone(fields, error, text):
    model = Net()
    before = dict(model.named_modules())
    with pytest.raises(error, match=text):
        adaptlora.attach(model, config(**fields))
    assert dict(model.named_modules()) == before and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_bad_regular_expression_is_named(field):
    with pytest.raises(ValueError, match=rf"{field} must be a regular expression, got '\*first'"):
        config(**{field: "*first"})


def test_a_target_that_is_not_linear():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    with pytest.raises(TypeError, match="target_modules must be nn.Linear or Conv1D, got LayerNorm at '1'"):
        adaptlora.attach(model, config(target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear


def test_a_base_that_cannot_be_adapted_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="base_layer.weight must be floating-point, got torch.int8"):
        adaptlora.attach(model, config(target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


# Blocks

ARCHITECTURES = {
    "Bert": "encoder.layer.{}",
    "Roberta": "encoder.layer.{}",
    "DebertaV2": "encoder.layer.{}",
    "T5": "encoder.block.{}, decoder.block.{}",
    "Bart": "encoder.layers.{}, decoder.layers.{}",
    "Llama": "layers.{}",
    "Mistral": "layers.{}",
    "Qwen2": "layers.{}",
    "ViT": "layers.{}",
    "CLIP": "text_model.encoder.layers.{}, vision_model.encoder.layers.{}",
    "GPT2": "h.{}",
    "Swin": "encoder.layers.{}.blocks.0",
}


def tiny(architecture):
    """A model of that architecture with two blocks in each stack, without weights."""
    import transformers

    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 32,
    }
    others = {
        "T5": {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 16, "d_kv": 8, "vocab_size": 32},
        "Bart": {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 32},
        "Mistral": small | {"num_key_value_heads": 2},
        "Qwen2": small | {"num_key_value_heads": 2},
        "CLIP": {"text_config": small | {"projection_dim": 8}, "vision_config": small | {"projection_dim": 8}},
        "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32},
        "Swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]},
    }
    config = getattr(transformers, f"{architecture}Config")(**others.get(architecture, small))
    with torch.device("meta"):
        return getattr(transformers, f"{architecture}Model")(config)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_block_of_every_linear_module(architecture):
    model = tiny(architecture)
    blocks = {pattern.format(i) for pattern in ARCHITECTURES[architecture].split(", ") for i in (0, 1)}
    found = {}
    for name, module in model.named_modules():
        if name and is_linear(module):
            found.setdefault(block_of(name), []).append(name)
    assert blocks <= found.keys(), sorted(found)
    for group, members in found.items():
        if group in blocks:
            assert len(members) >= 4 and all(member.startswith(f"{group}.") for member in members)
        else:  # poolers, projections, patch merging: not in a block of attention and feed-forward
            assert len(members) == 1


def test_blocks_within_wrappers():
    assert block_of("0.auto_model.encoder.layer.3.attention.self.query") == "0.auto_model.encoder.layer.3"
    assert block_of("base_model.model.model.layers.11.mlp.experts.5.w1") == "base_model.model.model.layers.11"
    assert block_of("decoder.block.1.layer.2.DenseReluDense.wi") == "decoder.block.1"
    assert block_of("stages.2.attention.q") == "stages.2"
    assert block_of("classifier") == "classifier" and block_of("layer") == "layer" and block_of("layer.0") == "layer.0"
