"""Two result files of the benchmarks side by side: what became slower.

Only ratios to the floor are compared, never times, so that a busier or a slower machine is no regression. A provider of a case regressed
when the lower quartile of its new ratio lies above the upper quartile of the old one and its median is more than 5 % larger. It improved
when the same holds the other way round. Memory is compared as times are. Where the floor is adaptlora itself, its ratio to each provider
of another kind is compared: the floor's own ratio says nothing. Rows of other packages are shown; only ours decide whether a run failed.

Files are those of `adaptlora bench --json` and of `make bench`. A case is known by its name, and M, R, dropout and dtype where it has them;
a provider by its name. A case whose floor is another one now cannot be compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..text_files import read_json

TOLERANCE = 0.05
MIN_ROUNDS = 5  # below it quartiles are hardly more than the extremes
# What the names of our providers begin with: "adaptlora", and where a benchmark has none but ours, what they do.
OURS = (
    "adaptlora",
    "PEFT LoRA accelerated",
    "randomized_svd",
    "penalty and its gradient",
    "proximal step",
    "rank change of every module",
)
_IDENTITY = ("M", "R", "dropout", "dtype")
# What times depend on, as a path into "environment".
_CONDITIONS = {
    "system": ("machine", "system"),
    "processor": ("machine", "cpu"),
    "cores": ("machine", "cores"),
    "threads": ("machine", "threads"),
    "GPU": ("machine", "gpu"),
    "device": ("device",),
    "instructions": ("isa",),
}


@dataclass(frozen=True)
class Ratio:
    low: float
    median: float
    high: float


@dataclass
class Results:
    """One file: ratios by (case, provider), floors and rounds by case, what they were measured on, and whether its run came to its end."""

    path: Path
    environment: Mapping
    floors: dict[str, str] = field(default_factory=dict)
    ratios: dict[tuple[str, str], Ratio] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    complete: bool = True


@dataclass(frozen=True)
class Row:
    case: str
    provider: str
    old: Ratio
    new: Ratio

    @property
    def change(self) -> float:
        """By how much the median ratio became larger, as a part of the old one."""
        return self.new.median / self.old.median - 1

    @property
    def ours(self) -> bool:
        return self.provider.startswith(OURS)

    @property
    def verdict(self) -> str:
        """ "regressed", "improved" or "" (see above)."""
        if self.new.low > self.old.high and self.new.median > (1 + TOLERANCE) * self.old.median:
            return "regressed"
        if self.new.high < self.old.low and self.old.median > (1 + TOLERANCE) * self.new.median:
            return "improved"
        return ""


@dataclass
class Differences:
    """
    rows: what both files have.   missing: in the old file alone, added: in the new one alone: cases, or providers of a case.
    floors: cases with another floor.   conditions: lines on what was different about the machine and what the files lack.
    """

    rows: list[Row]
    missing: list[str]
    added: list[str]
    floors: list[str]
    conditions: list[str]

    @property
    def regressed(self) -> list[Row]:
        """Rows of adaptlora; of other packages it is no fault of ours."""
        return [row for row in self.rows if row.ours and row.verdict == "regressed"]

    def table(self) -> Table:
        table = Table(header_style="dim", box=SIMPLE_HEAD)
        for column in ("case", "provider"):
            table.add_column(column, overflow="fold")
        for column in ("old ratio", "new ratio", "change"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        colours = {"regressed": "bold red", "improved": "green", "": None}
        for row in sorted(self.rows, key=lambda row: -row.change):
            old, new = (f"{r.median:.3f} ({r.low:.3f} – {r.high:.3f})" for r in (row.old, row.new))
            style = colours[row.verdict] if row.ours else None
            table.add_row(row.case, row.provider, old, new, f"{row.change:+.1%}", row.verdict, style=style)
        return table

    def notes(self) -> list[str]:
        """Everything that the table does not say."""
        return [
            *self.conditions,
            *(f"not compared, another floor: {line}" for line in self.floors),
            *(f"only in the old file: {line}" for line in self.missing),
            *(f"only in the new file: {line}" for line in self.added),
        ]


def read(path: str | Path) -> Results:
    """Raises: FileNotFoundError, ValueError (no JSON, or none of these benchmarks)."""
    path = Path(path)
    return parse(read_json("bench", path), path)


def parse(content: Mapping, path: Path) -> Results:
    """What `read` makes of a file's content.  Raises: ValueError."""
    environment, cases = content.get("environment"), content.get("cases")
    if not isinstance(environment, dict) or not isinstance(cases, list):
        raise ValueError(
            f"bench: {path} must be a result of these benchmarks, with the fields environment and cases, got"
            f" {', '.join(sorted(content)) or 'none'}"
        )
    results = Results(path, environment, complete=content.get("complete", True) is not False)
    for i, case in enumerate(cases):
        _add(results, case, f"{path}: cases[{i}]")
    return results


