"""adaptlora: adaptive-rank LoRA in which pruned ranks are really gone."""

from . import nn, ops
from .adapter import Adapter, RankChange, attach, load
from .config import LoraConfig, NormALConfig
from .integrations.compile import dynamic_ranks
from .ranks import RankedPair

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "LoraConfig",
    "NormALConfig",
    "RankChange",
    "RankedPair",
    "attach",
    "dynamic_ranks",
    "load",
    "nn",
    "ops",
]
