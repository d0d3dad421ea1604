"""The result of a run: as data, as JSON and as tables on a terminal."""

import json
import statistics
from dataclasses import asdict, dataclass, field

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..plots import describe_ranks, rank_grid
from ..rank_history import RankHistory

OURS, PEFT = "ours", "peft"
UNTIMED = 3  # first steps, which also fill caches and allocate the optimizer's state
# Relative, by the base model's precision: PEFT rounds in another order.
MAX_PEFT_DIFFERENCE = {"float32": 1e-5, "bfloat16": 5e-2}
_METHODS = {
    "normal": "NormAL",
    "lora": "LoRA",
    "lalora": "La-LoRA",
    "nora": "NoRA",
    "adalora": "AdaLoRA",
    "dylora": "DyLoRA",
}
_STARTS = {"kaiming": "", "pissa": " (PiSSA)", "milora": " (MiLoRA)"}
_FIRST_SIZES = {"after": "before clip", "end": "at the start"}  # what "before" is, by the sizes that follow it
_MOMENTS = {"before": "before training", "clip": "at the clip", "end": "at the end", "sheared": "sheared"}


@dataclass
class Report:
    """Everything a run found out. The keys of scores, losses and seconds are "ours" and, if it was compared, "peft"."""

    spec: dict
    versions: dict[str, str | None]
    machine: dict[str, str | int]
    data: dict[str, int]  # train, test, duplicates
    higher_is_better: dict[str, bool]  # by score
    # learner → before | clip | end | sheared → score
    scores: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    t_p: int | None = None
    t_c: int | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    history: dict | None = None  # of ranks that change over the steps: what the method's `history` returns
    # before the clip (else: at the start) | after it | end and compacted, where ranks grow | sheared | peft → summary's numbers
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    peft_r: int | None = None  # rank of PEFT's LoRA
    peft_difference: float | None = None  # of the logits after reloading with PEFT: max |Δ| / max |logit|
    files: dict[str, str] = field(default_factory=dict)
    total_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)  # what went otherwise than one may think

    def step_times(self) -> dict[str, dict[str, float]]:
        """Median seconds of a step and ours / PEFT, "before" and "after" the clip; without a clip of "all" of them.

        The first steps and the one that clips are left out. A phase without a step is left out too.
        """
        steps = len(self.seconds.get(OURS, []))
        phases = {"all": range(UNTIMED, steps)}
        if self.t_c is not None:
            phases = {"before": range(UNTIMED, self.t_c - 1), "after": range(max(UNTIMED, self.t_c), steps)}
        table = {}
        for phase, indices in phases.items():
            if indices:
                row = {name: statistics.median(values[i] for i in indices) for name, values in self.seconds.items()}
                table[phase] = row | ({"ratio": row[OURS] / row[PEFT]} if PEFT in row else {})
        return table

    def run_average(self) -> float | None:
        """Average rank over modules and steps, of ranks that change over the steps."""
        return None if self.history is None else RankHistory(**self.history).average_rank()

    def to_json(self) -> str:
        derived = {"step_times": self.step_times(), "run_average": self.run_average()}
        return json.dumps(asdict(self) | derived, indent=1, ensure_ascii=False) + "\n"

    def print(self, console: Console) -> None:
        """Tables: scores, ranks, sizes, step times, files."""
        self._print_table(console, f"Test scores ({self.data['test']} examples)", self._score_table())
        average = self.run_average()
        over_the_run = "" if average is None else f" at the end, {average:.2f} over the run"
        console.print(f"Ranks: {describe_ranks(self.ranks)}{over_the_run}", style="bold", highlight=False)
        for line in self._rank_lines(console.width):
            console.print(line, highlight=False, markup=False)
        console.print()
        self._print_table(console, "Sizes", self._size_table())
        self._print_table(console, "Median step time", self._time_table())
        if self.peft_difference is not None:
            console.print(
                f"[green]✓[/green] stock PEFT loads the adapter onto a fresh base model: logits differ by"
                f" {self.peft_difference:.1e} (relative, at most {MAX_PEFT_DIFFERENCE[self.spec['dtype']]:.0e})"
            )
        for name, path in self.files.items():
            console.print(f"  {name:<14}[bold]{path}[/bold]", soft_wrap=True, highlight=False)
        for note in self.notes:
            console.print(f"[yellow]note:[/yellow] {escape(note)}", highlight=False, soft_wrap=True)
        console.print(f"{self.total_seconds:.0f} s in all", highlight=False)

    @staticmethod
    def _print_table(console: Console, title: str, table: Table | None) -> None:
        if table is not None:
            console.print(
                title, style="bold", highlight=False
            )  # not the table's own title: that is folded to its width
            console.print(table)

    def label(self, learner: str) -> str:
        """Name of a learner for people."""
        if learner == PEFT:
            return f"PEFT LoRA r={self.peft_r}"
        return _METHODS[self.spec["method"]] + _STARTS[self.spec["init_lora_weights"]]

    def _score_table(self) -> Table:
        table = _table()
        table.add_column("")
        for learner in self.scores:
            for score, higher in self.higher_is_better.items():
                table.add_column(f"{self.label(learner)}\n{score} {'↑' if higher else '↓'}", justify="right")
        for moment, text in _MOMENTS.items():
            if moment in self.scores[OURS]:
                step = {"before": 0, "clip": self.t_c}.get(moment, len(self.losses[OURS]))
                cells = [
                    _score(score, values.get(moment, {}).get(score))
                    for values in self.scores.values()
                    for score in self.higher_is_better
                ]
                table.add_row(f"{text} (step {step})", *cells)
        return table

    def _rank_lines(self, width: int) -> list[str]:
        """Ranks as a grid, kinds of modules × layers, in as many blocks as `width` needs; some layers are numbered."""
        kinds, layers, cells = rank_grid(self.ranks)
        names = max(map(len, kinds))
        cell = 1 + max(len(str(rank)) for rank in self.ranks.values())
        block = max(1, (width - names - 2) // cell)
        every = -(-(1 + max(map(len, layers))) // cell)  # layer numbers must not touch
        lines = []
        for first in range(0, len(layers), block):
            columns = range(first, min(first + block, len(layers)))
            numbers = [layers[i].rjust(cell * every) for i in columns if (i - first) % every == every - 1]
            lines.append(f"  {'layer':<{names}}" + "".join(numbers))
            for kind, row in zip(kinds, cells, strict=True):
                shown = ("" if row[i] is None else str(row[i]) for i in columns)
                lines.append(f"  {kind:<{names}}" + "".join(text.rjust(cell) for text in shown))
        return lines

    def _size_table(self) -> Table:
        table = _table()
        table.add_column("")
        before = next((text for key, text in _FIRST_SIZES.items() if key in self.sizes), self.label(OURS))
        columns = {
            "before": before,
            "after": "after clip",
            "end": "at the end",
            "compacted": "compacted",
            "sheared": "sheared",
            "peft": self.label(PEFT),
        }
        shown = {key: text for key, text in columns.items() if key in self.sizes}
        for key, text in shown.items():
            table.add_column(text, justify="right")
            if key == "after":
                table.add_column("change", justify="right")
        rows = {
            "trainable_parameters": "trained parameters",
            "adapter_parameters": "adapter parameters",
            "adapter_bytes": "adapter bytes",
            "optimizer_bytes": "optimizer bytes",
            "outer_bytes": "frozen factors, bytes",
        }
        for name, text in rows.items():
            if name not in self.sizes["before"]:
                continue
            cells = []
            for key in shown:
                value = self.sizes[key].get(name)
                cells.append("–" if value is None else f"{value:,}")
                if key == "after":
                    cells.append(f"{100 * (value / self.sizes['before'][name] - 1):+.1f} %")
            table.add_row(text, *cells)
        return table

    def _time_table(self) -> Table | None:
        times = self.step_times()
        if not times:
            return None
        table = _table()
        table.add_column("")
        for learner in self.seconds:
            table.add_column(self.label(learner), justify="right")
        if PEFT in self.seconds:
            table.add_column("ratio", justify="right")
        for phase, row in times.items():
            cells = [f"{1000 * row[learner]:.0f} ms" for learner in self.seconds]
            text = {"before": "before the clip", "after": "after the clip", "all": "all steps"}[phase]
            table.add_row(text, *cells, *([f"{row['ratio']:.2f}"] if "ratio" in row else []))
        return table


def _table() -> Table:
    return Table(header_style="dim", box=SIMPLE_HEAD)


def _score(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if name == "accuracy" else f"{value:.2f}"
