"""adaptlora tune"""

from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..ops import _backend
from .app import app
from .console import one_clear_line, progress


@app.command(
    epilog="""[bold]Examples[/bold]

    adaptlora tune

    adaptlora tune --shape 4096,11008,4096 --shape 4096,4096,11008 --rank 8 --dry-run
"""
)
def tune(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="M,N,K: tokens, out_features, in_features of a layer; N and K multiples of 16. More than one may be given."
            " Without it: those of transformers 768 to 8192 wide, with 2048 and 8192 tokens.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16 or fp16.")] = "bf16",
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and show, but write nothing.")] = False,
) -> None:
    """Measure on this GPU which base GEMM is the faster one, and keep the answers.

    For layers of each shape, torch's product with the adapter added after it is
    timed against the fused ones, forward and backward, once they have been seen
    to give the same numbers. The fastest goes into a file of this GPU. Training
    follows it for sizes up to a factor of 2 away; elsewhere a prediction decides.
    [bold]adaptlora doctor[/bold] says which file is in use.
    """
    console = Console()
    with one_clear_line():
        shapes = None if shape is None else [_shape(text) for text in shape]
        if not torch.cuda.is_available():
            raise ValueError("tune: a CUDA GPU must be there to measure on, got none")
        if not _backend.has_triton():
            raise ValueError("tune: triton must be installed, got none")
        from .. import gemm_table, tuning

        if dtype not in tuning.DTYPES:
            raise ValueError(f"tune: dtype must be {' or '.join(tuning.DTYPES)}, got {dtype!r}")
        shapes = shapes or tuning.SHAPES
        device = torch.device("cuda", torch.cuda.current_device())
        found = []
        with progress(console) as watch:
            for measured in tuning.measure(shapes, tuning.DTYPES[dtype], rank, device):
                found.append(measured)
                entry = measured.entry
                note = f"{entry.gemm} {entry.M}×{entry.columns}, depth {entry.depth}"
                watch("measuring", len(found), len(shapes) * len(gemm_table.GEMMS), note)
        changed = [measured for measured in found if measured.entry.tile != measured.old]
        if changed:
            console.print(_tune_table(changed))
        console.print(f"{len(found)} products measured, {len(changed)} run another GEMM than before", highlight=False)
        if dry_run:
            console.print("nothing was written")
        else:
            file = gemm_table.update(torch.cuda.get_device_name(device), (measured.entry for measured in found))
            console.print(f"written: {file}", highlight=False, markup=False, soft_wrap=True)


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise ValueError(f"tune: shape must be three integers M,N,K, got {text!r}") from error


def _tune_table(measurements) -> Table:
    table = Table(header_style="dim", box=SIMPLE_HEAD)
    table.add_column("product", no_wrap=True)
    for header in ("M", "columns", "depth"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("before", "now"):
        table.add_column(header, overflow="fold")
    for header in ("ms before", "ms now", "ratio"):
        table.add_column(header, justify="right", no_wrap=True)
    for measured in measurements:
        entry = measured.entry
        sizes = (str(size) for size in (entry.M, entry.columns, entry.depth))
        times = (f"{1000 * seconds:.3f}" for seconds in (measured.old_seconds, entry.seconds))
        table.add_row(
            entry.gemm, *sizes, _gemm_name(measured.old), _gemm_name(entry.tile), *times, f"{measured.ratio:.2f}"
        )
    return table


def _gemm_name(tile) -> str:
    return "torch" if tile is None else f"fused {'×'.join(map(str, tile[:3]))}, {tile[3]} warps, {tile[4]} stages"
