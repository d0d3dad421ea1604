"""What decides the ranks while a model trains."""

from collections.abc import Callable

from ..config import AdaLoRAConfig, DyLoRAConfig, LaLoRAConfig, LoraConfig, NoRAConfig, NormALConfig
from .adalora import AdaLoRA
from .base import Attachment, Method, NonFiniteError
from .dylora import DyLoRA
from .lalora import LaLoRA
from .nora import NoRA
from .normal import NormAL

__all__ = ["METHODS", "Attachment", "Method", "NonFiniteError", "check_config", "register_method"]

METHODS = {
    LoraConfig: Method,
    NormALConfig: NormAL,
    LaLoRAConfig: LaLoRA,
    NoRAConfig: NoRA,
    AdaLoRAConfig: AdaLoRA,
    DyLoRAConfig: DyLoRA,
}


def register_method(config: type[LoraConfig]) -> Callable[[type[Method]], type[Method]]:
    """
    A class decorator: `attach` then trains by the decorated method wherever it is given a configuration of the class `config`.

    The class must be derived from `adaptlora.methods.Method`, whose docstring says what is called when and may be overridden.

    Args:
        config: a dataclass derived from LoraConfig, with the method's own fields.
    Raises: TypeError (other classes), ValueError (a configuration that has a method). Nothing is registered then.
    """
    if not (isinstance(config, type) and issubclass(config, LoraConfig) and "__dataclass_fields__" in vars(config)):
        raise TypeError(f"register_method: config must be a dataclass derived from LoraConfig, got {config!r}")
    if config in METHODS:
        raise ValueError(
            f"register_method: {config.__name__} must have no method yet, and it has {METHODS[config].__name__}"
        )

    def register(method: type[Method]) -> type[Method]:
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise TypeError(f"register_method: method must be a class derived from Method, got {method!r}")
        METHODS[config] = method
        return method

    return register


def check_config(config) -> None:
    """Raises: TypeError if `config` is of no class that has a method (PEFT's LoraConfig, for one, has none)."""
    if type(config) not in METHODS:
        names = ", ".join(kind.__name__ for kind in METHODS)
        raise TypeError(
            f"attach: config must be one of adaptlora's {names}, got {type(config).__module__}.{type(config).__name__}"
        )
