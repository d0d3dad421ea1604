"""Ranks that change on all processes or on none: one process decides, all prepare, and who disagrees is named."""

import hashlib
import json
from collections.abc import Callable, Sequence

from ..methods import NonFiniteError
from .processes import Processes

# The highest rank differences that an error lists.
_LISTED = 5


def checksum(value) -> int:
    """62 bits of the SHA-256 of JSON."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def _described(error: Exception | None) -> tuple[str, str] | None:
    if error is None:
        return None
    kind = (
        "NonFiniteError" if isinstance(error, NonFiniteError) else "ValueError" if isinstance(error, ValueError) else ""
    )
    return kind, f"{error}" if kind else repr(error)


def _raise(op: str, process: int, described: tuple[str, str]) -> None:
    kinds = {"NonFiniteError": NonFiniteError, "ValueError": ValueError}
    raise kinds.get(described[0], RuntimeError)(f"{op}: process {process}: {described[1]}")


class Agreement:
    """
    A block that all processes enter, and in which each says once how it fared: by `reached`, or by leaving the block without it, with an
    error or none. What `reached` is given must be equal on all.

    Raises: in all processes an error that names those in which something went wrong, or whose values differ.
    """

    def __init__(self, processes: Processes, op: str):
        self._processes, self._op, self._told = processes, op, False

    def __enter__(self) -> "Agreement":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if not self._told and (error is None or isinstance(error, Exception)):
            self._compare(error, {}, {})

    def reached(self, ranks: dict[str, list[int]], masked: dict[str, list[int]] | None = None) -> None:
        """Args: ranks: {module name: its rank before the change and after it}.   masked: {module name: its vectors that are masked}."""
        self._compare(None, ranks, masked or {})

    def _compare(self, error: Exception | None, ranks: dict[str, list[int]], masked: dict[str, list[int]]) -> None:
        self._told = True
        number = checksum([ranks, masked])
        doing = f"{self._op}: agreeing on ranks"
        if self._processes.largest([error is not None, number, -number], doing=doing) == [0, number, -number]:
            if ranks:
                self._processes.agreed = {name: after for name, (_, after) in ranks.items()}
            return
        told = self._processes.gather((_described(error), ranks, masked), doing=doing)
        if error is not None:
            return  # it is on its way
        for process, (described, *_) in enumerate(told):
            if described is not None:
                _raise(self._op, process, described)
        _, of_ranks, of_masked = zip(*told, strict=True)
        if any(ranks != of_ranks[0] for ranks in of_ranks):
            raise ValueError(f"{self._op}: {_disagreement('ranks before and after the change', of_ranks)}")
        raise ValueError(f"{self._op}: {_disagreement('vectors that are masked', of_masked)}")


def _disagreement(what: str, told: Sequence[dict[str, list[int]]]) -> str:
    """What differs between the processes' {module name: numbers}, against the first process."""
    differences = []
    for process, ranks in enumerate(told[1:], start=1):
        names = [name for name in {**told[0], **ranks} if told[0].get(name) != ranks.get(name)]
        if names:
            shown = [f"{name} {told[0].get(name)} and {ranks.get(name)}" for name in names[:_LISTED]]
            more = f" and {len(names) - _LISTED} more modules" if len(names) > _LISTED else ""
            differences.append(f"process 0 and process {process} have {', '.join(shown)}{more}")
    return f"{what} must be the same on all processes, and " + "; ".join(differences)


def decide(
    processes: Processes, method, step: Callable[[], dict[str, int] | None], source: int
) -> dict[str, int] | None:
    """
    `step()` of process `source` for all of them: its ranks, and its method's state. The others call it too, for what it does to factors.

    Returns: {module name: rank}, or None for no change.   Raises: in all processes what it raised in `source`, and what it raises here.
    """
    ranks = error = None
    try:
        ranks = step()
    except Exception as found:
        error = found
    said = (ranks, method.step_state(), _described(error)) if processes.rank == source else None
    ranks, state, described = processes.broadcast(said, source, doing="step: the decision on ranks")
    if error is not None:
        raise error
    if described is not None:
        _raise("step", source, described)
    if processes.rank != source:
        method.load_state_dict(state)
    return ranks
