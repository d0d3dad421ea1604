"""
What cost_growth.py's measurements and communication.py's byte counts say of LLaMA-3 70B and of 1,000 GPUs: predicted, not measured.

Times on the machine that was measured are extrapolated by one model for all axes, coefficients ≥ 0 from all points, relative errors:

    step           c₁ modules + c₂ M ΣKN + c₃ M Σ(K + N) + c₄ M ΣR(K + N) + c₅ ΣR(K + N)
    penalty        c₀ + c₁ modules + c₂ ΣR(K + N)
    rank change    c₀ + c₁ modules + c₂ ΣR'(K + N), R' the ranks that stay

How far to trust them: `decades` is how many powers of ten a prediction lies beyond the most expensive point that was measured. The model
fitted without the most expensive third of the points predicts these with some error over some decades; `factor` is that error, its
logarithm grown in proportion to the decades that are extrapolated: the truth is expected between prediction / factor and prediction ·
factor if nothing changes beyond the data. Something does: weights of 70 B parameters come from memory, not from caches.

Times of GPUs are bytes over a data sheet's bandwidth, and FLOPs as communication.py estimates them: no GPU has been timed.
"""

import math
from dataclasses import asdict, dataclass

import communication
import numpy as np
from communication import Decoder, Network, Ranks, Shapes, Trained
from growth_fit import nonnegative
from growth_models import OURS, PEFT, Point

from adaptlora.benchmarks import work
from adaptlora.kernels import devices

DECODER = communication.DECODERS[3]
DEVICES = 1000
CHANGES = ((8, 8), (8, 4), (8, 2), (64, 64), (64, 32), (64, 16), (64, 8))  # rank to start with, average that is left
TIMED = {"step": (OURS,), "penalty": (PEFT, OURS), "rank change": (PEFT, OURS)}
H100 = devices.DEVICES[90]


def terms(quantity: str, shapes: Shapes, rank: float, kept: float, tokens: int) -> list[float]:
    """What the coefficients of `quantity` are multiplied by."""
    numbers, stay = (communication.factor_numbers(shapes, r) for r in (rank, kept))
    if quantity != "step":
        return [1, len(shapes), numbers if quantity == "penalty" else stay]
    weights, sides = sum(K * N for K, N in shapes.values()), sum(K + N for K, N in shapes.values())
    return [len(shapes), tokens * weights, tokens * sides, tokens * numbers, numbers]


@dataclass(frozen=True)
class Extrapolated:
    seconds: float
    decades: float  # beyond the most expensive point
    factor: float  # the truth is expected within seconds / factor and seconds · factor


class CostModel:
    """One quantity of one provider, fitted to all points that have it; at least 6 of them.  Raises: ValueError (too few)."""

    def __init__(self, points: list[dict], quantity: str, provider: str):
        self.quantity, self.provider = quantity, provider
        rows = [row for row in points if quantity in row["ms"]]
        if len(rows) < 6:
            raise ValueError(f"prediction: {quantity} must have been measured at 6 points or more, got {len(rows)}")
        seconds = np.array([row["ms"][quantity][provider][1] / 1e3 for row in rows])
        order = np.argsort(seconds)
        self.columns = np.array([self._terms_at(Point(**row["point"])) for row in rows], float)[order]
        self.measured = seconds[order]
        self.coefficients, _ = nonnegative(self.columns, self.measured)
        self.missed, self.span = self._hold_out()

    def _terms_at(self, point: Point) -> list[float]:
        shapes = {str(i): (point.width, point.width) for i in range(point.modules)}
        return terms(self.quantity, shapes, point.rank, point.rank // 2, point.tokens)

    def _hold_out(self) -> tuple[float, float]:
        """(root of the mean square error, in decades, of the most expensive third predicted from the others; the decades between)"""
        cut = 2 * len(self.measured) // 3
        coefficients, _ = nonnegative(self.columns[:cut], self.measured[:cut])
        predicted = self.columns[cut:] @ coefficients
        missed = np.log10(predicted / self.measured[cut:])
        return math.sqrt(np.square(missed).mean()), math.log10(self.measured[-1] / self.measured[cut - 1])

    def __call__(self, shapes: Shapes, rank: float, kept: float, tokens: int) -> Extrapolated:
        seconds = float(np.array(terms(self.quantity, shapes, rank, kept, tokens)) @ self.coefficients)
        decades = math.log10(seconds / self.measured[-1])
        return Extrapolated(seconds, decades, 10 ** (self.missed * max(1.0, decades / max(self.span, 0.1))))


# The predictions


def held(decoder: Decoder, ranks: Ranks) -> dict[str, int]:
    """Numbers that train, and bytes that a device holds for them: factors, gradients, AdamW's two moments; float32."""
    parts = communication.memory(decoder, Trained("", ranks), 1, "DDP")
    numbers = communication.factor_numbers(decoder.linears(), ranks)
    return {"parameters": round(numbers)} | {name: round(parts[name]) for name in ("factors", "gradients", "optimizer")}


def communicated(decoder: Decoder, start: int, average: float, n: int) -> list[dict]:
    """Bytes that a device sends in a step among n, and the estimated time of the factors' all-reduce, for each engine."""
    rows = []
    for engine in communication.ENGINES:
        trained = Trained("", average)
        sent = communication.sent(decoder, trained, n, engine)
        seconds = communication.step_seconds(decoder, trained, n, engine, Network(), communication.TOKENS)
        rows.append(
            {
                "start": start,
                "average": average,
                "engine": engine,
                "gradient_bytes": round(sent["gradients"]),
                "base_bytes": round(sent["base"]),
                "all_reduce_ms": round(1e3 * seconds["gradients"], 3),
                "share_of_compute": seconds["gradients"] / seconds["compute"],
            }
        )
    return rows


def on_an_h100(decoder: Decoder, start: int, average: float) -> dict:
    """Seconds from byte counts: the penalty of all `start` ranks, a change to `average` (None without one), the step's compute."""
    shapes = decoder.linears()
    compute = communication.step_seconds(decoder, Trained("", start), 1, "DDP", Network(), communication.TOKENS)[
        "compute"
    ]
    penalty = work.penalty(round(communication.factor_numbers(shapes, start))).bytes / H100.bandwidth
    change = None
    if average != start:
        change = work.rank_change(round(communication.factor_numbers(shapes, average))).bytes / H100.bandwidth
    return {"start": start, "average": average, "step_s": compute, "penalty_s": penalty, "rank change_s": change}


def predictions(points: list[dict], decoder: Decoder = DECODER, devices: int = DEVICES) -> dict:
    """
    All of it, as it is written into the results.

    Args: points: rows of cost_growth.json, with enough of them for the models.
    Raises: ValueError (too few points).
    """
    models = {(q, p): CostModel(points, q, p) for q, providers in TIMED.items() for p in providers}
    shapes, times = decoder.linears(), []
    for start, average in CHANGES:
        row = {"start": start, "average": average}
        for (quantity, provider), model in models.items():
            rank = average if quantity == "step" else start  # the step after the change, the penalty before it
            nothing = quantity == "rank change" and start == average
            found = None if nothing else asdict(model(shapes, rank, average, communication.TOKENS))
            row[f"{quantity}, {provider}"] = found
        times.append(row)
    return {
        "what": "predicted from fits and byte counts, simulated: nothing here has been measured",
        "model": decoder.name,
        "modules": len(shapes),
        "devices": devices,
        "tokens": communication.TOKENS,
        "held": [{"start": s, "average": average, **held(decoder, average)} for s, average in CHANGES],
        "communicated": [row for change in CHANGES for row in communicated(decoder, *change, devices)],
        "times_here": times,
        "times_h100": [on_an_h100(decoder, *change) for change in CHANGES],
        "fits": {
            f"{quantity}, {provider}": {
                "coefficients": model.coefficients.tolist(),
                "held_out_error": 10**model.missed - 1,
                "held_out_decades": model.span,
            }
            for (quantity, provider), model in models.items()
        },
    }


# Tables


def _ranks(row: dict) -> str:
    return f"{row['start']}" if row["start"] == row["average"] else f"{row['start']} → {row['average']}"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2g} %"


