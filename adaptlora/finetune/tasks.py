"""The two tasks: how examples become batches, which model learns them, what it is scored by. The loop knows neither."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from . import metrics
from ._extras import need
from .data import Dataset
from .fetch import locate
from .presets import FinetuneSpec
from .smollm2 import convert

IGNORED = -100  # transformers' label of positions that the loss leaves out


def model_folder(spec: FinetuneSpec) -> Path:
    """The transformers folder of the spec's model; a gguf file is converted into data_dir on first use.

    Raises: ValueError (unknown or unfetched model).
    """
    if spec.model == "@smollm2":
        return convert(locate("smollm2", spec.data_dir), Path(spec.data_dir) / "smollm2-135m-instruct")
    if spec.model.startswith("@"):
        return locate(spec.model[1:], spec.data_dir)
    return Path(spec.model)


def _device(spec: FinetuneSpec) -> torch.device:
    there = torch.cuda.is_available()
    if spec.device == "cuda" and not there:
        raise ValueError("finetune: device must be one that torch sees, got 'cuda' without a GPU")
    return torch.device(("cuda" if there else "cpu") if spec.device == "auto" else spec.device)


class Task:
    """Tokenised examples and the model they are for.

    A subclass gives the attributes below, and `heads`, `_model_arguments`, `_encode` and `_evaluate`.
    """

    scores: dict[str, bool]  # names of what evaluate returns, and whether more is better
    _auto: str  # transformers' class
    _eval_batch: int

    def __init__(self, spec: FinetuneSpec, data: Dataset):
        self.spec = spec
        self.data = data
        self.folder = model_folder(spec)
        self.device = _device(spec)
        self.transformers = need("transformers", "adaptlora finetune")
        self.tokenizer = self._from_folder("AutoTokenizer")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.train = self._encode(data.train)
        self.test = self._encode(data.test)
        self._order = self._training_order()

    def model(self) -> nn.Module:
        """The base model, fresh from its folder: the same weights every time, a new head included."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.spec.seed)
            model = self._from_folder(self._auto, dtype=torch.float32, **self._model_arguments())
        if self.spec.model_dropout is not None:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = self.spec.model_dropout
        return model.to(self.device)

    def heads(self, model: nn.Module) -> list[str]:
        """Modules that are trained and saved whole."""
        raise NotImplementedError

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """One batch per step: epochs in a fixed random order, of which the last batch may reach into the next epoch."""
        for step in range(self.spec.steps):
            rows = self._order[step * self.spec.batch_size : (step + 1) * self.spec.batch_size].tolist()
            yield self._collate([self.train[row] for row in rows])

    def test_batches(self) -> Iterator[dict[str, Tensor]]:
        # by length, so that short examples are not padded to the longest one
        rows = sorted(self.test, key=lambda row: len(row["input_ids"]))
        for start in range(0, len(rows), self._eval_batch):
            yield self._collate(rows[start : start + self._eval_batch])

    def probe(self) -> dict[str, Tensor]:
        """A few test examples of different lengths, to compare two models on."""
        return self._collate(self.test[:8])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The model's scores on the test set; its training mode is left as it was."""
        mode = model.training
        model.eval()
        try:
            return self._evaluate(model)
        finally:
            model.train(mode)

    def _from_folder(self, auto: str, **arguments):
        try:
            return getattr(self.transformers, auto).from_pretrained(self.folder, local_files_only=True, **arguments)
        except (OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"finetune: model must load as {auto}, got {str(self.folder)!r}: {reason}") from error

    def _training_order(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.spec.seed)
        wanted = self.spec.steps * self.spec.batch_size
        epochs = -(-wanted // len(self.train))
        return torch.cat([torch.randperm(len(self.train), generator=generator) for _ in range(epochs)])

    def _collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """Rows of token ids → tensors, padded on the right to the longest of the batch."""
        width = max(len(row["input_ids"]) for row in rows)

        def padded(name, fill):
            return torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows], device=self.device)

        batch = {"input_ids": padded("input_ids", self.tokenizer.pad_token_id)}
        batch["attention_mask"] = torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows], device=self.device
        )
        if isinstance(rows[0]["labels"], list):
            batch["labels"] = padded("labels", IGNORED)
        else:
            batch["labels"] = torch.tensor([row["labels"] for row in rows], device=self.device)
        return batch


