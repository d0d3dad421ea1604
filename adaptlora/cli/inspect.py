"""adaptlora inspect"""

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .app import app
from .console import bars, one_clear_line

WIDE = 120  # characters from which all columns of two adapters have room beside a name


@app.command(
    epilog="""[bold]Examples[/bold]

    adaptlora inspect runs/trec/adapter

    adaptlora inspect runs/trec/adapter -o ranks.png

    adaptlora inspect runs/trec-lalora/adapter --over-steps steps.png

Everything, as pictures in a folder and as one HTML page:

    adaptlora inspect runs/trec/adapter --plot pictures --html trec.html

Two adapters side by side, or one before and after a clip or a shear:

    adaptlora inspect runs/trec/adapter runs/mine/adapter --html both.html

    adaptlora inspect sheared --before runs/trec/adapter --plot pictures
"""
)
def inspect(
    adapter: Annotated[
        Path,
        typer.Argument(
            help="A PEFT LoRA folder with its adapter_config.json and adapter_model.safetensors, or a kohya or diffusers .safetensors"
            " file.",
            show_default=False,
        ),
    ],
    other: Annotated[
        Path | None, typer.Argument(help="A second one, to set side by side with the first.", show_default=False)
    ] = None,
    before: Annotated[
        Path | None,
        typer.Option(
            help="What the adapter was before, such as an earlier checkpoint, or the input of a clip or a shear.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also draw the ranks as a heat map, into this .png file.")
    ] = None,
    over_steps: Annotated[
        Path | None,
        typer.Option(
            "--over-steps",
            help="Also draw the ranks over the steps of the run, into this .png file; for adapters with a rank_history.json, as"
            " La-LoRA's have, or beside a report.json that tells of a clip.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Also draw ranks, norms, singular values and what else there is, as .png files in this folder."
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option("--html", help="Also write everything as one HTML page that needs nothing else, to this file."),
    ] = None,
) -> None:
    """Show an adapter's modules: rank, shapes, parameters, scores. No model is needed.

    The score of a rank vector is its norm ‖a‖ + ‖b‖ as a share of the first
    vector's, at most 1: NormAL keeps vectors by it. There is a bar for each
    vector: a full one is 1, a low one could be clipped. lora_A is (rank, K) and
    lora_B (N, rank).

    Of two adapters it shows, for each module of both, the ranks, the norms and
    the cosine of the two ΔW = scaling · B A, how far they are apart as a part of
    the first, and how much of their column spaces they share (Σ cos² of the
    principal angles, over the smaller rank). All together, a module that one of
    them lacks counts as ΔW = 0 there. In less than 120 columns some are left out.
    """
    from ..inspection import compare, inspect_adapter, save_page, save_pictures
    from ..inspection.page import check_page_path
    from ..io import HISTORY_FILE
    from ..plots import rank_heatmap, rank_steps

    console = Console()
    with one_clear_line():
        for name, picture in (("out", out), ("over_steps", over_steps)):
            if picture is not None and picture.suffix.lower() != ".png":
                raise ValueError(f"inspect: {name} must end in .png, got {str(picture)!r}")
        if before is not None and other is not None:
            raise ValueError(f"inspect: before must go with one adapter, got two and {str(before)!r}")
        if plot is not None and plot.exists() and not plot.is_dir():
            raise ValueError(f"inspect: plot must be a folder, got the file {str(plot)!r}")
        if page is not None:
            check_page_path("inspect", "html", page)
        found = inspect_adapter(adapter)
        if plot is not None or page is not None:
            found.scalings()  # which only these two need: a configuration without them is refused before anything is drawn
        if over_steps is not None and found.history is None:
            raise ValueError(
                f"inspect: over_steps needs a {HISTORY_FILE} in the adapter's folder, got none in {str(adapter)!r}"
            )
        shown, labels = found, [str(adapter)]
        if before is not None:
            shown, labels = compare(inspect_adapter(before), found), ["before", "now"]
        elif other is not None:
            shown, labels = compare(found, inspect_adapter(other)), [str(adapter), str(other)]
        if other is None:
            _print_adapter(console, found)
        if shown is not found:
            _print_comparison(console, shown, labels, told=found if other is None else None)

        if out is not None:
            ranks, r = found.ranks(), found.config.get("r")
            top = max([*ranks.values(), r if isinstance(r, int) else 0])
            rank_heatmap(ranks, out, max_rank=top, title=f"Ranks: {_described(found)}")
            _say(console, f"heat map in {out}")
        if over_steps is not None:
            rank_steps(vars(found.history), over_steps)
            _say(console, f"ranks over the steps in {over_steps}")
        if plot is not None:
            written = save_pictures(shown, plot, labels)
            _say(console, f"{', '.join(file.name for file in written)} in {plot}")
        if page is not None:
            _say(console, f"page in {save_page(shown, page, labels)}")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _described(found) -> str:
    from ..plots import describe_ranks

    return describe_ranks(found.ranks())


def _print_adapter(console: Console, found) -> None:
    common = _print_common(console, [module.name for module in found.modules])
    console.print(_inspect_table(found, common))
    config, history = found.config, found.history
    about = f"r {config.get('r')}, lora_alpha {config.get('lora_alpha')}; " if config else f"{found.kind}; "
    _say(
        console,
        f"{_described(found)}; {found.parameters():,} parameters in them; {about}file {found.file_bytes:,} bytes",
    )
    _print_notes(console, found)
    if history is not None:
        _say(
            console,
            f"{found.history_file}: ranks over {history.steps} steps in {len(history.groups)} groups, {history.average_rank():.2f} on "
            "average over the run",
        )


def _print_notes(console: Console, found, whose: str = "") -> None:
    for name, count in found.others.items():
        _say(console, f"{whose}beside them: {name} ({count:,} parameters)")
    for name, why in found.skipped.items():
        _say(console, f"{whose}left out: {name}: {why}")
    if found.caveat() is not None:
        _say(console, f"{whose}{found.caveat()}")


def _print_common(console: Console, names: list[str]) -> str:
    from ..inspection.page import common_prefix

    common = common_prefix(names)
    if common:
        console.print(f"modules of [bold]{escape(common)}[/bold]", highlight=False)
    return common


def _inspect_table(found, common: str) -> Table:
    table = Table(header_style="dim", box=SIMPLE_HEAD)
    table.add_column("module", overflow="fold")
    for header in ("rank", "K→N", "parameters"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("scores", no_wrap=True)
    table.add_column("lowest", justify="right", no_wrap=True)
    for module in found.modules:
        lowest = f"{min(module.scores):.2f}" if module.scores else "–"
        shape = f"{module.shape_A[1]}→{module.shape_B[0]}"
        name = escape(module.name.removeprefix(common))
        table.add_row(name, str(module.rank), shape, f"{module.parameters:,}", bars(module.scores), lowest)
    return table


def _print_comparison(console: Console, found, labels: list[str], told) -> None:
    """told: the one of the two whose notes are on the screen already, or None."""
    common = _print_common(console, [module.name for module in found.modules])
    wide = console.width >= WIDE
    table = Table(header_style="dim", box=SIMPLE_HEAD)
    table.add_column("module", overflow="fold", min_width=16)
    for header in ("rank", *(("change", "parameters") if wide else ()), "‖ΔW‖", "cosine", "distance", "overlap"):
        table.add_column(header, justify="right", no_wrap=True)
    for module in found.modules:
        first, second = module.ranks
        change = f"{second - first:+d}" if second != first else "0"
        table.add_row(
            escape(module.name.removeprefix(common)),
            f"{first} → {second}",
            *((change, "{:,} → {:,}".format(*module.parameters)) if wide else ()),
            "{:.3g} → {:.3g}".format(*module.norms),
            _number(module.cosine, "{:.3f}"),
            _number(module.distance, "{:.3f}"),
            _number(module.overlap_out, "{:.1%}"),
        )
    console.print(table)
    for label, side in zip(labels, (found.first, found.second), strict=True):
        _say(console, f"{label}: {_described(side)}; {side.parameters():,} parameters in them")
        if side is not told:
            _print_notes(console, side, f"{label}: ")
    cosine, distance = _number(found.cosine(), "{:.4f}"), _number(found.distance(), "{:.4f}")
    _say(console, f"all together: cosine {cosine}, distance {distance}, of {found.scope()}")
    overlap = _number(found.overlap(), "{:.1%}")
    _say(console, f"overlap: {overlap} on average of the {len(found.modules):,} modules in both")
    for label, names in zip(labels, (found.only_first, found.only_second), strict=True):
        for name in names:
            _say(console, f"in {label} only: {name}")
    for name, ((N, K), (other_N, other_K)) in found.other_shapes.items():
        _say(console, f"of two shapes, not compared: {name} ({K}→{N} and {other_K}→{other_N})")
