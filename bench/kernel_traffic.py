"""Bytes and FLOPs that the Triton kernels ask for, counted in the interpreter, beside the least they could do; times predicted from them.

    make traffic, or TRITON_INTERPRET=1 PYTHONPATH=tests python bench/kernel_traffic.py [--quick]

Requested bytes are what all programs ask for, with no cache between them; distinct bytes are different addresses, which a perfect
cache would leave. Launches are those for an A100. Times are predictions, max(bytes / bandwidth, FLOPs / peak) at data-sheet
speeds: no GPU has been timed.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import triton
from layer_traffic import Layer, adapter_bytes, distinct, requested, skinny, whole
from rich.console import Console
from rich.table import Table

from adaptlora.kernels import devices

RESULTS = Path(__file__).resolve().parent / "results" / "kernel_traffic.json"
SMALL, LARGE = (2048, 1024, 1024), (8192, 4096, 4096)  # M, K, N


def predicted_us(layer: Layer, name: str, traffic) -> dict[str, float]:
    """Microseconds on each known GPU if distinct bytes came at full bandwidth or useful FLOPs at full speed, the slower of the two."""
    flops = layer.flops().get(name, 0)
    return {
        f"sm_{capability}": round(1e6 * max(distinct(traffic) / device.bandwidth, flops / device.flops), 2)
        for capability, device in devices.DEVICES.items()
    }


def kernel_rows(layer: Layer, counts: dict) -> list[dict]:
    ideal, rows = layer.ideal(), []
    for name, traffic in counts.items():
        least = ideal.get(name)
        rows.append(
            {
                "kernel": name.strip("_"),
                "launches": traffic.launches,
                "programs": traffic.programs,
                "ideal": least,
                "requested": requested(traffic),
                "distinct": distinct(traffic),
                "requested / ideal": least and round(requested(traffic) / least, 3),
                "distinct / ideal": least and round(distinct(traffic) / least, 3),
                "predicted_us": predicted_us(layer, name, traffic),
            }
        )
    return rows


def layer_rows(layer: Layer) -> list[dict]:
    """What a whole layer asks for beyond its two base products, with the fused ones, beside what no layer with dropout avoids."""
    rows = []
    for direction, least, counts in zip(("forward", "backward"), layer.extra(), whole(layer), strict=True):
        extra, requests = (
            sum(adapter_bytes(name, traffic, rereads=rereads) for name, traffic in counts.items())
            for rereads in (False, True)
        )
        rows.append(
            {
                "direction": direction,
                "least": least,
                "extra": extra,
                "requested": requests,
                "extra / least": round(extra / least, 3),
                "requested / least": round(requests / least, 3),
                "launches": sum(traffic.launches for traffic in counts.values()),
                "kernels": kernel_rows(layer, counts),
            }
        )
    return rows


def measured(quick: bool) -> list[dict]:
    shapes = [(SMALL, 8)] if quick else [(SMALL, 8), (SMALL, 16), (LARGE, 8), (LARGE, 16)]
    cases = []
    for (M, K, N), R in shapes:
        layer = Layer(M, K, N, R)
        case = {"M": M, "K": K, "N": N, "R": R, "dropout": layer.p, "kernels": kernel_rows(layer, skinny(layer))}
        # The base products of the larger shape would take the interpreter an hour.
        if (M, K, N) == SMALL and not quick:
            case["layer"] = layer_rows(layer)
        cases.append(case)
    return cases


def tables(case: dict) -> list[Table]:
    title = "M {M}, K {K}, N {N}, R {R}, bf16, dropout {dropout}".format(**case)
    kernels = Table(title=title, title_justify="left")
    for column in (
        "kernel",
        "programs",
        "ideal MB",
        "requested / ideal",
        "distinct / ideal",
        "predicted µs A100 / H100",
    ):
        kernels.add_column(column, justify="left" if column == "kernel" else "right")
    rows = case["kernels"] + [
        row for part in case.get("layer", []) for row in part["kernels"] if "gemm" in row["kernel"]
    ]
    for row in rows:
        ideal = row["ideal"]
        kernels.add_row(
            row["kernel"],
            str(row["programs"]),
            f"{ideal / 1e6:.2f}" if ideal else "–",
            f"{row['requested / ideal']:.3f}" if ideal else "–",
            f"{row['distinct / ideal']:.3f}" if ideal else "–",
            " / ".join(f"{time:.2f}" for time in row["predicted_us"].values()),
        )
    made = [kernels]
    if "layer" in case:
        layer = Table(title="the whole layer beyond its two base products", title_justify="left")
        for column in ("direction", "least MB", "extra / least", "with tile re-reads", "launches"):
            layer.add_column(column, justify="left" if column == "direction" else "right")
        for row in case["layer"]:
            layer.add_row(
                row["direction"],
                *(f"{value:.3f}" for value in (row["least"] / 1e6, row["extra / least"], row["requested / least"])),
                str(row["launches"]),
            )
        made.append(layer)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smaller shape, without base products; writes nothing")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    console, cases = Console(width=120), measured(arguments.quick)
    for case in cases:
        for table in tables(case):
            console.print(table)
    if not arguments.quick:
        content = {
            "what": "counted in triton's interpreter; predicted_us are predictions from data-sheet speeds, not measurements",
            "versions": {"torch": torch.__version__, "triton": triton.__version__},
            "cases": cases,
        }
        RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        console.print(f"written: {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
