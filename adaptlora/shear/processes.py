"""The processes of torchrun as far as shearing needs them: who computes what, and whether all went well."""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist


class _One:
    """A single process."""

    first = True

    def share(self, names: list[str]) -> list[str]:
        return names

    @contextmanager
    def agreement(self):
        yield


class _Many:
    """The processes of a torch.distributed group. Their files must lie on one file system."""

    def __init__(self):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.first = self.rank == 0

    def share(self, names: list[str]) -> list[str]:
        return names[self.rank :: self.size]

    @contextmanager
    def agreement(self):
        """
        Processes leave the block together: with what went wrong in them, or with a ValueError (RuntimeError, for what is no
        ValueError) that names the first process in which something did.
        """
        error = None
        try:
            yield
        except Exception as found:
            error = found
        bad_input = isinstance(error, ValueError)
        told: list = [None] * self.size
        dist.all_gather_object(told, None if error is None else (bad_input, f"{error}" if bad_input else repr(error)))
        if error is not None:
            raise error
        for rank, what in enumerate(told):
            if what is not None:
                raise (ValueError if what[0] else RuntimeError)(f"shear: process {rank}: {what[1]}")


@contextmanager
def group():
    """Within torchrun (RANK and WORLD_SIZE are set) its processes, else this one; a group that exists already is used."""
    launched = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if not dist.is_available() or not (dist.is_initialized() or launched):
        yield _One()
        return
    ours = not dist.is_initialized()
    if ours:
        # torchrun ends all processes when one dies; waiting for one that computes may take long.
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        yield _Many()
    finally:
        if ours:
            dist.destroy_process_group()
