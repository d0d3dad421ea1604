"""What the tasks on images share: they are read when they are needed, by threads ahead of the training."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from .. import pictures
from .._extras import need
from ..data import Dataset
from ..presets import FinetuneSpec
from .base import Options, Task

AHEAD = 2  # batches that are read while one is used


@dataclass(frozen=True)
class ImageOptions(Options):
    """workers: threads that read and process images; 0: none, each when it is used."""

    workers: int = 0

    def __post_init__(self):
        self.rule("workers", isinstance(self.workers, int) and self.workers >= 0, "an integer ≥ 0")


class Examples(Sequence):
    """Items that are made when they are asked for: load(row, generator or None), with a generator changed at random."""

    def __init__(self, count: int, load: Callable[[int, torch.Generator | None], dict]):
        self._count = count
        self.load = load

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> dict:
        if not 0 <= row < self._count:
            raise IndexError(row)
        return self.load(row, None)


def label_name(label, names: Sequence[str] | None) -> str | None:
    """The name of a label: of a class number the one of `names`, otherwise itself as text; None where it has none."""
    if label is None or names is None:
        return label if label is None else str(label)
    return names[label] if 0 <= label < len(names) else None


class ImageTask(Task):
    """A task whose rows have a column `image`; its `_encode` returns Examples."""

    packages: ClassVar = ("transformers", "PIL", "datasets")
    architecture_keys: ClassVar = ("image_processor", "tiny_image_processor")
    Options = ImageOptions
    _tiny_options: ClassVar[Mapping[str, object]] = {"workers": 2}  # in the place of a recipe's for its dry run

    @classmethod
    def read(cls, spec: FinetuneSpec) -> Dataset:
        data = super().read(spec)
        parts = {"train": data.train, "test": data.test}
        for name, rows in parts.items():
            if getattr(rows.features["image"], "dtype", None) == "string":
                file = spec.eval_data if name == "test" and spec.eval_data is not None else spec.data
                parts[name] = pictures.with_files(rows, Path(file).parent)
            pictures.check_files(parts[name], name)
        return Dataset(parts["train"], parts["test"], duplicates=data.duplicates)

    def _prepare(self) -> None:
        self.processor = self._pretrained("AutoImageProcessor", backend="pil")

    def batches(self) -> Iterator[dict[str, Tensor]]:
        size, seed = self.spec.batch_size, self.spec.seed * 1_000_003
        positions = range(self.spec.steps * size)
        order = self._order.tolist()
        examples = ((order[at], torch.Generator().manual_seed(seed + at)) for at in positions)
        return self._read_ahead(self.train, zip(*[examples] * size, strict=True))  # so many of one iterator at a time

    def test_batches(self) -> Iterator[dict[str, Tensor]]:
        rows = [(row, None) for row in range(len(self.test))]
        return self._read_ahead(
            self.test, (rows[start : start + self._eval_batch] for start in range(0, len(rows), self._eval_batch))
        )

    def _read_ahead(self, examples: Examples, batches: Iterable) -> Iterator[dict[str, Tensor]]:
        """The batches, collated; each is an iterable of (row, generator or None)."""
        if not self.options.workers:
            for batch in batches:
                yield self._collate([examples.load(*example) for example in batch])
            return
        pool, pending = ThreadPoolExecutor(self.options.workers), deque()
        try:
            for batch in batches:
                pending.append([pool.submit(examples.load, *example) for example in batch])
                if len(pending) > AHEAD:
                    yield self._collate([item.result() for item in pending.popleft()])
            while pending:
                yield self._collate([item.result() for item in pending.popleft()])
        finally:
            pool.shutdown(cancel_futures=True)

    @classmethod
    def tiny_fields(cls, spec: FinetuneSpec) -> dict:
        return {"task_options": {**spec.task_options, **cls._tiny_options}}

    @classmethod
    def write_tiny(cls, architecture, folder: Path, rows: list[dict], *, seed: int = 0) -> None:
        super().write_tiny(architecture, folder, rows, seed=seed)
        fields = {**architecture["image_processor"], **architecture["tiny_image_processor"]}
        kind = fields.pop("image_processor_type")
        transformers = need("transformers", "adaptlora finetune --dry-run")
        getattr(transformers, f"{kind}Pil")(**fields).save_pretrained(folder)
