"""adaptlora shear"""

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..shear.config import ClipConfig, DropConfig, NoRMConfig, RandomConfig, SVDConfig, TAIAConfig
from .app import app
from .console import one_clear_line, progress

_FIELDS = {  # method → options that belong to it
    "norm": ("search", "tau", "start", "components", "metric", "keep_scaling", "base_svd", "amplification", "seed"),
    "svd": ("keep", "budget"),
    "clip": ("target_r", "budget", "threshold", "first_below", "rescale", "sort"),
    "taia": (),
    "random": ("eta", "seed"),
    "layer": ("ratio", "seed"),
    "module": ("ratio", "seed"),
}
_NORM, _OTHERS = "NoRM", "Other methods"
_DEFAULT = NoRMConfig()


@app.command(
    epilog="""[bold]Examples[/bold]

NoRM: keep what resembles the base model; a PEFT adapter in, a smaller PEFT adapter out:

    adaptlora shear runs/trec/adapter --base ./bert -o runs/sheared

Without a base model: a tenth of the file, the largest singular values of all modules together:

    adaptlora shear lora.safetensors --method svd --budget 500 -o small.safetensors

    adaptlora shear adapter --method svd --keep energy=0.95 -o small

NormAL's clip to an average rank of 4, of an adapter trained without its penalty:

    adaptlora shear adapter --method clip --target-r 4 --sort -o small

Many processes, the same bits:

    torchrun --nproc-per-node 4 -m adaptlora.cli shear adapter --base ./llama -o sheared
"""
)
def shear(
    adapter: Annotated[
        Path,
        typer.Argument(help="A PEFT LoRA folder, or a kohya or diffusers .safetensors file.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder to write (PEFT), or .safetensors file; in the format of the input.",
            show_default=False,
        ),
    ],
    method: Annotated[str, typer.Option(help=f"{', '.join(_FIELDS)}.")] = "norm",
    base: Annotated[
        Path | None,
        typer.Option(help="The base model: a transformers folder, or a .safetensors file. NoRM and --merge need it."),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Also write the merged model, to OUTPUT/merged.")] = False,
    skip_unsupported: Annotated[
        bool, typer.Option("--skip-unsupported", help="Pass DoRA, embeddings and the like through untouched.")
    ] = False,
    search: Annotated[
        str | None,
        typer.Option(help=f"expected, official or min. \\[default: {_DEFAULT.search}]", rich_help_panel=_NORM),
    ] = None,
    components: Annotated[
        str | None, typer.Option(help=f"major, minor or pca. \\[default: {_DEFAULT.components}]", rich_help_panel=_NORM)
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help=f"subspace, l2 or cos. \\[default: {_DEFAULT.metric}]", rich_help_panel=_NORM)
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(
            help=f"Candidates are multiples of tau · rank. \\[default: {_DEFAULT.tau}]", rich_help_panel=_NORM
        ),
    ] = None,
    start: Annotated[
        int | None, typer.Option(help=f"The first multiple. \\[default: {_DEFAULT.start}]", rich_help_panel=_NORM)
    ] = None,
    keep_scaling: Annotated[
        bool | None,
        typer.Option(
            "--keep-scaling", help="Merge with the trained lora_alpha / r instead of 1.", rich_help_panel=_NORM
        ),
    ] = None,
    base_svd: Annotated[
        str | None,
        typer.Option(
            help=f"randomized or exact SVD of base weights. \\[default: {_DEFAULT.base_svd}]", rich_help_panel=_NORM
        ),
    ] = None,
    amplification: Annotated[
        bool | None,
        typer.Option("--amplification", help="Also report amplification factors.", rich_help_panel=_NORM),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="svd, in each module: rank=8, energy=0.95 (of the squared singular values) or ratio=0.1 (of the largest).",
            rich_help_panel=_OTHERS,
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            help="svd, clip: so many vectors in all modules together, the largest singular values or norms.",
            rich_help_panel=_OTHERS,
        ),
    ] = None,
    target_r: Annotated[
        float | None, typer.Option(help="clip: average rank of the modules.", rich_help_panel=_OTHERS)
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="clip: up to the last norm above this part of the first.", rich_help_panel=_OTHERS),
    ] = None,
    first_below: Annotated[
        bool | None,
        typer.Option("--first-below", help="clip: up to the first norm below it.", rich_help_panel=_OTHERS),
    ] = None,
    rescale: Annotated[
        bool | None,
        typer.Option("--rescale", help="clip: scale by lora_alpha / the rank that stays.", rich_help_panel=_OTHERS),
    ] = None,
    sort: Annotated[
        bool | None,
        typer.Option("--sort", help="clip: order the vectors by their norms first.", rich_help_panel=_OTHERS),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(help="random: part of each module's vectors to keep. \\[default: 0.5]", rich_help_panel=_OTHERS),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(help="layer, module: part of them to drop. \\[default: 0.5]", rich_help_panel=_OTHERS),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of whatever is drawn at random. \\[default: 0]")] = None,
    device: Annotated[str, typer.Option(help="Where the factorizations run: cpu or cuda.")] = "cpu",
    workers: Annotated[
        int | None, typer.Option(help="Modules at a time; the result is the same. \\[default: torch's threads]")
    ] = None,
) -> None:
    """Make a trained LoRA adapter smaller, without training.

    NoRM keeps, in each module, as many leading components of the update as
    resemble the base weight better than random ones would; the result is merged
    with scale 1. Other methods go by singular values or norms, or drop blindly.

    Writes the adapter in the format it came in, shear_report.json, and pictures
    of ranks and of what the search saw. A run that was killed goes on when it is
    called again. Under torchrun modules are split over the processes.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    with one_clear_line(interrupted="the same command goes on where it stopped"):
        config = _config(method, given)
        from ..shear.files import shear_files

        console = Console()
        with progress(console) as watch:
            report = shear_files(
                adapter,
                out,
                config,
                base=base,
                merge=merge,
                skip_unsupported=skip_unsupported,
                device=device,
                workers=workers,
                progress=lambda done, total: watch("shearing", done, total, ""),
            )
        if report is not None:
            console.print(_table(report))
            before, after = report.parameters()
            share = f" (−{1 - after / before:.1%})" if before else ""
            console.print(
                f"{before:,} → {after:,} parameters{share}; written: {escape(str(out))}",
                highlight=False,
                soft_wrap=True,
            )


def _config(method: str, given: dict):
    """The method's configuration from the options that were given."""
    if method not in _FIELDS:
        raise ValueError(f"shear: method must be one of {', '.join(_FIELDS)}, got {method!r}")
    every = {field for fields in _FIELDS.values() for field in fields}
    for field in sorted(every & given.keys() - set(_FIELDS[method])):
        owners = " or ".join(name for name, fields in _FIELDS.items() if field in fields)
        raise ValueError(f"shear: --{field.replace('_', '-')} must go with method {owners}, got method {method}")
    fields = {field: given[field] for field in _FIELDS[method] if field in given}
    if method == "svd":
        return SVDConfig(**_amounts(fields))
    if method in ("layer", "module"):
        return DropConfig(level=method, **fields)
    return {"norm": NoRMConfig, "clip": ClipConfig, "taia": TAIAConfig, "random": RandomConfig}[method](**fields)


