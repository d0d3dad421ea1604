"""One label per image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import metrics, pictures, sources
from .._extras import need
from .base import beside_the_encoder
from .images import Examples, ImageOptions, ImageTask, label_name


@dataclass(frozen=True)
class ImageClassificationOptions(ImageOptions):
    """crop: least share of an image that a training example shows; 1: the image as it is.   flip: mirror half of them."""

    crop: float = 0.5
    flip: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.rule("crop", 0 < self.crop <= 1, "in (0, 1]")
        self.rule("flip", isinstance(self.flip, bool), "True or False")


class LabelledImages(ImageTask):
    """Images with one label each, cropped and mirrored at random while training."""

    roles: ClassVar = {"image": "image", "label": "label"}
    metrics: ClassVar = {"accuracy": True}
    Options = ImageClassificationOptions

    def _prepare(self) -> None:
        super()._prepare()
        blank = need("PIL.Image", "adaptlora finetune on images").new("RGB", (64, 64))
        self._size = tuple(self._processed(blank).shape[-2:])
        self.classes = class_names(self.data.train)

    def _encode(self, rows) -> Examples:
        labels = class_ids(rows, self.classes)

        def load(row: int, generator: torch.Generator | None) -> dict:
            image = pictures.picture(rows, row)
            if generator is not None:
                if self.options.crop < 1:
                    image = pictures.random_crop(image, self._size, (self.options.crop, 1.0), generator)
                if self.options.flip:
                    image, _ = pictures.random_flip(image, generator)
            return {"pixel_values": self._processed(image), "labels": labels[row]}

        return Examples(len(rows), load)

    def _processed(self, image) -> Tensor:
        return self.processor(image, return_tensors="pt")["pixel_values"][0]

    def _collate(self, rows: list[dict]) -> dict[str, Tensor]:
        pixels = torch.stack([row["pixel_values"] for row in rows])
        labels = torch.tensor([row["labels"] for row in rows])
        return {
            "pixel_values": pixels.to(self.device, getattr(torch, self.spec.dtype)),
            "labels": labels.to(self.device),
        }

    @torch.no_grad()
    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        answers = [(self.output(model, batch).argmax(-1), batch["labels"]) for batch in self.test_batches()]
        found, labels = (torch.cat(parts).cpu() for parts in zip(*answers, strict=True))
        return {"accuracy": metrics.accuracy(found, labels)}


class ImageClassification(LabelledImages):
    """Cross-entropy on a new head."""

    _auto = "AutoModelForImageClassification"

    @classmethod
    def heads(cls, model: nn.Module) -> list[str]:
        return beside_the_encoder(model)

    def _config_fields(self) -> dict:
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": {label: i for i, label in enumerate(self.classes)},
        }


def class_names(rows) -> list[str]:
    """The classes of a column `label`: the names that the data set gives, or the labels that occur, sorted.

    Raises: ValueError (fewer than two).
    """
    names = sources.class_names(rows, "label") or sorted({str(label) for label in rows["label"][:]})
    if len(names) < 2:
        raise ValueError(
            f"finetune: label must have at least two classes to train on, got {', '.join(names) or 'none'}"
        )
    return names


def class_ids(rows, classes: Sequence[str]) -> list[int]:
    """The labels of `rows` as positions in `classes`.

    Raises: ValueError (a label that is none of them).
    """
    names = sources.class_names(rows, "label")
    known = {name: position for position, name in enumerate(classes)}
    ids = []
    for row, label in enumerate(rows["label"][:]):
        name = label_name(label, names)
        if name not in known:
            raise ValueError(
                f"finetune: every label must be one of the {len(classes)} classes of the training data, got {label!r} in row {row}"
            )
        ids.append(known[name])
    return ids
