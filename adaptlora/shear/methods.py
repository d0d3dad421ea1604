"""Which class carries out which configuration."""

from .base import Method
from .clip import Clip
from .config import ClipConfig, DropConfig, NoRMConfig, RandomConfig, SVDConfig, TAIAConfig
from .drop import TAIA, Drop, Random
from .norm import NoRM
from .svd import SVDTruncation

_METHODS = {
    NoRMConfig: NoRM,
    SVDConfig: SVDTruncation,
    ClipConfig: Clip,
    TAIAConfig: TAIA,
    RandomConfig: Random,
    DropConfig: Drop,
}


def method_for(config) -> Method:
    """Raises: TypeError (no configuration of shearing)."""
    if type(config) not in _METHODS:
        names = ", ".join(kind.__name__ for kind in _METHODS)
        raise TypeError(f"shear: config must be one of {names}, got {type(config).__name__}")
    return _METHODS[type(config)](config)