def _amounts(fields: dict) -> dict:
    """--keep rank=8 and --budget 500 as fields of SVDConfig."""
    amounts = {name: value for name, value in fields.items() if name == "budget"}
    if "keep" in fields:
        name, _, text = fields["keep"].partition("=")
        kinds = {"rank": int, "energy": float, "ratio": float}
        try:
            amounts[name] = kinds[name](text)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"shear: --keep must be rank=NUMBER, energy=PART or ratio=PART, got {fields['keep']!r}"
            ) from error
    return amounts


def _table(report) -> Table:
    """Ranks by kind of module: how many, before, now."""
    from ..plots import rank_grid

    ranks, before = report.ranks(), report.ranks_before()
    table = Table(header_style="dim", box=SIMPLE_HEAD)
    table.add_column("module", overflow="fold")
    for header in ("layers", "rank before", "now, average", "lowest", "highest"):
        table.add_column(header, justify="right", no_wrap=True)
    kinds, _, now = rank_grid(ranks)
    _, _, then = rank_grid(before)
    for kind, *rows in zip(kinds, now, then, strict=True):
        kept, were = ([rank for rank in row if rank is not None] for row in rows)
        table.add_row(
            escape(kind),
            str(len(kept)),
            f"{sum(were) / len(were):g}",
            f"{sum(kept) / len(kept):.1f}",
            str(min(kept)),
            str(max(kept)),
        )
    return table
