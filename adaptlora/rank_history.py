"""Ranks over the steps of a run: what La-LoRA's `Method.history` gives and rank_history.json holds, checked and expanded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import adapter_folder
from .io import HISTORY_FILE
from .text_files import read_json

_MOST_CELLS = 1 << 24
_MOST = 1 << 31  # of ranks and steps
_MOST_BYTES = 1 << 30  # a change of rank takes some 15 bytes, and La-LoRA may make one in each group at each step


def _are_counts(values, least: int = 0) -> bool:
    return isinstance(values, list) and all(type(value) is int and least <= value < _MOST for value in values)


@dataclass(frozen=True)
class RankHistory:
    """
    groups: {group: its modules}.   start: the groups' ranks before the first step.
    changes: [[step, group's number, its rank after that step], …], steps from 1, ascending.   steps: how many were made.

    Raises: ValueError on construction (field, rule, value).
    """

    groups: dict[str, list[str]]
    start: list[int]
    changes: list[list[int]]
    steps: int

    def __post_init__(self):
        def rule(name, holds, text):
            if not holds:
                raise ValueError(f"rank history: {name} must be {text}, got {str(getattr(self, name))[:80]}")

        groups, count = self.groups, len(self.groups) if isinstance(self.groups, dict) else 0
        named = count and all(
            isinstance(names, list) and names and all(isinstance(name, str) for name in names)
            for names in groups.values()
        )
        rule("groups", named, "lists of module names by group, none empty")
        rule("start", _are_counts(self.start) and len(self.start) == count, f"a rank for each of {count} groups")
        rule("steps", _are_counts([self.steps]), "an integer ≥ 0")
        rule("changes", isinstance(self.changes, list), "a list")
        last = 1
        for change in self.changes:
            whole = _are_counts(change) and len(change) == 3
            if not whole or not last <= change[0] <= self.steps or change[1] >= count:
                raise ValueError(
                    f"rank history: changes must be [step, group's number, rank], ascending, with steps of {self.steps} and "
                    f"{count} groups, got {str(change)[:80]}"
                )
            last = change[0]

    @classmethod
    def read(cls, folder: str | Path) -> "RankHistory | None":
        """The history in an adapter's folder; None where there is none that its weights know of.  Raises: ValueError (a damaged file)."""
        with adapter_folder.settled(Path(folder)) as files:
            if not files.has(HISTORY_FILE) or not files.belongs(HISTORY_FILE):
                return None
            file = files.path(HISTORY_FILE)
            try:
                return cls(**read_json("inspect", file, most_bytes=_MOST_BYTES))
            except (TypeError, ValueError) as error:
                raise ValueError(f"inspect: {file} must hold the ranks over the steps of a run: {error}") from error

    def table(self) -> torch.Tensor:
        """(groups, steps + 1) int64: each group's rank before the first step and after every step.  Raises: ValueError (too large)."""
        if len(self.groups) * (self.steps + 1) > _MOST_CELLS:
            raise ValueError(
                f"rank history: steps must be few enough for a table of {_MOST_CELLS} ranks, got {self.steps}"
            )
        differences = torch.zeros(len(self.groups), self.steps + 1, dtype=torch.int64, device="cpu")
        now = list(self.start)
        differences[:, 0] = torch.tensor(now, device="cpu")
        for step, group, rank in self.changes:
            differences[group, step] += rank - now[group]
            now[group] = rank
        return differences.cumsum(1)

    def at(self, steps: Sequence[int]) -> list[list[int]]:
        """For each group its rank after each of these steps, which ascend; step 0 is before the first."""
        columns, now, place = [], list(self.start), 0
        for step in steps:
            while place < len(self.changes) and self.changes[place][0] <= step:
                _, group, now[group] = self.changes[place]
                place += 1
            columns.append(list(now))
        return [list(row) for row in zip(*columns, strict=True)]

    def average_rank(self) -> float:
        """Mean over modules and steps of the rank that a step was computed with; without a step that of the start."""
        steps = max(1, self.steps)
        sums, now = [steps * rank for rank in self.start], list(self.start)
        for step, group, rank in self.changes:
            sums[group] += (steps - step) * (rank - now[group])
            now[group] = rank
        sizes = [len(names) for names in self.groups.values()]
        return sum(total * size for total, size in zip(sums, sizes, strict=True)) / (steps * sum(sizes))

    def final_ranks(self) -> dict[str, int]:
        """{module: its rank after the last step}"""
        ranks = list(self.start)
        for _, group, rank in self.changes:
            ranks[group] = rank
        return {name: rank for names, rank in zip(self.groups.values(), ranks, strict=True) for name in names}
