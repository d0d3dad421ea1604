"""What the tasks on text share: a tokenizer, and rows of token ids that are padded to batches."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy
import torch
from torch import Tensor

from .. import data, sources
from ..data import Dataset
from ..presets import FinetuneSpec
from .base import Task

IGNORED = -100  # transformers' label of positions that the loss leaves out


class TextTask(Task):
    """A subclass gives `_encode_some`, the rows of a thousand examples."""

    architecture_keys: ClassVar = ("tokenizer",)
    _targets: ClassVar[tuple[str, ...]] = ()  # roles whose text is learnt, and must not be empty
    _fills: ClassVar[Mapping[str, int]] = {"attention_mask": 0, "token_type_ids": 0, "labels": IGNORED}

    @classmethod
    def read(cls, spec: FinetuneSpec) -> Dataset:
        """Pairs of a .csv or .jsonl file or a fetched source, checked line by line; anything else as every task."""
        plain = "text" in cls.roles and not spec.columns
        if spec.data.startswith("@") or (plain and Path(spec.data).suffix in (".csv", ".jsonl")):
            return data.read(spec)
        read = super().read(spec)
        where = {"text": spec.text_column, "label": spec.label_column or "label", **spec.columns}
        for part, rows in (("train", read.train), ("test", read.test)):
            learnt = cls._targets if "label" in rows.column_names else cls._targets and ("text",)
            for role in rows.column_names:
                column = rows[role]
                for number, value in enumerate(column, 1):
                    if value is None or (role in learnt and value == ""):
                        raise ValueError(
                            f"finetune: column {where.get(role, role)!r} must hold a value in every row, got {value!r}"
                            f" in row {number} of the rows to {part} on"
                        )
        return read

    def _prepare(self) -> None:
        self.tokenizer = self._pretrained("AutoTokenizer")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def _encode(self, rows: Sequence[dict]) -> list[dict]:
        """Rows of int32 arrays `input_ids`, `labels`, …, or of one number each."""
        encoded = []
        for some in sources.chunks(rows):
            for row in self._encode_some(some):
                encoded.append(
                    {n: numpy.asarray(v, dtype=numpy.int32) if isinstance(v, list) else v for n, v in row.items()}
                )
        return encoded

    def _encode_some(self, rows: list[dict]) -> list[dict]:
        raise NotImplementedError

    def test_batches(self) -> Iterator[dict[str, Tensor]]:
        # by length, so that short examples are not padded to the longest one
        rows = sorted(self.test, key=lambda row: len(row["input_ids"]))
        for start in range(0, len(rows), self._eval_batch):
            yield self._collate(rows[start : start + self._eval_batch])

    def _collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """Rows of token ids → tensors, padded on the right to the longest of the batch."""
        fills = {**self._fills, "input_ids": self.tokenizer.pad_token_id}
        batch = {}
        for name, first in rows[0].items():
            if isinstance(first, numpy.ndarray):
                batch[name] = padded([row[name] for row in rows], fills[name])
            elif isinstance(first, int | float):
                batch[name] = torch.tensor([row[name] for row in rows])
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    @classmethod
    def write_tiny(cls, architecture: Mapping, folder: Path, rows: list[dict], *, seed: int = 0) -> None:
        from ..tiny import write_tokenizer

        super().write_tiny(architecture, folder, rows, seed=seed)
        write_tokenizer(architecture["tokenizer"], folder, rows)


def padded(rows: Sequence[numpy.ndarray], fill: int) -> Tensor:
    """(len(rows), longest) int64, filled up on the right."""
    batch = torch.full((len(rows), max(map(len, rows))), fill)
    for i, row in enumerate(rows):
        batch[i, : len(row)] = torch.from_numpy(row)
    return batch