class Classification(Task):
    """One label per text, cross-entropy on a new head."""

    _auto = "AutoModelForSequenceClassification"
    _eval_batch = 64

    def __init__(self, spec: FinetuneSpec, data: Dataset):
        self.scores = {"accuracy": True}
        self.classes = sorted({label for _, label in data.train})
        super().__init__(spec, data)

    def heads(self, model: nn.Module) -> list[str]:
        """Everything with parameters beside the encoder: transformers names it classifier, score, pre_classifier, …"""
        return [
            name
            for name, child in model.named_children()
            if name != model.base_model_prefix and next(child.parameters(), None) is not None
        ]

    def _model_arguments(self) -> dict:
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": {label: i for i, label in enumerate(self.classes)},
            "pad_token_id": self.tokenizer.pad_token_id,
            "ignore_mismatched_sizes": True,
        }

    def _encode(self, pairs) -> list[dict]:
        encoded = self.tokenizer([text for text, _ in pairs], truncation=True, max_length=self.spec.max_length)
        index = {label: i for i, label in enumerate(self.classes)}
        return [
            {"input_ids": ids, "labels": index[label]}
            for ids, (_, label) in zip(encoded["input_ids"], pairs, strict=True)
        ]

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"accuracy": metrics.accuracy(model, self.test_batches())}


class CausalLM(Task):
    """The next token; where there is a prompt, the loss covers what follows it only, its end included."""

    _auto = "AutoModelForCausalLM"
    _eval_batch = 16  # logits are (batch, length, vocabulary)

    def __init__(self, spec: FinetuneSpec, data: Dataset):
        super().__init__(spec, data)
        references: dict[str, list[str]] = {}
        for prompt, target in data.test:
            if prompt:
                references.setdefault(self._framed(prompt), []).append(target.strip())
        self.references = dict(list(references.items())[: spec.generate])
        self.scores = {"perplexity": False} | ({"bleu": True} if self.references else {})

    def _framed(self, prompt: str) -> str:
        """The prompt as the model sees it."""
        if not self.spec.chat:
            return prompt
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"finetune: chat must be False for a tokenizer without a chat template, as in {self.folder}"
            )
        message = {"role": "user", "content": prompt}
        return self.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)

    def heads(self, model: nn.Module) -> list[str]:
        return []

    def _model_arguments(self) -> dict:
        return {}

    def _encode(self, pairs) -> list[dict]:
        if not pairs:
            return []
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        framed = [self._framed(prompt) if prompt else "" for prompt, _ in pairs]
        # a template brings its own special tokens; so does a prompt, and what follows it must not begin anew
        prompts = self.tokenizer(framed, add_special_tokens=not self.spec.chat)["input_ids"]
        joined = [_joined(prompt, target) for prompt, (_, target) in zip(framed, pairs, strict=True)]
        targets = self.tokenizer(joined, add_special_tokens=False)["input_ids"]
        rows = []
        for prompt, target, (text, _) in zip(prompts, targets, pairs, strict=True):
            if len(prompt) >= self.spec.max_length:
                raise ValueError(
                    f"finetune: max_length must leave room after every prompt, got {self.spec.max_length}"
                    f" for a prompt of {len(prompt)} tokens ({text[:40]!r}…)"
                )
            ids = (prompt + target + end)[: self.spec.max_length]
            rows.append({"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]})
        return rows

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        scores = {"perplexity": metrics.perplexity(model, self.test_batches())}
        if self.references:
            texts = metrics.generate(
                model,
                self.tokenizer,
                list(self.references),
                new_tokens=self.spec.new_tokens,
                add_special_tokens=not self.spec.chat,
            )
            scores["bleu"] = metrics.bleu(texts, list(self.references.values()))
        return scores


def _joined(prompt: str, target: str) -> str:
    """The target with the blank between it and its prompt, where neither has one."""
    apart = not prompt or prompt[-1].isspace() or target[0].isspace()
    return target if apart else f" {target}"


def build(spec: FinetuneSpec, data: Dataset) -> Task:
    """The task of a spec. Raises: ValueError, MissingExtraError."""
    return {"classification": Classification, "causal-lm": CausalLM}[spec.task](spec, data)
