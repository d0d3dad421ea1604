"""The Typer application that every command registers with."""

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Adaptive-rank LoRA: train with rank vectors to spare, keep the ones that earn their place, and really remove"
    " the rest.",
    epilog="Begin with [bold]adaptlora doctor[/bold], then [bold]adaptlora finetune --preset trec[/bold].",
)
