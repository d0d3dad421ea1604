"""trained_parameters: counts from shapes, equal to what attach trains, and to the numbers that the papers print."""

import pytest
import torch
from models import tiny_bert

import adaptlora

COMMONSENSE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]  # adapted in the commonsense runs of the papers


def llama(intermediate_size, key_value_heads):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=intermediate_size,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=key_value_heads,
        vocab_size=32000,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    "config",
    [
        adaptlora.LoraConfig(r=3, target_modules="all-linear", rank_pattern={"query": 5}),
        adaptlora.NormALConfig(r=4, target_r=2, target_modules=["query"], modules_to_save=["classifier"]),
        adaptlora.NoRAConfig(r=3, r_out=20, target_modules="all-linear", modules_to_save=["classifier"]),
        adaptlora.NoRAConfig(r=3, r_out=7, target_modules="all-linear", rank_pattern={"query": 2}),
    ],
    ids=lambda config: type(config).__name__,
)
def test_the_count_is_what_attach_trains(config):
    count = adaptlora.trained_parameters(tiny_bert(), config)
    assert count == adaptlora.attach(tiny_bert(), config).summary()["trainable_parameters"]


def test_la_lora_counts_its_largest_ranks():
    config = adaptlora.LaLoRAConfig(r=4, target_modules="all-linear")
    plain = adaptlora.LoraConfig(r=4, target_modules="all-linear")
    assert adaptlora.trained_parameters(tiny_bert(), config) == adaptlora.trained_parameters(tiny_bert(), plain)


@pytest.mark.parametrize(
    ("model", "r", "expected"),
    [
        # 28.3 M: what NoRA's Table 1 prints for LoRA on LLaMA3-8B
        ((14336, 8), 16, 28_311_552),
        # 56.1 M: the 0.83 % of DoRA's LLaMA-7B runs, whose recipe this is
        ((11008, 32), 32, 56_098_816),
    ],
    ids=["LLaMA3-8B", "LLaMA-7B"],
)
def test_lora_counts_of_the_papers(model, r, expected):
    config = adaptlora.LoraConfig(r=r, target_modules=COMMONSENSE)
    assert adaptlora.trained_parameters(llama(*model), config) == expected


@pytest.mark.parametrize("model", [(14336, 8), (11008, 32)], ids=["LLaMA3-8B", "LLaMA-7B"])
@pytest.mark.parametrize(
    ("r_out", "r", "expected"),
    [
        (704, 32, 7_208_960),  # 7.2 M: NoRA's Table 1 on LLaMA3-8B
        (256, 16, 1_310_720),
        (512, 32, 5_242_880),
        (1024, 32, 10_485_760),
    ],
)
def test_nora_counts_by_the_papers_formula(model, r_out, r, expected):
    """2 · r_out · r a module, 160 modules, whatever their shapes."""
    config = adaptlora.NoRAConfig(r=r, r_out=r_out, target_modules=COMMONSENSE)
    assert expected == 160 * 2 * r_out * r
    assert adaptlora.trained_parameters(llama(*model), config) == expected
