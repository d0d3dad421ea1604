"""A llama.cpp file (gguf) of the Llama family → a transformers folder, once.

transformers can read gguf itself, but then marks the model as quantised and refuses to train or save it. Here the
weights are dequantised to float32, llama.cpp's order of the rotary dimensions is undone, and a plain folder is written:
model.safetensors, config.json and the tokenizer.
"""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from ._extras import need

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
_CONTROL_TOKEN = 3  # gguf's token_type of tokens that are never part of text


def rotary_unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection from llama.cpp's order back to transformers'.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, transformers rows (i, i + d/2): within each head of d
    rows, row j·d/2 + i of the result is row 2i + j of `weight`, j ∈ {0, 1}.

    Args:
        weight: (heads · d, K), d even.
        heads: heads of this projection (for keys: the key-value heads).
    Returns: (heads · d, K).
    Raises: ValueError (rows not heads · an even number).
    """
    rows = weight.shape[0]
    if heads < 1 or rows % (2 * heads):
        raise ValueError(
            f"rotary_unpermute: weight must have heads · d rows with d even, got {rows} rows for {heads} heads"
        )
    return weight.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def convert(gguf_path: str | Path, folder: str | Path) -> Path:
    """Write the transformers folder of a gguf file; an existing folder is kept as it is.

    The folder appears under its name only when it is complete.
    Raises: ValueError (not a Llama gguf, or a tensor that Llama does not have), MissingExtraError.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    reader = need("gguf", "reading a gguf file").GGUFReader(str(gguf_path))
    architecture = _value(reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"convert: gguf_path must be a file of architecture llama, got {architecture!r} in {gguf_path}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tensors = _tensors(reader)
        _write_model(reader, tensors, partial)
        _write_tokenizer(reader, partial)
        partial.chmod(0o755)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _value(reader, key: str):
    field = reader.fields.get(key)
    if field is None:
        raise ValueError(f"convert: the gguf file must have the field {key}")
    return field.contents()


def _tensors(reader) -> dict[str, np.ndarray]:
    dequantize = need("gguf", "reading a gguf file").dequantize
    heads = {
        "attn_q": _value(reader, "llama.attention.head_count"),
        "attn_k": _value(reader, "llama.attention.head_count_kv"),
    }
    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        name, _, kind = tensor.name.rpartition(".")
        if name.startswith("blk."):
            _, layer, part = name.split(".")
            if part not in _BLOCK:
                raise ValueError(f"convert: every tensor must belong to a Llama, got {tensor.name!r}")
            if part in heads:
                weight = rotary_unpermute(weight, heads[part])
            target = f"model.layers.{layer}.{_BLOCK[part]}"
        elif name in _TOP:
            target = _TOP[name]
        else:
            raise ValueError(f"convert: every tensor must belong to a Llama, got {tensor.name!r}")
        tensors[f"{target}.{kind}"] = np.ascontiguousarray(weight)
    return tensors


def _write_model(reader, tensors: dict[str, np.ndarray], folder: Path) -> None:
    transformers = need("transformers", "a transformers folder")
    config = transformers.LlamaConfig(
        vocab_size=_value(reader, "llama.vocab_size"),
        hidden_size=_value(reader, "llama.embedding_length"),
        intermediate_size=_value(reader, "llama.feed_forward_length"),
        num_hidden_layers=_value(reader, "llama.block_count"),
        num_attention_heads=_value(reader, "llama.attention.head_count"),
        num_key_value_heads=_value(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_value(reader, "llama.context_length"),
        # the file stores float32(1e-5); the shortest decimal that means the same float32 is the number that was meant
        rms_norm_eps=float(str(np.float32(_value(reader, "llama.attention.layer_norm_rms_epsilon")))),
        rope_parameters={"rope_type": "default", "rope_theta": float(_value(reader, "llama.rope.freq_base"))},
        tie_word_embeddings="lm_head.weight" not in tensors,
        bos_token_id=_value(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_value(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_value(reader, "tokenizer.ggml.padding_token_id"),
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    need("safetensors.numpy", "a transformers folder").save_file(
        tensors, folder / "model.safetensors", metadata={"format": "pt"}
    )
    config.save_pretrained(folder)


def _write_tokenizer(reader, folder: Path) -> None:
    tokenizers = need("tokenizers", "a transformers folder")
    transformers = need("transformers", "a transformers folder")
    tokens = _value(reader, "tokenizer.ggml.tokens")
    kinds = _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in _value(reader, "tokenizer.ggml.merges")]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # "smollm" of llama.cpp: digits one by one, then GPT-2's byte-level splitting
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN])
    special = {
        name: tokens[_value(reader, f"tokenizer.ggml.{key}_token_id")]
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
    }
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=_value(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = _value(reader, "tokenizer.chat_template")
    tokenizer.save_pretrained(folder)
