"""adaptlora export"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .app import app
from .console import one_clear_line


@app.command(
    epilog="""[bold]Examples[/bold]

For a server that takes one rank and one scaling for all modules:

    adaptlora export runs/trec/adapter -o served

    adaptlora export adapter --pad 16 -o served

A whole model that needs neither adaptlora nor PEFT:

    adaptlora export adapter --format merged --base ./llama -o merged
"""
)
def export(
    adapter: Annotated[Path, typer.Argument(help="A PEFT LoRA folder.", show_default=False)],
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    format: Annotated[str, typer.Option(help="vllm or merged.")] = "vllm",
    pad: Annotated[
        str | None,
        typer.Option(help="vllm: fill every module with zeros up to this rank, or to the largest with --pad max."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="merged: the base model, a transformers or diffusers folder, sharded or not.")
    ] = None,
) -> None:
    """Write a trained adapter for a server, or merge it into its base.

    vllm: an adapter whose scaling is in lora_B and whose lora_alpha is r, so that
    it means the same to PEFT and to servers that ignore rank_pattern and
    alpha_pattern. merged: the base model's folder with the update in its weights,
    one shard in memory at a time; tokenizer and configuration are copied.
    """
    with one_clear_line():
        if format not in ("vllm", "merged"):
            raise ValueError(f"export: format must be vllm or merged, got {format!r}")
        if (base is None) == (format == "merged"):
            raise ValueError(f"export: --base must be given for merged and no other format, got {base} for {format}")
        if pad is not None and format != "vllm":
            raise ValueError(f"export: --pad must go with vllm, got {pad} for {format}")
        from .. import merging, serving_files

        if format == "vllm":
            serving_files.export(adapter, out, pad=_pad(pad))
        else:
            merging.merge_files(adapter, base, out)
        Console().print(f"written: {out}", highlight=False, markup=False, soft_wrap=True)


def _pad(text: str | None) -> bool | int:
    if text is None or text == "max":
        return text == "max"
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"export: --pad must be a rank or max, got {text!r}") from error
