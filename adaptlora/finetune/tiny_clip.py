"""A tokenizer of CLIP's kind for dry runs, without a vocabulary of words."""

from ._extras import need

VOCABULARY = 514  # every byte, every byte at the end of a word, and the two ends


def tokenizer(length: int):
    """transformers.CLIPTokenizer of bytes; as in CLIP's own the end of a sentence has the highest id.

    Args: length: longest sentence, in tokens.
    """
    alphabet = sorted(need("tokenizers", "adaptlora finetune --dry-run").pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"{byte}</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"]
    kind = need("transformers", "adaptlora finetune --dry-run").CLIPTokenizer
    return kind(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=length)
