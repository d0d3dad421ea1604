"""What a user says about base GEMMs: ADAPTLORA_GEMM, and for each device a file of the fastest, which `adaptlora tune` measures."""

import dataclasses
import datetime
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from .files import atomic_file

OVERRIDES = ("torch", "fused")
VERSION = 1
GEMMS = ("gemm_expand", "gemm_dx", "gemm_dx_group")
DTYPES = ("bfloat16", "float16")

Tile = tuple[int, ...]  # the numbers of a GemmTile


def forced() -> str | None:
    """ADAPTLORA_GEMM, checked; None where it is not set."""
    override = os.environ.get("ADAPTLORA_GEMM") or None
    if override is not None and override not in OVERRIDES:
        raise ValueError(f"ADAPTLORA_GEMM must be one of {', '.join(OVERRIDES)}, got {override!r}")
    return override


@dataclasses.dataclass(frozen=True)
class Entry:
    """
    The fastest of a product (M, columns) summed over `depth`, with an adapter of `rank`.

    tile: None for torch's GEMM.   seconds: of the fastest.   torch_seconds: of torch's GEMM and `lora_expand_`.
    Raises: ValueError, TypeError (what a file may hold instead).
    """

    gemm: str
    dtype: str
    M: int
    columns: int
    depth: int
    rank: int
    tile: Tile | None
    seconds: float
    torch_seconds: float

    def __post_init__(self):
        for field, allowed in (("gemm", GEMMS), ("dtype", DTYPES)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        for field in ("M", "columns", "depth", "rank"):
            if not _is_size(getattr(self, field)):
                raise ValueError(f"{field} must be an integer > 0, got {getattr(self, field)!r}")
        if self.tile is not None and not (len(self.tile) == 5 and all(map(_is_size, self.tile))):
            raise ValueError(f"tile must be null or five integers > 0, got {self.tile!r}")
        for field in ("seconds", "torch_seconds"):
            value = getattr(self, field)
            if type(value) is not float or not 0 < value < math.inf:
                raise ValueError(f"{field} must be a number > 0, got {value!r}")

    @property
    def product(self) -> tuple:
        return self.gemm, self.dtype, self.M, self.columns, self.depth


def _is_size(value) -> bool:
    return type(value) is int and value > 0


@dataclasses.dataclass(frozen=True)
class Table:
    """The entries of a device, one a product, and the day (ISO) on which the last was measured."""

    device: str
    date: str
    entries: tuple[Entry, ...]

    def nearest(self, gemm: str, dtype: torch.dtype, M: int, columns: int, depth: int, tiles) -> Entry | None:
        """
        The entry of this gemm and dtype nearest in log2 of its three sizes, each of which is within a factor of 2.

        tiles: those that can run; an entry of another one, which an older version measured, does not count.
        """
        best, least = None, math.inf
        for entry in self.entries:
            if (entry.gemm, entry.dtype) != (gemm, name_of(dtype)) or not (entry.tile is None or entry.tile in tiles):
                continue
            sizes = zip((entry.M, entry.columns, entry.depth), (M, columns, depth), strict=True)
            steps = [math.log2(theirs / ours) for theirs, ours in sizes]
            if max(map(abs, steps)) <= 1 and math.hypot(*steps) < least:
                best, least = entry, math.hypot(*steps)
        return best


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def path(device: str) -> Path:
    """The file of a device: in ADAPTLORA_CACHE_DIR, else in adaptlora/ of XDG_CACHE_HOME, else of ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.environ.get("ADAPTLORA_CACHE_DIR") or os.path.join(cache, "adaptlora")
    return Path(folder) / f"gemm-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def read(device: str) -> Table | None:
    """The table of a device, None where there is no file.  Raises: ValueError (damaged, of another version or device)."""
    file = path(device)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} must be readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold an object, got {type(content).__name__}")
    for field, expected in (("version", VERSION), ("device", device)):
        if content.get(field) != expected:
            raise ValueError(f"{file}: {field} must be {expected!r}, got {content.get(field)!r}")
    try:
        date = datetime.date.fromisoformat(content["date"]).isoformat()
        entries = tuple(
            Entry(**entry | {"tile": entry["tile"] and tuple(entry["tile"])}) for entry in content["entries"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} must hold a date and whole entries: {type(error).__name__}: {error}") from error
    return Table(device, date, entries)


@functools.cache
def in_use(device: str) -> Table | None:
    """`read`, once a process. A file that it refuses is left as it is and counts as none, with one warning."""
    try:
        return read(device)
    except ValueError as error:
        warnings.warn(f"adaptlora: {error}; base GEMMs are chosen by prediction", stacklevel=2)
        return None


def update(device: str, measured: Iterable[Entry]) -> Path:
    """
    Puts entries in the place of those of the same products; the others stay. The file is written whole or not at all.

    A file that `read` refuses is kept: it gets `.old` behind its name.
    """
    file = path(device)
    try:
        before = read(device)
    except ValueError:
        before = None
        os.replace(file, file.with_name(f"{file.name}.old"))
    entries = {entry.product: entry for entry in (*(before.entries if before else ()), *measured)}
    content = {
        "version": VERSION,
        "device": device,
        "date": datetime.date.today().isoformat(),
        "entries": [dataclasses.asdict(entry) for entry in entries.values()],
    }
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return file
