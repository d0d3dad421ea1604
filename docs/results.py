"""
Tables and plots of the pages, made from bench/results/*.json when the site is built, so that no number is copied by hand.

A hook of mkdocs. In a page `<!-- results: NAME -->` stands for what TABLES[NAME] returns, and `<!-- results: quality-TABLE -->` for a
table of bench/quality.py with its plot; figures/*.svg are those of FIGURES, figures/*.png those of PICTURES.
"""

import functools
import io
import json
import re
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path

from adaptlora.kernels.devices import DEVICES
from matplotlib.figure import Figure
from mkdocs.structure.files import File

from adaptlora.benchmarks import plots
from adaptlora.plots import INK, MUTED, OURS, THEIRS

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "bench"), str(ROOT / "tests")]

import cost_growth  # noqa: E402
import quality_report  # noqa: E402
from layer_traffic import Layer  # noqa: E402

RESULTS = ROOT / "bench" / "results"
SWEEP, GROWTH = "bench_layer_sweep", "cost_growth"
# Benchmarks of one op each, and of what a rank change is made of.
OPS = (
    "lora_delta",
    "compose",
    "rank_norms",
    "rank_gather",
    "rank_change",
    "low_rank_svd",
    "randomized_svd",
    "subspace_overlap",
)
GPUS = {80: "A100", 90: "H100"}


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def measured(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def not_measured(command: str) -> str:
    return f"Not measured yet: {command}."


def markdown(header: list[str], rows: list[list]) -> str:
    """A table; numbers to the right."""
    align = ["---" if i == 0 else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, align, *rows])


def ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def threads(of: dict) -> str:
    return "1 thread" if of["threads"] == 1 else f"{of['threads']} threads"


def machine(content: dict) -> str:
    """What a result was measured on."""
    environment = content["environment"]
    of, versions = environment["machine"], environment["versions"]
    return (
        f"{of['cpu']}, {of['cores']} cores, {threads(of)}, {environment['isa']}; torch {versions['torch']}, PEFT "
        f"{versions['peft']}; load before the run {environment['load_before']}."
    )


# Tables


def comparison(name: str, script: str) -> str:
    """Every case of a benchmark: the providers' times over the floor's, medians with quartiles."""
    content = read(name)
    parts = []
    for case in content["cases"]:
        peaks = case.get("peak MiB", {})
        rows = []
        for provider, found in sorted(case["providers"].items(), key=lambda item: item[1]["ratio"]):
            low, high = found["ratio_quartiles"]
            rows.append([provider, f"{found['median_ms']:.2f}", ratio(found["ratio"]), f"{ratio(low)} – {ratio(high)}"])
            if peaks:
                rows[-1].append(peaks.get(provider, "–"))
        header = [
            "",
            "median, ms",
            f"over “{case['floor']}”",
            "quartiles",
            *(["peak beyond before, MiB"] if peaks else []),
        ]
        parts.append(
            f"**{case['case']}** ({case['rounds']} round{'s' * (case['rounds'] > 1)})\n\n{markdown(header, rows)}"
        )
    return "\n\n".join([*parts, f"`{script}`, `bench/results/{name}.json`. {machine(content)}"])


def ratios(name: str, script: str) -> str:
    """
    A row for each case of a benchmark: every provider's time over the floor's, medians of the rounds; in brackets the roofline's time
    over its own, where its work was counted.
    """
    content = read(name)
    providers = list(dict.fromkeys(provider for case in content["cases"] for provider in case["providers"]))
    rows = []
    for case in content["cases"]:
        found = case["providers"]
        cells = [_ratio_and_share(found[provider]) if provider in found else "" for provider in providers]
        dtype = case.get("dtype", "torch.float32").removeprefix("torch.")
        name = case["case"] + (f", {dtype}" if dtype != "float32" and dtype not in case["case"] else "")
        rows.append([name, f"{found[case['floor']]['median_ms']:.3f}", *cells])
    header = ["", "ms of the one with 1.00", *providers]
    return f"{markdown(header, rows)}\n\n`{script}`, `bench/results/{name}.json`. {machine(content)}"


def _ratio_and_share(row: dict) -> str:
    return ratio(row["ratio"]) + (f" ({row['roofline_share']:.0%})" if "roofline_share" in row else "")


def ops() -> str:
    """A table of each op's benchmark that was run, and the names of the others."""
    parts = [f"**`bench_{op}.py`**\n\n{ratios(f'bench_{op}', 'make bench')}" for op in OPS if measured(f"bench_{op}")]
    others = ", ".join(f"`bench_{op}.py`" for op in OPS if not measured(f"bench_{op}"))
    return "\n\n".join([*parts, *([not_measured(f"`make bench` ({others})")] if others else [])])


