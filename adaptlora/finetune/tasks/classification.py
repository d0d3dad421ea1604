"""One label, or one number, for a text or a pair of texts."""

import math
import re
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import metrics, sources
from ..data import Dataset
from ..presets import FinetuneSpec
from .base import beside_the_encoder
from .text import TextTask


class _OnOneHead(TextTask):
    """A new head on an encoder."""

    roles: ClassVar = {"text": "text", "pair": None, "label": "label"}
    _auto = "AutoModelForSequenceClassification"

    @classmethod
    def heads(cls, model: nn.Module) -> list[str]:
        return beside_the_encoder(model)

    def _encode_some(self, rows: list[dict]) -> list[dict]:
        pairs = [row["pair"] for row in rows] if "pair" in rows[0] else None
        encoded = self.tokenizer([row["text"] for row in rows], pairs, truncation=True, max_length=self.spec.max_length)
        names = ["input_ids"]
        if pairs is not None and "token_type_ids" in encoded:
            names.append("token_type_ids")
        return [
            {name: encoded[name][i] for name in names} | {"labels": self._target(row["label"])}
            for i, row in enumerate(rows)
        ]

    @torch.no_grad()
    def _answers(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits (M, classes) and labels (M,) of all test examples, on the CPU."""
        answers = [(self.output(model, batch).float().cpu(), batch["labels"].cpu()) for batch in self.test_batches()]
        logits, labels = zip(*answers, strict=True)
        return torch.cat(logits), torch.cat(labels)


class Classification(_OnOneHead):
    """One label per text, cross-entropy on a new head."""

    metrics: ClassVar = {"accuracy": True, "f1": True, "matthews": True}
    default_metrics = ("accuracy",)

    def __init__(self, spec: FinetuneSpec, data: Dataset):
        self.classes = classes(data.train)
        if "f1" in (spec.metrics or ()) and len(self.classes) != 2:
            raise ValueError(f"finetune: metric f1 must go with two classes, got {len(self.classes)}")
        self._named = sources.class_names(data.train, "label") is not None  # labels are numbers of classes then
        self._index = {label: i for i, label in enumerate(self.classes)}
        super().__init__(spec, data)

    @classmethod
    def read(cls, spec: FinetuneSpec) -> Dataset:
        data = super().read(spec)
        _check(data, spec)
        return data

    def _config_fields(self) -> dict:
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": self._index,
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def _target(self, label) -> int:
        return label if self._named else self._index[str(label)]

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        logits, labels = self._answers(model)
        compute = {"accuracy": metrics.accuracy, "f1": metrics.f1, "matthews": metrics.matthews}
        return {name: compute[name](logits.argmax(-1), labels) for name in self.scores}


class Regression(_OnOneHead):
    """One number per text, mean squared error on a new head."""

    metrics: ClassVar = {"pearson": True, "spearman": True}

    def _config_fields(self) -> dict:
        return {
            "num_labels": 1,
            "problem_type": "regression",
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def _target(self, label) -> float:
        try:
            value = float(label)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"finetune: every label of task regression must be a finite number, got {label!r}")
        return value

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        logits, labels = self._answers(model)
        compute = {"pearson": metrics.pearson, "spearman": metrics.spearman}
        return {name: compute[name](logits[:, 0], labels) for name in self.scores}


def classes(rows) -> list[str]:
    """The names of the classes in `rows`: of its column of class numbers, or all that are there, sorted, integers as numbers."""
    return sources.class_names(rows, "label") or sorted({str(row["label"]) for row in rows}, key=_number_or_text)


def _number_or_text(name: str) -> tuple[bool, int, str]:
    whole = re.fullmatch(r"[-+]?\d+", name) is not None
    return (not whole, int(name) if whole else 0, name)


def _check(data: Dataset, spec: FinetuneSpec) -> None:
    where = "eval_data" if spec.eval_data else spec.test_split or "the part of data that is held out"
    known = classes(data.train)
    if len(known) < 2:
        raise ValueError(
            f"finetune: data must have at least two classes to train on, got {len(known)} ({', '.join(map(repr, known))})"
        )
    named = sources.class_names(data.train, "label") is not None
    allowed = set(range(len(known))) if named else set(known)
    found = [(set(rows["label"]) if named else {str(row["label"]) for row in rows}) for rows in (data.train, data.test)]
    for labels, part in zip(found, (spec.train_split, where), strict=True):
        if labels - allowed:
            new = ", ".join(map(repr, sorted(labels - allowed)[:5]))
            raise ValueError(f"finetune: every label of {part} must be in the training data, got {new}")
