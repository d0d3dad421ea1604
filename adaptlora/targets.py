"""Which modules of a model a configuration means, by PEFT's rules, and the pattern look-ups that go with them."""

import functools
import math
import re
from re import _constants as codes
from re import _parser as parser

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
    return _suffix_rule(key).match(name) is not None


@functools.lru_cache(1 << 14)  # re's own holds fewer than an adapter may have patterns
def _suffix_rule(key: str) -> re.Pattern:
    return re.compile(rf"(.*\.)?({key})$")


def pattern_value(pattern: dict, name: str, default):
    """Value of the first key of `pattern` that matches `name`."""
    return next((value for key, value in pattern.items() if matches_pattern(key, name)), default)


def in_layers(config, name: str) -> bool:
    """PEFT's rule for layers_to_transform and layers_pattern: the first number behind the pattern, or in the name, must be one of them."""
    numbers = config.layers_to_transform
    if numbers is None or numbers == []:
        return True
    patterns = config.layers_pattern
    patterns = [patterns] if isinstance(patterns, str) else patterns
    rules = [rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\." for pattern in patterns or ()]
    found = (re.match(rule, name) for rule in rules or [r".*?\.[^.]*\.(?P<layer>\d+)\."])
    layer = next((match["layer"] for match in found if match), None)
    return layer is not None and int(layer) in ([numbers] if isinstance(numbers, int) else numbers)


_MOST_STEPS = 5e9  # some ten seconds at the very worst: literals cut real expressions short long before
_MOST_REPEATS = 1000
_USUAL_LENGTH = 100  # of a model's longest module name


def check_expressions(op: str, where: str, expressions, names) -> None:
    """
    Regular expressions from a file must not take forever on the names of modules.

    Raises: ValueError (no regular expression, an exponential one, or so many of polynomial length).
    """
    length = max([_USUAL_LENGTH, *map(len, names)])
    steps = 0.0
    for expression in expressions:
        try:
            # as `matches_pattern` has it
            ways, degree = _ways(parser.parse(rf"(.*\.)?({expression})$"), length, False)
        except (ValueError, RecursionError, OverflowError, re.error) as error:
            rule = "must be a regular expression that cannot take forever"
            raise ValueError(f"{op}: {where} {rule}, got {expression[:80]!r}: {error}") from error
        literal = (ways, degree) == (
            2.0,
            1,
        )  # but for what is put before it; an adapter may have one for each of its modules
        steps += (10 if literal else min(ways, 1e30) * math.comb(length + degree, degree)) * len(names)
    if steps > _MOST_STEPS:
        raise ValueError(
            f"{op}: {where} must need at most {_MOST_STEPS:g} steps on {len(names)} names, got {steps:.2g}"
        )


def _ways(tree, length: int, repeated: bool) -> tuple[float, int]:
    """
    (w, d): a parsed expression matches at one place of a name of n characters in at most w · C(n + d, d) ways, for its d unbounded
    repeats share the name between them; a bound on what backtracking tries.
    """
    ways, degree = 1.0, 0
    for code, argument in tree:
        inner = (1.0, 0)
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT):
            inner = _repeat_ways(*argument, length, repeated)
        elif code is codes.BRANCH:
            inner = _branch_ways(argument[1], length, repeated)
        elif code is codes.SUBPATTERN:
            inner = _ways(argument[-1], length, repeated)
        elif code is codes.ATOMIC_GROUP:
            inner = _ways(argument, length, repeated)
        elif code in (codes.ASSERT, codes.ASSERT_NOT):
            within, of_degree = _ways(argument[1], length, repeated)
            inner = (within * math.comb(length + of_degree, of_degree), 0)
        elif code is codes.GROUPREF_EXISTS:
            inner = _sum([_ways(part, length, repeated) for part in argument[1:] if part is not None])
        if repeated and inner != (1.0, 0):
            raise ValueError("what is repeated must match in one way")
        ways, degree = ways * inner[0], degree + inner[1]
    return ways, degree


