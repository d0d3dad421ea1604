"""The processes of torchrun, for shearing: a group of them where none is there yet."""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from ..distributed.processes import Processes, ProcessGroup

# torchrun ends all processes when one dies; waiting for one that computes may take long.
_TIMEOUT = timedelta(days=1)


@contextmanager
def group():
    """Within torchrun (RANK and WORLD_SIZE are set) its processes, whose files must lie on one file system; else this one alone."""
    launched = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if not dist.is_available() or not (dist.is_initialized() or launched):
        yield Processes()
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield ProcessGroup(timeout=_TIMEOUT)
    finally:
        if ours:
            dist.destroy_process_group()
