"""Tables and plots of quality runs: mean, standard deviation and seeds, and the difference to a baseline seed by seed."""

import statistics
from pathlib import Path

from quality_methods import average
from quality_tables import Table
from quality_tasks import QualityTask

from adaptlora.files import atomic_file


def summary(table: Table, fixed: QualityTask, runs: dict[str, dict[int, dict]]) -> dict[str, dict]:
    """{row: what its runs say}, rows without runs left out."""
    baseline = runs[table.baseline]
    rows = {}
    for label, found in runs.items():
        scores = {seed: run["score"] for seed, run in found.items() if run["score"] is not None}
        if not found:
            continue
        ended = [found[seed] for seed in scores]
        pairs = [scores[s] - baseline[s]["score"] for s in scores if s in baseline and baseline[s]["score"] is not None]
        rows[label] = {
            "metric": fixed.metric,
            "seeds": len(found),
            "failed": len(found) - len(scores),
            "lr": next(iter(found.values()))["lr"],
            "mean": statistics.mean(scores.values()) if scores else None,
            "std": statistics.stdev(scores.values()) if len(scores) > 1 else None,
            "difference": statistics.mean(pairs) if pairs else None,
            "difference_std": statistics.stdev(pairs) if len(pairs) > 1 else None,
            "rank": statistics.mean(average(run["ranks"]) for run in ended) if ended else None,
            "parameters": round(statistics.mean(run["parameters"] for run in ended)) if ended else None,
        }
    return rows


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.{digits}f}"


def markdown(name: str, table: Table, rows: dict[str, dict]) -> str:
    if not rows:
        return f"{name}: no runs yet"
    metric = next(iter(rows.values()))["metric"]
    digits = 4 if metric == "accuracy" else 3
    lines = [
        f"{name}: {table.title}",
        "",
        f"| | {metric} | seed by seed, minus {table.baseline} | seeds | learning rate | average rank | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, row in rows.items():
        score = f"{_number(row['mean'], digits)} ± {_number(row['std'], digits)}"
        difference = f"{_number(row['difference'], digits, '+')} ± {_number(row['difference_std'], digits)}"
        seeds = f"{row['seeds']}" + (f" ({row['failed']} diverged)" if row["failed"] else "")
        parameters = "–" if row["parameters"] is None else f"{row['parameters']:,}"
        own = "" if label == table.baseline else difference
        lines.append(
            f"| {label} | {score} | {own} | {seeds} | {row['lr']:g} | {_number(row['rank'], 2)} | {parameters} |"
        )
    return "\n".join(lines) + "\n"


def plot(table: Table, rows: dict[str, dict], path: Path) -> None:
    """Mean and standard deviation of every row, one under the other; the baseline's mean as a line."""
    from matplotlib.figure import Figure

    labels = [label for label, row in rows.items() if row["mean"] is not None]
    means = [rows[label]["mean"] for label in labels]
    errors = [rows[label]["std"] or 0.0 for label in labels]
    figure = Figure(figsize=(7.2, 1.2 + 0.32 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    axes.errorbar(
        means, range(len(labels)), xerr=errors, fmt="o", color="#20639b", capsize=3, linewidth=1.2, markersize=4.5
    )
    if table.baseline in labels:
        axes.axvline(rows[table.baseline]["mean"], color="#8a8a8a", linewidth=1, linestyle="--")
    names = [f"{label}  ({rows[label]['seeds']})" for label in labels]
    axes.set_yticks(range(len(labels)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"{rows[labels[0]]['metric']}, mean ± standard deviation (seeds in brackets)", fontsize=9)
    axes.set_title(f"{table.task}: {table.title}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