def _repeat_ways(least: int, most: int, body, length: int, repeated: bool) -> tuple[float, int]:
    if least > _MOST_REPEATS or _MOST_REPEATS < most < codes.MAXREPEAT:
        raise ValueError(f"a repeat must be of at most {_MOST_REPEATS} times or unbounded")
    if repeated and most > 1:
        raise ValueError("a repeat must not be repeated")
    ways, degree = _ways(body, length, repeated or most > 1)
    return (ways, degree + 1) if most == codes.MAXREPEAT else (ways * (most - least) + 1, degree)


def _branch_ways(alternatives, length: int, repeated: bool) -> tuple[float, int]:
    """Of plain words only those match at one place that begin one another."""
    if any(code is not codes.LITERAL for alternative in alternatives for code, _ in alternative):
        return _sum([_ways(alternative, length, repeated) for alternative in alternatives])
    chain, longest = [], 1
    for word in sorted([letter for _, letter in alternative] for alternative in alternatives):
        while chain and word[: len(chain[-1])] != chain[-1]:
            chain.pop()
        chain.append(word)
        longest = max(longest, len(chain))
    return float(longest), 0


def _sum(parts: list[tuple[float, int]]) -> tuple[float, int]:
    return sum(ways for ways, _ in parts), max(degree for _, degree in parts)


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


def find_targets(model: nn.Module, config, whole=None) -> dict[str, nn.Module]:
    """
    {name: module} that the configuration adapts, in the model's order; none in a module that is trained whole.

    Args: whole: names of such modules, instead of what modules_to_save means.
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
    whole = list(find_saved(model, config, whole))
    linear = {name: module for name, module in modules.items() if name and is_linear(module)}
    spec = config.target_modules
    if isinstance(spec, str) and spec.lower() == ALL_LINEAR:
        heads = _output_heads(model)
        chosen = {name: module for name, module in linear.items() if module not in heads}
    else:
        chosen = {
            name: module
            for name, module in modules.items()
            if name and matches(spec, name) and (isinstance(spec, str) or name in spec or in_layers(config, name))
        }
        for entry in [] if isinstance(spec, str) else spec:
            if not any(matches([entry], name) for name in modules):
                parameters = [name for name, _ in model.named_parameters() if matches([entry], name)]
                kind = " (a parameter)" if parameters else ""
                raise ValueError(
                    f"{op}: target_modules must name modules of the model, got {entry!r}{kind}; linear ones: {_some(linear)}"
                )
    chosen = {
        name: module
        for name, module in chosen.items()
        if not matches(config.exclude_modules, name) and not any(f"{name}.".startswith(f"{other}.") for other in whole)
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


def find_stacked(model: nn.Module, config) -> dict[str, tuple[int, ...]]:
    """
    {name: shape (E, ·, ·)} of the stacked weights of a mixture's E experts, which "all-linear" asks for and no layer can adapt: they
    are parameters of one module, not linear layers. Empty for other targets; without what is excluded or saved whole.
    """
    if not (isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR):
        return {}
    return {
        f"{name}.{key}".lstrip("."): tuple(parameter.shape)
        for name, module in model.named_modules()
        # torch's own are convolutions and the like
        if not type(module).__module__.startswith("torch.nn.")
        and not matches(config.exclude_modules, name)
        and not _inside(name, config.modules_to_save)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1
    }


def find_saved(model: nn.Module, config, whole=None) -> dict[str, nn.Module]:
    """
    {name: module} trained and saved whole, by PEFT's rule: an entry of modules_to_save is the end of a name, wherever in a word it begins.

    Args: whole: full names, instead of modules_to_save.
    Raises: ValueError (an entry that names nothing).
    """
    found = {}
    for entry in (config.modules_to_save or ()) if whole is None else whole:
        means = str.endswith if whole is None else str.__eq__
        named = {name: module for name, module in model.named_modules() if name and means(name, entry)}
        if not named:
            raise ValueError(f"attach: modules_to_save must name modules of the model, got {entry!r}")
        found.update(named)
    # A module inside another one that is saved is saved with it.
    return {name: module for name, module in found.items() if not any(name.startswith(f"{other}.") for other in found)}


def _some(names, count: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f", … ({len(names)} in all)" if len(names) > count else "")
