"""The processes of torchrun as far as shearing needs them: who computes what, and whether all went well."""

import os
from contextlib import contextmanager

import torch.distributed as dist


class _One:
    """A single process."""

    first = True

    def share(self, names: list[str]) -> list[str]:
        return names

    def agree(self, error: str | None) -> str | None:
        return error

    def wait(self) -> None:
        pass


class _Many:
    """The processes of a torch.distributed group. Their files must lie on one file system."""

    def __init__(self):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.first = self.rank == 0

    def share(self, names: list[str]) -> list[str]:
        return names[self.rank :: self.size]

    def agree(self, error: str | None) -> str | None:
        """Every process says what went wrong in it; all hear the first error and where it was."""
        errors = [None] * self.size
        dist.all_gather_object(errors, error)
        return next((f"process {rank}: {text}" for rank, text in enumerate(errors) if text is not None), None)

    def wait(self) -> None:
        dist.barrier()


@contextmanager
def group():
    """Within torchrun (RANK and WORLD_SIZE are set) its processes, else this one; a group that exists already is used."""
    if not dist.is_available() or (not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) == 1):
        yield _One()
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo")
    try:
        yield _Many()
    finally:
        if ours:
            dist.destroy_process_group()
