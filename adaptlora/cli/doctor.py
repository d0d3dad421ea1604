"""adaptlora doctor"""

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .app import app


@app.command(epilog="[bold]Example[/bold]\n\n    ADAPTLORA_BACKEND=reference adaptlora doctor")
def doctor() -> None:
    """Show versions, extension and GPU, and which backend will run where and why.

    Exit code 1 if something is broken, not merely absent.
    """
    from ..doctor import diagnose

    console = Console()
    well = True
    for section, rows in diagnose().items():
        console.print(section, style="bold")
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, style="dim")
        table.add_column(overflow="fold")
        for question, answer, good in rows:
            table.add_row(question, escape(answer) if good else f"[red]{escape(answer)}[/red]")
            well = well and good
        console.print(table)
        console.print()
    raise typer.Exit(0 if well else 1)
