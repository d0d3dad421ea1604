"""Inspected adapters as PNG: heat maps of ranks, spectra by kind of module, overlap of two adapters."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files import make_folder
from ..finetune._extras import need
from ..plots import colour_bar, describe_ranks, draw_grid, grid_size, rank_grid, rank_heatmap, rank_steps, save_figure
from .adapter import Inspection
from .updates import Comparison, Spectrum, spectra

MOST_PANELS = 16
LABELS = "first", "second"


def save_pictures(found: Inspection | Comparison, folder: str | Path, labels: Sequence[str] = LABELS) -> list[Path]:
    """
    Draw all there is about one adapter, or about two side by side, into `folder`, which is made where it is missing.

    ranks.png, norms.png (of the vectors, as stored), singular_values.png (of ΔW); of two adapters overlap.png, and steps.png where the
    ranks over the steps are known (of two adapters: the second's, which is the later one of a before and an after).

    Returns: the files.   Raises: ValueError (a configuration without the scalings), MissingExtraError, OSError.
    """
    need("matplotlib.figure", "a picture")
    folder = Path(folder)
    two = isinstance(found, Comparison)
    sides = [found.first, found.second] if two else [found]
    of_sides: Sequence[Mapping[str, Spectrum]] = found.spectra if two else [spectra(found)]
    labels = labels if two else [""]
    caveats = _caveats(sides, labels)
    make_folder(folder)
    norms = [{module.name: module.norms for module in side.modules} for side in sides]
    values = [{name: spectrum.singular_values for name, spectrum in of.items()} for of in of_sides]
    ranks = sides[0].ranks()
    written = [
        ranks_side_by_side(found, folder / "ranks.png", labels)
        if two
        else rank_heatmap(ranks, folder / "ranks.png", title=f"Ranks: {describe_ranks(ranks)}"),
        spectrum_panels(
            norms,
            labels,
            folder / "norms.png",
            title="Norms of the rank vectors, as stored",
            axes_names=("vector", "‖a‖ + ‖b‖"),
        ),
        spectrum_panels(
            values,
            labels,
            folder / "singular_values.png",
            title="Singular values of scaling · B A",
            axes_names=("number", "singular value"),
            logarithmic=True,
            caveats=caveats,
        ),
    ]
    if two:
        written.append(overlap_heatmap(found, folder / "overlap.png", labels))
    if sides[-1].history is not None:
        written.append(rank_steps(vars(sides[-1].history), folder / "steps.png"))
    return written


def ranks_side_by_side(found: Comparison, path: str | Path, labels: Sequence[str] = LABELS) -> Path:
    """PNG of three heat maps: the ranks of both adapters on one colour scale, and the second's less the first's."""
    first, second = found.first.ranks(), found.second.ranks()
    names = list(dict.fromkeys([*first, *second]))
    kinds, layers, places = rank_grid({name: i for i, name in enumerate(names)})
    differences = {name: second[name] - first[name] for name in first if name in second}
    top = max(1, *first.values(), *second.values())
    most = max(1, *map(abs, differences.values()))
    width, height = grid_size(kinds, layers)
    beside = width < 9
    size = (2.7 * width, height + 0.3) if beside else (width, 3 * height)
    figure = need("matplotlib.figure", "a picture").Figure(figsize=size, layout="constrained")
    panels = [
        (f"{labels[0]}: {describe_ranks(first)}", first, "YlGnBu", 0, top, str),
        (f"{labels[1]}: {describe_ranks(second)}", second, "YlGnBu", 0, top, str),
        (
            f"{labels[1]} − {labels[0]}",
            differences,
            "RdBu_r",
            -most,
            most,
            lambda change: f"{change:+d}" if change else "0",
        ),
    ]
    images, every = [], list(figure.subplots(*((1, 3) if beside else (3, 1)), sharex=True, sharey=True))
    for axes, (title, values, colours, low, high, text) in zip(every, panels, strict=True):
        table = [[None if i is None else values.get(names[i]) for i in row] for row in places]
        images.append(draw_grid(axes, kinds, layers, table, colours=colours, low=low, top=high, text=text))
        axes.set_title(title, fontsize=10, loc="left")
        axes.label_outer()
    colour_bar(figure, images[1], every[:2] if not beside else every[1], "rank (vectors)", pad=0.02, fraction=0.06)
    colour_bar(figure, images[2], every[2], "difference of ranks", pad=0.02, fraction=0.06)
    return save_figure(figure, path)


def _caveats(sides: Sequence[Inspection], labels: Sequence[str]) -> list[str]:
    """Of adapters whose ΔW is more than what is drawn of it; once where both have the same."""
    found: dict[str, list[str]] = {}
    for label, side in zip(labels, sides, strict=True):
        if side.caveat() is not None:
            found.setdefault(side.caveat(), []).append(label)
    return [f"{' and '.join(of)}: {caveat}" if any(of) else caveat for caveat, of in found.items()]


def _head(figure, title: str, caveats: Sequence[str]) -> None:
    """Title and caveats at the top left, in lines that fit; the figure grows by those after the first."""
    width = int(12 * figure.get_figwidth())  # letters of 10 points
    text = "\n".join(textwrap.fill(line, width) for line in (title, *caveats))
    figure.set_figheight(figure.get_figheight() + 0.17 * text.count("\n"))
    figure.suptitle(text, fontsize=10, x=0.01, ha="left")


def overlap_heatmap(found: Comparison, path: str | Path, labels: Sequence[str] = LABELS) -> Path:
    """
    PNG of a heat map of the modules that both have: the part that the two column spaces have in common, in per cent; empty where one
    ΔW is zero.
    """
    overlaps = {module.name: module.overlap_out for module in found.modules}
    kinds, layers, places = rank_grid({name: i for i, name in enumerate(overlaps)})
    values = list(overlaps.values())
    table = [[None if i is None or values[i] is None else 100 * values[i] for i in row] for row in places]
    figure = need("matplotlib.figure", "a picture").Figure(figsize=grid_size(kinds, layers), layout="constrained")
    axes = figure.add_subplot()
    image = draw_grid(axes, kinds, layers, table, colours="YlGnBu", low=0, top=100, text="{:.0f}".format)
    title = f"Overlap of the column spaces of the two ΔW, {len(overlaps)} modules in both"
    _head(figure, title, _caveats((found.first, found.second), labels))
    colour_bar(figure, image, axes, "Σ cos² of the principal angles, %", pad=0.02, fraction=0.06)
    return save_figure(figure, path)


def spectrum_panels(
    sides: Sequence[Mapping[str, Sequence[float]]],
    labels: Sequence[str],
    path: str | Path,
    *,
    title: str,
    axes_names: tuple[str, str],
    logarithmic: bool = False,
    caveats: Sequence[str] = (),
) -> Path:
    """
    PNG with a panel for each kind of module and in it a line for each layer, coloured by its depth.

    Args: sides: {module name: values}, of one adapter or of two; the first of two is dashed.   caveats: told below the title.
    """
    names = list(dict.fromkeys(name for side in sides for name in side))
    kinds, _, places = rank_grid({name: i for i, name in enumerate(names)})
    panels = [[None if i is None else names[i] for i in row] for row in places]
    if len(kinds) > MOST_PANELS:  # names without kinds and layers
        kinds, panels = ["all modules"], [names]
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    needed = ("figure", "cm", "colors", "ticker")
    figure_module, cm, colors, ticker = (need(f"matplotlib.{name}", "a picture") for name in needed)
    figure = figure_module.Figure(figsize=(max(5.0, 2.9 * columns + 0.8), 2.1 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    whole = need("matplotlib", "a picture").colormaps["viridis"]
    colours = colors.ListedColormap([whole(i / 290) for i in range(256)])  # without its end, pale on white
    every = [values for side in sides for values in side.values()]
    longest = max(map(len, every))
    logarithmic = logarithmic and any(value > 0 for values in every for value in values)
    for place, (axes, kind, panel) in enumerate(zip(grid.flat, kinds, panels, strict=False)):
        for depth, name in enumerate(panel):
            colour = colours(depth / max(1, len(panel) - 1))
            for number, side in enumerate(sides):
                values = side.get(name, ())
                dashed = number < len(sides) - 1
                axes.plot(
                    range(1, len(values) + 1),
                    # zeros have no logarithm: there the line ends
                    [value if value > 0 or not logarithmic else float("nan") for value in values],
                    color=colour,
                    linewidth=0.9 if dashed else 1.4,
                    linestyle=(0, (3, 2)) if dashed else "-",
                    marker=None if dashed else "o",
                    markersize=2.2,
                    alpha=0.55 if dashed else 0.9,
                )
        axes.set_title(kind, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.tick_params(labelsize=8)
        axes.set_xlim(0.6, longest + 0.4)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=6, integer=True))
        axes.xaxis.set_tick_params(labelbottom=place + columns >= len(kinds))
    if logarithmic:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    for axes in list(grid.flat)[len(kinds) :]:
        axes.set_visible(False)
    if len(panels[0]) > 1:
        scale = cm.ScalarMappable(cmap=colours)
        scale.set_clim(0, len(panels[0]) - 1)
        colour_bar(figure, scale, grid, "layer" if len(kinds) > 1 else "number of the module", pad=0.01, fraction=0.04)
    note = "" if len(sides) == 1 else " (dashed: {}, solid: {})".format(*labels)
    _head(figure, title + note, caveats)
    figure.supxlabel(axes_names[0], fontsize=9)
    figure.supylabel(axes_names[1], fontsize=9)
    return save_figure(figure, path)
