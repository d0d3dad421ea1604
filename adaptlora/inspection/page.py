"""One HTML page about one adapter, or two side by side, complete in itself: page.html with its style, its script and the data."""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib import resources
from itertools import takewhile
from pathlib import Path
from string import Template

from ..files import atomic_file
from ..plots import group_ticks, rank_grid
from ..rank_history import RankHistory
from .adapter import Inspection
from .updates import Comparison, ModuleComparison, spectra

MOST_STEPS = 240  # columns of ranks over the steps


def save_page(found: Inspection | Comparison, path: str | Path, labels: Sequence[str] | None = None) -> Path:
    """
    Write the page: heat maps of ranks, norms and singular values of each module, ranks over the steps, a table to sort and filter;
    of two adapters their ranks on one colour scale, differences, cosines and overlaps.

    It makes no request, and its own policy forbids any; names from the adapters' files are text to it, never markup.

    Args: path: an .html file, in a folder that is there.   labels: what to call the adapter, or the two; their paths by default.
    Raises: ValueError (path, a configuration without the scalings), OSError.   The file appears when it is complete.
    """
    path = Path(path)
    check_page_path("save_page", "path", path)
    text = page(found, labels)
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def check_page_path(op: str, name: str, path: Path) -> None:
    """Raises: ValueError if a page could not be written there."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{op}: {name} must end in .html, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"{op}: {name} must be in a folder that is there, got {str(path)!r}")


def page(found: Inspection | Comparison, labels: Sequence[str] | None = None) -> str:
    """The text of the page; see `save_page`."""
    sides = [found.first, found.second] if isinstance(found, Comparison) else [found]
    labels = list(labels or (str(side.path) for side in sides))
    if len(labels) != len(sides):
        raise ValueError(f"page: labels must be {len(sides)}, got {labels}")
    texts = {name: resources.files(__package__).joinpath(f"page.{name}").read_text("utf-8") for name in ("css", "js")}
    policy = {
        "default-src": "'none'",
        "script-src": _digest(texts["js"]),
        "style-src": _digest(texts["css"]),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    template = Template(resources.files(__package__).joinpath("page.html").read_text("utf-8"))
    return template.substitute(
        title=html.escape("Adapter: " + labels[0] if len(sides) == 1 else "Adapters: " + " and ".join(labels)),
        policy="; ".join(f"{name} {value}" for name, value in policy.items()),
        style=texts["css"],
        script=texts["js"],
        data=_embedded(page_data(found, labels)),
    )


def _digest(text: str) -> str:
    """A script or style of this very text, as a policy allows it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(data: dict) -> str:
    """JSON that no HTML parser sees a tag or a character reference in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def page_data(found: Inspection | Comparison, labels: Sequence[str]) -> dict:
    """What the script draws, as plain lists, numbers and texts; numbers have four digits."""
    two = isinstance(found, Comparison)
    sides = [found.first, found.second] if two else [found]
    of_spectra = found.spectra if two else (spectra(found),)
    of_modules = [{module.name: module for module in side.modules} for side in sides]
    both = {module.name: module for module in found.modules} if two else {}
    names = list(dict.fromkeys(name for side in of_modules for name in side))
    kinds, layers, grid = rank_grid({name: i for i, name in enumerate(names)})
    prefix = common_prefix(names)
    modules = []
    for name in names:
        each = [side.get(name) for side in of_modules]
        spectrum = [side.get(name) for side in of_spectra]
        lora_A, lora_B = next((module.shape_A, module.shape_B) for module in each if module)
        modules.append(
            {
                "name": name,
                "short": name.removeprefix(prefix),
                "shape": [lora_A[1], lora_B[0]],
                "ranks": [module and module.rank for module in each],
                "parameters": [module and module.parameters for module in each],
                "norms": [module and _rounded(module.norms) for module in each],
                "lowest": [min(_rounded(module.scores), default=None) if module else None for module in each],
                "values": [one and _rounded(one.singular_values) for one in spectrum],
                "norm": [one and _rounded([one.norm])[0] for one in spectrum],
                "rank90": [one and one.rank_90 for one in spectrum],
                "both": _both(both[name]) if name in both else None,
            }
        )
    return {
        "labels": list(labels),
        "adapters": [_adapter(side, label) for side, label in zip(sides, labels, strict=True)],
        "kinds": kinds,
        "layers": layers,
        "grid": grid,
        "prefix": prefix,
        "modules": modules,
        "together": _together(found) if two else None,
        "lists": _lists(found, sides, labels),
    }


def common_prefix(names: Sequence[str]) -> str:
    """Path that all the names are under; told once, it leaves rows that fit a line."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{level[0]}." for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _both(module: ModuleComparison) -> dict:
    numbers = (module.cosine, module.distance, module.overlap_out, module.overlap_in)
    rounded = [None if number is None else _rounded([number])[0] for number in numbers]
    angles = {"anglesOut": _rounded(module.angles_out), "anglesIn": _rounded(module.angles_in)}
    return dict(zip(("cosine", "distance", "out", "in"), rounded, strict=True)) | angles


