"""Text and JSON read from files that anyone may have written: bounded, strict, and with errors that name the file."""

import json
import math
import os
import stat
from contextlib import contextmanager
from pathlib import Path

_MOST_BYTES = 1 << 26
_MOST_DIGITS = 100  # a number above is none that a float could hold, or that anything here means


@contextmanager
def open_regular(op: str, file: Path, note: str = ""):
    """
    with open_regular(op, file) as stream: a regular file, as bytes. Nothing waits for a pipe's other end.

    Raises: FileNotFoundError, ValueError (a folder, a pipe, a device), OSError.
    """
    try:
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{op}: {file} is missing{note}") from error
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kind = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device"}
        raise ValueError(f"{op}: {file} must be a regular file, got {kind.get(stat.S_IFMT(mode), 'something else')}")
    with open(handle, "rb") as stream:
        yield stream


def read_json(op: str, file: Path, *, strict: bool = True, most_bytes: int = _MOST_BYTES) -> dict:
    """The JSON object in a file; see `parse_json`.  Raises: FileNotFoundError, OSError, ValueError."""
    with open_regular(op, file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most_bytes:
            raise ValueError(f"{op}: {file} must have {most_bytes} bytes or less, got {size}")
        content = stream.read(most_bytes)
    return parse_json(op, str(file), content, strict=strict)


def parse_json(op: str, where: str, content: str | bytes, *, strict: bool = True) -> dict:
    """
    A JSON object.  Args: where: for errors.   strict: each name once in an object, integers of 64 bits, finite numbers.
    Raises: ValueError (no JSON, no UTF-8, no object, nested too deep, a number too long).
    """
    hooks = {"parse_int": _int64, "object_pairs_hook": _pairs, "parse_float": _finite, "parse_constant": _finite}
    try:
        found = json.loads(content, **(hooks if strict else {"parse_int": _integer}))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{op}: {where} must be JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{op}: {where} must hold an object, got {type(found).__name__}")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"numbers must have {_MOST_DIGITS} digits or less, got {len(digits)}")
    return int(digits)


def _int64(digits: str) -> int:
    if not -(1 << 63) <= (number := _integer(digits)) < 1 << 63:
        raise ValueError(f"integers must be of 64 bits, got {digits[:20]}…")
    return number


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"numbers must be finite, got {digits[:20]}")
    return number


def _pairs(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"a name must stand once in an object, got {next(n for n in found if names.count(n) > 1)!r} again"
        )
    return found
