"""Who trains an adapter together, and how ranks change on all of them at once."""

import contextlib
import dataclasses
from collections.abc import Callable

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .ddp import StandIn
from .decisions import Agreement, decide
from .gradients import GradientSync
from .processes import Processes


@dataclasses.dataclass
class Distribution:
    """One process by itself, until `distribute` says otherwise."""

    processes: Processes = dataclasses.field(default_factory=Processes)
    gradients: GradientSync | None = None
    ddp: DistributedDataParallel | None = None
    stand_in: StandIn | None = None
    joined: bool = False  # no more data in here, while others in ddp.join() go on

    def close(self) -> None:
        if self.gradients is not None:
            self.gradients.close()
        if self.stand_in is not None:
            self.stand_in.close()

    def no_sync(self):
        """See `Adapter.no_sync`."""
        if self.ddp is not None:
            return self.ddp.no_sync()  # by which processes without data know, too
        return contextlib.nullcontext() if self.gradients is None else self.gradients.paused()

    def source(self) -> int:
        """The process that decides: the first that has data."""
        if self.ddp is None or not self.ddp._join_config.enable:
            return 0
        candidate = -self.processes.size if self.joined else -self.processes.rank
        return -self.processes.largest([candidate], doing="step: who has data")[0]

    def mean(self, value: float, error: Exception | None = None) -> float:
        """The mean over the processes that have data.  Raises: in all processes, if one of them has an `error` and no value."""
        shares = [0.0, 0.0] if self.joined else [value, 1.0]
        total, count, wrong = self.processes.total(
            [*shares, float(error is not None)], doing="step: averaging the loss"
        )
        if wrong:
            with self.processes.agreement("step"):
                if error is not None:
                    raise error
        return total / count

    def agreement(self) -> Agreement:
        return Agreement(self.processes, "step")

    def decide(self, method, step: Callable[[], dict[str, int] | None]) -> dict[str, int] | None:
        return decide(self.processes, method, step, self.source())


def must_distribute() -> bool:
    """Whether this process is one of several, as torch.distributed knows."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
