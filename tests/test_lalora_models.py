"""La-LoRA on encoders, decoders, encoder-decoders and vision models: trained for a few steps, ranks shared by block."""

import pytest
import torch
import transformers

import adaptlora

TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
IDS = torch.arange(12).view(2, 6)
PIXELS = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def t5():
    config = transformers.T5Config(
        d_model=16, num_layers=2, num_heads=2, d_ff=24, d_kv=8, vocab_size=40, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), {"input_ids": IDS, "labels": IDS}


def bart():
    config = transformers.BartConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        vocab_size=40,
        pad_token_id=1,
        decoder_start_token_id=2,
    )
    return transformers.BartForConditionalGeneration(config), {"input_ids": IDS, "labels": IDS}


def llama():
    config = transformers.LlamaConfig(**TEXT)
    return transformers.LlamaForCausalLM(config), {"input_ids": IDS, "labels": IDS}


def deberta():
    config = transformers.DebertaV2Config(**TEXT, num_labels=2)
    return transformers.DebertaV2ForSequenceClassification(config), {"input_ids": IDS, "labels": torch.tensor([0, 1])}


def vit():
    config = transformers.ViTConfig(**{k: v for k, v in TEXT.items() if k != "vocab_size"}, image_size=8, patch_size=4)
    return transformers.ViTForImageClassification(config), {"pixel_values": PIXELS, "labels": torch.tensor([0, 1])}


def clip():
    vision = {k: v for k, v in TEXT.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=TEXT | {"eos_token_id": 11}, vision_config=vision, projection_dim=8)
    return transformers.CLIPModel(config), {"input_ids": IDS, "pixel_values": PIXELS, "return_loss": True}


MODELS = {
    t5: ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"],
    bart: [f"model.{stack}.layers.{i}" for stack in ("encoder", "decoder") for i in (0, 1)],
    llama: ["model.layers.0", "model.layers.1"],
    deberta: ["deberta.encoder.layer.0", "deberta.encoder.layer.1", "pooler.dense"],
    vit: ["vit.layers.0", "vit.layers.1"],
    clip: [f"{part}_model.encoder.layers.{i}" for part in ("text", "vision") for i in (0, 1)]
    + ["visual_projection", "text_projection"],
}


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_a_few_steps(build):
    torch.manual_seed(0)
    model, batch = build()
    adapter = adaptlora.attach(model, adaptlora.LaLoRAConfig(r=6, lora_alpha=6, target_modules="all-linear", gamma=4.0))
    assert sorted(adapter.method.groups) == sorted(MODELS[build])
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.track(optimizer)
    seen = set()
    for _ in range(6):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
        ranks = adapter.method.group_ranks
        seen.add(tuple(ranks))
        assert sum(ranks) == round(adapter.method.budget) and min(ranks) >= 1 and max(ranks) <= 6
        assert {adapter.method.groups[g]: r for g, r in enumerate(ranks)} == {
            adapter.method.groups[g]: layer.rank
            for g, layer in zip(adapter.method.group_of, adapter.layers.values(), strict=True)
        }
    assert len(seen) > 2
