"""Making a trained LoRA adapter smaller: NoRM and its alternatives, on a model in memory or on files."""

from .config import ClipConfig, DropConfig, NoRMConfig, RandomConfig, SVDConfig, TAIAConfig
from .files import shear_files
from .live import shear
from .report import ShearReport

__all__ = [
    "ClipConfig",
    "DropConfig",
    "NoRMConfig",
    "RandomConfig",
    "SVDConfig",
    "ShearReport",
    "TAIAConfig",
    "shear",
    "shear_files",
]