def _adapter(found: Inspection, label: str) -> dict:
    ranks = found.ranks()
    facts = [
        ("modules", f"{len(ranks):,}"),
        ("rank vectors", f"{sum(ranks.values()):,}"),
        ("average rank", f"{sum(ranks.values()) / len(ranks):.2f}"),
        ("ranks", f"{min(ranks.values())} to {max(ranks.values())}"),
        ("parameters in them", f"{found.parameters():,}"),
        ("file", f"{found.file_bytes:,} bytes, {found.kind}"),
    ]
    for name in ("r", "lora_alpha", "base_model_name_or_path"):
        if found.config.get(name):
            facts.append((name, str(found.config[name])))
    caveat = found.caveat()
    return {"label": label, "facts": facts, "notes": [f"{caveat}."] if caveat else [], "history": _history(found)}


def _history(found: Inspection) -> dict | None:
    history: RankHistory | None = found.history
    if history is None:
        return None
    columns = min(MOST_STEPS, history.steps + 1)
    steps = sorted({round(i * history.steps / max(1, columns - 1)) for i in range(columns)})
    groups = list(history.groups)
    ticks = zip(*group_ticks(groups, 24), strict=True)
    return {
        "file": found.history_file,
        "groups": groups,
        "steps": steps,
        "ranks": history.at(steps),
        "ticks": list(ticks),
    }


def _together(found: Comparison) -> dict:
    first, second = found.first.parameters(), found.second.parameters()
    rows = [
        ("modules in both", f"{len(found.modules):,}"),
        ("parameters", f"{first:,} → {second:,} ({second / first - 1:+.1%})"),
    ]
    for name, value, form in (
        ("cosine of all ΔW", found.cosine(), "{:.4f}"),
        ("distance of all ΔW", found.distance(), "{:.4f}"),
        ("overlap, mean of those in both", found.overlap(), "{:.1%}"),
    ):
        rows.append((name, "–" if value is None else form.format(value)))
    return {"facts": rows, "notes": [f"All ΔW: {found.scope()}."]}


def _lists(found: Inspection | Comparison, sides: Sequence[Inspection], labels: Sequence[str]) -> list:
    lists = []
    if isinstance(found, Comparison):
        for label, names in zip(labels, (found.only_first, found.only_second), strict=True):
            lists.append((f"Modules in {label} only", names))
        shapes = [f"{name}: {a[1]}→{a[0]} and {b[1]}→{b[0]}" for name, (a, b) in found.other_shapes.items()]
        lists.append(("Modules of two shapes, which are not compared", shapes))
    for side, label in zip(sides, labels, strict=True):
        of = f" ({label})" if len(sides) > 1 else ""
        lists.append(
            (f"Saved beside the factors{of}", [f"{name}: {n:,} parameters" for name, n in side.others.items()])
        )
        lists.append((f"No plain LoRA{of}", [f"{name}: {why}" for name, why in side.skipped.items()]))
        if side.history is not None:
            empty = [name for name, rank in side.history.final_ranks().items() if not rank]
            lists.append((f"Of rank 0, not in the file{of}", empty))
    return [(title, entries) for title, entries in lists if entries]
