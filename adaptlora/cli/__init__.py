"""The command `adaptlora`: finetune, shear, export, inspect, tune, doctor."""

from . import finetune, shear, export, inspect, tune, doctor  # isort: skip  (the order of the help)
from .app import app

__all__ = ["app", "doctor", "export", "finetune", "inspect", "shear", "tune"]
