"""What decides the ranks while a model trains."""

from ..config import AdaLoRAConfig, DyLoRAConfig, LaLoRAConfig, LoraConfig, NoRAConfig, NormALConfig
from .adalora import AdaLoRA
from .base import Attachment, Method, NonFiniteError
from .dylora import DyLoRA
from .lalora import LaLoRA
from .nora import NoRA
from .normal import NormAL

__all__ = ["METHODS", "Attachment", "Method", "NonFiniteError", "check_config"]

METHODS = {
    LoraConfig: Method,
    NormALConfig: NormAL,
    LaLoRAConfig: LaLoRA,
    NoRAConfig: NoRA,
    AdaLoRAConfig: AdaLoRA,
    DyLoRAConfig: DyLoRA,
}


def check_config(config) -> None:
    """Raises: TypeError if `config` is no configuration of this package (PEFT's LoraConfig, for one, is not)."""
    if type(config) not in METHODS:
        names = ", ".join(kind.__name__ for kind in METHODS)
        raise TypeError(
            f"attach: config must be one of adaptlora's {names}, got {type(config).__module__}.{type(config).__name__}"
        )