def layer_sweep() -> str:
    """Pictures of the layer's times over one axis at a time."""
    if not measured(SWEEP):
        return not_measured("`make bench` (`bench/bench_layer_sweep.py`)")
    images = "\n\n".join(
        f"![One layer, {name.removeprefix('layer_')}](figures/{name}.png)" for name in sweep_pictures()
    )
    return f"{images}\n\n`make bench`, `bench/results/{SWEEP}.json`. {machine(read(SWEEP))}"


def growth() -> dict | None:
    """The measurements of bench/cost_growth.py with their fits; None until all of it was measured."""
    content = read(GROWTH) if measured(GROWTH) else {}
    return content if "fits" in content else None


def growth_fits() -> str:
    content, command = growth(), "`python bench/cost_growth.py`"
    if content is None:
        return not_measured(command)
    return (
        f"{cost_growth.fit_table(content)}\n\n![Costs against sizes](figures/{GROWTH}.png)\n\n{command}, "
        f"`bench/results/{GROWTH}.json`. {machine(content)}"
    )


def growth_here() -> str:
    """What the fits say of the large model, on the processor of the measurements: the last table of the script's predictions."""
    content, command = growth(), "`python bench/cost_growth.py`"
    if content is None:
        return not_measured(command)
    tables = cost_growth.prediction_tables(content["predictions"])
    title, heads, rows = next(table for table in tables if "on the machine of the measurements" in table[0])
    return f"{title}\n\n{cost_growth.markdown(heads, rows)}\n\n{command}, `bench/results/{GROWTH}.json`."


def memory() -> str:
    content = read("memory")
    rows = [
        [
            row["provider"],
            row["dropout"],
            row["peak MiB"],
            row["beyond the model MiB"],
            row.get("peak over PEFT's", "1"),
            row.get("beyond the model over PEFT's", "1"),
        ]
        for row in content["rows"]
    ]
    header = ["", "dropout", "peak, MiB", "beyond the model", "peak over PEFT's", "beyond it over PEFT's"]
    return f"{markdown(header, rows)}\n\n`python bench/memory.py`, `bench/results/memory.json`. {machine(content)}"


def _shape(case: dict) -> str:
    return "M {M}, K {K}, N {N}, R {R}".format(**case)


def traffic() -> str:
    """Requested bytes over the least, by kernel and shape, and what they would take at data-sheet speed."""
    cases = read("kernel_traffic")["cases"]
    rows = []
    for case in cases:
        for kernel in case["kernels"]:
            if kernel["ideal"]:
                times = " / ".join(f"{time:.2f}" for time in kernel["predicted_us"].values())
                name = kernel["kernel"].removesuffix("_kernel")
                sizes = [f"{kernel[key] / 1e6:.2f}" for key in ("ideal", "requested", "distinct")]
                rows.append([f"`{name}`", _shape(case), *sizes, f"{kernel['requested / ideal']:.3f}", times])
    rows.sort(key=lambda row: row[0])
    header = [
        "kernel",
        "shape",
        "least, MB",
        "asked for",
        "of it distinct",
        "asked / least",
        "µs predicted, A100 / H100",
    ]
    return f"{markdown(header, rows)}\n\n`make traffic`, `bench/results/kernel_traffic.json`."


def layer_traffic() -> str:
    rows = [
        [
            part["direction"],
            _shape(case),
            f"{part['least'] / 1e6:.2f}",
            f"{part['extra / least']:.3f}",
            f"{part['requested / least']:.3f}",
            part["launches"],
        ]
        for case in read("kernel_traffic")["cases"]
        for part in case.get("layer", [])
    ]
    header = [
        "",
        "shape",
        "least beyond the base products, MB",
        "asked / least",
        "tiles' re-reading counted",
        "launches",
    ]
    return f"{markdown(header, rows)}\n\n`make traffic`, `bench/results/kernel_traffic.json`."


