"""Files and folders written whole or not at all, whoever fails or dies meanwhile, and the lock that savers into one folder hold."""

import errno
import os
import re
import secrets
import shutil
import time
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None

_PATIENCE = 60.0  # seconds that anyone may hold a folder's lock: it takes milliseconds
_OLD = 24 * 3600.0  # seconds after which a file that no lock vouches for is a dead process's
_LOCK = ".adaptlora-lock"
LEFTOVER = r"[0-9a-f]{16}\.adaptlora-tmp"  # what stands behind `.<name>.` in a temporary's name


def make_folder(path: Path) -> None:
    """Raises: NotADirectoryError (something else is there), OSError; both name the path."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "must be a folder, got another kind of file", str(path)) from error


def check_new_folder(op: str, path: Path) -> None:
    """Raises: ValueError if `path` is there and no empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{op}: out must not exist or be an empty folder, got {str(path)!r}")


class temporary_file:
    """
    with temporary_file(path) as temporary: a Path beside `path`, gone after the block unless it was renamed.

    It is locked meanwhile, by which `remove_leftovers` tells it from what a killed process left.
    Raises: OSError that names `path`, also for one in the block that names no file or the temporary.
    """

    def __init__(self, path):
        self.path = Path(path)

    def __enter__(self) -> Path:
        make_folder(self.path.parent)
        with _naming(self.path):
            while True:
                self.temporary = _beside(self.path)
                self._handle = os.open(self.temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
                # Whoever removes leftovers may have come between the two.
                if _lock(self._handle) is not False and os.fstat(self._handle).st_nlink:
                    break
                os.close(self._handle)
            if fcntl is None:  # an open file cannot be renamed on Windows
                os.close(self._handle)
        return self.temporary

    def __exit__(self, kind, error, traceback) -> None:
        with suppress(OSError):
            self.temporary.unlink(missing_ok=True)
        if fcntl is not None:
            _unlock(self._handle)
        if isinstance(error, OSError) and (named := _named(error, self.path)) is not error:
            raise named from error


class atomic_file(temporary_file):
    """
    with atomic_file(path) as temporary: write to `temporary`, a Path beside `path`; it replaces `path` on success, synced
    to disk, and is removed if the block raises, leaving `path` as it was.
    """

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                with _naming(self.path):
                    sync_file(self.temporary)
                    os.replace(self.temporary, self.path)
                    sync_folder(self.path.parent)
                remove_leftovers(self.path)
        finally:
            super().__exit__(kind, error, traceback)


class atomic_folder:
    """
    with atomic_folder(path) as temporary: fill `temporary`, a folder beside `path`; it becomes `path`, which must be absent or
    an empty folder, on success, its files synced to disk, and is removed if the block raises.
    """

    def __init__(self, path):
        self.path = Path(path)

    def __enter__(self) -> Path:
        make_folder(self.path.parent)
        self.temporary = _beside(self.path)
        self.temporary.mkdir()
        return self.temporary

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                for file in (*self.temporary.rglob("*"), self.temporary):
                    if file.is_file():
                        sync_file(file)
                    elif file.is_dir():
                        sync_folder(file)
                os.replace(self.temporary, self.path)
                sync_folder(self.path.parent)
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)


@contextmanager
def locked(folder: Path):
    """
    with locked(folder) as alone: no other such block for this folder runs meanwhile, in whatever thread or process.

    alone: False where the platform or the file system has no locks, or the folder may not be opened: the block runs all the same.
    Raises: TimeoutError (held for a minute by somebody else), FileNotFoundError.
    """
    handle = _patiently(folder, _try_folder) if fcntl is not None else None
    file = None
    if handle is None and fcntl is not None:  # NFS locks only what is open for writing, which a folder cannot be
        file = folder / _LOCK
        handle = _patiently(folder, _try_file)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            if file is not None:
                file.unlink(missing_ok=True)
            _unlock(handle)


def _patiently(folder: Path, attempt) -> int | None:
    """The handle by which `attempt(folder)` came to hold the lock; None where there is none to hold."""
    deadline = time.monotonic() + _PATIENCE
    while (handle := attempt(folder)) is False:
        if time.monotonic() > deadline:
            raise TimeoutError(errno.ETIMEDOUT, f"locked by another process for {_PATIENCE:g} s", str(folder))
        time.sleep(0.002)
    return handle


def _try_folder(folder: Path) -> int | bool | None:
    try:
        return _hold(os.open(folder, os.O_RDONLY))
    except PermissionError:
        return None


def _try_file(folder: Path) -> int | bool | None:
    try:
        handle = _hold(os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666))
    except OSError:
        return None
    if handle is None:
        (folder / _LOCK).unlink(missing_ok=True)
    elif handle is not False and not os.fstat(handle).st_nlink:  # whoever held it before has removed it
        _unlock(handle)
        return False
    return handle


def _hold(handle: int) -> int | bool | None:
    """`handle`, locked; else closed, and False (somebody else's) or None (there are no locks here)."""
    held = _lock(handle)
    if held:
        return handle
    os.close(handle)
    return held


def sync_file(file: Path) -> None:
    """A file's bytes on disk, which must be there before the file gets its name."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Names on disk, where the platform and the file system know such a thing."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with _naming(folder):
            os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def remove_leftovers(path: Path) -> None:
    """Remove what `temporary_file(path)` of killed processes left: those of living ones are locked, or without locks younger than a day."""
    rule = re.compile(rf"\.{re.escape(path.name)}\.{LEFTOVER}")
    with suppress(OSError):
        for name in os.listdir(path.parent):
            if rule.fullmatch(name):
                _remove_unlocked(path.with_name(name))


def is_old(file: Path) -> bool:
    """Whether a file is from another day: whoever was about to rename it is dead."""
    return time.time() - file.stat().st_mtime > _OLD


def _remove_unlocked(file: Path) -> None:
    with suppress(OSError):
        handle = os.open(file, os.O_RDWR | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
        try:
            held = _lock(handle)
            if held or (held is None and is_old(file)):
                file.unlink()
        finally:
            _unlock(handle)


def _beside(path: Path) -> Path:
    """A name that nobody has, and that nobody else would give: the kernel applies the umask to what is created under it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.adaptlora-tmp")


def _lock(handle: int) -> bool | None:
    """True: it is ours now.  False: somebody else's.  None: there are no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _unlock(handle: int) -> None:
    # Closing alone would leave the lock to a child that was forked meanwhile and holds the handle, too.
    with suppress(OSError):
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


@contextmanager
def _naming(path: Path):
    try:
        yield
    except OSError as error:
        if (named := _named(error, path)) is not error:
            raise named from error
        raise


def _named(error: OSError, path: Path) -> OSError:
    """`error` about `path` where it is about no file, or about a temporary of `path` that the user never heard of."""
    about = [str(name) for name in (error.filename, error.filename2) if name is not None]
    if error.errno is None or any(not Path(name).name.startswith(f".{path.name}.") for name in about[:1]):
        return error
    return OSError(error.errno, error.strerror, str(path))
