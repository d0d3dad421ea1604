"""The clip of a run of `adaptlora finetune`, from the report that lies beside the adapter."""

from pathlib import Path

from ..rank_history import RankHistory
from ..text_files import read_json

REPORT_FILE = "report.json"


def clip_history(file: Path, ranks: dict[str, int]) -> RankHistory | None:
    """
    The one change of ranks of a run that clipped them, every module from the r of its start to what it has.

    Args: file: report.json.   ranks: of the adapter.
    Returns: None where there is no such file, or another one of that name, or one of a run without a clip, or about other ranks.
    """
    try:
        report = read_json("inspect", file, strict=False)
    except (OSError, ValueError):
        return None  # the adapter is whole without it, and the name is anybody's
    spec, after, step, losses = (report.get(name) for name in ("spec", "ranks", "t_c", "losses"))
    if not (isinstance(spec, dict) and isinstance(after, dict) and isinstance(losses, dict) and type(step) is int):
        return None
    start, steps = spec.get("r"), losses.get("ours")
    if type(start) is not int or not isinstance(steps, list) or {n: r for n, r in after.items() if r} != ranks:
        return None
    changes = [[step, i, rank] for i, rank in enumerate(after.values()) if rank != start]
    try:
        return RankHistory({name: [name] for name in after}, [start] * len(after), changes, len(steps))
    except ValueError:
        return None
