"""Files and folders written whole or not at all, and safetensors read with errors that name the file."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


class atomic_file:
    """
    with atomic_file(path) as temporary: write to `temporary`, a Path beside `path`; it replaces `path` on success, synced
    to disk, and is removed if the block raises, leaving `path` as it was.
    """

    def __init__(self, path):
        self.path = Path(path)

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        os.close(handle)
        self.temporary = Path(name)
        return self.temporary

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                self.temporary.chmod(0o666 & ~_umask())
                _sync(self.temporary)
                os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)


class atomic_folder:
    """
    with atomic_folder(path) as temporary: fill `temporary`, a folder beside `path`; it becomes `path`, which must be absent or
    an empty folder, on success, its files synced to disk, and is removed if the block raises.
    """

    def __init__(self, path):
        self.path = Path(path)

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}."))
        return self.temporary

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                for file in self.temporary.rglob("*"):
                    if file.is_file():
                        _sync(file)
                self.temporary.chmod(0o777 & ~_umask())
                os.replace(self.temporary, self.path)
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(file: Path) -> None:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


class open_tensors:
    """
    with open_tensors(op, file) as handle: safetensors' own handle, of which only the header has been read.

    Raises: FileNotFoundError, ValueError (another format, a file that is cut or damaged).
    """

    def __init__(self, op: str, file: Path):
        self.op, self.file = op, file

    def __enter__(self):
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.op}: {self.file} is missing (only safetensors are read)")
        if self.file.suffix != ".safetensors":
            raise ValueError(
                f"{self.op}: {self.file} must be a .safetensors file (pickles run code when they are read)"
            )
        try:
            self.handle = safe_open(self.file, framework="pt")
            return self.handle.__enter__()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.op}: {self.file} must be a whole safetensors file: {error}") from error

    def __exit__(self, *exception) -> None:
        self.handle.__exit__(*exception)


def read_tensors(op: str, file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, mapped from disk, and its metadata.  Raises: as `open_tensors`."""
    with open_tensors(op, file) as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
