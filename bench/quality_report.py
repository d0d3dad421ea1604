"""
Tables and plots of quality runs: mean, standard deviation and seeds, and the difference to a baseline seed by seed.

A summary is plain data, which quality.json keeps beside the runs: {"task", "title", "baseline", "metric", "curves", "rows": {label: …}}.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the documentation reads summaries without what trains them
    from quality_tables import Table
    from quality_tasks import QualityTask


def summary(table: Table, fixed: QualityTask, runs: dict[str, dict[int, dict]]) -> dict:
    """What the runs of a table say; rows without runs are left out."""
    rows = {label: _row(found, runs[table.baseline]) for label, found in runs.items() if found}
    return {
        "task": table.task,
        "title": table.title,
        "baseline": table.baseline,
        "metric": fixed.metric,
        "curves": table.curves and asdict(table.curves),
        "rows": rows,
    }


def _row(found: dict[int, dict], baseline: dict[int, dict]) -> dict:
    scores = {seed: run["score"] for seed, run in found.items() if run["score"] is not None}
    ended = [found[seed] for seed in scores]
    pairs = [scores[s] - baseline[s]["score"] for s in scores if s in baseline and baseline[s]["score"] is not None]
    return {
        "seeds": len(found),
        "failed": len(found) - len(scores),
        "lr": next(iter(found.values()))["lr"],
        "mean": statistics.mean(scores.values()) if scores else None,
        "std": statistics.stdev(scores.values()) if len(scores) > 1 else None,
        "difference": statistics.mean(pairs) if pairs else None,
        "difference_std": statistics.stdev(pairs) if len(pairs) > 1 else None,
        "rank": statistics.mean(statistics.mean(run["ranks"]) for run in ended) if ended else None,
        "parameters": round(statistics.mean(run["parameters"] for run in ended)) if ended else None,
    }


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.{digits}f}"


def markdown(content: dict) -> str:
    """The table of a summary."""
    rows, metric, baseline = content["rows"], content["metric"], content["baseline"]
    digits = 4 if metric == "accuracy" else 3
    lines = [
        f"| | {metric} | seed by seed, minus {baseline} | seeds | learning rate | average rank | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, row in rows.items():
        score = f"{_number(row['mean'], digits)} ± {_number(row['std'], digits)}"
        difference = f"{_number(row['difference'], digits, '+')} ± {_number(row['difference_std'], digits)}"
        seeds = f"{row['seeds']}" + (f" ({row['failed']} diverged)" if row["failed"] else "")
        parameters = "–" if row["parameters"] is None else f"{row['parameters']:,}"
        own = "" if label == baseline else difference
        lines.append(
            f"| {label} | {score} | {own} | {seeds} | {row['lr']:g} | {_number(row['rank'], 2)} | {parameters} |"
        )
    return "\n".join(lines)


def figure(content: dict):
    """Mean and standard deviation: over a number where the table has one, else row by row; the baseline's mean as a line."""
    from matplotlib.figure import Figure

    rows = {label: row for label, row in content["rows"].items() if row["mean"] is not None}
    content = content | {"rows": rows}
    curves = content["curves"]
    drawing = Figure(figsize=(7.2, 4.2 if curves else 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = drawing.add_subplot()
    (_draw_curves if curves else _draw_rows)(axes, **content)
    axes.set_title(f"{content['task']}: {content['title']}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y" if curves else "x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return drawing


_BARS = {"capsize": 3, "linewidth": 1.2, "markersize": 4.5}


def _draw_rows(axes, *, rows: dict[str, dict], baseline: str, metric: str, **_) -> None:
    means, errors = zip(*((row["mean"], row["std"] or 0.0) for row in rows.values()), strict=True)
    axes.errorbar(means, range(len(rows)), xerr=errors, fmt="o", color="#20639b", **_BARS)
    if baseline in rows:
        axes.axvline(rows[baseline]["mean"], color="#8a8a8a", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [f"{label}  ({row['seeds']})" for label, row in rows.items()], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric}, mean ± standard deviation (seeds in brackets)", fontsize=9)


def _draw_curves(axes, *, rows: dict[str, dict], baseline: str, metric: str, curves: dict, **_) -> None:
    series: dict[str, list[tuple[float, float, float]]] = {}
    for label, (name, at) in curves["points"].items():
        if label in rows:
            series.setdefault(name, []).append((at, rows[label]["mean"], rows[label]["std"] or 0.0))
    for (name, points), colour in zip(sorted(series.items()), ("#20639b", "#d1495b"), strict=False):
        at, means, errors = zip(*sorted(points), strict=True)
        axes.errorbar(at, means, yerr=errors, fmt="o-", color=colour, label=name, **_BARS)
    if baseline in rows:
        label = f"{baseline} ({rows[baseline]['seeds']} seeds)"
        axes.axhline(rows[baseline]["mean"], color="#8a8a8a", linewidth=1, linestyle="--", label=label)
    if curves["log"]:
        axes.set_xscale("log")
    axes.set_xlabel(curves["axis"], fontsize=9)
    axes.set_ylabel(f"{metric}, mean ± standard deviation", fontsize=9)
    axes.legend(frameon=False, fontsize=9)
