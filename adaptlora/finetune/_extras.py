"""Optional packages, imported when they are first needed."""

import importlib
from types import ModuleType

_RECIPES = (
    "PIL",
    "datasets",
    "diffusers",
    "rouge_score",
    "scipy",
    "yaml",
)  # packages of the extra `recipes`, which are not of `demo`


class MissingExtraError(ImportError):
    """A package of the extra `demo` or `recipes` is not installed; the message says how to install it."""


def need(package: str, purpose: str) -> ModuleType:
    """Import `package` now; where it is missing, say what wanted it and how to get it.

    Raises: MissingExtraError.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package.split(".")[0]:
            raise
        name = package.split(".")[0]
        extra = "recipes" if name in _RECIPES else "demo"
        raise MissingExtraError(
            f'{purpose} needs the package {name}, which is not installed: pip install "adaptlora[{extra}]"'
        ) from error
