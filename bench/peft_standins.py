"""Models of the hub that PEFT's tests load by name, as tiny ones with random weights in a cache of the hub's layout: no network."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

VOCABULARY = 512
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_LLAMA = {**_SIZES, "num_key_value_heads": 4, "max_position_embeddings": 512}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}
_OPT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 16}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_BART = {
    "d_model": 32,
    "max_position_embeddings": 128,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
}
_BERT = {**_SIZES, "max_position_embeddings": 514}
_MOE = {**_LLAMA, "num_experts_per_tok": 2}
_OPT_125M = {**_OPT, "hidden_size": 128, "num_hidden_layers": 12, "ffn_dim": 512, "word_embed_proj_dim": 128}

# Name on the hub: (class of transformers, fields of its configuration).
STANDINS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", _OPT),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", _OPT_125M),
    "facebook/opt-125m": ("OPTForCausalLM", _OPT_125M),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT2),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        {**_LLAMA, "pad_token_id": 0},
    ),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", {**_LLAMA, "head_dim": 8}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", {**_LLAMA, "head_dim": 8}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", {**_LLAMA, "head_dim": 8}),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        {"hidden_size": 32, "n_layer": 5, "n_head": 4},
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", _SIZES),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", _BART),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", _T5),
    "google/flan-t5-small": ("T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", _BERT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", _BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", {**_BERT, "pos_att_type": ["p2c", "c2p"]}),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", {**_BERT, "pos_att_type": ["p2c", "c2p"]}),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _BERT),
    "hf-internal-testing/tiny-random-BertModel": ("BertModel", _BERT),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", _BERT),
    "bert-base-uncased": ("BertForSequenceClassification", _BERT),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4ForCausalLM",
        {**_MOE, "head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1},
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        "GptOssForCausalLM",
        {**_MOE, "head_dim": 8, "num_local_experts": 4},
    ),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": (
        "Qwen3MoeForCausalLM",
        {**_MOE, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16},
    ),
    "hf-internal-testing/Mixtral-tiny": ("MixtralForCausalLM", {**_MOE, "head_dim": 8, "num_local_experts": 4}),
    "peft-internal-testing/tiny-clip-text-2": ("CLIPTextModel", {**_SIZES, "max_position_embeddings": 77}),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
}
# Name on the hub: (base, target_modules) of an adapter with random factors.
ADAPTERS = {
    "peft-internal-testing/tiny-OPTForCausalLM-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        ["q_proj", "v_proj"],
    ),
    "peft-internal-testing/gpt2-lora-random": ("gpt2", ["c_attn"]),
}


def _snapshot(cache: Path, name: str) -> Path:
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text("standin")
    folder = repository / "snapshots" / "standin"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _tokenizer(length: int = 128) -> transformers.PreTrainedTokenizerFast:
    """Bytes, one a token, after three special ones."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = special | {letter: len(special) + i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **names)


def _model(name: str) -> transformers.PreTrainedModel:
    class_name, fields = STANDINS[name]
    cls = getattr(transformers, class_name)
    config = cls.config_class()
    vocabulary = {"vocab_size": VOCABULARY} if hasattr(config, "vocab_size") else {}
    special = {"bos_token_id": 1, "eos_token_id": 2} | (
        {"pad_token_id": 0} if getattr(config, "pad_token_id", None) is None else {}
    )
    config = cls.config_class(**{**vocabulary, **(special if vocabulary else {}), **fields})
    torch.manual_seed(0)
    return cls(config)


def _save_diffusion(cache: Path) -> None:
    """hf-internal-testing/tiny-sd-pipe: a StableDiffusionPipeline."""
    import diffusers

    torch.manual_seed(0)
    blocks = {"block_out_channels": (32, 64), "norm_num_groups": 32}
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **blocks,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **blocks,
    )
    text = transformers.CLIPTextConfig(vocab_size=VOCABULARY, max_position_embeddings=77, **_SIZES)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=_tokenizer(77),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(_snapshot(cache, "hf-internal-testing/tiny-sd-pipe"))


def build(cache: Path) -> dict[str, str]:
    """Fill the cache.  Returns: name: error, of those that could not be built."""
    import peft

    failed, tokenizer = {}, _tokenizer()
    for name in STANDINS:
        try:
            model = _model(name)
        except Exception as error:  # a configuration that another version of transformers refuses: counted, not hidden
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        folder = _snapshot(cache, name)
        model.save_pretrained(folder)
        if hasattr(model.config, "vocab_size"):
            tokenizer.save_pretrained(folder)
    for name, (base, targets) in ADAPTERS.items():
        config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        config.base_model_name_or_path = base
        peft.get_peft_model(_model(base), config).save_pretrained(_snapshot(cache, name), save_embedding_layers=False)
    _save_diffusion(cache)
    return failed
