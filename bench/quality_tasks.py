"""The tasks of the quality tables: TREC-6 on MiniLM, E2E on SmolLM2-135M, CIFAR-10 on DINOv2-S, each cut to what two cores can repeat.

A task has `model(seed)`, `heads(model)`, `batches(seed)`, `score(model)`, and the fields of `QualityTask`. What a learning rate is
chosen by (`validating=True`) is a part of the training data that no run of a task trains on.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from adaptlora.finetune import data as data_module
from adaptlora.finetune import preset, tasks


@dataclass(frozen=True)
class QualityTask:
    """What is fixed for all methods of a task."""

    steps: int
    batch_size: int
    metric: str
    higher_is_better: bool
    targets: str | list[str]
    data: dict[str, int]  # how many examples train, validate and test, and the seed that chooses them


class TextTask:
    """A preset of `adaptlora finetune`, with fewer and smaller steps."""

    def __init__(self, name: str, fixed: QualityTask, *, data_dir: str, validating: bool):
        self.fixed = fixed
        self._spec = dataclasses.replace(
            preset(name), compare=False, data_dir=data_dir, generate=0, method="lora", options={},
            steps=fixed.steps, batch_size=fixed.batch_size,
        )  # fmt: skip
        whole = data_module.load(self._spec)
        train, held = (
            [whole.train[i] for i in rows]
            for rows in data_module.held_out(
                [row["text"] for row in whole.train], fixed.data["validation"], seed=fixed.data["seed"]
            )
        )
        self._data = data_module.Dataset(
            train, (held if validating else whole.test)[: fixed.data["test"]], whole.duplicates
        )
        self._task = None

    def _for(self, seed: int):
        if self._task is None or self._task.spec.seed != seed:
            self._task = tasks.build(dataclasses.replace(self._spec, seed=seed), self._data)
        return self._task

    def model(self, seed: int) -> nn.Module:
        return self._for(seed).model()

    def heads(self, model: nn.Module) -> list[str]:
        return self._task.heads(model)

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        return self._for(seed).batches()

    def score(self, model: nn.Module) -> float:
        return self._task.evaluate(model)[self.fixed.metric]


# E2E: perplexity of 32 held-out references; validation holds out 20 whole meaning representations more.
FIXED = {
    "trec": QualityTask(
        120, 16, "accuracy", True, preset("trec").target_modules, {"validation": 500, "test": 1000, "seed": 7}
    ),
    "e2e": QualityTask(
        20, 4, "perplexity", False, list(preset("e2e").target_modules), {"validation": 20, "test": 32, "seed": 7}
    ),
    "cifar10": QualityTask(
        60, 16, "accuracy", True, r".*\.layer\.\d+\..*\.(q_proj|k_proj|v_proj|o_proj|fc1|fc2)",
        {"train": 2000, "validation": 400, "test": 500, "seed": 7, "pixels": 70},
    ),
}  # fmt: skip


def build(name: str, data_dir: str, *, validating: bool):
    if name == "cifar10":
        from quality_cifar import Cifar10  # reads images: no other table needs what it imports

        return Cifar10(FIXED[name], data_dir=data_dir, validating=validating)
    return TextTask(name, FIXED[name], data_dir=data_dir, validating=validating)
