"""Pictures: ranks as heat maps, losses as curves. Files appear only when they are complete."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .files import atomic_file
from .finetune._extras import need
from .rank_history import RankHistory

LAYER = r"(?:^|\.)(\d+)(?:\.|$)"  # the first number in a module's name
INK, MUTED, OURS, THEIRS = "#1a1a1a", "#8a8a8a", "#0b6e99", "#d1701c"


def rank_grid(ranks: Mapping[str, int]) -> tuple[list[str], list[str], list[list[int | None]]]:
    """Ranks by module name → (kinds, layers, table): a row for each kind of module, a column for each layer.

    The first number in a name is its layer and what follows is its kind; names without a number make up a layer "–".
    The table has None where a layer has no such module. Kinds keep the order of the names; layers ascend.
    """
    cells: dict[tuple[str, str], int] = {}
    for name, rank in ranks.items():
        match = re.search(LAYER, name)
        layer, kind = (match.group(1), name[match.end() :] or name) if match else ("–", name)
        if (kind, layer) in cells:  # two stacks with the same numbering: an encoder's and a decoder's
            kind = f"{name[: match.start()]}: {kind}" if match else name
        cells[kind, layer] = rank
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = sorted(
        dict.fromkeys(layer for _, layer in cells), key=lambda layer: (layer == "–", int(layer) if layer != "–" else 0)
    )
    return kinds, layers, [[cells.get((kind, layer)) for layer in layers] for kind in kinds]


def describe_ranks(ranks: Mapping[str, int]) -> str:
    """How much rank there is, in words."""
    total = sum(ranks.values())
    return f"{total} vectors in {len(ranks)} modules, {total / len(ranks):.2f} on average"


def rank_heatmap(
    ranks: Mapping[str, int], path: str | Path, *, max_rank: int | None = None, title: str = "Ranks"
) -> Path:
    """PNG of ranks, modules × layers, each cell with its number; a cell without a module stays empty.

    Args:
        ranks: rank by module name, at least one.
        max_rank: top of the colour scale; default: the highest rank.
    Raises: ValueError (no ranks), MissingExtraError.
    """
    if not ranks:
        raise ValueError("rank_heatmap: ranks must name at least one module, got none")
    kinds, layers, table = rank_grid(ranks)
    top = max(max_rank or 0, *ranks.values(), 1)
    figure = need("matplotlib.figure", "a picture").Figure(figsize=grid_size(kinds, layers), layout="constrained")
    axes = figure.add_subplot()
    image = draw_grid(axes, kinds, layers, table, colours="YlGnBu", low=0, top=top)
    axes.set_title(title, fontsize=10, loc="left")
    colour_bar(figure, image, axes, "rank (vectors)", pad=0.02, fraction=0.06)
    return save_figure(figure, path)


def grid_size(kinds: Sequence[str], layers: Sequence[str]) -> tuple[float, float]:
    """Inches that a heat map of so many rows and columns needs, with its colour bar."""
    cell = 0.46 if len(layers) <= 16 else 0.34
    width = max(4.6, cell * len(layers) + 0.085 * max(map(len, kinds)) + 1.7)
    return width, max(2.2, 0.38 * len(kinds) + 1.5)


def draw_grid(axes, kinds, layers, table, *, colours: str, low: float, top: float, text=str):
    """The table of `rank_grid` as coloured cells, each with text(its value), on `axes`; None stays empty.  Returns: the image."""
    map_ = need("matplotlib", "a picture").colormaps[colours]
    values = [[float("nan") if value is None else value for value in row] for row in table]
    image = axes.imshow(values, cmap=map_, vmin=low, vmax=top, aspect="auto")
    for row, of_kind in enumerate(table):
        for column, value in enumerate(of_kind):
            if value is not None:
                red, green, blue, _ = map_((value - low) / (top - low))
                ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else INK
                axes.text(column, row, text(value), ha="center", va="center", color=ink, fontsize=8)
    axes.set_xticks(range(len(layers)), layers, fontsize=8)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes.set_xticks([i + 0.5 for i in range(len(layers) - 1)], minor=True)
    axes.set_yticks([i + 0.5 for i in range(len(kinds) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer")
    axes.set_ylabel("module")
    return image


def colour_bar(figure, image, axes, label: str, *, integers: bool = True, **place) -> None:
    """The colour scale of `image`, with ticks at integers, without a frame."""
    bar = figure.colorbar(image, ax=axes, **place)
    bar.set_label(label)
    if integers:
        bar.locator = need("matplotlib.ticker", "a picture").MaxNLocator(integer=True)
    bar.update_ticks()
    bar.outline.set_visible(False)


def loss_curve(
    losses: Mapping[str, Sequence[float]],
    path: str | Path,
    *,
    t_p: int | None = None,
    t_c: int | None = None,
    title: str = "Training loss",
) -> Path:
    """PNG of training losses by name over the steps (from 1), each pale as it was, and smoothed; t_p and t_c marked.

    Raises: ValueError (no losses), MissingExtraError.
    """
    if not losses or not all(losses.values()):
        raise ValueError("loss_curve: losses must hold at least one value for each name")
    figure = need("matplotlib.figure", "a picture").Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for (name, values), colour in zip(losses.items(), (OURS, THEIRS, "#5b8c3e", "#7a4f9e"), strict=False):
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.9)
        axes.plot(steps, _smoothed(values), color=colour, linewidth=1.8, label=name)
    last = max(2, *(len(values) for values in losses.values()))
    marks = [(t_p, "penalty ends, $t_p$", "--"), (t_c, "ranks clipped, $t_c$", "-")]
    for row, (step, text, style) in enumerate(marks):
        if step is None:
            continue
        left = step > last / 2  # the label stands on the side where there is more room; the two at different heights
        axes.axvline(step, color=MUTED, linewidth=1, linestyle=style)
        axes.annotate(
            f"{text} = {step}",
            (step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if left else 4, -2 - 11 * row),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top",
            fontsize=8,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    axes.set_xlim(1, last)
    axes.set_ylim(bottom=0, top=1.15 * max(max(values) for values in losses.values()) or 1)
    axes.set_xlabel("training step")
    axes.set_ylabel("cross-entropy of the batch (nats)")
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(
        frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(losses), borderaxespad=0.2
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return save_figure(figure, path)


def rank_steps(history: Mapping, path: str | Path, *, title: str = "Ranks over the steps") -> Path:
    """PNG of ranks that change over the steps: above, a row for each group and its rank as colour; below, their sum, the budget.

    Args:
        history: what La-LoRA's `Method.history` returns and rank_history.json holds.
    Raises: ValueError (not such a history), MissingExtraError.
    """
    table = RankHistory(**history).table()
    groups, steps = list(history["groups"]), history["steps"]
    top = max(1, table.max().item())
    matplotlib = need("matplotlib", "a picture")
    figure_module, ticker = (need(f"matplotlib.{name}", "a picture") for name in ("figure", "ticker"))
    heat = min(5.6, max(1.6, 0.24 * len(groups)))
    figure = figure_module.Figure(figsize=(7.6, heat + 2.3), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(heat, 1.4))
    colours = matplotlib.colormaps["YlGnBu"].resampled(top + 1)
    image = above.imshow(
        table.numpy(),
        cmap=colours,
        vmin=-0.5,
        vmax=top + 0.5,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, steps + 0.5, len(groups) - 0.5, -0.5),
    )
    rows, names = group_ticks(groups)
    above.set_yticks(rows, names, fontsize=8)
    above.set_ylabel("layer" if names != groups else "group")
    above.tick_params(axis="both", length=0)
    above.set_title(title, fontsize=10, loc="left")
    above.spines[:].set_visible(False)
    colour_bar(figure, image, above, "rank of the group", pad=0.02, fraction=0.06, aspect=6 * heat)

    below.step(range(steps + 1), table.sum(0).tolist(), where="mid", color=OURS, linewidth=1.8)
    below.set_xlim(-0.5, steps + 0.5)
    below.set_ylim(bottom=0)
    below.tick_params(labelsize=8)
    below.set_xlabel("training step")
    below.set_ylabel("sum of ranks", fontsize=8)
    for axis, most in ((below.xaxis, 8), (below.yaxis, 3)):
        axis.set_major_locator(ticker.MaxNLocator(nbins=most, steps=[1, 2, 5, 10], integer=True))
    below.spines[["top", "right"]].set_visible(False)
    below.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    below.set_axisbelow(True)
    return save_figure(figure, path)


def group_ticks(groups: Sequence[str], most: int = 32) -> tuple[list[float], list[str]]:
    """Rows to label and their labels: the middle of each layer's groups with its number, and no more of them than are read easily."""
    numbers = [match.group(1) if (match := re.search(LAYER, group)) else group for group in groups]
    first = [i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1]]
    shown = list(zip(first, [*first[1:], len(groups)], strict=True))[:: -(-len(first) // most)]
    return [(start + end - 1) / 2 for start, end in shown], [numbers[start] for start, _ in shown]


def overlap_curves(curves: Mapping[str, tuple[Sequence[float | None], int]], path: str | Path, *, metric: str) -> Path:
    """PNG of what a search for ranks saw: for each module its measure against the part c / r that is kept, the chosen c marked.

    Args:
        curves: {module name: (measure of c = 1 … r, or None where it was not taken; the chosen c)}.
        metric: what was measured, for the axis: "subspace", "l2" or "cos".
    Raises: ValueError (no curves), MissingExtraError.
    """
    if not curves:
        raise ValueError("overlap_curves: curves must hold at least one module, got none")
    figure = need("matplotlib.figure", "a picture").Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    pale = max(0.08, min(0.5, 12 / len(curves)))
    for i, (values, chosen) in enumerate(curves.values()):
        taken = [(c / len(values), value) for c, value in enumerate(values, 1) if value is not None]
        axes.plot(*zip(*taken, strict=True), color=OURS, alpha=pale, linewidth=1, label=None if i else "a module")
        label = None if i else "the c it keeps"
        axes.plot(
            [chosen / len(values)], [values[chosen - 1]], "o", color=THEIRS, markersize=3.5, alpha=0.8, label=label
        )
    names = {
        "subspace": "overlap with the base weight, φ",
        "l2": "−‖ΔW − W‖",
        "cos": "cosine of ΔW and W",
    }
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("part of the components that is kept, c / r")
    axes.set_ylabel(names[metric])
    axes.set_title(f"What {len(curves)} modules were judged by", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return save_figure(figure, path)


def _smoothed(values: Sequence[float], reach: int = 5) -> list[float]:
    """Mean over the values at most `reach` steps away: no lag, and shorter windows at both ends."""
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def save_figure(figure, path: str | Path) -> Path:
    """Write a figure as PNG, complete or not at all."""
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    return Path(path)
