"""CLIP on a few images of each class: an image belongs to the class whose sentence is nearest to it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from .. import metrics, tiny_clip
from ..data import Dataset
from ..presets import FinetuneSpec
from .image_classification import ImageClassificationOptions, LabelledImages, class_ids, class_names


@dataclass(frozen=True)
class ClipFewShotOptions(ImageClassificationOptions):
    """
    Args:
        shots: training images of each class; a class with fewer is refused.
        shots_seed: of the choice, on its own, so that runs with several seeds train on the same images.
        prompt: the sentence of a class, with {} for its name.
        names: of the classes in these sentences, in the order of the data set's; without them its own, with blanks for underscores.
    """

    shots: int = 16
    shots_seed: int = 0
    prompt: str = "a photo of a {}."
    names: Sequence[str] = ()

    def __post_init__(self):
        super().__post_init__()
        self.rule("shots", isinstance(self.shots, int) and self.shots >= 1, "an integer ≥ 1")
        self.rule("shots_seed", isinstance(self.shots_seed, int) and self.shots_seed >= 0, "an integer ≥ 0")
        self.rule("prompt", isinstance(self.prompt, str) and self.prompt.count("{}") == 1, "a text with one {}")


class ClipFewShot(LabelledImages):
    """Cross-entropy over the similarities of an image with all classes' sentences; both towers may be adapted."""

    Options = ClipFewShotOptions
    _tiny_options: ClassVar = {**LabelledImages._tiny_options, "shots": 2, "names": ()}
    _auto = "AutoModelForZeroShotImageClassification"

    @classmethod
    def read(cls, spec: FinetuneSpec) -> Dataset:
        data, options = super().read(spec), cls.Options(**spec.task_options)
        classes = class_names(data.train)
        rows = few(class_ids(data.train, classes), classes, options.shots, seed=options.shots_seed)
        return replace(data, train=data.train.select(rows))

    def _prepare(self) -> None:
        super()._prepare()
        names = list(self.options.names) or [name.replace("_", " ") for name in self.classes]
        if len(names) != len(self.classes):
            raise ValueError(
                f"finetune: task_options.names must have a name for each of {len(self.classes)} classes, got {len(names)}"
            )
        tokenizer = self._pretrained("AutoTokenizer")
        sentences = tokenizer([self.options.prompt.format(name) for name in names], padding=True, return_tensors="pt")
        width = sentences["input_ids"].shape[1]
        if width > tokenizer.model_max_length:
            raise ValueError(
                f"finetune: every class's sentence must have at most {tokenizer.model_max_length} tokens, got {width} in the longest"
            )
        self._sentences = {name: sentences[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(self.output(model, batch).float(), batch["labels"])

    def output(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Similarities (batch, classes), scaled by the model's temperature."""
        return model(pixel_values=batch["pixel_values"], **self._sentences).logits_per_image

    @torch.no_grad()
    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        classes = normalize(model.get_text_features(**self._sentences).pooler_output, dim=-1)
        answers = []
        for batch in self.test_batches():
            images = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
            answers.append(((images @ classes.T).argmax(-1), batch["labels"]))
        found, labels = (torch.cat(parts).cpu() for parts in zip(*answers, strict=True))
        return {"accuracy": metrics.accuracy(found, labels)}

    @classmethod
    def write_tiny(cls, architecture, folder: Path, rows: list[dict], *, seed: int = 0) -> None:
        super().write_tiny(architecture, folder, rows, seed=seed)
        tiny_clip.tokenizer(architecture["tiny"]["text_config"]["max_position_embeddings"]).save_pretrained(folder)


def few(labels: Sequence[int], classes: Sequence[str], shots: int, *, seed: int) -> list[int]:
    """Rows of a few-shot training set, `shots` of each class chosen at random, in the order of `labels`.

    Raises: ValueError (a class with fewer).
    """
    generator = torch.Generator().manual_seed(seed)
    members: list[list[int]] = [[] for _ in classes]
    for row, label in enumerate(labels):
        members[label].append(row)
    chosen = []
    for name, rows in zip(classes, members, strict=True):
        if len(rows) < shots:
            raise ValueError(
                f"finetune: task_options.shots must be at most the number of images of each class, got {shots} for {len(rows)} of {name!r}"
            )
        chosen += [rows[at] for at in torch.randperm(len(rows), generator=generator)[:shots].tolist()]
    return sorted(chosen)
