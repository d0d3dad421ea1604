"""The tasks: how examples become batches, which model learns them, what it is scored by. The loop knows none of them.

A task is a class of its own file here, with a line in adaptlora.finetune.registry.
"""

from ..data import Dataset
from ..presets import FinetuneSpec
from ..registry import task_class
from .base import Options, Task
from .text import IGNORED

__all__ = ["IGNORED", "Options", "Task", "build"]


def build(spec: FinetuneSpec, data: Dataset) -> Task:
    """The task of a spec. Raises: ValueError, MissingExtraError."""
    return task_class(spec.task)(spec, data)
