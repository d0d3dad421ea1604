"""What the commands share on the screen: errors in one line, progress bars, small drawings."""

import traceback
from contextlib import contextmanager
from itertools import pairwise

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..finetune._extras import MissingExtraError

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes, as shells use them


@contextmanager
def one_clear_line(interrupted: str = "nothing was written"):
    """Errors that adaptlora raises about its input become one red line and exit code 2; others keep their traceback."""
    console = Console(stderr=True)
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError, MissingExtraError) as error:
        if not _raised_by_adaptlora(error):
            raise
        message = " ".join(str(error).split())
        console.print(f"[bold red]error:[/bold red] [red]{escape(message)}[/red]", soft_wrap=True, highlight=False)
        raise typer.Exit(BAD_INPUT) from error
    except KeyboardInterrupt as error:
        console.print(f"[yellow]interrupted: {escape(str(error)) or interrupted}[/yellow]", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from error


def _raised_by_adaptlora(error: BaseException) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return (frames[-1].f_globals.get("__package__") or "").split(".")[0] == "adaptlora"


@contextmanager
def progress(console: Console):
    """A progress bar for each stage, as the callback that `run` calls."""
    columns = (
        SpinnerColumn(finished_text="[green]✓[/green]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}[/dim]"),
    )
    with Progress(*columns, console=console) as progress:
        bars = {}

        def watch(stage: str, done: int, total: int, note: str) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total, note=note)
            progress.update(bars[stage], completed=done, total=total, note=note)

        try:
            yield watch
        except BaseException:
            progress.live.transient = True  # an error stands alone, without half a bar
            raise


def bars(scores: list[float], most: int = 24) -> str:
    """One block for each score; where there are more than fit, one for each stretch of them (its mean)."""
    if len(scores) > most:
        edges = [len(scores) * i // most for i in range(most + 1)]
        scores = [sum(scores[a:b]) / (b - a) for a, b in pairwise(edges)]
    return "".join(" ▁▂▃▄▅▆▇█"[round(8 * score)] for score in scores)
