"""Pictures of a result of the benchmarks: sweeps with the floor's line and the roofline's, ratios of every case, the roofline itself.

They draw what a JSON file holds, so that an old file can be drawn again.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from ..finetune._extras import need
from ..plots import INK, MUTED, OURS, THEIRS, save_figure

COLOURS = ("#d1701c", "#7a4f9e", "#5b8c3e", "#b03060", "#8c6d31", "#3f7fbf")
# What a sweep's axis is called in the facts of a case.
_FACT = {"M": "M", "K = N": "K", "R": "R", "dropout": "dropout", "dtype": "dtype"}
_AXIS = {
    "M": "tokens M", "K = N": "in_features = out_features, K = N", "R": "rank R", "dropout": "dropout", "dtype": "dtype",
}  # fmt: skip


def draw(content: Mapping, folder: str | Path, *, ratios: bool = True) -> list[Path]:
    """
    PNGs into `folder`: `layer_<axis>.png` for each axis that was swept, `roofline.png` where work was counted, and with `ratios` a
    `<scenario>_ratios.png` of every scenario.

    Args: content: what `Report.content` returns.   Raises: MissingExtraError.
    """
    folder, written = Path(folder), []
    cases = content["cases"]
    sweeps = {axis: [case for case in cases if axis in case.get("axes", [])] for axis in _AXIS}
    for axis, on_axis in sweeps.items():
        if len(on_axis) > 1:
            written.append(sweep(on_axis, axis, folder / f"layer_{_slug(axis)}.png", _machine(content)))
    if content["environment"].get("limits") and any(_rated(case) for case in cases):
        written.append(roofline(content, folder / "roofline.png"))
    if ratios:
        scenarios: dict[str, list] = {}
        for case in cases:
            scenarios.setdefault(case.get("scenario", "cases"), []).append(case)
        for scenario, of_it in scenarios.items():
            written.append(ratio_bars(of_it, folder / f"{_slug(scenario)}_ratios.png", _machine(content)))
    return written


def _slug(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_").lower()


def _machine(content: Mapping) -> str:
    machine = content["environment"].get("machine", {})
    device = content["environment"].get("device", "cpu")
    place = machine.get("gpu") if device == "cuda" else machine.get("cpu")
    torch = content["environment"].get("versions", {}).get("torch")
    return f"{place}, threads: {machine.get('threads')}, torch {torch}"


def _rated(case: Mapping) -> bool:
    return any("roofline_ms" in row for row in case["providers"].values())


def _axes(width: float, height: float):
    figure = need("matplotlib.figure", "a picture").Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _colours(providers, floors=()) -> dict[str, str]:
    """adaptlora's own layer and PEFT's are told by the same colours in every picture, as are floors where they are points like others."""
    fixed = {"adaptlora": OURS, "PEFT": THEIRS, **dict.fromkeys(floors, INK)}
    rest = iter(COLOURS[1:] * (1 + len(providers)))
    return {provider: fixed.get(provider) or next(rest) for provider in providers}


def sweep(cases: list[Mapping], axis: str, path: Path, machine: str = "") -> Path:
    """
    Median times over one axis, log by log, with bands between the quartiles; the floor, and the roofline of an adapted layer, as lines.

    Dropout and dtype are places at equal distances.
    """
    fact = _FACT[axis]
    cases = sorted(cases, key=lambda case: (isinstance(case[fact], str), case[fact]))
    numbers = axis not in ("dropout", "dtype")
    places = [case[fact] for case in cases] if numbers else list(range(len(cases)))
    figure, axes = _axes(7.2, 5.0)
    floor = cases[0]["floor"]
    providers = list(dict.fromkeys(provider for case in cases for provider in case["providers"] if provider != floor))
    for provider, colour in {floor: INK, **_colours(providers)}.items():
        points = [
            (x, case["providers"][provider])
            for x, case in zip(places, cases, strict=True)
            if provider in case["providers"]
        ]
        xs, rows = zip(*points, strict=True)
        quartiles = zip(*(row["quartiles_ms"] for row in rows), strict=True)
        if axis == "dtype":  # between two dtypes is nothing
            axes.vlines(xs, *quartiles, color=colour, linewidth=2, alpha=0.5)
        else:
            axes.fill_between(xs, *quartiles, color=colour, alpha=0.15, linewidth=0)
        style = {"color": colour, "linewidth": 2.2 if provider in (floor, "adaptlora") else 1.4, "markersize": 4}
        style["linestyle"] = "none" if axis == "dtype" else "--" if provider == floor else "-"
        axes.plot(xs, [row["median_ms"] for row in rows], marker="o", label=_floor(provider, floor), **style)
    limits = [(x, _limit(case)) for x, case in zip(places, cases, strict=True) if _limit(case) is not None]
    if limits:
        axes.plot(*zip(*limits, strict=True), ":", color=MUTED, linewidth=1.6, label="roofline, adapted layer")
    axes.set_yscale("log")
    if numbers:
        axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(case[fact]).removeprefix("torch.") for case in cases])
    axes.xaxis.set_minor_locator(need("matplotlib.ticker", "a picture").NullLocator())
    axes.set_xlabel(_AXIS[axis])
    axes.set_ylabel("forward and backward, ms (median, quartiles)")
    others = ", ".join(
        f"{name} {str(cases[0][key]).removeprefix('torch.')}"
        for name, key in _FACT.items()
        if name != axis and key in cases[0]
    )
    axes.set_title(f"One adapted layer over {axis}: {others}\n{machine}", fontsize=9, loc="left")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return save_figure(figure, path)


def _floor(provider: str, floor: str) -> str:
    return f"{provider} (the floor)" if provider == floor else provider


def _limit(case: Mapping) -> float | None:
    """Roofline time of what an adapted layer has to do: the largest of the providers', as the floor does less."""
    return max((row["roofline_ms"] for row in case["providers"].values() if "roofline_ms" in row), default=None)


