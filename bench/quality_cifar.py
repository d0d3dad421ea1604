"""CIFAR-10 on DINOv2-S at 70 px: the weights out of an ONNX file, the images out of a JSON of PNGs, and the loop's view of both.

The weights come from a saliency package and went through its training: what they know is not the original's. The images are
CIFAR-10's test set, split here with a fixed seed. Accuracies do not compare with published ones. Both are kept under data_dir once
converted.
"""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from quality_tasks import QualityTask
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adaptlora.files import atomic_file
from adaptlora.finetune.fetch import locate

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as DINOv2 was trained
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def _weights(file: Path) -> dict[str, Tensor]:
    """transformers' names and layouts; a matrix without a name in the file is known by the node that multiplies with it."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(str(file)).graph
    values = {tensor.name: torch.from_numpy(to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {name: value for name, value in values.items() if name.startswith("backbone.")}
    positions = {}
    for node in graph.node:
        operand = next((values[name] for name in node.input if name.startswith("onnx::") and name in values), None)
        if operand is None:
            continue
        if node.op_type == "MatMul":
            weights[node.name[1:].removesuffix("/MatMul").replace("/", ".") + ".weight"] = operand.t().contiguous()
        else:  # the position of the class token is concatenated with those of the patches, which are reshaped
            positions[node.op_type] = operand
    weights["backbone.embeddings.position_embeddings"] = torch.cat([positions["Concat"], positions["Reshape"]], 1)
    renamed = {}
    for name, value in weights.items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        renamed[name.replace("backbone.", "dinov2.")] = value
    return renamed


def _converted(data_dir: Path) -> Path:
    file = data_dir / "dinov2-s.safetensors"
    if not file.is_file():
        with atomic_file(file) as partial:
            save_file(_weights(locate("dinov2", data_dir)), partial)
    return file


def _images(data_dir: Path, sizes: dict[str, int]) -> tuple[Tensor, Tensor]:
    """(images (n, 3, 32, 32) uint8, labels (n,)), the first that are needed of the order that the seed gives."""
    count, seed = sizes["train"] + sizes["validation"] + sizes["test"], sizes["seed"]
    file = data_dir / f"cifar10-{count}-{seed}.safetensors"
    if not file.is_file():
        examples = json.loads(locate("cifar10", data_dir).read_text())["examples"]
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
        chosen = [examples[i] for i in order[:count].tolist()]
        classes = sorted(chosen[0]["target_scores"])
        pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(e["input"]))).convert("RGB")) for e in chosen]
        labels = [classes.index(max(e["target_scores"], key=e["target_scores"].get)) for e in chosen]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        with atomic_file(file) as partial:
            save_file({"images": images, "labels": torch.tensor(labels)}, partial)
    found = load_file(file)
    return found["images"], found["labels"]


class Cifar10:
    """Ten classes on the class token and the mean of the patches, as transformers' Dinov2ForImageClassification has it."""

    def __init__(self, fixed: QualityTask, *, data_dir: str, validating: bool):
        self.fixed = fixed
        self._weights = load_file(_converted(Path(data_dir)))
        images, labels = _images(Path(data_dir), fixed.data)
        train, validation, test = (fixed.data[name] for name in ("train", "validation", "test"))
        parts = [part.split([train, validation, test]) for part in (images, labels)]
        self._train, held, tested = zip(*parts, strict=True)
        self._test = held if validating else tested

    def model(self, seed: int) -> nn.Module:
        config = transformers.Dinov2Config(
            hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, num_labels=10
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of the head
            model = transformers.Dinov2ForImageClassification(config)
        missing, unexpected = model.load_state_dict(self._weights, strict=False)
        missing = sorted(set(missing) - {"classifier.weight", "classifier.bias", "dinov2.embeddings.mask_token"})
        if missing or unexpected:
            raise ValueError(f"cifar10: the weights must be DINOv2-S's, got {missing} missing, {unexpected} unknown")
        return model

    def heads(self, model: nn.Module) -> list[str]:
        return ["classifier"]

    def _batch(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        large = F.interpolate(
            images.float() / 255, (self.fixed.data["pixels"],) * 2, mode="bicubic", align_corners=False
        )
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        return {"pixel_values": (large - mean) / std, "labels": labels}

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        wanted, train = self.fixed.steps * self.fixed.batch_size, len(self._train[1])
        order = torch.cat([torch.randperm(train, generator=generator) for _ in range(-(-wanted // train))])
        for rows in order[:wanted].split(self.fixed.batch_size):
            yield self._batch(self._train[0][rows], self._train[1][rows])

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        model.eval()
        right = 0
        for images, labels in zip(*(part.split(50) for part in self._test), strict=True):
            batch = self._batch(images, labels)
            right += int((model(pixel_values=batch["pixel_values"]).logits.argmax(1) == labels).sum())
        return right / len(self._test[1])