def compiled() -> str:
    """What real compilation says of each kernel, all configurations and targets together."""
    content = read("gpu_check")
    rows: dict[str, list[dict]] = {}
    for row in content["rows"]:
        found = dict(zip(content["columns"], row, strict=True))
        rows.setdefault(found["kernel"].strip("_").removesuffix("_kernel"), []).append(found)
    table = []
    for name, found in sorted(rows.items(), key=lambda item: (not item[0].startswith("lora"), item[0])):
        targets = sorted({row["target"] for row in found})
        counts = " / ".join(f"{sum(row['target'] == target for row in found)}" for target in targets)

        def between(column: str, unit: float = 1, found=found) -> str:
            values = [row[column] / unit for row in found]
            low, high = (
                f"{value:.0f}" if value >= 1 or not value else f"{value:.1f}" for value in (min(values), max(values))
            )
            return low if low == high else f"{low} – {high}"

        faults = sum(bool(row["faults"]) for row in found)
        targets = ", ".join(target.removeprefix("sm_") for target in targets)
        table.append(
            [f"`{name}`", targets, counts, between("registers"), between("shared", 1024), between("occupancy"), faults]
        )
    header = ["kernel", "sm_", "configurations", "registers", "shared memory, KiB", "programs an SM", "faults"]
    total = len(content["rows"])
    return f"{markdown(header, table)}\n\n`make gpu-check`, `bench/results/gpu_check.json`: {total:,} compilations."


def by_seed(name: str, columns: dict[str, tuple[str, int]], command: str) -> str:
    """Runs of quality_*.json, named "variant/seed": mean ± standard deviation over the seeds. columns: {header: (entry, digits)}."""
    content = read(name)
    variants: dict[str, list[dict]] = {}
    for run, found in content["runs"].items():
        variants.setdefault(run.rsplit("/", 1)[0], []).append(found)
    rows = []
    for variant, found in variants.items():
        row = [f"`{variant}`", len(found)]
        for entry, digits in columns.values():
            values = [run[entry] for run in found if run.get(entry) is not None]
            spread = f" ± {statistics.stdev(values):,.{digits}f}" if len(set(values)) > 1 else ""
            row.append(f"{statistics.mean(values):,.{digits}f}{spread}" if values else "–")
        rows.append(row)
    of, versions = content["machine"], content["versions"]
    where = f"{of['cpu']}, {threads(of)}, torch {versions['torch']}"
    return f"{markdown(['', 'seeds', *columns], rows)}\n\n`{command}`, `bench/results/{name}.json`. {where}."


def quality(name: str) -> str:
    """A table of bench/quality.py with its plot, from the summary that it keeps beside its runs."""
    if f'"{name}":' not in (ROOT / "bench" / "quality_tables.py").read_text(encoding="utf-8"):
        raise ValueError(f"results: bench/quality_tables.py has no table {name!r}")
    content, command = (
        read("quality") if (RESULTS / "quality.json").exists() else {},
        f"`python bench/quality.py {name}`",
    )
    summary = content.get("tables", {}).get(name)
    if summary is None:
        return f"No runs yet: {command}."
    of, versions = content["machine"], content["versions"]
    where = f"{of['cpu']}, {threads(of)}, torch {versions['torch']}, PEFT {versions['peft']}"
    return (
        f"{quality_report.markdown(summary)}\n\n![{summary['title']}](figures/quality_{name}.svg)\n\n"
        f"{command}, `bench/results/quality.json`. {where}."
    )


def recipes() -> str:
    """recipes/README.md without its title."""
    return (ROOT / "recipes" / "README.md").read_text(encoding="utf-8").partition("\n")[2]


TABLES = {
    "recipes": recipes,
    "norm": lambda: by_seed(
        "quality_norm",
        {"E2E perplexity": ("task", 2), "Wikipedia perplexity": ("wikipedia", 2), "parameters": ("parameters", 0)},
        "python bench/quality_norm.py",
    ),
    "shear": lambda: comparison("bench_shear", "make bench"),
    "peft": lambda: comparison("bench_peft", "make bench"),
    "step": lambda: comparison("bench_step", "make bench"),
    "layer": lambda: ratios("bench_lora_linear", "make bench"),
    "layer-sweep": layer_sweep,
    "ops": ops,
    "cost-growth": growth_fits,
    "cost-growth-here": growth_here,
    "penalty": lambda: ratios("bench_rank_penalty", "make bench"),
    "step-parts": lambda: comparison("bench_step_parts", "make bench"),
    "memory": memory,
    "traffic": traffic,
    "layer-traffic": layer_traffic,
    "compiled": compiled,
}


# Figures


def svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def roof(axes, bandwidth: float, peak: float, label: str, **style) -> None:
    """min(bandwidth · intensity, peak), both in G a second."""
    ridge = peak / bandwidth
    intensities = [ridge / 1e4, ridge, ridge * 1e3]
    axes.plot(intensities, [min(bandwidth * x, peak) for x in intensities], lw=1.2, label=label, **style)


def finish(axes, title: str, rate: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel=rate)
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(True, which="major", alpha=0.25)
    axes.legend(fontsize=7, loc="lower right", framealpha=0.9)
    axes.spines[["top", "right"]].set_visible(False)