def ratio_bars(cases: list[Mapping], path: Path, machine: str = "") -> Path:
    """Ratio to the floor of every provider of every case, a point with its quartiles, on a log axis; 1 is the floor, a grey mark the
    roofline."""
    rows = [(case, provider) for case in cases for provider in case["providers"] if provider != case["floor"]]
    figure, axes = _axes(8.6, max(2.2, 0.22 * (len(rows) + 1.2 * len(cases)) + 1.2))
    colours = _colours(list(dict.fromkeys(provider for _, provider in rows)))
    y, ticks, labels = 0.0, [], []
    for case in cases:
        floor = case["providers"][case["floor"]]
        axes.text(0.0, y, f" {case['case']} (floor: {case['floor']})", fontsize=7, color=INK, va="center",
                  transform=axes.get_yaxis_transform())  # fmt: skip
        y += 1
        for provider, row in case["providers"].items():
            if provider == case["floor"]:
                continue
            low, high = row["ratio_quartiles"]
            axes.plot([low, high], [y, y], color=colours[provider], linewidth=2, alpha=0.5)
            axes.plot([row["ratio"]], [y], "o", color=colours[provider], markersize=4)
            if "roofline_ms" in row and floor.get("median_ms"):
                axes.plot([row["roofline_ms"] / floor["median_ms"]], [y], "|", color=MUTED, markersize=9)
            ticks.append(y)
            labels.append(provider)
            y += 1
        y += 0.3
    axes.axvline(1.0, color=INK, linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set_ylim(y, -0.8)
    axes.set_xlabel("ratio to the floor (median, quartiles); dashed: the floor; grey mark: the roofline")
    axes.set_title(machine, fontsize=9, loc="left")
    return save_figure(figure, path)


def roofline(content: Mapping, path: Path) -> Path:
    """
    GFLOP/s against FLOPs a byte, log by log: each provider's median in each case that has FLOPs, under the roofs of this machine. The
    slanted roofs are the bandwidths of the largest memory measured and of the fastest (a CPU's cache); the flat ones the peaks by dtype.
    """
    limits = content["environment"]["limits"]
    figure, axes = _axes(9.6, 4.8)
    points: dict[str, list[tuple[float, float]]] = {}
    for case in content["cases"]:
        for provider, row in case["providers"].items():
            if row.get("flops") and row.get("bytes"):
                points.setdefault(provider, []).append((row["flops"] / row["bytes"], row["gflop_per_s"]))
    intensities = [x for values in points.values() for x, _ in values]
    bandwidths, peaks = list(limits["gb_per_s_by_mib"].items()), limits["gflop_per_s"].values()
    # so far to the left that every roof is seen to slant
    low = min(0.5 * min(intensities), 0.2 * min(peaks) / max(rate for _, rate in bandwidths))
    high, top = 2 * max(intensities), max(peaks)
    fastest = "the fastest measured" if content["environment"].get("device") == "cuda" else "the fastest cache measured"
    for (mib, rate), line, where in (
        (bandwidths[-1], "-", "memory"),
        (max(bandwidths, key=lambda entry: entry[1]), ":", fastest),
    ):
        end = top / rate
        axes.plot([low, end], [low * rate, end * rate], line, color=MUTED, label=f"{rate:g} GB/s, {where} ({mib} MiB)")
    for dtype, peak in limits["gflop_per_s"].items():
        axes.axhline(peak, color=MUTED, linewidth=1, linestyle="--")
        axes.text(high, peak, f"{dtype}: {peak:g} GFLOP/s ", fontsize=8, color=MUTED, va="bottom", ha="right")
    floors = {case["floor"] for case in content["cases"]}
    for provider, colour in _colours(list(points), floors).items():
        axes.plot(*zip(*points[provider], strict=True), "o", color=colour, markersize=4, alpha=0.75, label=provider)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(0.5 * min(y for values in points.values() for _, y in values), 2 * top)
    axes.set_xlabel("counted FLOPs a counted byte")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"Roofline\n{_machine(content)}", fontsize=9, loc="left")
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    return save_figure(figure, path)
