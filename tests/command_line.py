"""What tests of the command line share: a call of it, small models with a tokenizer in folders, a table to learn."""

import models
import pytest
import torch
from typer.testing import CliRunner

from adaptlora.cli import app

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

WORDS = [
    "who",
    "what",
    "when",
    "where",
    "is",
    "was",
    "the",
    "a",
    "cat",
    "river",
    "city",
    "year",
    "born",
    "painted",
    "built",
    "name",
    "of",
    "in",
]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Commands run in an empty folder: whatever they write is seen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def tokenizer():
    """One token for each word."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "?", ":", ",", "."])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]", model_max_length=20
    )


@pytest.fixture(scope="session", name="bert")
def bert_folder(tmp_path_factory):
    """Folder of a small BERT and a tokenizer, without a head, as encoders come."""
    folder = tmp_path_factory.mktemp("bert")
    models.tiny_bert().bert.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", name="llama")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def questions(path, count=60, text="text", label="label"):
    """A table that can be learnt: the first word says the label."""
    kinds = [("who", "person"), ("when", "time"), ("where", "place")]
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{text},{label}\n")
        for i in range(count):
            first, kind = kinds[i % 3]
            file.write(f"{first} {WORDS[i % len(WORDS)]} of {WORDS[i // len(WORDS)]} ?,{kind}\n")
    return path
