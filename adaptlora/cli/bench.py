"""adaptlora bench"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .app import app
from .console import one_clear_line

REGRESSED = 1  # exit code
MIN_WIDTH = 140  # of the tables of results: a cut number says nothing


@app.command(
    epilog="""[bold]Examples[/bold]

    adaptlora bench layer --json layer.json --plot plots

    adaptlora bench --json new.json --compare old.json

    adaptlora bench --compare old.json --new new.json
"""
)
def bench(
    scenarios: Annotated[
        list[str] | None,
        typer.Argument(
            help="layer, penalty, rank-change, svd, step, memory; without any of them: all.",
            metavar="SCENARIO",
            show_default=False,
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the results into this file.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw them into this folder, as .png files.", show_default=False)
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            help="An older result: show what changed; exit code 1 if a ratio to the floor became worse.",
            show_default=False,
        ),
    ] = None,
    new: Annotated[
        Path | None,
        typer.Option(
            "--new",
            help="With --compare or --plot: a result that is there already; nothing is measured.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes and three rounds: whether all runs, not how fast.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(help="Rounds of every case, in place of its own number.", show_default=False)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch on the CPU; without it, as torch chooses.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Measure adaptlora beside PEFT and the frozen model, on this machine.

    Every provider of a case is first seen to compute the same, then all are
    called in turn. Reported are medians and quartiles, the ratio to a floor (of a
    layer and a step: the frozen model's), and the share of what this machine's
    memory and arithmetic, measured in the same run, would allow. Models have
    random weights: nothing is fetched. PEFT and transformers must be installed.
    All scenarios take a good part of an hour; what else runs on the machine
    blurs them.
    """
    console = Console()
    tables = Console(width=max(console.width, MIN_WIDTH))
    regressed = False
    with one_clear_line():
        _check(scenarios, json, compare, new, plot)
        # What is wrong with an old file is said before half an hour is spent.
        from ..benchmarks import comparison

        old = None if compare is None else comparison.read(compare)
        if new is not None:
            content, where = _stored(new), new
        else:
            content, where = (
                _measured(console, tables, scenarios, quick, rounds, threads, device),
                json or Path("this run"),
            )
        if json is not None:
            from ..benchmarks.harness import write_json

            write_json(json, content)
            console.print(f"results in {json}", highlight=False, markup=False, soft_wrap=True)
        if plot is not None:
            from ..benchmarks.plots import draw

            for path in draw(content, plot):
                console.print(f"picture in {path}", highlight=False, markup=False, soft_wrap=True)
        if old is not None:
            found = comparison.compare(old, comparison.parse(content, where))
            regressed = bool(found.regressed)
            if found.rows:
                tables.print(found.table())
            for note in found.notes():
                console.print(note, highlight=False, markup=False, soft_wrap=True)
            console.print(
                f"{len(found.rows)} ratios compared with {escape(str(compare))}: {len(found.regressed)} regressed",
                highlight=False,
            )
    if regressed:
        raise typer.Exit(REGRESSED)


def _check(scenarios, json, compare, new, plot) -> None:
    """What goes together."""
    if new is not None and (scenarios or json is not None):
        raise ValueError("bench: --new takes a result that is there already, without scenarios and --json")
    if new is not None and compare is None and plot is None:
        raise ValueError("bench: --new needs --compare or --plot")
    if json is not None and json.is_dir():
        raise ValueError(f"bench: json must be a file, got the folder {str(json)!r}")
    if plot is not None and plot.exists() and not plot.is_dir():
        raise ValueError(f"bench: plot must be a folder, got the file {str(plot)!r}")
    if plot is not None:
        from ..finetune._extras import need

        need("matplotlib.figure", "bench: --plot")


def _stored(path: Path) -> dict:
    """The content of a result file, checked."""
    from ..benchmarks import comparison
    from ..text_files import read_json

    content = read_json("bench", path)
    comparison.parse(content, path)
    return content


def _measured(console: Console, tables: Console, scenarios, quick, rounds, threads, device) -> dict:
    from ..benchmarks import suite
    from ..benchmarks.case import NotRun, Options
    from ..benchmarks.timing import choose_device

    options = Options(choose_device(device), quick, rounds)
    with suite.torch_threads(threads), tables.status("measuring") as status:

        def watch(scenario: str, found) -> None:
            if isinstance(found, NotRun):
                tables.print(f"not run: {found.case}: {found.reason}", highlight=False, markup=False)
            else:
                tables.print(found.table())
            status.update(f"measuring; of {scenario} last: {escape(found.case)}")

        report = suite.run(scenarios or suite.SCENARIOS, options, watch)
    content = report.content()
    limits = content["environment"].get("limits")
    if limits:
        rates = ", ".join(f"{dtype} {rate:g} GFLOP/s" for dtype, rate in limits["gflop_per_s"].items())
        memory = ", ".join(f"{mib} MiB {rate:g}" for mib, rate in limits["gb_per_s_by_mib"].items())
        console.print(
            f"limits measured here: {rates}; GB/s by size of memory: {memory}", highlight=False, soft_wrap=True
        )
        console.print(
            "A share of the roofline takes the bandwidth of the case's own size; where that fits into a cache it says so.",
            highlight=False,
            soft_wrap=True,
        )
    return content
