"""Examples in, as pairs (text, label) or (prompt, text to learn): from the presets' sources, .csv and .jsonl files."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .fetch import locate
from .presets import FinetuneSpec
from .registry import task_class

Pair = tuple[str, str]
MAX_HOLDOUT = 1000


@dataclass(frozen=True)
class Dataset:
    """Rows {role: value} to train on and to test on, as lists or datasets.Dataset. No text is in both, unless it was given in both."""

    train: Sequence[dict]
    test: Sequence[dict]
    duplicates: int  # repeated rows that were dropped before the split


def load(spec: FinetuneSpec) -> Dataset:
    """The data of a run, as its task reads them.

    Raises: ValueError (argument, rule, value; for a row, its line), MissingExtraError.
    """
    return task_class(spec.task).read(spec)


def read(spec: FinetuneSpec) -> Dataset:
    """Texts (or prompts) and labels from a .csv or .jsonl file or a fetched source: checked, de-duplicated, split.

    Raises: ValueError (argument, rule, value; for a row, its line).
    """
    if spec.data == "@trec":
        pairs = trec(locate("trec", spec.data_dir))
    elif spec.data == "@e2e":
        pairs = e2e(locate("e2e", spec.data_dir))
    elif spec.data.startswith("@"):
        raise ValueError(f"finetune: data must be a file, @trec or @e2e, got {spec.data!r}")
    else:
        pairs = read_pairs(spec.data, spec)
    unique = list(dict.fromkeys(pairs))
    if spec.eval_data is not None:
        train, test = unique, list(dict.fromkeys(read_pairs(spec.eval_data, spec)))
    else:
        train, test = split(unique, spec.holdout, seed=spec.split_seed)
    rows = ([{"text": text, "label": label} for text, label in part] for part in (train, test[: spec.test_limit]))
    return Dataset(*rows, duplicates=len(pairs) - len(unique))


def trec(path: str | Path) -> list[Pair]:
    """TREC questions with their six coarse classes. A line is `LABEL:fine question`.

    The file is several nested training sets one after the other: two thirds of its lines are repetitions.
    """
    pairs = []
    for line in Path(path).read_text(encoding="latin-1").split("\n"):
        if line.strip():
            label, question = line.split(" ", 1)
            pairs.append((question.strip(), label.split(":")[0]))
    return pairs


def e2e(path: str | Path) -> list[Pair]:
    """E2E NLG: a restaurant's attributes as prompt, a description as the text to learn."""
    task = json.loads(Path(path).read_text(encoding="utf-8"))
    before, after = task["example_input_prefix"].lstrip(), task["example_output_prefix"].rstrip()
    return [(f"{before}{example['input']}{after}", example["target"].strip()) for example in task["examples"]]


def read_pairs(path: str | Path, spec: FinetuneSpec) -> list[Pair]:
    """The two columns of a file that the spec names, as strings; the first is "" where a task can do without a label and has none.

    Raises: ValueError (kind of file, no rows, columns that are not there, empty cells).
    """
    rows = _read_rows(Path(path))
    label_column = spec.label_column or task_class(spec.task).roles["label"]
    for argument, column in (("text_column", spec.text_column), ("label_column", label_column)):
        if column is not None and column not in rows[0][1]:
            raise ValueError(
                f"finetune: {argument} must be one of the columns of {path} ({', '.join(rows[0][1])}), got {column!r}"
            )
    pairs = []
    for line, row in rows:
        cells = []
        for column in (spec.text_column, label_column):
            if column is None:
                continue
            value = row.get(column)
            if value is None or isinstance(value, dict | list) or not str(value).strip():
                raise ValueError(
                    f"finetune: column {column!r} must hold text in every row, got {value!r} in line {line} of {path}"
                )
            cells.append(str(value))
        pairs.append((cells[0], cells[1]) if len(cells) == 2 else ("", cells[0]))
    return pairs


def _read_rows(path: Path) -> list[tuple[int, dict]]:
    """(line number, row) for every row of a .csv or .jsonl file."""
    kind = path.suffix.lower()
    if kind not in (".csv", ".jsonl"):
        raise ValueError(f"finetune: data must be a .csv or .jsonl file, got {str(path)!r}")
    try:
        # utf-8-sig: spreadsheets begin a .csv with a byte-order mark, which would be part of the first column's name
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"finetune: data must be UTF-8 text, got byte {error.start} of {path} that is not") from error
    # lines end at \n only: str.splitlines would also cut at characters that JSON strings and cells may contain
    rows = []
    if kind == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if not reader.fieldnames and text.strip():
            raise ValueError(f"finetune: data must start with a row of column names, got none in {path}")
        rows = [(reader.line_num, {k: v for k, v in row.items() if k is not None}) for row in reader]
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"finetune: data must be one JSON object a line, got {error.msg} in line {number} of {path}"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"finetune: data must be one JSON object a line, got {line[:40]!r} in line {number} of {path}"
                )
            rows.append((number, row))
    if not rows:
        raise ValueError(f"finetune: data must have at least one row, got an empty file {path}")
    return rows


def split(pairs: list[Pair], holdout: int | None, *, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(train, test): whole groups are held out, never single pairs of a group; both keep the order of the file.

    A group is all pairs with the same text (or prompt); pairs without a prompt are groups of their own.

    Args:
        holdout: number of groups; None: a fifth of them, at most 1,000.
    Raises: ValueError (not enough groups).
    """
    kept, held = held_out([first or second for first, second in pairs], holdout, seed=seed)
    return [pairs[i] for i in kept], [pairs[i] for i in held]


def held_out(keys: list, holdout: int | None, *, seed: int) -> tuple[list[int], list[int]]:
    """The indices that stay and those of the groups that are held out, a group being all that have the same key; both in order.

    Args: holdout: number of groups; None: a fifth of them, at most 1,000.
    Raises: ValueError (not enough groups).
    """
    groups = list(dict.fromkeys(keys))
    if holdout is None:
        holdout = min(MAX_HOLDOUT, max(1, len(groups) // 5))
    if holdout >= len(groups):
        raise ValueError(
            f"finetune: holdout must be less than the number of different texts, got {holdout} of {len(groups)}"
        )
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    held = {groups[i] for i in order[:holdout].tolist()}
    kept = [i for i, key in enumerate(keys) if key not in held]
    return kept, [i for i, key in enumerate(keys) if key in held]
