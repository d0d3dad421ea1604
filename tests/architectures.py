"""Tiny models of many architectures with random weights: each function returns (model, batch), the same ones every time."""

import torch
import transformers as hf
from torch import nn

IDS = torch.arange(24).view(2, 12) * 7 % 97 + 2
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).sin().view(2, 3, 16, 16)
TEXT = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = TEXT | {"intermediate_size": 48, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER = TEXT | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 32}
VISION = {key: value for key, value in ENCODER.items() if key != "vocab_size"} | {"image_size": 16, "patch_size": 8}


def encoder(config, model, **fields):
    return model(config(**ENCODER, **fields)), {"input_ids": IDS}


def decoder(config, model, **fields):
    return model(config(**DECODER | fields)), {"input_ids": IDS, "use_cache": False}


def bert():
    return encoder(hf.BertConfig, hf.BertForSequenceClassification)


def roberta():
    return encoder(hf.RobertaConfig, hf.RobertaForSequenceClassification)


def deberta_v2():
    options = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": False}
    return encoder(hf.DebertaV2Config, hf.DebertaV2ForSequenceClassification, **options)


def deberta_v3():
    options = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
    options |= {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
    return encoder(hf.DebertaV2Config, hf.DebertaV2ForSequenceClassification, **options)


def bart():
    stacks = {f"{stack}_{key}": n for stack in ("encoder", "decoder") for key, n in (("layers", 2), ("ffn_dim", 48))}
    config = hf.BartConfig(
        vocab_size=100, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.0, **stacks
    )
    return hf.BartForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS, "use_cache": False}


def t5():
    sizes = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = hf.T5Config(**sizes, dropout_rate=0.0, feed_forward_proj="gated-gelu")
    return hf.T5ForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS, "use_cache": False}


def llama():
    return decoder(hf.LlamaConfig, hf.LlamaForCausalLM)


def mistral():
    return decoder(hf.MistralConfig, hf.MistralForCausalLM)


def qwen2():
    return decoder(hf.Qwen2Config, hf.Qwen2ForCausalLM)


def qwen3():
    return decoder(hf.Qwen3Config, hf.Qwen3ForCausalLM, head_dim=8)


def gemma():
    return decoder(hf.GemmaConfig, hf.GemmaForCausalLM, head_dim=8)


def phi():
    return decoder(hf.PhiConfig, hf.PhiForCausalLM)


def mixtral():
    # its grouped product knows no float64
    return decoder(hf.MixtralConfig, hf.MixtralForCausalLM, num_local_experts=4, experts_implementation="eager")


def gpt2():
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = hf.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=32, **drops)
    return hf.GPT2LMHeadModel(config), {"input_ids": IDS, "use_cache": False}


def gpt_neox():
    config = hf.GPTNeoXConfig(**TEXT, intermediate_size=48, max_position_embeddings=32)
    return hf.GPTNeoXForCausalLM(config), {"input_ids": IDS, "use_cache": False}


def vit():
    return hf.ViTForImageClassification(hf.ViTConfig(**VISION)), {"pixel_values": PIXELS}


def yolos():
    sizes = {"image_size": [16, 16], "num_detection_tokens": 5}
    return hf.YolosForObjectDetection(hf.YolosConfig(**VISION | sizes)), {"pixel_values": PIXELS}


def clip():
    text = {key: value for key, value in ENCODER.items() if not key.endswith("prob")} | {"eos_token_id": 99}
    vision = {key: value for key, value in VISION.items() if not key.endswith("prob")}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    return hf.CLIPModel(config), {"input_ids": IDS, "pixel_values": PIXELS}


def whisper():
    stacks = {
        f"{stack}_{key}": n
        for stack in ("encoder", "decoder")
        for key, n in (("layers", 2), ("ffn_dim", 48), ("attention_heads", 4))
    }
    special = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "decoder_start_token_id": 2}
    lengths = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20}
    config = hf.WhisperConfig(vocab_size=100, d_model=32, **stacks, **special, **lengths)
    features = torch.linspace(-1, 1, 2 * 8 * 20).sin().view(2, 8, 20)
    return hf.WhisperForConditionalGeneration(config), {
        "input_features": features,
        "decoder_input_ids": IDS,
        "use_cache": False,
    }


def unet():
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    context = torch.linspace(-1, 1, 2 * 5 * 24).cos().view(2, 5, 24)
    sample = torch.linspace(-1, 1, 2 * 4 * 8 * 8).sin().view(2, 4, 8, 8)
    return model, {"sample": sample, "timestep": torch.tensor([3, 40]), "encoder_hidden_states": context}


def dit():
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2
    )
    sample = torch.linspace(-1, 1, 2 * 4 * 8 * 8).sin().view(2, 4, 8, 8)
    return model, {"hidden_states": sample, "timestep": torch.tensor([3, 40]), "class_labels": torch.tensor([1, 2])}


ARCHITECTURES = [
    bert, roberta, deberta_v2, deberta_v3, bart, t5, llama, mistral, qwen2, qwen3, gemma, phi, gpt2, gpt_neox, mixtral,
    vit, yolos, clip, whisper, unet, dit,
]  # fmt: skip


def made(build, dtype=torch.float64, seed=0) -> tuple[nn.Module, dict]:
    """The model and its batch in one dtype, in eval mode, with the weights that `seed` draws."""
    torch.manual_seed(seed)
    model, batch = build()
    with torch.no_grad():
        # zeros, of biases and of a DiT's modulations, would hide what is behind them
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.02)
    batch = {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in batch.items()
    }
    return model.to(dtype).eval(), batch


def outputs(model: nn.Module, batch: dict) -> list[torch.Tensor]:
    """The floating-point tensors that the model returns."""
    found = model(**batch)
    return [t for t in dict(found).values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
