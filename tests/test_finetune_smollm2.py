"""A llama.cpp file read as transformers reads it: order of the rotary dimensions, weights, tokenizer."""

import numpy as np
import pytest
import torch

from adaptlora.finetune import smollm2


def _permuted(weight, heads):
    """llama.cpp's order, written out: rows i and i + d/2 of a head become neighbours."""
    d = weight.shape[0] // heads
    order = [head * d + half * (d // 2) + i for head in range(heads) for i in range(d // 2) for half in (0, 1)]
    return weight[order]


@pytest.mark.parametrize(("heads", "d"), [(1, 2), (3, 8), (2, 6)])
def test_rotary_unpermute_undoes_the_permutation(heads, d):
    weight = np.arange(heads * d * 5, dtype=np.float32).reshape(heads * d, 5)
    np.testing.assert_array_equal(smollm2.rotary_unpermute(_permuted(weight, heads), heads), weight)


def test_rotary_unpermute_by_hand():
    assert smollm2.rotary_unpermute(np.arange(8)[:, None], 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    with pytest.raises(ValueError, match="heads · d rows with d even, got 6 rows for 2 heads"):
        smollm2.rotary_unpermute(np.zeros((6, 4)), 2)


def test_rotary_unpermute_gives_the_same_attention_scores():
    """Rotating neighbours in llama.cpp's order equals rotating halves in transformers' order, for every position."""
    heads, d, k = 2, 8, 5
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, heads * d, k))
    x = rng.standard_normal((6, k))
    angle = np.arange(6)[:, None] * 10.0 ** -np.arange(d // 2)

    def neighbours(v):
        a, b = v[..., 0::2], v[..., 1::2]
        return np.stack([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1).reshape(
            v.shape
        )

    def halves(v):
        a, b = v[..., : d // 2], v[..., d // 2 :]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)

    def scores(rotate, q, k):
        split = [(x @ w.T).reshape(6, heads, d).swapaxes(0, 1) for w in (q, k)]
        return rotate(split[0]) @ rotate(split[1]).swapaxes(1, 2)

    theirs = scores(halves, smollm2.rotary_unpermute(query, heads), smollm2.rotary_unpermute(key, heads))
    np.testing.assert_allclose(theirs, scores(neighbours, query, key), rtol=1e-12)


@pytest.fixture
def small_gguf(tmp_path):
    """A gguf Llama of one layer, with a byte-level tokenizer."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    hidden, heads, kv, feed, d = 32, 4, 2, 48, 8
    alphabet = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    alphabet += [chr(256 + i) for i in range(68)]
    tokens = ["<|unk|>", "<|start|>", "<|end|>", *alphabet, "Ġa"]
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(feed)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(d)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages }}")
    shapes = {
        "attn_q": (heads * d, hidden),
        "attn_k": (kv * d, hidden),
        "attn_v": (kv * d, hidden),
        "attn_output": (hidden, heads * d),
        "ffn_gate": (feed, hidden),
        "ffn_up": (feed, hidden),
        "ffn_down": (hidden, feed),
    }

    def tensor(*shape):
        return rng.standard_normal(shape).astype(np.float32) / 4

    writer.add_tensor("token_embd.weight", tensor(len(tokens), hidden))
    writer.add_tensor("output_norm.weight", 1 + tensor(hidden))
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.0.{name}.weight", tensor(*shape))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", 1 + tensor(hidden))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def test_converted_model_equals_transformers_reading_of_the_file(small_gguf, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2.convert(small_gguf, tmp_path / "cache" / "tiny")
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    ours = AutoModelForCausalLM.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = " a cafe\u0301 in 1789<|end|> a"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text and ids[0, -1] == len(tokenizer) - 1
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.config.rms_norm_eps == 1e-5 and ours.config.rope_parameters["rope_theta"] == 5000

    written = (folder / "model.safetensors").stat().st_mtime_ns
    smollm2.convert(tmp_path / "not even there", folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_conversion_that_fails_leaves_nothing(small_gguf, tmp_path, monkeypatch):
    monkeypatch.delitem(smollm2._BLOCK, "ffn_up")
    with pytest.raises(ValueError, match=r"every tensor must belong to a Llama, got 'blk\.0\.ffn_up\.weight'"):
        smollm2.convert(small_gguf, tmp_path / "cache" / "tiny")
    assert not list((tmp_path / "cache").iterdir())
