"""adaptlora bench"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .app import app
from .console import BAD_INPUT, one_clear_line

REGRESSED = 1  # exit code, of nothing else: whatever fails ends with BAD_INPUT
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
        Path | None,
        typer.Option("--json", help="Write the results into this file, anew after every case.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw them into this folder, as .png files.", show_default=False)
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            help="An older result: show what changed; exit code 1 if one of adaptlora's ratios to the floor became worse.",
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
        int | None,
        typer.Option(
            help="Rounds of every case, in place of its own number; with --compare 5 at least.", show_default=False
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Threads of torch on the CPU; without it, as torch chooses. Memory's processes have one.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; memory is that of the CPU on any.")] = "auto",
) -> None:
    """Measure adaptlora beside PEFT and the frozen model, on this machine.

    Every provider of a case is first seen to compute the same, then all are
    called in turn. Reported are medians and quartiles, the ratio to a floor (of a
    layer and a step: the frozen model's), and the share of what this machine's
    memory and arithmetic, measured in the same run, would allow. Models have
    random weights: nothing is fetched. PEFT and transformers must be installed.
    All scenarios take a good part of an hour; what else runs on the machine
    blurs them.

    Exit codes: 0, all well; 1, something of adaptlora regressed (--compare); 2,
    whatever else went wrong; 130, interrupted.
    """
    console = Console()
    tables = Console(width=max(console.width, MIN_WIDTH))
    regressed = False
    kept = (
        "nothing was written"
        if json is None
        else f"{escape(str(json))} has the cases that were measured before, if any"
    )
    with _code_2_for_whatever_fails(), one_clear_line(kept):
        _check(scenarios, json, compare, new, plot, quick, rounds, threads, device)
        # What is wrong with an old file is said before half an hour is spent.
        from ..benchmarks import comparison

        old = None if compare is None else comparison.read(compare)
        if new is not None:
            content, where = _stored(new), new
        else:
            content = _measured(console, tables, scenarios, quick, rounds, threads, device, json)
            where = json or Path("this run")
        if json is not None:
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
            if not found.rows:
                raise ValueError(f"bench: {where} must have a case and a provider of {compare}, got none to compare")
            console.print(
                f"{len(found.rows)} ratios compared with {escape(str(compare))}: {len(found.regressed)} regressed",
                highlight=False,
            )
    if regressed:
        raise typer.Exit(REGRESSED)


@contextmanager
def _code_2_for_whatever_fails() -> Iterator[None]:
    """An error that nobody expected keeps its traceback, but not Python's exit code, which here means a regression."""
    try:
        yield
    except Exception as error:
        if isinstance(error, typer.Exit):
            raise
        traceback.print_exc()
        raise typer.Exit(BAD_INPUT) from error


def _check(scenarios, json, compare, new, plot, quick, rounds, threads, device) -> None:
    """What goes together, and whether results can be written where they are to go."""
    if new is not None:
        given = {
            "scenarios": scenarios,
            "--json": json is not None,
            "--quick": quick,
            "--rounds": rounds is not None,
            "--threads": threads is not None,
            "--device": device != "auto",
        }
        wrong = [name for name, is_given in given.items() if is_given]
        if wrong:
            raise ValueError(f"bench: --new takes a result that is there already, without {', '.join(wrong)}")
    if new is not None and compare is None and plot is None:
        raise ValueError("bench: --new needs --compare or --plot")
    if compare is not None and new is None:
        from ..benchmarks.comparison import MIN_ROUNDS

        if (quick and rounds is None) or (rounds is not None and 0 < rounds < MIN_ROUNDS):
            got = "--quick with its 3" if rounds is None else str(rounds)
            raise ValueError(
                f"bench: --compare needs at least {MIN_ROUNDS} rounds, since it compares quartiles, got {got}: --rounds"
            )
    if json is not None and json.is_dir():
        raise ValueError(f"bench: json must be a file, got the folder {str(json)!r}")
    if json is not None and json.exists() and not json.is_file():
        raise ValueError(f"bench: json must be a file, got another thing {str(json)!r}")
    if plot is not None and plot.exists() and not plot.is_dir():
        raise ValueError(f"bench: plot must be a folder, got the file {str(plot)!r}")
    if plot is not None:
        from ..finetune._extras import need

        need("matplotlib.figure", "bench: --plot")
    for option, file in (("json", json), ("plot", None if plot is None else plot / "roofline.png")):
        if file is not None:
            _check_writable(option, file)


def _check_writable(option: str, file: Path) -> None:
    """Raises: ValueError, if no new file may stand there."""
    from ..files import temporary_file

    try:
        with temporary_file(file):
            pass
    except OSError as error:
        raise ValueError(
            f"bench: {option} must be a place that can be written to, got {str(file)!r}: {error.strerror}"
        ) from error


def _stored(path: Path) -> dict:
    """The content of a result file, checked."""
    from ..benchmarks import comparison
    from ..text_files import read_json

    content = read_json("bench", path)
    comparison.parse(content, path)
    return content


def _measured(console: Console, tables: Console, scenarios, quick, rounds, threads, device, json) -> dict:
    """The content of a result; `json`, where given, has all that was found until now after every case."""
    from ..benchmarks import suite
    from ..benchmarks.accuracy import WrongResultError
    from ..benchmarks.case import NotRun, Options
    from ..benchmarks.harness import write_json
    from ..benchmarks.memory import ProcessError
    from ..benchmarks.timing import choose_device

    options = Options(choose_device(device), quick, rounds)
    with suite.torch_threads(threads), tables.status("measuring") as status:

        def watch(scenario: str, found, report) -> None:
            if json is not None:
                write_json(json, report.content())
            if isinstance(found, NotRun):
                tables.print(f"not run: {found.case}: {found.reason}", highlight=False, markup=False)
            else:
                tables.print(found.table())
            status.update(f"measuring; of {scenario} last: {escape(found.case)}")

        try:
            report = suite.run(scenarios or suite.SCENARIOS, options, watch)
        except (WrongResultError, ProcessError) as error:
            kept = "" if json is None else f" ({json} has the cases that were measured before, if any)"
            raise ValueError(f"{error}{kept}") from error
    content = report.content()
    if json is not None:
        write_json(json, content)
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
