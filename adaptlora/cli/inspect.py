"""adaptlora inspect"""

from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .app import app
from .console import bars, one_clear_line


@app.command(
    epilog="""[bold]Examples[/bold]

    adaptlora inspect runs/trec/adapter

    adaptlora inspect runs/trec/adapter -o ranks.png

    adaptlora inspect runs/trec-lalora/adapter --over-steps steps.png
"""
)
def inspect(
    adapter: Annotated[
        Path,
        typer.Argument(
            help="A PEFT LoRA folder: adapter_config.json and adapter_model.safetensors.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also draw the ranks as a heat map, into this .png file.")
    ] = None,
    over_steps: Annotated[
        Path | None,
        typer.Option(
            "--over-steps",
            help="Also draw the ranks over the steps of the run, into this .png file; for adapters with a rank_history.json, as"
            " La-LoRA's have.",
        ),
    ] = None,
) -> None:
    """Show an adapter's modules: rank, shapes, parameters, scores. No model is needed.

    The score of a rank vector is its norm ‖a‖ + ‖b‖ as a share of the first
    vector's, at most 1: NormAL keeps vectors by it. There is a bar for each
    vector: a full one is 1, a low one could be clipped. lora_A is (rank, K) and
    lora_B (N, rank).
    """
    from ..inspection import inspect_adapter
    from ..io import HISTORY_FILE
    from ..plots import describe_ranks, rank_heatmap, rank_steps

    console = Console()
    with one_clear_line():
        for name, picture in (("out", out), ("over_steps", over_steps)):
            if picture is not None and picture.suffix.lower() != ".png":
                raise ValueError(f"inspect: {name} must end in .png, got {str(picture)!r}")
        found = inspect_adapter(adapter)
        history = found.history
        if over_steps is not None and history is None:
            raise ValueError(
                f"inspect: over_steps needs a {HISTORY_FILE} in the adapter's folder, got none in {str(adapter)!r}"
            )
        common = common_prefix([module.name for module in found.modules])
        if common:
            console.print(f"modules of [bold]{escape(common)}[/bold]", highlight=False)
        console.print(_inspect_table(found, common))
        config = found.config
        parameters = sum(module.parameters for module in found.modules)
        ranks = {module.name: module.rank for module in found.modules}
        console.print(
            f"{describe_ranks(ranks)}; {parameters:,} parameters in them; r {config.get('r')}, lora_alpha {config.get('lora_alpha')}; "
            f"file {found.file_bytes:,} bytes",
            highlight=False,
        )
        for name, count in found.others.items():
            console.print(f"beside them: {name} ({count:,} parameters)", highlight=False, markup=False)
        if history is not None:
            console.print(
                f"{HISTORY_FILE}: ranks over {history.steps} steps in {len(history.groups)} groups, {history.average_rank():.2f} on "
                "average over the run",
                highlight=False,
            )
        if out is not None:
            top = max([*ranks.values(), config["r"] if isinstance(config.get("r"), int) else 0])
            rank_heatmap(ranks, out, max_rank=top, title=f"Ranks: {describe_ranks(ranks)}")
            console.print(f"heat map in {out}", highlight=False, markup=False, soft_wrap=True)
        if over_steps is not None:
            rank_steps(vars(history), over_steps)
            console.print(f"ranks over the steps in {over_steps}", highlight=False, markup=False, soft_wrap=True)


def common_prefix(names: list[str]) -> str:
    """Path that all the names are under; told once, it leaves rows that fit a line."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{level[0]}." for level in takewhile(lambda level: len(set(level)) == 1, levels))


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
        name = module.name.removeprefix(common)
        table.add_row(name, str(module.rank), shape, f"{module.parameters:,}", bars(module.scores), lowest)
    return table
