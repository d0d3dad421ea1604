"""Boxes and classes of the things in an image, by YOLOS: transformers' loss, COCO's average precision."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy
import torch
from torch import Tensor, nn

from .. import pictures
from ..average_precision import Detections, Truth, average_precision
from .images import Examples, ImageOptions, ImageTask, label_name

BOX_FORMATS = ("xywh", "xyxy")
_OUTSIDE = 0.01  # of a side: COCO's own boxes are rounded


@dataclass(frozen=True)
class ObjectDetectionOptions(ImageOptions):
    """
    Args:
        flip: mirror half of the training images.
        box_format: "xywh": left, top, width, height, as in COCO; "xyxy": left, top, right, bottom; in pixels.
        box, category, crowd: names of the fields of a row's `objects`; crowd may be missing there.
        classes: "model": the model's own, which have to have the names of the data's, and its own head; "new": the data's, and a new head.
    """

    flip: bool = True
    box_format: str = "xywh"
    box: str = "bbox"
    category: str = "category"
    crowd: str = "iscrowd"
    classes: str = "new"

    def __post_init__(self):
        super().__post_init__()
        self.rule("flip", isinstance(self.flip, bool), "True or False")
        self.rule("box_format", self.box_format in BOX_FORMATS, f"one of {', '.join(BOX_FORMATS)}")
        self.rule("classes", self.classes in ("model", "new"), "model or new")


class ObjectDetection(ImageTask):
    """A set of boxes, matched to those that are there; what the model says of an image does not depend on other images."""

    # with an image's width and height all boxes are checked before the training, without them when the image is read
    roles: ClassVar = {"image": "image", "objects": "objects", "width": None, "height": None}
    metrics: ClassVar = {"map": True, "map_50": True, "map_75": True}
    packages: ClassVar = (*ImageTask.packages, "scipy")
    Options = ObjectDetectionOptions
    _auto = "AutoModelForObjectDetection"
    _most_tested = 1  # images of different sizes are padded in a batch, and the model sees the padding

    def _prepare(self) -> None:
        super()._prepare()
        self.classes = self._class_names(self.data.train)
        if self.options.classes == "new":
            self._ids = {name: i for i, name in enumerate(self.classes)}
            return
        known = {name: int(number) for number, name in self._pretrained("AutoConfig").id2label.items()}
        missing = [name for name in self.classes if name not in known]
        if missing:
            raise ValueError(
                "finetune: task_options.classes must be 'new' unless the model's classes have the names of the data's,"
                f" got 'model' for a model without {missing[0]!r}"
            )
        self._ids = {name: known[name] for name in self.classes}

    def _class_names(self, rows) -> list[str]:
        _field(rows.features["objects"], self.options.box)
        names = _names(_field(rows.features["objects"], self.options.category))
        if names is None:
            names = sorted({str(label) for objects in rows["objects"] for label in self._fields(objects)[1]})
        if not names:
            raise ValueError("finetune: objects must have at least one class to train on, got no object")
        return names

    def _fields(self, objects) -> tuple[list, list, list]:
        """(boxes, labels, whether each is a crowd) of a row's objects: a list of dicts, or a dict of lists."""
        options = self.options
        if isinstance(objects, Mapping):
            boxes, labels = objects[options.box], objects[options.category]
            return boxes, labels, [bool(c) for c in objects.get(options.crowd) or [False] * len(boxes)]
        rows = [(one[options.box], one[options.category], bool(one.get(options.crowd))) for one in objects]
        return tuple(map(list, zip(*rows, strict=True))) or ([], [], [])

    def _encode(self, rows) -> Examples:
        names = _names(_field(rows.features["objects"], self.options.category))
        found = [self._truth(objects, names, row) for row, objects in enumerate(rows["objects"][:])]

        if {"width", "height"} <= set(rows.column_names):
            for row, size in enumerate(zip(rows["width"][:], rows["height"][:], strict=True)):
                _check_inside(found[row].boxes, size, row)

        def load(row: int, generator: torch.Generator | None) -> dict:
            image, truth = pictures.picture(rows, row), found[row]
            _check_inside(truth.boxes, image.size, row)
            boxes = truth.boxes.copy()
            if generator is not None and self.options.flip:
                image, flipped = pictures.random_flip(image, generator)
                if flipped:
                    boxes[:, [0, 2]] = image.width - boxes[:, [2, 0]]
            return {"image": image, "boxes": boxes, "truth": truth}

        return Examples(len(rows), load)

    def _truth(self, objects, names: list[str] | None, row: int) -> Truth:
        boxes, labels, crowd = self._fields(objects)
        for what, values in ((self.options.category, labels), (self.options.crowd, crowd)):
            if len(values) != len(boxes):
                raise ValueError(
                    f"finetune: objects must have as many {what!r} as boxes, got {len(values)} and {len(boxes)} in row {row}"
                )
        for box in boxes:
            if len(box) != 4 or not all(number is not None and math.isfinite(number) for number in box):
                raise ValueError(f"finetune: every box must be 4 finite numbers, got {box} in row {row}")
        corners = numpy.array(boxes, dtype=numpy.float64).reshape(-1, 4)
        if self.options.box_format == "xywh":
            corners[:, 2:] += corners[:, :2]
        if (corners[:, 2:] < corners[:, :2]).any():
            wrong = boxes[int((corners[:, 2:] < corners[:, :2]).any(axis=1).argmax())]
            raise ValueError(
                f"finetune: every box must have a width and height ≥ 0 as {self.options.box_format}, got {wrong} in row {row}"
            )
        ids = []
        for label in labels:
            name = label_name(label, names)
            if name not in self._ids:
                raise ValueError(
                    f"finetune: every category must be one of the {len(self.classes)} classes of the training data,"
                    f" got {label!r} in row {row}"
                )
            ids.append(self._ids[name])
        return Truth(corners, numpy.array(ids, dtype=numpy.int64), numpy.array(crowd, dtype=bool))

    def _collate(self, rows: list[dict]) -> dict:
        annotations = [
            {
                "image_id": number,
                "annotations": [
                    {"bbox": [x, y, right - x, bottom - y], "category_id": label, "area": (right - x) * (bottom - y)}
                    for (x, y, right, bottom), label, crowd in zip(
                        row["boxes"].tolist(), row["truth"].labels.tolist(), row["truth"].crowd.tolist(), strict=True
                    )
                    if not crowd
                ],
            }
            for number, row in enumerate(rows)
        ]
        batch = self.processor([row["image"] for row in rows], annotations=annotations, return_tensors="pt")
        return {
            "pixel_values": batch["pixel_values"].to(self.device, getattr(torch, self.spec.dtype)),
            "labels": [
                {name: label[name].to(self.device) for name in ("class_labels", "boxes")} for label in batch["labels"]
            ],
            "sizes": [row["image"].size for row in rows],
            "truths": [row["truth"] for row in rows],
        }

    @classmethod
    def heads(cls, model: nn.Module) -> list[str]:
        return ["class_labels_classifier", "bbox_predictor"]

    def _config_fields(self) -> dict:
        if self.options.classes == "model":
            return {}
        return {"id2label": dict(enumerate(self.classes)), "label2id": self._ids}

    def loss(self, model: nn.Module, batch: dict) -> Tensor:
        return model(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss

    def weight(self, batch: dict) -> float:
        return max(1, sum(len(label["boxes"]) for label in batch["labels"]))

    def output(self, model: nn.Module, batch: dict) -> Tensor:
        """Logits and boxes of all queries, (batch, queries, classes + 5)."""
        found = model(pixel_values=batch["pixel_values"])
        return torch.cat([found.logits, found.pred_boxes], dim=-1)

    @torch.no_grad()
    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        detections, truths = [], []
        for batch in self.test_batches():
            found = self.output(model, batch).double().cpu()
            scores, labels = found[..., :-4].softmax(-1)[..., :-1].max(-1)  # the last class: nothing
            centre, size = found[..., -4:-2], found[..., -2:]
            corners = torch.cat([centre - size / 2, centre + size / 2], dim=-1)
            for place, (width, height) in enumerate(batch["sizes"]):
                boxes = corners[place] * torch.tensor([width, height, width, height])
                detections.append(Detections(boxes.numpy(), scores[place].numpy(), labels[place].numpy()))
            truths += batch["truths"]
        found = average_precision(detections, truths)
        return {name: found[name] for name in self.scores}


def _field(feature, name: str):
    """The feature of a field of the objects. Raises: ValueError (there is none)."""
    inner = getattr(feature, "feature", feature)  # List({…}), or {…: List(…)}
    if not isinstance(inner, Mapping) or name not in inner:
        fields = ", ".join(inner) if isinstance(inner, Mapping) else repr(inner)
        raise ValueError(f"finetune: objects must have the field {name!r} (task_options say which), got {fields}")
    return inner[name]


def _names(feature) -> list[str] | None:
    return getattr(getattr(feature, "feature", feature), "names", None)


def _check_inside(boxes: numpy.ndarray, size: tuple[float, float], row: int) -> None:
    """Raises: ValueError (a box that is not in an image of this width and height)."""
    width, height = size
    low, high = boxes[:, :2], boxes[:, 2:] - (width, height)
    slack = numpy.array([width, height]) * _OUTSIDE
    outside = (low < -slack).any(axis=1) | (high > slack).any(axis=1)
    if outside.any():
        wrong = boxes[int(outside.argmax())].tolist()
        raise ValueError(
            f"finetune: every box must lie in its image of {width:g} × {height:g} pixels, got {wrong} (left, top, right, bottom)"
            f" in row {row}; task_options.box_format says how they are written"
        )
