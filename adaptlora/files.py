"""Files and folders written whole or not at all, whoever fails or dies meanwhile, and the lock that savers into one folder hold."""

import errno
import os
import re
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None

_PATIENCE = 60.0  # seconds that anyone may hold a folder's lock: it takes milliseconds


def make_folder(path: Path) -> None:
    """Raises: NotADirectoryError (something else is there), OSError; both name the path."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "must be a folder, got another kind of file", str(path)) from error


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
                self._handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
                # Whoever removes leftovers may have come between the two.
                if _lock(self._handle) is not False and os.fstat(self._handle).st_nlink:
                    break
                os.close(self._handle)
            if fcntl is None:  # an open file cannot be renamed on Windows
                os.close(self._handle)
        self.temporary = Path(name)
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
                    publish(self.temporary)
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
        self.temporary = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}."))
        return self.temporary

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                for file in (*self.temporary.rglob("*"), self.temporary):
                    if file.is_file():
                        _sync(file)
                    elif file.is_dir():
                        sync_folder(file)
                self.temporary.chmod(0o777 & ~_umask())
                os.replace(self.temporary, self.path)
                sync_folder(self.path.parent)
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)


@contextmanager
def locked(folder: Path):
    """
    No other `locked` block for this folder runs meanwhile, in whatever thread or process. Where the platform or the file system
    has no locks, or the folder may not be opened, the block runs without.

    Raises: TimeoutError (held for a minute by somebody else), FileNotFoundError.
    """
    try:
        handle = None if fcntl is None else os.open(folder, os.O_RDONLY)
    except PermissionError:
        handle = None
    if handle is None:
        yield
        return
    try:
        deadline = time.monotonic() + _PATIENCE
        while _lock(handle) is False:
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, f"locked by another process for {_PATIENCE:g} s", str(folder))
            time.sleep(0.002)
        yield
    finally:
        _unlock(handle)


def publish(temporary: Path) -> None:
    """What must happen to a file of `mkstemp` before it gets its name: the mode of a new file, and its bytes on disk."""
    temporary.chmod(0o666 & ~_umask())
    _sync(temporary)


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
    """Remove what `temporary_file(path)` of killed processes left; those of living ones are locked. Without locks all stay."""
    if fcntl is None:
        return
    rule = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}")
    with suppress(OSError):
        for name in os.listdir(path.parent):
            if rule.fullmatch(name):
                _remove_unlocked(path.with_name(name))


def _remove_unlocked(file: Path) -> None:
    with suppress(OSError):
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            if _lock(handle):
                file.unlink()
        finally:
            _unlock(handle)


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(file: Path) -> None:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
