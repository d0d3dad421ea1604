"""Made-up rows with a data set's columns, written as a data set's folder, for runs that only show that everything works."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import synthetic_images
from ._extras import need

# fmt: off
_WORDS = (
    "the", "a", "of", "to", "and", "in", "on", "at", "is", "was", "has", "one", "two", "river", "city", "house", "street",
    "tower", "bridge", "table", "garden", "paper", "letter", "north", "south", "winter", "summer", "morning", "evening", "red",
    "blue", "green", "old", "new", "small", "large", "quick", "quiet", "reads", "writes", "builds", "carries", "finds", "keeps",
    "opens", "closes", "under", "over", "near", "between", "who", "what", "when", "where", "why", "how",
)
# fmt: on


@dataclass(frozen=True)
class Kind:
    """A kind of column.

    Args:
        feature: argument → its feature of `datasets`.
        value: (generator, argument, the row so far) → one cell.
        argument: what the argument has to be, for the message, and whether one is; None: there is none.
    """

    feature: Callable[[object], object]
    value: Callable[[random.Random, object, dict], object]
    argument: tuple[str, Callable[[object], bool]] | None = None


def _value(dtype: str) -> Callable:
    return lambda argument: need("datasets", "made-up data").Value(dtype)


def _sentence(generator: random.Random, words: int | None = None) -> str:
    words = words or 8
    return " ".join(generator.choices(_WORDS, k=generator.randint(max(1, words // 2), words)))


def _span(generator: random.Random, argument, row: dict) -> dict:
    """An answer of SQuAD: words of the row's context with their place; none in one of four where some are without."""
    column, some_without = (argument, False) if isinstance(argument, str) else (argument["context"], argument["none"])
    words = row[column].split(" ")
    if some_without and generator.random() < 0.25:
        return {"text": [], "answer_start": []}
    first = generator.randrange(len(words))
    text = " ".join(words[first : first + generator.randint(1, 3)])
    return {"text": [text], "answer_start": [len(" ".join([*words[:first], ""]))]}


def _conversation(generator: random.Random, turns, row: dict) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": _sentence(generator)} for i in range(turns)]


def _list_of(**fields: str) -> Callable:
    def feature(argument):
        datasets = need("datasets", "made-up data")
        return datasets.List({name: datasets.Value(dtype) for name, dtype in fields.items()})

    return feature


def _answers(argument):
    datasets = need("datasets", "made-up data")
    return {"text": datasets.List(datasets.Value("string")), "answer_start": datasets.List(datasets.Value("int32"))}


def _names(value) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(name, str) for name in value)


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_span(value) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and set(value) == {"context", "none"})


KINDS = {
    "text": Kind(_value("string"), lambda g, words, row: _sentence(g, words), ("a number of words", _is_count)),
    "id": Kind(_value("string"), lambda g, argument, row: f"{g.getrandbits(64):016x}"),
    "choice": Kind(_value("string"), lambda g, names, row: g.choice(names), ("a list of texts", _names)),
    "classes": Kind(
        lambda names: need("datasets", "made-up data").ClassLabel(names=names),
        lambda g, names, row: g.randrange(len(names)),
        ("a list of names", _names),
    ),
    "number": Kind(
        _value("float32"),
        lambda g, limits, row: g.uniform(*limits),
        ("a list of two numbers", lambda value: isinstance(value, list) and len(value) == 2),
    ),
    "image": Kind(
        synthetic_images.image_feature, synthetic_images.image, ("a list of width and height", synthetic_images.is_size)
    ),
    "objects": Kind(
        synthetic_images.objects_feature,
        synthetic_images.objects,
        ("classes, the image's size, and format, xywh or xyxy", synthetic_images.is_objects),
    ),
    "answers": Kind(_answers, _span, ("the name of the context's column", _is_span)),
    "messages": Kind(_list_of(role="string", content="string"), _conversation, ("a number of turns", _is_count)),
}
_BARE = ("text", "id")  # kinds that need no argument


def parse(kind) -> tuple[Kind, object]:
    """(kind, argument) of a column as a recipe says it: `text`, or `{text: 12}`.

    Raises: ValueError (a rule, to be put after "must").
    """
    name, argument = next(iter(kind.items())) if isinstance(kind, Mapping) and len(kind) == 1 else (kind, None)
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"be one of {', '.join(KINDS)}, or one of them with what it needs")
    found = KINDS[name]
    if argument is None and (found.argument is None or name in _BARE):
        return found, None
    if found.argument is None or not found.argument[1](argument):
        raise ValueError(f"have {found.argument[0]} after {name}" if found.argument else f"have nothing after {name}")
    return found, argument


def rows(columns: Mapping[str, object], count: int, *, seed: int = 0) -> list[dict]:
    """So many rows; a column may be made of those before it."""
    generator = random.Random(seed)
    kinds = {column: parse(kind) for column, kind in columns.items()}
    made = []
    for _ in range(count):
        row = {}
        for column, (kind, argument) in kinds.items():
            row[column] = kind.value(generator, argument, row)
        made.append(row)
    return made


def write(folder: Path, columns: Mapping[str, object], parts: Mapping[str, list[dict]], config: str | None) -> None:
    """A data set's folder as the hub has them: Parquet for each part, and a README that names them.

    Args: parts: split → rows.   config: name of its configuration.
    """
    datasets = need("datasets", "made-up data")
    kinds = {column: parse(kind) for column, kind in columns.items()}
    features = {column: kind.feature(argument) for column, (kind, argument) in kinds.items()}
    (folder / "data").mkdir(parents=True)
    lines = ["---", "configs:", f"- config_name: {config or 'default'}", "  data_files:"]
    for split, some in parts.items():
        file = f"data/{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(some, features=datasets.Features(features)).to_parquet(folder / file)
        lines += [f"  - split: {split}", f"    path: {file}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")
