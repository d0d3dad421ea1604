"""
An adapter's folder: its weights and the files that describe them change together, whenever a save is killed.

The weights' metadata hold the SHA-256 of each file that belongs to them. A save puts those files on disk under waiting names,
`.<name>.<SHA-256>`, or `.<name>.gone` for one that is to go, and then renames the weights: that is the moment of the change. What
still waits then gets its name from the save, or after a kill from whoever comes next: a file that waits is the one its weights mean.
Weights whose file does not wait are whole, and a file with another digest is one that the user edited.
"Old or new, whatever happens" holds for adaptlora's readers: after a kill between the two renames stock PEFT meets the new weights
with the old configuration until adaptlora looks, and what is edited in that time is replaced by what waits.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import time
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .files import is_old, locked, make_folder, remove_leftovers, sync_file, sync_folder, temporary_file
from .tensor_files import save_file

FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adaptlora_config.json",
    "adaptlora_model.safetensors",
    "rank_history.json",
)
_DIGESTS = "adaptlora_files"
_GONE = "gone"
_PAUSES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)  # seconds at most before each attempt
_WAITING = re.compile(rf"\.(?P<name>{'|'.join(map(re.escape, FILES))})\.(?P<digest>[0-9a-f]{{64}}|{_GONE})")


def write(folder: Path, weights: str, tensors: dict, texts: dict[str, str], metadata: dict[str, str]) -> None:
    """
    Write an adapter: the file `weights`, one of FILES, and the others of `texts`, {name: text}. The rest of FILES goes: the folder
    holds this adapter afterwards and no other, or the one that it held before.

    Raises: NotADirectoryError, TimeoutError (another process holds the folder's lock), OSError (also where others keep changing a
        folder that cannot be locked); each names the file.
    """
    make_folder(folder)
    digests = {name: _digest(texts[name].encode()) if name in texts else _GONE for name in FILES if name != weights}
    metadata = metadata | {_DIGESTS: json.dumps(digests)}
    for pause in _PAUSES:
        time.sleep(pause * secrets.randbelow(1000) / 1000)
        _write(folder, weights, tensors, texts, digests, metadata)
        if _is_one(
            folder
        ):  # without locks another save may have come between: the last one to change anything sees it here
            return
    rule = (
        "the files of one save, but others write here and the file system has no locks (save to a folder of your own)"
    )
    raise OSError(errno.EBUSY, f"must hold {rule}", str(folder))


def _write(folder: Path, weights: str, tensors: dict, texts: dict, digests: dict, metadata: dict) -> None:
    with contextlib.ExitStack() as stack:
        new = stack.enter_context(temporary_file(folder / weights))
        save_file(tensors, new, metadata)
        sync_file(new)
        temporaries = {}
        for name, text in texts.items():
            temporaries[name] = stack.enter_context(temporary_file(folder / name))
            temporaries[name].write_bytes(text.encode())
            sync_file(temporaries[name])
        with locked(folder) as alone:
            _finish(folder)
            try:
                _let_wait(folder, digests, temporaries)
                os.replace(new, folder / weights)
                sync_folder(folder)
            finally:
                # Also after an error, which may have come behind the renaming; with the old weights nothing is left to finish.
                _finish(folder)
                for name in digests:
                    _waiting(folder, name, digests[name]).unlink(missing_ok=True)
            sync_folder(folder)
            for file in _waiting_files(folder).values():
                with contextlib.suppress(FileNotFoundError):
                    if alone or is_old(file):
                        file.unlink()
            for name in FILES:
                remove_leftovers(folder / name)


class settled:
    """
    with settled(folder) as files: no save of ours changes the folder meanwhile, and what a killed one left is finished.

    files.path(name): where the file is, or would be.   files.has(name).   files.belongs(name): whether the weights say that they have it.
    In a folder that cannot be written or locked, a file that waits is taken from where it is.
    Raises: TimeoutError (another process holds the folder's lock), OSError.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._waiting: dict[str, Path | None] = {}

    def __enter__(self) -> "settled":
        self._stack = contextlib.ExitStack()
        if self.folder.is_dir():
            alone = self._stack.enter_context(locked(self.folder))
            self._waiting = _finish(self.folder, read_only=True, rename=alone)
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def path(self, name: str) -> Path:
        return self._waiting.get(name) or self.folder / name

    def has(self, name: str) -> bool:
        return self._waiting[name] is not None if name in self._waiting else (self.folder / name).exists()

    def belongs(self, name: str) -> bool:
        return any(found == name and digest != _GONE for found, digest in _meant(self.folder))


def _let_wait(folder: Path, digests: dict[str, str], temporaries: dict[str, Path]) -> None:
    for name, digest in digests.items():
        if name in temporaries:
            os.replace(temporaries[name], _waiting(folder, name, digest))
        elif os.path.lexists(folder / name):
            _waiting(folder, name, digest).touch()
    sync_folder(folder)


def _finish(folder: Path, *, read_only: bool = False, rename: bool = True) -> dict[str, Path | None]:
    """
    Give the files that wait for the weights that are there their names.

    Returns: {name: file that waits still, None for one that is to go}, of a folder that cannot be written, where `read_only` allows it,
    or all of them without `rename`.
    """
    waiting = _waiting_files(folder)
    left: dict[str, Path | None] = {}
    for name, digest in [pair for pair in _meant(folder) if pair in waiting] if waiting else []:
        file = waiting[name, digest]
        try:
            if digest != _GONE and not _is_whole(file, digest):
                continue  # its bytes never reached the disk, or another save without locks has renamed it
            if not rename:
                left[name] = None if digest == _GONE else file
            elif digest == _GONE:
                (folder / name).unlink(missing_ok=True)
                file.unlink(missing_ok=True)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.replace(file, folder / name)
        except OSError as error:
            if not read_only or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            left[name] = None if digest == _GONE else file
    return left


def _meant(folder: Path) -> list[tuple[str, str]]:
    """[(name, digest)] of the files that the weights in the folder say are theirs."""
    pairs = []
    for weights in [folder / name for name in FILES if name.endswith(".safetensors")]:
        with contextlib.suppress(OSError, SafetensorError, ValueError, AttributeError, RecursionError):
            if weights.is_file():
                with safe_open(weights, framework="pt") as handle:
                    pairs += json.loads((handle.metadata() or {}).get(_DIGESTS, "{}")).items()
    return [(name, digest) for name, digest in pairs if isinstance(digest, str)]


def _is_one(folder: Path) -> bool:
    """Whether the folder holds what its weights say, no more and no less."""
    meant = _meant(folder)
    files = [(folder / name, digest) for name, digest in meant]
    return bool(meant) and all(
        not os.path.lexists(file) if digest == _GONE else _is_whole(file, digest) for file, digest in files
    )


def _waiting_files(folder: Path) -> dict[tuple[str, str], Path]:
    found = {entry: _WAITING.fullmatch(entry.name) for entry in folder.iterdir()}
    return {
        (match["name"], match["digest"]): entry
        for entry, match in found.items()
        if match and entry.is_file() and not entry.is_symlink()
    }


def _waiting(folder: Path, name: str, digest: str) -> Path:
    return folder / f".{name}.{digest}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _is_whole(file: Path, digest: str) -> bool:
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == digest
    except FileNotFoundError:
        return False
