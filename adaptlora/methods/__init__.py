"""What decides the ranks while a model trains."""

from ..config import LoraConfig, NormALConfig
from .base import FixedRank, Method
from .normal import NormAL

METHODS = {LoraConfig: FixedRank, NormALConfig: NormAL}


def method_for(config, layers) -> Method:
    """The method that a configuration asks for, checked against the modules it will decide about."""
    return METHODS[type(config)](config, layers)
