"""A merged model's folder, loaded by the library that the model is of: bit for bit what `merge` computes."""

import copy
import importlib.util
import json
import math

import pytest
import torch
from models import Net, batch, bert_batch, randomise, tiny_bert
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import adaptlora
from adaptlora.cli import app
from adaptlora.merged_model import _merged_copy

TOKENS = {"input_ids": torch.arange(10).view(2, 5)}


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2)).eval()


def tiny_mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 20}
    config = MixtralConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2
    )
    return MixtralForCausalLM(config).eval()


def tiny_llama(tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 20}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied)
    ).eval()


LORA = adaptlora.LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", rank_pattern={".*0.*": 2})
CASES = {
    "bert, lora_bias": (tiny_bert, bert_batch(), {"lora_bias": True}),
    "bert": (tiny_bert, bert_batch(), {"modules_to_save": ["classifier"], "exclude_modules": ["classifier"]}),
    "gpt2": (tiny_gpt2, TOKENS, {}),
    "mixtral": (tiny_mixtral, TOKENS, {}),
    "llama, head too": (tiny_llama, TOKENS, {"target_modules": ["q_proj", "up_proj", "lm_head"]}),
    "llama, bf16": (lambda: tiny_llama(tied=True).bfloat16(), TOKENS, {}),
}


def adapted(model, **fields):
    config = adaptlora.LoraConfig(**{**vars(LORA), **fields})
    adapter = adaptlora.attach(model, config)
    randomise(adapter)
    with torch.no_grad():
        trained = [parameter for module in adapter.saved.values() for parameter in module.parameters()]
        for parameter in trained + [layer.lora_bias for layer in adapter.layers.values() if config.lora_bias]:
            parameter.add_(0.1)
    return adapter


@pytest.mark.parametrize("case", CASES)
def test_from_pretrained_computes_what_merge_computes(case, tmp_path):
    make, inputs, fields = CASES[case]
    adapter = adapted(make(), **fields)
    model = adapter.model
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**inputs).logits
        config = copy.deepcopy(model.config.to_dict())
        adapter.save(tmp_path / "out", format="merged", max_shard_size="4KB")
        assert torch.equal(model(**inputs).logits, expected)
    assert model.state_dict().keys() == before.keys() and model.config.to_dict() == config
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    loaded, notes = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(notes.values())
    assert loaded.dtype == model.dtype
    with torch.no_grad():
        theirs = loaded.eval()(**inputs).logits
        assert torch.equal(theirs, adapter.merge()(**inputs).logits)
    # A merged weight is rounded once to its own dtype; the layers keep their update apart.
    tolerance = 2e-2 if model.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(theirs, expected, rtol=tolerance, atol=tolerance)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_parameters"] == loaded.num_parameters()
    assert not any("lora" in key or "base_layer" in key for key in index["weight_map"])


FIELDS = {"r": 2, "target_modules": ["q_proj", "up_proj"]}


@pytest.mark.parametrize(
    "config",
    [
        adaptlora.NoRAConfig(**FIELDS, r_out=6),
        adaptlora.LoraConfig(**FIELDS, init_lora_weights="milora"),
        adaptlora.AdaLoRAConfig(init_r=3, target_r=2, total_step=9, target_modules=FIELDS["target_modules"]),
    ],
    ids=["nora", "milora", "adalora"],
)
def test_methods_that_add_another_product_or_take_from_the_base(config, tmp_path):
    adapter = adaptlora.attach(tiny_llama(), config)
    randomise(adapter)
    adapter.save(tmp_path / "out", format="merged")
    with torch.no_grad():
        theirs = type(adapter.model).from_pretrained(tmp_path / "out").eval()(**TOKENS).logits
        assert torch.equal(theirs, adapter.merge()(**TOKENS).logits)


