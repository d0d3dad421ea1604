"""Which modules of a model a configuration means, by PEFT's rules, and the pattern look-ups that go with them."""

import re

from torch import nn

from .nn import is_linear

ALL_LINEAR = "all-linear"
_HEADS = ("classifier", "score", "lm_head", "qa_outputs")


def matches(spec: str | list[str] | None, name: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name; a list holds names or their dotted suffixes."""
    if spec is None:
        return False
    if isinstance(spec, str):
        return re.fullmatch(spec, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in spec)


def matches_pattern(key: str, name: str) -> bool:
    """PEFT's rule for the keys of rank_pattern and alpha_pattern: a regular expression for the name or a dotted suffix of it."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def pattern_value(pattern: dict, name: str, default):
    """Value of the first key of `pattern` that matches `name`."""
    return next((value for key, value in pattern.items() if matches_pattern(key, name)), default)


_BLOCKS = re.compile(r"(?:.*\.)?blocks?\.\d+(?=\.)")
_LAYERS = re.compile(r"(?:.*?\.)?(?:layers?|h|resblocks)\.\d+(?=\.)")
_NUMBERED = re.compile(r"(?:.*?\.)?\d+(?=\.)")


def block_of(name: str) -> str:
    """
    Path of the transformer block that a module lies in, or its own name outside any.

    The number behind the last "block" or "blocks", else behind the first "layer", "layers", "h" or "resblocks", else the first one: T5
    numbers layers within its blocks, Swin blocks within its layers, and a wrapper may number the model itself.
    """
    found = next(filter(None, (rule.match(name) for rule in (_BLOCKS, _LAYERS, _NUMBERED))), None)
    return found[0] if found else name


def _output_heads(model: nn.Module) -> set[nn.Module]:
    """The modules that "all-linear" leaves out: the output embedding, and heads by their customary names."""
    heads = {getattr(model, name) for name in _HEADS if isinstance(getattr(model, name, None), nn.Module)}
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    if get_output_embeddings is not None and get_output_embeddings() is not None:
        heads.add(get_output_embeddings())
    return {module for head in heads for module in head.modules()}


def _inside(name: str, parents: list[str] | None) -> bool:
    return any(matches([parent], name) or f".{parent}." in f".{name}." for parent in parents or ())


def find_targets(model: nn.Module, config) -> dict[str, nn.Module]:
    """
    {name: module} that the configuration adapts, in the model's order.

    Raises: ValueError (a model that is adapted already, an entry of target_modules that names nothing, nothing left),
        TypeError (a named module that is no linear layer).
    """
    op = "attach"
    modules = dict(model.named_modules())
    # PEFT's layers, too, keep what they adapt as `base_layer`.
    adapted = next((name for name, module in modules.items() if hasattr(module, "base_layer")), None)
    if adapted is not None:
        kind = type(modules[adapted]).__name__
        raise ValueError(f"{op}: model must not be adapted already; {adapted!r} is a {kind} (detach or merge it first)")
    linear = {name: module for name, module in modules.items() if name and is_linear(module)}
    spec = config.target_modules
    if isinstance(spec, str) and spec.lower() == ALL_LINEAR:
        heads = _output_heads(model)
        chosen = {name: module for name, module in linear.items() if module not in heads}
    else:
        chosen = {name: module for name, module in modules.items() if name and matches(spec, name)}
        for entry in [] if isinstance(spec, str) else spec:
            if not any(matches([entry], name) for name in modules):
                raise ValueError(
                    f"{op}: target_modules must name modules of the model, got {entry!r}; linear ones: {_some(linear)}"
                )
    chosen = {
        name: module
        for name, module in chosen.items()
        if not matches(config.exclude_modules, name) and not _inside(name, config.modules_to_save)
    }
    for name, module in chosen.items():
        if name not in linear:
            raise TypeError(
                f"{op}: target_modules must be nn.Linear or Conv1D, got {type(module).__name__} at {name!r}"
            )
    if not chosen:
        raise ValueError(
            f"{op}: target_modules must match at least one module, got {spec!r}; linear ones: {_some(linear)}"
        )
    return chosen


def find_saved(model: nn.Module, config) -> dict[str, nn.Module]:
    """{name: module} trained and saved whole.  Raises: ValueError (an entry of modules_to_save that names nothing)."""
    found = {}
    for entry in config.modules_to_save or ():
        named = {name: module for name, module in model.named_modules() if name and matches([entry], name)}
        if not named:
            raise ValueError(f"attach: modules_to_save must name modules of the model, got {entry!r}")
        found.update(named)
    # A module inside another one that is saved is saved with it.
    return {name: module for name, module in found.items() if not any(name.startswith(f"{other}.") for other in found)}


def _some(names, count: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f", … ({len(names)} in all)" if len(names) > count else "")