def gpu_points() -> list[tuple[str, float, float, float]]:
    """(kernel and shape, useful FLOPs, least bytes, bytes that its programs ask for), of kernels with FLOPs."""
    points = []
    for case in read("kernel_traffic")["cases"]:
        flops = Layer(case["M"], case["K"], case["N"], case["R"], case["dropout"]).flops()
        kernels = [
            *case["kernels"],
            *(k for part in case.get("layer", []) for k in part["kernels"] if "gemm" in k["kernel"]),
        ]
        points += [
            (
                f"{kernel['kernel'].removesuffix('_kernel')}, {_shape(case)}",
                flops[key],
                kernel["distinct"],
                kernel["requested"],
            )
            for kernel in kernels
            if (key := f"_{kernel['kernel']}") in flops
        ]
    return points


def gpu_roofline() -> str:
    """Where counted bytes put each kernel under the data sheets' limits: a prediction."""
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for (capability, name), colour in zip(GPUS.items(), (MUTED, INK), strict=True):
        device = DEVICES[capability]
        bandwidth, peak = device.bandwidth / 1e9, device.flops / 1e9
        label = f"{name}: {bandwidth / 1e3:.2f} TB/s, {peak / 1e3:.0f} TFLOP/s (data sheet)"
        roof(axes, bandwidth, peak, label, color=colour)
    device = DEVICES[90]
    markers: dict[str, str] = {}
    colours: dict[str, str] = {}
    for label, flops, least, asked in gpu_points():
        kernel = label.split(",")[0]
        new = kernel not in markers
        marker = markers.setdefault(kernel, "osD^v"[len(markers) % 5])
        colours.setdefault(kernel, f"C{len(colours)}")
        for bytes_, filled in ((least, True), (asked, False)):
            intensity = flops / bytes_
            rate = min(device.bandwidth * intensity, device.flops) / 1e9
            axes.plot(
                intensity,
                rate,
                marker,
                color=colours[kernel],
                mfc=colours[kernel] if filled else "none",
                ms=5,
                label=kernel if new and filled else None,
            )
    axes.plot([], [], "o", color=MUTED, mfc="none", ms=5, label="hollow: re-reading of tiles counted, no cache")
    finish(axes, "Predicted from counted bytes and data-sheet speeds, H100, bf16: no GPU was timed", "GFLOP/s")
    axes.set(xlim=(2, 5e3), ylim=(5e3, 2e6))
    return svg(figure)


def cpu_results() -> tuple[list[str], list[str]]:
    """
    (those under one roof, the others) of the results that were measured on a CPU beside limits of the machine. One roof has what was
    measured on one kind of machine with the same number of threads: of several such, most results.
    """
    roofs = {}
    for file in sorted(RESULTS.glob("bench_*.json")):
        environment = read(file.stem).get("environment", {})
        of, limits = environment.get("machine", {}), environment.get("limits")
        # Files from before "device" was in them are told by their GPU.
        if limits and environment.get("device", "cuda" if "gpu" in of else "cpu") == "cpu":
            roofs[file.stem] = of.get("cpu"), of.get("cores"), limits["threads"]
    most = max(Counter(roofs.values()).items(), key=lambda item: item[1], default=(None, 0))[0]
    return [name for name, roof in roofs.items() if roof == most], [n for n, roof in roofs.items() if roof != most]


def _fastest(limits: list[dict]) -> dict:
    """One of the limits that several runs on the same machine measured: what the machine was seen to do at best."""

    def best(part: str) -> dict[str, float]:
        keys = dict.fromkeys(key for of in limits for key in of[part])
        return {key: max(of[part][key] for of in limits if key in of[part]) for key in keys}

    return {"threads": limits[0]["threads"]} | {part: best(part) for part in ("gb_per_s_by_mib", "gflop_per_s")}


def cpu_points() -> tuple[dict, list[tuple[str, str, float, float]]]:
    """(limits, [(benchmark, provider, FLOP / byte, GFLOP/s)]) in float32, of `cpu_results`' first part; ({}, []) without any."""
    contents = {name: read(name) for name in cpu_results()[0]}
    points = [
        (name.removeprefix("bench_"), provider, row["flops"] / row["bytes"], row["gflop_per_s"])
        for name, content in contents.items()
        for case in content["cases"]
        if case.get("dtype", "torch.float32") == "torch.float32"
        for provider, row in case["providers"].items()
        if row.get("flops") and row.get("bytes")
    ]
    if not points:
        return {}, []
    return _fastest([content["environment"]["limits"] for content in contents.values()]), points


