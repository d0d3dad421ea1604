"""
How step time, memory and a rank change's time grow with rank, modules, tokens and width: PEFT's LoRA, adaptlora, the frozen model.

    python bench/cost_growth.py [--quick] [--fresh] [--results FILE]     measures, or goes on where it was stopped; fits; draws
    python bench/cost_growth.py --table [--results FILE]                 prints results as markdown, measures nothing

Stacks of square linears with random weights, float32, no dropout: rank 8, 12 modules, 256 tokens, width 256, and one of the four varied.
FLOPs of a step: 4·M·K·N a module frozen (y and dx), 6·M·R·(K + N) more with rank R. Bytes held for rank R: 16·R·(K + N) a module, factor,
gradient and AdamW's moments in float32, and for the step its x, 4·M·K. The penalty and the rank change do not know about tokens.

    step           forward, backward, AdamW
    memory         bytes of tensors at the worst moment of a step, base weights and input left out; counted, not sampled
    penalty        NormAL's, with its gradient: published module by module; adaptlora's op
    rank change    every module to half its rank, AdamW's state included: by hand with PEFT, which has no call for it; adaptlora

The providers of a point are interleaved; a point's times are medians with quartiles. Before it is timed, gradients of both packages are
compared, and what their rank changes leave of factors and moments with what was there. Exponents: growth_fit.py. Predictions, which are
none of the measurements: growth_predict.py.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from growth_fit import Growth, growth
from growth_models import FROZEN, OURS, PEFT, Models, Point
from growth_predict import prediction_tables, predictions
from rich.console import Console

from adaptlora.benchmarks.harness import Interleaved, environment
from adaptlora.files import atomic_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "cost_growth.json"
QUICK_RESULTS = ROOT / "runs" / "bench-quick" / "cost_growth.json"
BENCHMARK = "cost_growth"
AXES = {
    "rank": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "modules": (6, 12, 25, 50, 100, 200, 450, 1000),
    "tokens": (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    "width": (64, 128, 256, 512, 1024, 2048),
}
QUICK_AXES = {
    "rank": (1, 2, 4, 8, 16, 32),
    "modules": (2, 3, 6, 12, 24),
    "tokens": (16, 32, 64, 128, 256),
    "width": (16, 32, 64, 128, 256),
}
QUANTITIES = ("step", "memory", "penalty", "rank change")
PROVIDERS = {
    "step": (FROZEN, PEFT, OURS),
    "memory": (FROZEN, PEFT, OURS),
    "penalty": (PEFT, OURS),
    "rank change": (PEFT, OURS),
}
SECONDS = {"step": 7.0, "penalty": 2.0, "rank change": 2.0}  # a point's time for each, if it has the rounds
WARMUP, FEWEST, MOST = 2, 5, 61  # rounds


class UnusableResults(ValueError):
    """The results file is not there, not complete, another benchmark's, another machine's, or of other settings."""


# Results on disk


def settings(quick: bool) -> dict:
    axes = QUICK_AXES if quick else AXES
    return {"base": asdict(Point()), "axes": {axis: list(sizes) for axis, sizes in axes.items()}}


def comparable(found: dict) -> dict:
    """What must be the same for points to stand in one table; not how busy the machine was."""
    return {key: found.get(key) for key in ("machine", "versions", "isa")}


def read(path: Path) -> dict:
    """Raises: UnusableResults (no file, no JSON, another benchmark's, or parts of it missing)."""
    if not path.is_file():
        raise UnusableResults(f"cost_growth: {path} must be there: run without --table first")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, no JSON
        raise UnusableResults(f"cost_growth: {path} must be JSON that cost_growth wrote, got {error}") from error
    if not isinstance(content, dict) or content.get("benchmark") != BENCHMARK:
        found = content.get("benchmark") if isinstance(content, dict) else type(content).__name__
        raise UnusableResults(f"cost_growth: {path} must be results with benchmark {BENCHMARK!r}, got {found!r}")
    for part, kind in (("environment", dict), ("settings", dict), ("points", list)):
        if not isinstance(content.get(part), kind):
            raise UnusableResults(f"cost_growth: {path} must have {part}, a {kind.__name__}, got {content.get(part)!r}")
    for row in content["points"]:
        if not isinstance(row, dict) or not all(isinstance(row.get(part), dict) for part in ("point", "ms", "bytes")):
            raise UnusableResults(f"cost_growth: {path} must have point, ms and bytes of each point, got {row!r}")
        if row["point"].keys() != asdict(Point()).keys():
            raise UnusableResults(
                f"cost_growth: {path} must have points with {list(asdict(Point()))}, got {row['point']}"
            )
    return content


def resumed(path: Path, quick: bool, fresh: bool = False) -> dict:
    """
    The results so far, or new ones without points; fresh: these, whatever there is.

    Raises: UnusableResults: not ours, or measured with other settings, on another machine or with other versions.
    """
    mine = {"benchmark": BENCHMARK, "environment": environment(), "settings": settings(quick), "points": []}
    if fresh or not path.exists():
        return mine
    found = read(path)
    for part, here, there in (
        ("settings", mine["settings"], found["settings"]),
        *((key, here, comparable(found["environment"])[key]) for key, here in comparable(mine["environment"]).items()),
    ):
        if here != there:
            raise UnusableResults(
                f"cost_growth: {path} must have been measured with this {part}, {here}, got {there}: give --fresh to replace it"
            )
    return found


def write(path: Path, content: dict) -> None:
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# Measuring


def points(quick: bool) -> list[Point]:
    """Every point once: the axes meet in the base point."""
    axes = QUICK_AXES if quick else AXES
    return list(dict.fromkeys(Point(**{axis: size}) for axis, sizes in axes.items() for size in sizes))


def timed(providers: dict, seconds: float, fewest: int, most: int) -> dict[str, list[float]]:
    """{provider: [lower quartile, median, upper quartile] in ms}, of as many rounds as fit into `seconds`."""
    interleaved, begin, rounds = Interleaved(providers), time.perf_counter(), 0
    for _ in range(WARMUP):
        interleaved()
    while rounds < fewest or (rounds < most and time.perf_counter() - begin < seconds):
        interleaved()
        rounds += 1
    samples = {name: [1e3 * t for t in interleaved.samples[name][WARMUP:]] for name in providers}
    return {
        name: [round(q, 5) for q in statistics.quantiles(times, n=4, method="inclusive")]
        for name, times in samples.items()
    }


def measured(point: Point, quick: bool) -> dict:
    load, (fewest, most) = round(os.getloadavg()[0], 2), (2, 3) if quick else (FEWEST, MOST)
    models = Models(point)
    calls = {"step": models.steps(), "penalty": models.penalties(), "rank change": models.rank_changes()}
    times = {name: timed(of, SECONDS[name], fewest, most) for name, of in calls.items() if of}
    return {"point": asdict(point), "load": load, "ms": times, "bytes": models.peaks()}


def measure(path: Path, quick: bool, *, fresh: bool = False, say=print) -> dict:
    """
    All points that `path` lacks, each stored as it is there; fresh: all points, and the first of them replaces what `path` held.

    Raises: UnusableResults.
    """
    content = resumed(path, quick, fresh)
    present = [Point(**row["point"]) for row in content["points"]]
    wanted = points(quick)
    for i, point in enumerate(wanted, 1):
        if point in present:
            continue
        begin = time.perf_counter()
        content["points"].append(measured(point, quick))
        write(path, content)
        say(f"{i}/{len(wanted)} {point}: {time.perf_counter() - begin:.1f} s")
    return content


# Fits


def series(content: dict, quantity: str, axis: str, provider: str) -> tuple[list[int], list[list[float]]]:
    """(sizes, [lower quartile, median, upper quartile] of each) in ms, or MB three times, of the points where only `axis` varies."""
    base, found = content["settings"]["base"], []
    for row in content["points"]:
        if any(row["point"][other] != base[other] for other in base if other != axis):
            continue
        if quantity == "memory":
            found.append((row["point"][axis], [row["bytes"][provider] / 1e6] * 3))
        elif quantity in row["ms"]:
            found.append((row["point"][axis], row["ms"][quantity][provider]))
    found.sort()
    return [n for n, _ in found], [y for _, y in found]


def fits(content: dict) -> dict[tuple[str, str, str], Growth]:
    """{(quantity, axis, provider): its growth}"""
    found = {}
    for quantity in QUANTITIES:
        for axis in content["settings"]["axes"]:
            for provider in PROVIDERS[quantity]:
                n, y = series(content, quantity, axis, provider)
                found[quantity, axis, provider] = growth(n, [median for _, median, _ in y])
    return found


def complete(content: dict) -> dict:
    """With fits and predictions, as they are written."""
    found = fits(content)
    rows = []
    for (quantity, axis, provider), fit in found.items():
        n, y = series(content, quantity, axis, provider)
        row = {"quantity": quantity, "axis": axis, "provider": provider, "from": n[0], "to": n[-1]}
        row |= {"smallest": round(y[0][1], 4), "largest": round(y[-1][1], 4), "unit": _unit(quantity)}
        row |= {name: [round(p.k, 3), round(p.error, 3)] for name, p in (("slope", fit.slope), ("upper", fit.upper))}
        if fit.growing is not None:
            row["growing"] = [round(fit.growing.k, 3), round(fit.growing.error, 3)]
            row["growing_share"] = round(fit.growing.share, 3)
        rows.append(row)
    return content | {"fits": rows, "predictions": predictions(content["points"])}


def _unit(quantity: str) -> str:
    return "MB" if quantity == "memory" else "ms"


# Tables and picture


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fit_table(content: dict) -> str:
    def exponent(pair):
        return f"{pair[0]:.2f} ± {pair[1]:.2f}" if pair else "–"

    return markdown(
        ["", "against", "provider", "from … to", "slope", "upper half", "k of a + b nᵏ", "grown, of the largest"],
        [
            [
                row["quantity"],
                f"{row['axis']} {row['from']:,} … {row['to']:,}",
                row["provider"],
                f"{row['smallest']:,.3g} … {row['largest']:,.4g} {row['unit']}",
                exponent(row["slope"]),
                exponent(row["upper"]),
                exponent(row.get("growing")),
                f"{100 * row['growing_share']:.0f} %" if "growing_share" in row else "–",
            ]
            for row in content["fits"]
        ],
    )


def draw(content: dict, path: Path) -> None:
    """Log axes: a column of panels for each axis, a row for each quantity; points with quartiles, and the fitted lines."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    # Larger marks below smaller ones: points that coincide are all seen.
    colours = {FROZEN: ("#8a8a8a", "o", 4), PEFT: ("#d1701c", "s", 5.5), OURS: ("#0b6e99", "o", 3)}
    axes, found = list(content["settings"]["axes"]), fits(content)
    figure = Figure(figsize=(3.6 * len(axes), 2.8 * len(QUANTITIES)), layout="constrained")
    panels = figure.subplots(len(QUANTITIES), len(axes), sharex="col", sharey="row")
    for row, quantity in zip(panels, QUANTITIES, strict=True):
        for panel, axis in zip(row, axes, strict=True):
            for provider in PROVIDERS[quantity]:
                n, y = series(content, quantity, axis, provider)
                fit = found[quantity, axis, provider]
                low, median, high = zip(*y, strict=True)
                bars = [
                    [m - q for m, q in zip(median, low, strict=True)],
                    [q - m for m, q in zip(median, high, strict=True)],
                ]
                growing = fit.growing
                constant = " + constant" if growing is not None and growing.a > 0.01 * growing(n[-1]) else ""
                label = f"{provider}: n^{fit.curve.k:.2f}{constant}"
                colour, mark, size = colours[provider]
                panel.errorbar(n, median, yerr=bars, fmt=mark, markersize=size, color=colour, linewidth=1, label=label)
                dense = [n[0] * (n[-1] / n[0]) ** (i / 60) for i in range(61)]
                panel.plot(dense, fit.curve(dense), color=colour, linewidth=1.1)
            panel.set_xscale("log")
            panel.set_yscale("log")
            for side in (panel.xaxis, panel.yaxis):
                side.set_minor_formatter(NullFormatter())
            panel.legend(frameon=False, fontsize=7)
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(color="#e6e6e6", linewidth=0.6)
            panel.set_axisbelow(True)
        row[0].set_ylabel(f"{quantity} ({_unit(quantity)})")
    for panel, axis in zip(panels[-1], axes, strict=True):
        panel.set_xlabel(axis)
    machine = content["environment"]["machine"]
    figure.suptitle(f"{machine['cpu']}, threads: {machine['threads']}; medians and quartiles", fontsize=9)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


def show(content: dict) -> None:
    print(fit_table(content))
    for title, heads, rows in prediction_tables(content["predictions"]):
        print(f"\n{title}\n\n{markdown(heads, rows)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, three rounds: whether it runs, not how fast")
    parser.add_argument("--table", action="store_true", help="print what was measured as markdown, and measure nothing")
    parser.add_argument("--fresh", action="store_true", help="replace what the results file holds instead of going on")
    parser.add_argument(
        "--results",
        type=Path,
        help=f"default: {RESULTS.relative_to(ROOT)}, with --quick {QUICK_RESULTS.relative_to(ROOT)}",
    )
    options = parser.parse_args()
    path = options.results or (QUICK_RESULTS if options.quick else RESULTS)
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    try:
        if options.table:
            content = read(path)
            if not ("fits" in content and "predictions" in content):
                raise UnusableResults(f"cost_growth: {path} must be complete: run without --table, which goes on")
            show(content)
            return 0
        gc.freeze()  # the libraries' objects, which the collector would otherwise look through in every round
        content = complete(measure(path, options.quick, fresh=options.fresh, say=console.print))
    except UnusableResults as error:
        console.print(str(error))
        return 2
    write(path, content)
    draw(content, path.with_suffix(".png"))
    show(content)
    console.print(f"written: {path}, {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