def _add(results: Results, case, where: str) -> None:
    if not isinstance(case, dict) or not isinstance(case.get("case"), str) or not isinstance(case.get("floor"), str):
        raise ValueError(f"bench: {where} must have the texts case and floor")
    providers = case.get("providers")
    if not isinstance(providers, dict) or case["floor"] not in providers:
        raise ValueError(f"bench: {where} must have providers, {case['floor']!r} among them")
    facts = {key: f"{key} {case[key]}" for key in _IDENTITY if key in case}
    if "dtype" in facts:
        facts["dtype"] = str(case["dtype"]).removeprefix("torch.")
    name = ", ".join([case["case"], *(fact for fact in facts.values() if fact not in case["case"])])
    if name in results.floors:
        raise ValueError(f"bench: {where} must be named otherwise than the cases before it, got {name!r}")
    floor = results.floors[name] = case["floor"]
    if isinstance(case.get("rounds"), int):
        results.rounds[name] = case["rounds"]
    for provider, row in providers.items():
        ratio = _ratio(row, f"{where}: {provider}")
        if floor.startswith(OURS) and not provider.startswith(OURS):
            provider, ratio = f"{floor} over {provider}", Ratio(1 / ratio.high, 1 / ratio.median, 1 / ratio.low)
        results.ratios[name, provider] = ratio


def _ratio(row, where: str) -> Ratio:
    values = [row.get("ratio"), *_pair(row.get("ratio_quartiles"))] if isinstance(row, dict) else [None]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise ValueError(f"bench: {where} must have a number ratio and two numbers ratio_quartiles")
    median, low, high = values
    if not 0 < low <= median <= high:
        raise ValueError(
            f"bench: {where} must have 0 < lower quartile ≤ ratio ≤ upper quartile, got {low}, {median}, {high}"
        )
    return Ratio(low, median, high)


def _pair(value) -> list:
    return value if isinstance(value, list) and len(value) == 2 else [None]


def compare(old: Results, new: Results) -> Differences:
    """Everything in `new` against `old`; see the rule above."""
    shared = [name for name in old.floors if name in new.floors]
    other_floor = [name for name in shared if old.floors[name] != new.floors[name]]
    comparable = set(shared) - set(other_floor)
    rows, missing, added = [], [], []
    for here, there, only in ((old, new, missing), (new, old, added)):
        only += [name for name in here.floors if name not in there.floors]
        only += [
            f"{provider}, of {name}"
            for name, provider in here.ratios
            if name in comparable and (name, provider) not in there.ratios
        ]
    for (name, provider), ratio in old.ratios.items():
        if name in comparable and provider != old.floors[name] and (name, provider) in new.ratios:
            rows.append(Row(name, provider, ratio, new.ratios[name, provider]))
    floors = [f"{name}: {old.floors[name]!r}, now {new.floors[name]!r}" for name in other_floor]
    noted = [f"{side.path} is of a run that did not come to its end" for side in (old, new) if not side.complete]
    few = {row.case for row in rows if min(s.rounds.get(row.case, MIN_ROUNDS) for s in (old, new)) < MIN_ROUNDS}
    if few:
        noted.append(f"fewer than {MIN_ROUNDS} rounds, whose quartiles say little: {', '.join(sorted(few))}")
    return Differences(rows, missing, added, floors, conditions(old.environment, new.environment) + noted)


def conditions(old: Mapping, new: Mapping) -> list[str]:
    """A line for each thing that was another one: machine, threads, versions."""
    pairs = {title: tuple(_at(side, keys) for side in (old, new)) for title, keys in _CONDITIONS.items()}
    versions = [side.get("versions") if isinstance(side.get("versions"), dict) else {} for side in (old, new)]
    for package in dict.fromkeys([*versions[0], *versions[1]]):
        pairs[f"version of {package}"] = tuple(side.get(package) for side in versions)
    # "device" is younger than the first result files, which are told by their GPU
    return [
        f"{title}: {before if before is not None else 'none'}, now {now if now is not None else 'none'}"
        for title, (before, now) in pairs.items()
        if before != now and not (title == "device" and before is None)
    ]


def _at(environment: Mapping, keys: tuple[str, ...]):
    found = environment
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
