"""The command `adaptlora`: finetune, shear, inspect, tune, doctor."""

from . import finetune, shear, inspect, tune, doctor  # isort: skip  (the order of the help)
from .app import app

__all__ = ["app", "doctor", "finetune", "inspect", "shear", "tune"]
