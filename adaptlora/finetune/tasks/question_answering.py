"""An answer as a span of a context, or that there is none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy
import torch
from torch import Tensor, nn

from .. import metrics, sources
from ..presets import FinetuneSpec
from . import base
from .base import beside_the_encoder
from .text import TextTask


@dataclass(frozen=True)
class Options(base.Options):
    """Settings of question-answering.

    Args:
        stride: tokens that neighbouring windows of a long context share.
        answer_length: tokens of an answer at most.
        none: whether questions may have no answer, as in SQuAD 2: it is given where it scores above the best span.
    """

    stride: int = 128
    answer_length: int = 30
    none: bool = False

    def __post_init__(self):
        self.rule("stride", self.stride >= 0, "at least 0")
        self.rule("answer_length", self.answer_length >= 1, "at least 1")


class QuestionAnswering(TextTask):
    """Cross-entropy of an answer's first and last token in each window of the context; without an answer, of the window's first token."""

    roles: ClassVar = {"question": "question", "context": "context", "answers": "answers"}
    metrics: ClassVar = {"exact": True, "f1": True}
    Options = Options
    _auto = "AutoModelForQuestionAnswering"
    _batch: ClassVar = ("input_ids", "token_type_ids", "start_positions", "end_positions")

    @classmethod
    def heads(cls, model: nn.Module) -> list[str]:
        return beside_the_encoder(model)

    @classmethod
    def tiny_fields(cls, spec: FinetuneSpec) -> dict:
        return {"task_options": {**spec.task_options, "stride": 4}}

    def _encode(self, rows: Sequence[dict]) -> list[dict]:
        """A row for each window. Those to test on keep `example`, its number, and `spans` (L, 2), the tokens' characters in the context."""
        windows, first, tested = [], 0, rows is self.data.test
        for some in sources.chunks(rows):
            questions = [row["question"].strip() for row in some]
            self._check_room(questions)
            encoded = self.tokenizer(
                questions,
                [row["context"] for row in some],
                truncation="only_second",
                max_length=self.spec.max_length,
                stride=self.options.stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            for i, number in enumerate(encoded["overflow_to_sample_mapping"]):
                inside = numpy.array([part == 1 for part in encoded.sequence_ids(i)])
                spans = numpy.where(inside[:, None], numpy.array(encoded["offset_mapping"][i], dtype=numpy.int32), -1)
                start, end = _tokens_of(some[number]["answers"], spans)
                window = {"input_ids": numpy.array(encoded["input_ids"][i], dtype=numpy.int32)}
                if "token_type_ids" in encoded:
                    window["token_type_ids"] = numpy.array(encoded["token_type_ids"][i], dtype=numpy.int32)
                window |= {"start_positions": start, "end_positions": end}
                windows.append(window | ({"example": first + number, "spans": spans} if tested else {}))
            first += len(some)
        return windows

    def _check_room(self, questions: list[str]) -> None:
        """The tokenizer would not say it, but stop the process."""
        around = self.tokenizer.num_special_tokens_to_add(pair=True)
        for question, ids in zip(
            questions, self.tokenizer(questions, add_special_tokens=False)["input_ids"], strict=True
        ):
            if self.spec.max_length - len(ids) - around <= self.options.stride:
                raise ValueError(
                    f"finetune: max_length must leave more than stride={self.options.stride} tokens after every question, got"
                    f" {self.spec.max_length} for a question of {len(ids)} tokens ({question[:40]!r}…)"
                )

    def _collate(self, rows: list[dict]) -> dict[str, Tensor]:
        return super()._collate([{name: row[name] for name in self._batch if name in row} for row in rows])

    def output(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """(2, M, L): logits of the first and of the last token."""
        inputs = {name: tensor for name, tensor in batch.items() if not name.endswith("_positions")}
        answer = model(**inputs)
        return torch.stack([answer.start_logits, answer.end_logits])

    @torch.no_grad()
    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        count = len(self.data.test)
        best, none, answers = [-numpy.inf] * count, [numpy.inf] * count, [""] * count
        rows = sorted(self.test, key=lambda row: len(row["input_ids"]))
        for at in range(0, len(rows), self._eval_batch):
            some = rows[at : at + self._eval_batch]
            for row, logits in zip(some, self.output(model, self._collate(some)).float().cpu().unbind(1), strict=True):
                score, first, last = _best_span(*logits.numpy(), row["spans"], self.options.answer_length)
                example = row["example"]
                none[example] = min(none[example], float(logits[:, 0].sum()))
                if score > best[example]:
                    context = self.data.test[example]["context"]
                    best[example], answers[example] = score, context[row["spans"][first, 0] : row["spans"][last, 1]]
        if self.options.none:
            answers = ["" if none[i] > best[i] else answer for i, answer in enumerate(answers)]
        wanted = [row["answers"]["text"] for row in self.data.test]
        found = metrics.answer_scores(answers, wanted)
        return {name: found[name] for name in self.scores}


def _tokens_of(answers: dict, spans: numpy.ndarray) -> tuple[int, int]:
    """First and last token of the first answer in a window, (0, 0) where it is not wholly in it."""
    if not answers["text"]:
        return 0, 0
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    inside = numpy.flatnonzero(spans[:, 1] >= 0)
    if not len(inside) or spans[inside[0], 0] > start or spans[inside[-1], 1] < end:
        return 0, 0
    touching = inside[(spans[inside, 1] > start) & (spans[inside, 0] < end)]
    return (int(touching[0]), int(touching[-1])) if len(touching) else (0, 0)


def _best_span(start: numpy.ndarray, end: numpy.ndarray, spans: numpy.ndarray, longest: int) -> tuple[float, int, int]:
    """Score, first and last token of the best span in the context; the logits may be longer, where a window is padded.

    A window in which no token is of the context has none: −∞.
    """
    length = len(spans)
    inside = spans[:, 1] > spans[:, 0]
    scores = start[:length, None] + end[None, :length]
    near = numpy.triu(numpy.ones((length, length), dtype=bool)) & ~numpy.triu(
        numpy.ones((length, length), dtype=bool), longest
    )
    scores = numpy.where(near & inside[:, None] & inside[None], scores, -numpy.inf)
    first, last = numpy.unravel_index(scores.argmax(), scores.shape)
    return float(scores[first, last]), int(first), int(last)
