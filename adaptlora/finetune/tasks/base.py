"""What every task is made of."""

import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, get_type_hints

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .. import sources
from .._extras import need
from ..data import Dataset
from ..fetch import locate
from ..field_types import described, fits
from ..peft_twin import logits
from ..presets import HUB, FinetuneSpec
from ..smollm2 import convert


@dataclass(frozen=True)
class Options:
    """Settings of one task, beyond those that all have; a task with some derives from this. Raises: ValueError."""

    def rule(self, name: str, holds: bool, text: str) -> None:
        """Raises: ValueError unless it holds."""
        if not holds:
            raise ValueError(f"finetune: task_options.{name} must be {text}, got {getattr(self, name)!r}")


class Task:
    """Examples as batches, the model they are for, and its scores.

    A subclass gives `metrics` and what differs of `read`, `_prepare`, `_encode`, `_collate`, `loss`, `output` and `_evaluate`; for
    `adaptlora finetune --dry-run` also of `meta_model`, `write_tiny` and `tiny_fields`.
    """

    roles: ClassVar[Mapping[str, str | None]] = {}  # what it reads → default column; None: it can do without
    metrics: ClassVar[Mapping[str, bool]] = {}  # all that it can compute, and whether more is better
    default_metrics: ClassVar[tuple[str, ...]] = ()  # where a spec names none; empty: all
    packages: ClassVar[tuple[str, ...]] = ("transformers",)
    architecture_keys: ClassVar[
        tuple[str, ...]
    ] = ()  # what a recipe's `architecture` has to say beside the model's configuration
    Options: ClassVar[type[Options]] = Options
    _auto: ClassVar[str]  # transformers' class
    _most_tested: ClassVar[int] = 64  # examples in one forward pass of a test

    def __init__(self, spec: FinetuneSpec, data: Dataset):
        self.spec = spec
        self.dropped = 0  # training examples that could not be learnt
        self.data = data
        self.options = self.Options(**spec.task_options)
        self.device = _device(spec)
        self.transformers = need("transformers", "adaptlora finetune")
        self._prepare()
        self.train = self._encode(data.train)
        self.test = self._encode(data.test)
        self._order = self._training_order()

    @classmethod
    def chosen_metrics(cls, spec: FinetuneSpec) -> tuple[str, ...]:
        return tuple(spec.metrics or cls.default_metrics or cls.metrics)

    @classmethod
    def check(cls, spec: FinetuneSpec) -> None:
        """What of the spec is the task's own, before anything is loaded.

        Raises: ValueError (metrics, roles, options that the task does not have, or bad values of them).
        """
        for name in spec.metrics or ():
            if name not in cls.metrics:
                known = ", ".join(cls.metrics)
                raise ValueError(f"finetune: metrics must be of those of task {spec.task} ({known}), got {name!r}")
        sources.columns(spec, cls.roles)
        known = [field.name for field in fields(cls.Options)]
        for name in spec.task_options:
            if name not in known:
                raise ValueError(
                    f"finetune: task_options must be settings of task {spec.task} ({', '.join(known) or 'it has none'}), got {name!r}"
                )
        hints = get_type_hints(cls.Options)
        for name, value in spec.task_options.items():
            if not fits(value, hints[name]):
                raise ValueError(f"finetune: task_options.{name} must be {described(hints[name])}, got {value!r}")
        cls.Options(**spec.task_options)

    @property
    def scores(self) -> dict[str, bool]:
        """Names of what `evaluate` returns, and whether more is better."""
        return {name: self.metrics[name] for name in self.chosen_metrics(self.spec)}

    # Data

    @classmethod
    def roles_of(cls, spec: FinetuneSpec) -> Mapping[str, str | None]:
        """`roles`, or those of them that this spec's way of reading takes."""
        return cls.roles

    @classmethod
    def read(cls, spec: FinetuneSpec) -> Dataset:
        """The examples as rows {role: value}.

        Raises: ValueError (columns, splits, what the data set's own loader refuses), MissingExtraError.
        """
        return sources.read(spec, cls.roles_of(spec))

    def _prepare(self) -> None:
        """Load what `_encode` needs: tokenizer, image processor."""

    def _encode(self, rows: Sequence[dict]) -> Sequence[dict]:
        """What `_collate` takes, in the same order; where that is large, a sequence that makes each item when it is asked for."""
        raise NotImplementedError

    def _collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """One batch, on self.device; its first value is a tensor whose first dimension is the examples."""
        raise NotImplementedError

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """One batch per step: epochs in a fixed random order, of which the last batch may reach into the next epoch."""
        for step in range(self.spec.steps):
            rows = self._order[step * self.spec.batch_size : (step + 1) * self.spec.batch_size].tolist()
            yield self._collate([self.train[row] for row in rows])

    @property
    def _eval_batch(self) -> int:
        """Examples in one forward pass of a test: not more than what training shows to fit into memory."""
        return min(self._most_tested, self.spec.micro_batch or self.spec.batch_size)

    def test_batches(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.test), self._eval_batch):
            yield self._collate([self.test[row] for row in range(start, min(start + self._eval_batch, len(self.test)))])

    def probe(self) -> dict[str, Tensor]:
        """A few test examples, to compare two models on."""
        return self._collate([self.test[row] for row in range(min(8, self._eval_batch, len(self.test)))])

    def _training_order(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.spec.seed)
        wanted = self.spec.steps * self.spec.batch_size
        epochs = -(-wanted // len(self.train))
        return torch.cat([torch.randperm(len(self.train), generator=generator) for _ in range(epochs)])

    # The model

    def model(self) -> nn.Module:
        """The base model, fresh from its folder: the same weights every time, a new head included."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.spec.seed)
            config = self._pretrained("AutoConfig", **self._config_fields())
            self._check_model_options(config)
            for name, value in self.spec.model_options.items():
                setattr(config, name, value)  # some models read fields that their configuration does not have by itself
            new_head = type(self).heads.__func__ is not Task.heads.__func__  # its old sizes may be others
            model = self._pretrained(
                self._auto, config=config, dtype=getattr(torch, self.spec.dtype), ignore_mismatched_sizes=new_head
            )
        if self.spec.model_dropout is not None:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = self.spec.model_dropout
        if self.spec.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.to(self.device)

    def _check_model_options(self, config) -> None:
        """Raises: ValueError (a field that neither the configuration has nor the model's code names)."""
        kinds = getattr(self.transformers, self._auto)._model_mapping
        if type(config) not in kinds:
            return  # loading it says so
        source = inspect.getsource(sys.modules[kinds[type(config)].__module__])
        for name in self.spec.model_options:
            if not hasattr(config, name) and not re.search(rf"\b{re.escape(name)}\b", source):
                raise ValueError(
                    f"finetune: model_options must be fields of {type(config).__name__}, or such that the model reads, got {name!r}"
                )

    @classmethod
    def heads(cls, model: nn.Module) -> list[str]:
        """Modules that are trained and saved whole."""
        return []

    def _config_fields(self) -> dict:
        """Fields of the model's configuration that follow from the data: num_labels, …"""
        return {}

    def _pretrained(self, auto: str, **arguments):
        """`auto`.from_pretrained of the spec's model. Raises: ValueError."""
        source, revision = model_source(self.spec), {}
        if isinstance(source, Path):
            revision = {"local_files_only": True}
        elif self.spec.revision is not None:
            revision = {"revision": self.spec.revision}
        try:
            return getattr(self.transformers, auto).from_pretrained(source, **revision, **arguments)
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"finetune: model must load as {auto}, got {str(source)!r}: {reason}") from error

    # Training

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Iterator[Tensor]:
        """The loss of a batch in addends, one for each micro batch, to be differentiated one after the other."""
        size = self.spec.micro_batch
        if size is None or size >= len(next(iter(batch.values()))):
            yield self.loss(model, batch)
            return
        count = len(next(iter(batch.values())))
        parts = [{n: v[start : start + size] for n, v in batch.items()} for start in range(0, count, size)]
        weights = [self.weight(part) for part in parts]
        for part, weight in zip(parts, weights, strict=True):
            yield self.loss(model, part) * (weight / sum(weights))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss of a batch: (), with graph."""
        return model(**batch).loss

    def weight(self, batch: dict[str, Tensor]) -> float:
        """Of a micro batch in the mean over its batch: how many terms its loss is a mean of."""
        return len(next(iter(batch.values())))

    # Testing

    def output(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """What two models are compared by: the same for the same weights, whatever was drawn before."""
        return logits(model, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The model's scores on the test set; its training mode is left as it was."""
        mode = model.training
        model.eval()
        try:
            return self._evaluate(model)
        finally:
            model.train(mode)

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        """A value for each name in self.scores."""
        raise NotImplementedError

    def export(self, adapter: Path, out: Path) -> None:
        """Write the adapter for others than PEFT too, into folders of their own in `out`.

        Args: adapter: the PEFT folder.
        """

    # The dry run

    @classmethod
    def meta_model(cls, architecture: Mapping) -> nn.Module:
        """The model in its real sizes, without memory: all parameters on the device meta."""
        transformers = need("transformers", "adaptlora finetune --dry-run")
        config = transformers.AutoConfig.for_model(architecture["model_type"], **architecture["config"])
        with torch.device("meta"):
            return getattr(transformers, cls._auto).from_config(config)

    @classmethod
    def write_tiny(cls, architecture: Mapping, folder: Path, rows: list[dict], *, seed: int = 0) -> None:
        """A folder for `model` and `_prepare`: the same architecture with small sizes and random weights.

        Args:
            rows: examples as the data set has them, to make a tokenizer of their texts.
        """
        transformers = need("transformers", "adaptlora finetune --dry-run")
        fields = {**architecture["config"], **architecture["tiny"]}
        config = transformers.AutoConfig.for_model(architecture["model_type"], **fields)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            getattr(transformers, cls._auto).from_config(config).save_pretrained(folder)

    @classmethod
    def tiny_fields(cls, spec: FinetuneSpec) -> dict:
        """Fields of the spec that the dry run changes for this task, beside those it always does."""
        return {}


def beside_the_encoder(model: nn.Module) -> list[str]:
    """A transformers model's children with parameters beside its encoder: classifier, score, pre_classifier, …"""
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and next(child.parameters(), None) is not None
    ]


def model_source(spec: FinetuneSpec) -> Path | str:
    """The transformers folder of the spec's model, or its name on the hub; a gguf file is converted into data_dir on first use.

    Raises: ValueError (unknown or unfetched model).
    """
    if spec.model.startswith(HUB):
        return spec.model.removeprefix(HUB)
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
