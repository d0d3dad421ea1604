"""What --tiny takes in the place of models and data: random weights and made-up examples, so that nothing need be fetched."""

import random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_SUBJECTS = {
    "HUM": ["who wrote", "who painted"],
    "NUM": ["how many are", "how old is"],
    "LOC": ["where is", "where lies"],
}
_OBJECTS = ["the river", "a castle", "the bridge", "this song", "the moon", "an old book", "the garden"]


def questions(count: int) -> list[tuple[str, str]]:
    """[(question, class)]: the first words tell the class."""
    drawn = random.Random(0)
    labels = [drawn.choice(list(_SUBJECTS)) for _ in range(count)]
    return [(f"{drawn.choice(_SUBJECTS[label])} {drawn.choice(_OBJECTS)}", label) for label in labels]


def descriptions(count: int) -> list[tuple[str, str]]:
    """[(attributes, text to learn)]"""
    drawn = random.Random(0)
    places = [
        (drawn.choice("ABCDEFG"), drawn.choice(["cheap", "fine"]), drawn.choice(["pub", "cafe"])) for _ in range(count)
    ]
    return [(f"name {name} price {price} kind {kind} :", f"{name} is a {price} {kind}") for name, price, kind in places]


def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """One token for each word of the texts."""
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *words])}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")
