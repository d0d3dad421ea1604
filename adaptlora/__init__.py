"""adaptlora: adaptive-rank LoRA in which pruned ranks are really gone."""

from . import nn, ops
from .adapter import Adapter, RankChange, attach, load, trained_parameters
from .checkpoint import check_checkpoint, last_checkpoint, load_checkpoint, save_checkpoint
from .config import AdaLoRAConfig, DyLoRAConfig, LaLoRAConfig, LoraConfig, NoRAConfig, NormALConfig
from .distributed.faults import ProcessError
from .integrations.accelerate import Acceleration, accelerate, restore
from .integrations.compile import dynamic_ranks
from .integrations.from_peft import from_peft
from .integrations.peft_prune import prune
from .logs import log_values
from .methods import NonFiniteError, register_method
from .optimizer_state import register_optimizer_state
from .ranks import RankedPair
from .shear import (
    ClipConfig,
    DropConfig,
    NoRMConfig,
    RandomConfig,
    ShearReport,
    SVDConfig,
    TAIAConfig,
    shear,
    shear_files,
)

__version__ = "0.1.0"

__all__ = [
    "Acceleration",
    "AdaLoRAConfig",
    "Adapter",
    "ClipConfig",
    "DropConfig",
    "DyLoRAConfig",
    "LaLoRAConfig",
    "LoraConfig",
    "NoRAConfig",
    "NoRMConfig",
    "NonFiniteError",
    "NormALConfig",
    "ProcessError",
    "RandomConfig",
    "RankChange",
    "RankedPair",
    "SVDConfig",
    "ShearReport",
    "TAIAConfig",
    "accelerate",
    "attach",
    "check_checkpoint",
    "dynamic_ranks",
    "from_peft",
    "last_checkpoint",
    "load",
    "load_checkpoint",
    "log_values",
    "nn",
    "ops",
    "prune",
    "register_method",
    "register_optimizer_state",
    "restore",
    "save_checkpoint",
    "shear",
    "shear_files",
    "trained_parameters",
]
