"""The next token."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from .. import metrics
from ..data import Dataset
from ..presets import FinetuneSpec
from . import base
from .text import IGNORED, TextTask


@dataclass(frozen=True)
class Options(base.Options):
    """Settings of causal-lm.

    Args:
        prompt: what stands around a prompt, with {text} in its place.
        chat_template: in Jinja, instead of the tokenizer's own; for `chat` and for the role `messages`.
        beams: of the search that writes texts; 1: greedy.   length_penalty, no_repeat_ngram: of that search.
        answer: a regular expression; for metric `answer` its first match in the text that was written must be that in the reference.
    """

    prompt: str = "{text}"
    chat_template: str | None = None
    beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0
    answer: str | None = None

    def __post_init__(self):
        self.rule("prompt", "{text}" in self.prompt, "text with {text} in it")
        self.rule("beams", self.beams >= 1, "at least 1")
        self.rule("no_repeat_ngram", self.no_repeat_ngram >= 0, "at least 0")
        if self.answer is not None:
            try:
                re.compile(self.answer)
            except re.error as error:
                raise ValueError(
                    f"finetune: task_options.answer must be a regular expression, got {self.answer!r}: {error}"
                ) from error


class CausalLM(TextTask):
    """The next token; where there is a prompt, the loss covers what follows it only, its end included.

    Of `messages`, a list of {"role", "content"}, it covers what the assistant says, each time to the end of its turn.
    """

    roles: ClassVar = {"text": "text", "label": None, "messages": None}
    metrics: ClassVar = {"perplexity": False, "bleu": True, "rougeL": True, "answer": True}
    default_metrics = ("perplexity", "bleu")
    Options = Options
    _targets: ClassVar = ("label",)
    _auto = "AutoModelForCausalLM"
    _most_tested = 16  # logits are (batch, length, vocabulary)
    _written: ClassVar = ("bleu", "rougeL", "answer")  # metrics of generated texts

    def __init__(self, spec: FinetuneSpec, data: Dataset):
        super().__init__(spec, data)
        references: dict[str, list[str]] = {}
        for row in data.test:
            if row.get("label") and row["text"]:
                references.setdefault(self._framed(row["text"]), []).append(row["label"].strip())
        self.references = dict(list(references.items())[: spec.generate])

    @classmethod
    def check(cls, spec: FinetuneSpec) -> None:
        super().check(spec)
        if "answer" in (spec.metrics or ()) and spec.task_options.get("answer") is None:
            raise ValueError(
                "finetune: metric answer must go with task_options.answer, which says what of a text it is, got none"
            )
        written = [name for name in spec.metrics or () if name in cls._written]
        if written and spec.generate < 1:
            raise ValueError(f"finetune: generate must be at least 1 for metric {written[0]}, got {spec.generate}")

    @classmethod
    def roles_of(cls, spec: FinetuneSpec) -> dict[str, str | None]:
        return {"messages": None} if "messages" in spec.columns else cls.roles

    @classmethod
    def tiny_fields(cls, spec: FinetuneSpec) -> dict:
        beams = min(cls.Options(**spec.task_options).beams, 2)
        # what stands around a prompt does not shrink, and a small tokenizer makes more tokens of it
        return {"max_length": min(spec.max_length, 256), "task_options": {**spec.task_options, "beams": beams}}

    @property
    def scores(self) -> dict[str, bool]:
        return {name: more for name, more in super().scores.items() if self.references or name not in self._written}

    def _prepare(self) -> None:
        super()._prepare()
        if self.options.chat_template is not None:
            self.tokenizer.chat_template = self.options.chat_template
        if (self.spec.chat or "messages" in self.spec.columns) and self.tokenizer.chat_template is None:
            raise ValueError(
                f"finetune: chat must be False for a tokenizer without a chat template, as in {base.model_source(self.spec)}"
            )

    def _framed(self, prompt: str) -> str:
        """The prompt as the model sees it."""
        prompt = self.options.prompt.replace("{text}", prompt)
        if not self.spec.chat:
            return prompt
        message = {"role": "user", "content": prompt}
        return self.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)

    def _encode(self, rows: Sequence[dict]) -> list[dict]:
        testing = rows is self.data.test
        self._dropping = not testing
        encoded = super()._encode(rows)
        if not encoded:
            raise ValueError(
                f"finetune: max_length must leave room after a prompt of the rows to {'test' if testing else 'train'} on,"
                f" got {self.spec.max_length} for {len(rows):,} rows of which none can be learnt"
            )
        return encoded

    def _encode_some(self, rows: list[dict]) -> list[dict]:
        if "messages" in rows[0]:
            learnt = [row for row in map(self._conversation, rows) if any(label != IGNORED for label in row["labels"])]
            self.dropped += (len(rows) - len(learnt)) * self._dropping
            return learnt
        pairs = [(row["text"], row["label"]) if "label" in row else ("", row["text"]) for row in rows]
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        framed = [self._framed(prompt) if prompt else "" for prompt, _ in pairs]
        # a template brings its own special tokens; so does a prompt, and what follows it must not begin anew
        prompts = self.tokenizer(framed, add_special_tokens=not self.spec.chat)["input_ids"]
        joined = [_joined(prompt, target) for prompt, (_, target) in zip(framed, pairs, strict=True)]
        targets = self.tokenizer(joined, add_special_tokens=False)["input_ids"]
        encoded = []
        for prompt, target, (text, _) in zip(prompts, targets, pairs, strict=True):
            if len(prompt) >= self.spec.max_length:
                if self._dropping:
                    self.dropped += 1
                    continue
                raise ValueError(
                    f"finetune: max_length must leave room after every prompt to test on, got {self.spec.max_length}"
                    f" for a prompt of {len(prompt)} tokens ({text[:40]!r}…)"
                )
            ids = (prompt + target + end)[: self.spec.max_length]
            encoded.append({"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]})
        return encoded

    def _conversation(self, row: dict) -> dict:
        """Turn by turn: what the template adds for a turn is a piece of its own, learnt where the assistant speaks."""
        ids, labels, before = [], [], ""
        for i, message in enumerate(row["messages"]):
            asked = self._rendered(row["messages"][:i], prompt=True) if message["role"] == "assistant" else before
            after = self._rendered(row["messages"][: i + 1])
            if not asked.startswith(before) or not after.startswith(asked):
                raise ValueError(
                    "finetune: chat_template must render a conversation's beginning as the beginning of the whole, got "
                    f"{after[-60:]!r} after {asked[-60:]!r}"
                )
            for text, learnt in ((asked[len(before) :], False), (after[len(asked) :], message["role"] == "assistant")):
                piece = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
                ids += piece
                labels += piece if learnt else [IGNORED] * len(piece)
            before = after
        return {"input_ids": ids[: self.spec.max_length], "labels": labels[: self.spec.max_length]}

    def _rendered(self, messages: list[dict], *, prompt: bool = False) -> str:
        return (
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            if messages
            else ""
        )

    def weight(self, batch: dict[str, Tensor]) -> float:
        return (batch["labels"][:, 1:] != IGNORED).sum().item()

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        scores, wanted = {}, list(self.references.values())
        if any(name in self._written for name in self.scores):
            texts = metrics.generate(
                model,
                self.tokenizer,
                list(self.references),
                new_tokens=self.spec.new_tokens,
                batch_size=min(8, self._eval_batch),
                add_special_tokens=not self.spec.chat,
                num_beams=self.options.beams,
                length_penalty=self.options.length_penalty,
                no_repeat_ngram_size=self.options.no_repeat_ngram,
            )
        for name in self.scores:
            if name == "perplexity":
                scores[name] = metrics.perplexity(model, self.test_batches())
            elif name == "bleu":
                scores[name] = metrics.bleu(texts, wanted)
            elif name == "rougeL":
                scores[name] = metrics.rouge(texts, wanted)["rougeL"]
            else:
                scores[name] = metrics.same_answers(texts, wanted, self.options.answer)
        return scores


def _joined(prompt: str, target: str) -> str:
    """The target with the blank between it and its prompt, where neither has one."""
    apart = not prompt or prompt[-1].isspace() or target[0].isspace()
    return target if apart else f" {target}"
