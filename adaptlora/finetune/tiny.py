"""Small tokenizers with the special tokens of the real ones, trained on a few texts."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ._extras import need

VOCABULARY = 400  # entries at most, special tokens and the 256 bytes included


@dataclass(frozen=True)
class TokenizerKind:
    """How a family of tokenizers cuts and frames texts.

    Args:
        model: bytes (byte-level BPE), unigram or wordpiece.
        special: the special tokens, in the order of their numbers from 0.
        named: which of them is what: bos_token, eos_token, …
        single, pair: what stands around one text $A, and around two.
    """

    model: str
    special: tuple[str, ...]
    named: dict[str, str]
    single: str
    pair: str | None = None


_DEBERTA = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "mask_token": "[MASK]",
}
_BART = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
KINDS = {
    "bert": TokenizerKind(
        "wordpiece",
        ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        _DEBERTA,
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
    ),
    "deberta": TokenizerKind(
        "unigram",
        ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"),
        _DEBERTA,
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
    ),
    "bart": TokenizerKind(
        "bytes", ("<s>", "<pad>", "</s>", "<unk>", "<mask>"), _BART, "<s> $A </s>", "<s> $A </s> </s> $B </s>"
    ),
    "t5": TokenizerKind(
        "unigram",
        ("<pad>", "</s>", "<unk>"),
        {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        "$A </s>",
    ),
    "llama": TokenizerKind(
        "bytes", ("<unk>", "<s>", "</s>"), {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, "<s> $A"
    ),
    "llama3": TokenizerKind(
        "bytes",
        ("<|begin_of_text|>", "<|end_of_text|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        "<|begin_of_text|> $A",
    ),
}


def write_tokenizer(kind: str, folder: Path, rows: list) -> None:
    """A tokenizer of that kind, trained on all the texts in `rows`, for AutoTokenizer.from_pretrained(folder).

    Raises: ValueError (no such kind).
    """
    if kind not in KINDS:
        raise ValueError(f"finetune: architecture.tokenizer must be one of {', '.join(KINDS)}, got {kind!r}")
    tokenizers = need("tokenizers", "adaptlora finetune --dry-run")
    transformers = need("transformers", "adaptlora finetune --dry-run")
    known = KINDS[kind]
    models, pre, decoders, trainers = (
        getattr(tokenizers, name) for name in ("models", "pre_tokenizers", "decoders", "trainers")
    )
    options = {"vocab_size": VOCABULARY, "special_tokens": list(known.special), "show_progress": False}
    if known.model == "bytes":
        fast = tokenizers.Tokenizer(models.BPE())
        fast.pre_tokenizer, fast.decoder = pre.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre.ByteLevel.alphabet(), **options)
    elif known.model == "unigram":
        fast = tokenizers.Tokenizer(models.Unigram())
        fast.pre_tokenizer, fast.decoder = pre.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token=known.named["unk_token"], **options)
    else:
        fast = tokenizers.Tokenizer(models.WordPiece(unk_token=known.named["unk_token"]))
        fast.pre_tokenizer, fast.decoder = pre.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**options)
    fast.train_from_iterator(list(_texts(rows)), trainer)
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single=known.single,
        pair=known.pair,
        special_tokens=[(token, fast.token_to_id(token)) for token in known.special],
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **known.named).save_pretrained(folder)


def _texts(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
