"""The command `adaptlora`: finetune, shear, export, inspect, bench, tune, doctor."""

from . import finetune, shear, export, inspect, bench, tune, doctor  # isort: skip  (the order of the help)
from .app import app

__all__ = ["app", "bench", "doctor", "export", "finetune", "inspect", "shear", "tune"]
