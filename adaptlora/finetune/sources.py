"""Data sets with columns of any kind: files, folders and the Hugging Face hub, through `datasets.load_dataset`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ._extras import need
from .data import Dataset, held_out
from .presets import HUB, FinetuneSpec

_FILES = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def read(spec: FinetuneSpec, roles: Mapping[str, str | None]) -> Dataset:
    """The rows of a spec's data, {role: value}, as datasets.Dataset, to train on and to test on.

    The test rows are those of `eval_data`, or of `test_split`, or else held out: whole groups of the same `text`, where there is one.
    A single file has no splits: of one, `test_split` is not read, and rows are held out.

    Args: roles: role → its column where the spec names none, or None where it is optional.
    Raises: ValueError (no such file, split, configuration or column; no rows), MissingExtraError.
    """
    train = _load(spec, spec.data, spec.train_split, roles)
    if spec.eval_data is not None:
        test = _load(spec, spec.eval_data, spec.test_split or "test", roles)
    elif spec.test_split is not None and not Path(spec.data).is_file():
        test = _load(spec, spec.data, spec.test_split, roles)
    else:
        keys = train["text"] if "text" in train.column_names else range(len(train))
        kept, held = held_out(list(keys), spec.holdout, seed=spec.split_seed)
        train, test = train.select(kept), train.select(held)
    if spec.test_limit is not None:
        test = test.select(range(min(spec.test_limit, len(test))))
    return Dataset(train, test, duplicates=0)


def class_names(rows, role: str) -> list[str] | None:
    """The names of a column of class numbers; None where it holds something else, or `rows` is a plain list."""
    return getattr(getattr(rows, "features", {}).get(role), "names", None)


def chunks(rows: Sequence[dict], size: int = 1000) -> Iterator[list[dict]]:
    """Rows of a list or a datasets.Dataset, so many at a time."""
    for start in range(0, len(rows), size):
        if isinstance(rows, list):
            yield rows[start : start + size]
        else:
            yield list(rows.select(range(start, min(start + size, len(rows)))))


def columns(spec: FinetuneSpec, roles: Mapping[str, str | None]) -> dict[str, str]:
    """{role: column} of what a run reads.

    Raises: ValueError (a role that the task does not have).
    """
    unknown = [role for role in spec.columns if role not in roles or role in ("text", "label")]
    if unknown:
        others = ", ".join(role for role in roles if role not in ("text", "label")) or "none"
        raise ValueError(
            f"finetune: columns must have the further roles of task {spec.task} as keys ({others}), got {unknown[0]!r}"
        )
    named = {"text": spec.text_column, "label": spec.label_column} | dict(spec.columns)
    chosen = {role: named.get(role) or default for role, default in roles.items()}
    return {role: column for role, column in chosen.items() if column is not None}


def _load(spec: FinetuneSpec, source: str, split: str, roles: Mapping[str, str | None]):
    datasets = need("datasets", f"reading {source}")
    if source.startswith(HUB):
        where = {"path": source.removeprefix(HUB), "name": spec.data_config, "revision": spec.data_revision}
    else:
        where = {"cache_dir": str(Path(spec.data_dir) / "datasets")}
        if Path(source).is_dir():
            where |= {"path": source, "name": spec.data_config}
        else:
            kind = _FILES.get(Path(source).suffix.lower())
            if kind is None:
                raise ValueError(f"finetune: data must be a folder or a file of {', '.join(_FILES)}, got {source!r}")
            where |= {"path": kind, "data_files": {split.partition("[")[0]: source}}
    try:
        rows = datasets.load_dataset(**where, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"finetune: data must load, got {source!r} with split {split!r}: {reason}") from error
    if not len(rows):
        raise ValueError(f"finetune: data must have at least one row, got none in split {split!r} of {source}")
    wanted = columns(spec, roles)
    for role, column in wanted.items():
        if column not in rows.column_names:
            argument = f"{role}_column" if role in ("text", "label") else f"columns[{role!r}]"
            raise ValueError(
                f"finetune: {argument} must be one of the columns of {source} ({', '.join(rows.column_names)}), got {column!r}"
            )
    return rows.select_columns(list(dict.fromkeys(wanted.values()))).rename_columns(
        {column: role for role, column in wanted.items() if column != role}
    )