def cpu_roofline() -> str:
    """Measured rates of ops and layers under the limits of the machine as they were measured at best."""
    limits, points = cpu_points()
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    bandwidths = {float(size): rate for size, rate in limits["gb_per_s_by_mib"].items()}
    largest, fastest = max(bandwidths), max(bandwidths, key=bandwidths.get)
    peak = limits["gflop_per_s"]["float32"]
    for size, style in ((fastest, "--"), (largest, "-")):
        label = f"{bandwidths[size]:.0f} GB/s over {size:g} MiB, {peak:.0f} GFLOP/s (measured)"
        roof(axes, bandwidths[size], peak, label, color=INK, ls=style)
    benches = list(dict.fromkeys(bench for bench, *_ in points))
    kinds = {"adaptlora": OURS, "PEFT": THEIRS, "other": MUTED}
    for bench, provider, intensity, rate in points:
        kind = next((kind for kind in ("adaptlora", "PEFT") if provider.startswith(kind)), "other")
        marker = "osD^vPX*<>hp"[benches.index(bench) % 12]
        axes.plot(intensity, rate, marker, color=kinds[kind], ms=4, alpha=0.7, zorder=3 if kind == "adaptlora" else 2)
    for kind, colour in kinds.items():
        axes.plot([], [], "s", color=colour, ms=6, label=kind)
    for i, bench in enumerate(benches):
        axes.plot([], [], "osD^vPX*<>hp"[i % 12], color=INK, mfc="none", ms=5, label=bench)
    finish(axes, "Measured on a CPU, float32: least work over the time taken", "GFLOP/s")
    rates = [rate for *_, rate in points]
    intensities = [intensity for _, _, intensity, _ in points]
    axes.set(xlim=(min(intensities) / 3, max(intensities) * 30), ylim=(min(rates) / 3, peak * 2))
    return svg(figure)


def cpu_figure() -> str:
    limits, _ = cpu_points()
    if not limits:
        return (
            "The results in `bench/results/` are of runs that did not measure the machine's limits; `make bench` does."
        )
    names, others = cpu_results()
    left_out = f" Not in it, being of another machine or number of threads: {', '.join(others)}." if others else ""
    of = read(names[0])["environment"]["machine"]
    return (
        "![Roofline of the CPU measurements](figures/roofline_cpu.svg)\n\n`make bench`, `bench/results/`: "
        f"{', '.join(names)}; {of['cpu']}, {of['cores']} cores, {threads(limits)}.{left_out}"
    )


TABLES["cpu-roofline"] = cpu_figure
TABLES["gpu-roofline"] = lambda: (
    "![Predicted roofline positions on an H100](figures/roofline_gpu.svg)\n\n`bench/results/kernel_traffic.json`"
)
FIGURES = {"roofline_gpu": gpu_roofline, "roofline_cpu": cpu_roofline}


def _drawn(draw) -> dict[str, bytes]:
    """{name: PNG} of what `draw(folder)` writes."""
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder))
        return {path.stem: path.read_bytes() for path in sorted(Path(folder).glob("*.png"))}


@functools.cache
def sweep_pictures() -> dict[str, bytes]:
    drawn = _drawn(lambda folder: plots.draw(read(SWEEP), folder, ratios=False))
    return {name: picture for name, picture in drawn.items() if name.startswith("layer_")}


def growth_pictures() -> dict[str, bytes]:
    return _drawn(lambda folder: cost_growth.draw(growth(), folder / f"{GROWTH}.png"))


# (whether there is something to draw, what draws it)
PICTURES = ((lambda: measured(SWEEP), sweep_pictures), (lambda: growth() is not None, growth_pictures))


# What mkdocs calls


def on_files(files, config):
    sweep_pictures.cache_clear()
    if (RESULTS / "quality.json").exists():
        for name, summary in read("quality").get("tables", {}).items():
            figure = svg(quality_report.figure(summary))
            files.append(File.generated(config, f"figures/quality_{name}.svg", content=figure))
    for name, draw in FIGURES.items():
        if draw is not cpu_roofline or cpu_points()[0]:
            files.append(File.generated(config, f"figures/{name}.svg", content=draw()))
    for there, pictures in PICTURES:
        for name, content in pictures().items() if there() else ():
            files.append(File.generated(config, f"figures/{name}.png", content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    def result(match: re.Match) -> str:
        if match[1].startswith("quality-"):
            return quality(match[1].removeprefix("quality-"))
        if match[1] not in TABLES:
            raise ValueError(f"{page.file.src_uri}: results must be one of {', '.join(TABLES)}, got {match[1]!r}")
        return TABLES[match[1]]()

    return re.sub(r"<!-- results: ([\w-]+) -->", result, markdown)
