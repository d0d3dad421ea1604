"""Processes that end at the n-th call that they make to the disk."""

import builtins
import contextlib
import os

CALLS = ("replace", "fsync", "open")


class Killer:
    """Ends the process, as a kill would, at the n-th call of what a save does to a disk: rename, sync, open for writing."""

    def __init__(self, n: int):
        self.left = n

    def hit(self) -> None:
        self.left -= 1
        if self.left < 0:
            os._exit(9)

    @contextlib.contextmanager
    def __call__(self):
        originals = {"replace": os.replace, "fsync": os.fsync, "open": builtins.open}

        def guarded(name):
            def call(*args, **kwargs):
                mode = str(kwargs.get("mode", args[1] if len(args) > 1 else "r"))
                if name != "open" or any(letter in mode for letter in "wax+"):
                    self.hit()
                return originals[name](*args, **kwargs)

            return call

        os.replace, os.fsync, builtins.open = (guarded(name) for name in CALLS)
        try:
            yield
        finally:
            os.replace, os.fsync, builtins.open = (originals[name] for name in CALLS)


def kill_every_call(save, check, most: int = 200) -> int:
    """
    In forked children, `save()` is ended at its first call to the disk, at its second, …, until it completes; `check(completed)` follows.

    Returns: how many calls were hit.
    """
    for n in range(most):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                with Killer(n)():
                    save()
                status = 0
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status not in (0, 9):
            raise RuntimeError(f"a save that is ended at call {n} ended with {status}")
        check(status == 0)
        if status == 0:
            return n
    raise RuntimeError(f"a save must be done after {most} calls")