def prediction_tables(found: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, column heads, rows) of each."""
    name, tokens = found["model"], found["tokens"]
    bytes_held = [
        [_ranks(row), f"{row['parameters'] / 1e6:,.1f} M"]
        + [f"{row[part] / 1e9:,.3f} GB" for part in ("factors", "gradients", "optimizer")]
        for row in found["held"]
    ]
    by_ranks: dict[str, dict] = {}
    for row in found["communicated"]:
        by_ranks.setdefault(_ranks(row), {})[row["engine"]] = row
    sent = [
        [ranks]
        + [
            f"{(row[engine]['gradient_bytes'] + row[engine]['base_bytes']) / 1e6:,.1f}"
            for engine in communication.ENGINES
        ]
        + [f"{row['HSDP']['gradient_bytes'] / 1e6:,.1f}", f"{row['DDP']['all_reduce_ms']:.1f}"]
        + [f"{100 * row['DDP']['share_of_compute']:.2f} %"]
        for ranks, row in by_ranks.items()
    ]
    here = []
    for row in found["times_here"]:
        step = row[f"step, {OURS}"]
        cells = [_ranks(row), f"{step['seconds'] / 3600:,.1f} h", f"{step['decades']:.1f}, ×/÷ {step['factor']:.1f}"]
        for quantity, provider in (("penalty", PEFT), ("penalty", OURS), ("rank change", PEFT), ("rank change", OURS)):
            time = row[f"{quantity}, {provider}"]
            cells.append(
                f"{time['seconds']:.2g} s, {_share(time['seconds'], step['seconds'])} (×/÷ {time['factor']:.1f})"
                if time
                else "–"
            )
        here.append(cells)
    gpu = [
        [_ranks(row), f"{row['step_s']:.2f} s"]
        + [
            "–" if seconds is None else f"{1e3 * seconds:.2f} ms, {_share(seconds, row['step_s'])}"
            for seconds in (row["penalty_s"], row["rank change_s"])
        ]
        for row in found["times_h100"]
    ]
    return [
        (
            f"Predicted, not measured: held for the adapter of {name}, {found['modules']} modules, float32, AdamW",
            ["average rank", "LoRA parameters", "factors", "gradients", "optimizer"],
            bytes_held,
        ),
        (
            f"Simulated, not measured: MB that each of {found['devices']:,} GPUs sends in a step of {name}",
            ["average rank", *communication.ENGINES, "HSDP, leaving the node", "all-reduce, ms", "of compute"],
            sent,
        ),
        (
            f"Predicted, not measured: {name}, {tokens:,} tokens, on the machine of the measurements; parts of adaptlora's step",
            [
                "average rank",
                "step",
                "decades beyond",
                "penalty, published",
                "penalty",
                "rank change by hand",
                "rank change",
            ],
            here,
        ),
        (
            f"Predicted, not measured: {name}, {tokens:,} tokens on an H100, byte counts over its data sheet's bandwidth",
            ["average rank", "compute of a step", "penalty", "rank change"],
            gpu,
        ),
    ]
