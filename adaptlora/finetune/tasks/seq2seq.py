"""One text from another, by an encoder and a decoder."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import metrics
from ..presets import FinetuneSpec
from . import base
from .text import IGNORED, TextTask


@dataclass(frozen=True)
class Options(base.Options):
    """Settings of seq2seq.

    Args:
        prefix: stands before every text ("summarize: ").
        target_length: tokens of a text to learn; longer ones are cut.
        beams: of the search that writes texts; 1: greedy.   length_penalty, no_repeat_ngram, min_tokens: of that search.
    """

    prefix: str = ""
    target_length: int = 128
    beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0
    min_tokens: int = 0

    def __post_init__(self):
        self.rule("target_length", self.target_length >= 1, "at least 1")
        self.rule("beams", self.beams >= 1, "at least 1")
        for name in ("no_repeat_ngram", "min_tokens"):
            self.rule(name, getattr(self, name) >= 0, "at least 0")


class Seq2Seq(TextTask):
    """The text in role `label`, given that in role `text`; scored on what is written for the first `generate` test examples."""

    roles: ClassVar = {"text": "text", "label": "label"}
    metrics: ClassVar = {
        "rouge1": True,
        "rouge2": True,
        "rougeL": True,
        "rougeLsum": True,
        "bleu": True,
        "perplexity": False,
    }
    default_metrics = ("rouge1", "rouge2", "rougeLsum")
    Options = Options
    _targets: ClassVar = ("label",)
    _auto = "AutoModelForSeq2SeqLM"
    _most_tested = 16

    @classmethod
    def check(cls, spec: FinetuneSpec) -> None:
        super().check(spec)
        if set(cls.chosen_metrics(spec)) - {"perplexity"} and spec.generate < 1:
            raise ValueError(f"finetune: generate must be at least 1 for metrics of written texts, got {spec.generate}")

    @classmethod
    def tiny_fields(cls, spec: FinetuneSpec) -> dict:
        options = cls.Options(**spec.task_options)
        small = {"target_length": min(options.target_length, 16), "beams": min(options.beams, 2), "min_tokens": 0}
        return {"task_options": {**spec.task_options, **small}}

    def _encode_some(self, rows: list[dict]) -> list[dict]:
        texts = [self.options.prefix + row["text"] for row in rows]
        inputs = self.tokenizer(texts, truncation=True, max_length=self.spec.max_length)["input_ids"]
        targets = self.tokenizer(
            text_target=[row["label"] for row in rows], truncation=True, max_length=self.options.target_length
        )["input_ids"]
        return [{"input_ids": text, "labels": target} for text, target in zip(inputs, targets, strict=True)]

    def weight(self, batch: dict[str, Tensor]) -> float:
        return (batch["labels"] != IGNORED).sum().item()

    def output(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).logits  # the decoder reads the labels, shifted

    @torch.no_grad()
    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        scores, texts = {}, []
        if set(self.scores) - {"perplexity"}:
            count = min(self.spec.generate, len(self.data.test))
            texts = self._written(model, count)
            wanted = [[self.data.test[i]["label"].strip()] for i in range(count)]
            if any(name.startswith("rouge") for name in self.scores):
                scores |= metrics.rouge(texts, wanted)
            if "bleu" in self.scores:
                scores["bleu"] = metrics.bleu(texts, wanted)
        if "perplexity" in self.scores:
            scores["perplexity"] = metrics.perplexity(model, self.test_batches(), shifted=False)
        return {name: scores[name] for name in self.scores}

    def _written(self, model: nn.Module, count: int) -> list[str]:
        """What the model writes for the first test examples."""
        texts = []
        for start in range(0, count, self._eval_batch):
            rows = [{"input_ids": row["input_ids"]} for row in self.test[start : min(start + self._eval_batch, count)]]
            written = model.generate(
                **self._collate(rows),
                max_new_tokens=self.spec.new_tokens,
                min_new_tokens=self.options.min_tokens,
                do_sample=False,
                num_beams=self.options.beams,
                length_penalty=self.options.length_penalty,
                no_repeat_ngram_size=self.options.no_repeat_ngram,
            )
            texts += [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]
        return texts