def test_a_plain_module(tmp_path):
    adapter = adapted(Net(), target_modules=["first", "second"], modules_to_save=["classifier"], rank_pattern={})
    (tmp_path / "out").mkdir()
    adapter.save(tmp_path / "out", format="merged", max_shard_size=600)
    tensors = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors |= load_file(file)
    plain, (x, _) = Net(seed=1), batch()
    plain.load_state_dict(tensors)
    with torch.no_grad():
        assert torch.equal(plain(x), adapter.merge()(x))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_what_does_not_change_is_not_copied():
    adapter = adapted(tiny_bert(), target_modules=["query"])
    before = dict(adapter.model.named_parameters())
    for name, parameter in _merged_copy(adapter).named_parameters():
        assert (parameter is before.get(name)) == (".query.weight" not in name and ".query.bias" not in name)
    bias = "bert.encoder.layer.0.attention.self.query.bias"
    assert _merged_copy(adapter).get_parameter(bias) is before[bias.replace(".bias", ".base_layer.bias")]


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
def test_diffusers(tmp_path):
    from diffusers import PixArtTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "cross_attention_dim": 16}
    model = PixArtTransformer2DModel(**sizes, sample_size=4, in_channels=4, out_channels=8, caption_channels=16).eval()
    adapter = adapted(model, target_modules=["to_q", "to_out.0"], rank_pattern={})
    inputs = {
        "hidden_states": torch.randn(1, 4, 4, 4),
        "encoder_hidden_states": torch.randn(1, 3, 16),
        "timestep": torch.tensor([3]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    adapter.save(tmp_path / "out", format="merged", max_shard_size="20KB")
    assert (tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").exists()
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).sample, adapter.merge()(**inputs).sample)


class TiedNet(Net):
    """A last layer that shares its weight with another one's."""

    def __init__(self):
        super().__init__()
        self.twin = nn.Linear(17, 11)
        self.twin.weight = self.second.weight


@pytest.mark.parametrize(
    "make, fields, names",
    [
        (
            lambda: tiny_llama(tied=True),
            {"target_modules": ["q_proj", "lm_head"]},
            "lm_head.weight.*embed_tokens.weight",
        ),
        (lambda: tiny_llama(tied=True), {"modules_to_save": ["lm_head"]}, "lm_head.weight.*embed_tokens.weight"),
        (lambda: tiny_llama(tied=True), {"modules_to_save": ["embed_tokens"]}, "embed_tokens.weight.*lm_head.weight"),
        (TiedNet, {"target_modules": ["second"], "rank_pattern": {}}, "second.weight.*twin.weight"),
    ],
)
def test_weights_that_loading_would_tie_again_are_refused(make, fields, names, tmp_path):
    adapter = adapted(make(), **fields)
    with pytest.raises(ValueError, match=f"save: .* must change weights that stand alone, got .*{names}"):
        adapter.save(tmp_path / "out", format="merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "chosen, options, message",
    [
        (
            {},
            {"max_shard_size": "1GB"},
            "max_shard_size must be '5GB' unless format is \"merged\", got '1GB' for 'peft'",
        ),
        ({"format": "merged"}, {"fold_residual": False}, 'unless format is "peft" or "vllm", got False for .merged.'),
        (
            {"format": "vllm"},
            {"save_outer": True},
            'save_outer must be False unless format is "nora", got True for .vllm.',
        ),
        ({"format": "merged"}, {"pad": 8}, 'pad must be False unless format is "vllm", got 8 for .merged.'),
    ],
)
def test_options_of_other_formats_are_refused(chosen, options, message, tmp_path):
    with pytest.raises(ValueError, match=f"save: .*{message}"):
        adapted(Net(), target_modules=["second"], rank_pattern={}).save(tmp_path / "out", **chosen, **options)
    assert not (tmp_path / "out").exists()


def test_a_residual_hides_no_tie(tmp_path):
    adapter = adaptlora.attach(tiny_llama(tied=True), adaptlora.NoRAConfig(r=2, r_out=6, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="must change weights that stand alone, got lm_head.weight"):
        adapter.save(tmp_path / "out", format="merged")


def test_quantised_bases_are_refused(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = Net()
    first = bitsandbytes.nn.Linear4bit(13, 17, compute_dtype=torch.float32)
    first.load_state_dict(model.first.state_dict())
    model.first = first.to("cpu")
    adapter = adapted(model, target_modules=["second"], rank_pattern={})
    with pytest.raises(ValueError, match="must have a base that is not quantised, .* got first: save the adapter"):
        adapter.save(tmp_path / "out", format="merged")


def test_nothing_is_left_of_a_model_that_cannot_be_written(tmp_path):
    adapter = adapted(Net().half(), target_modules=["first", "second"], rank_pattern={})
    layer = adapter.layers["second"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    for out in (tmp_path / "full", tmp_path / "full" / "mine"):
        with pytest.raises(ValueError, match="save: out must not exist or be an empty folder"):
            adapter.save(out, format="merged")
    for size in ("many", "5", "0GB", "0.0MB", "0.0001KB", 0, True, 5.0):
        with pytest.raises(
            ValueError, match=f'save: max_shard_size must be an integer > 0 or text as "5GB", got {size!r}'
        ):
            adapter.save(tmp_path / "out", format="merged", max_shard_size=size)
    layer.scaling = 1e8
    with pytest.raises(ValueError, match="save: second.weight must be finite in torch.float16 once merged"):
        adapter.save(tmp_path / "out", format="merged")
    layer.scaling = 1.0
    with torch.no_grad():
        layer.lora_A[0, 0] = math.inf
    with pytest.raises(adaptlora.NonFiniteError, match="second: lora_A must be finite"):
        adapter.save(tmp_path / "out", format="merged")
    with torch.no_grad():
        layer.lora_A[0, 0] = 0
    adapter.merge()
    with pytest.raises(ValueError, match="save: the adapter must not be merged"):
        adapter.save(tmp_path / "out", format="merged")
    adapter = adapted(Net(), target_modules=["second"], rank_pattern={}, lora_bias=True)
    with pytest.raises(ValueError, match="base_layer must have a bias for lora_bias"):
        adapter.save(tmp_path / "out", format="merged")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "mine").read_text() == "kept"


def test_export_merges_a_folder_into_a_base_on_disk(tmp_path):
    adapter = adapted(tiny_bert(), modules_to_save=["classifier"], exclude_modules=["classifier"])
    tiny_bert().save_pretrained(tmp_path / "base", max_shard_size="4KB")
    adapter.save(tmp_path / "adapter")
    command = ["export", str(tmp_path / "adapter"), "--format", "merged", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--base", str(tmp_path / "base")])
    assert result.exit_code == 0, result.output
    loaded = type(adapter.model).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = adapter.merge()(**bert_batch()).logits
        torch.testing.assert_close(loaded(**bert_batch()).logits, expected, rtol=1e-5, atol=1e-6)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "--base must be given for merged" in " ".join(result.output.split())
