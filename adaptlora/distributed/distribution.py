"""Who trains an adapter together, and how ranks change on all of them at once."""

import dataclasses
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed.algorithms.join import Joinable

from .decisions import Agreement, decide
from .gradients import GradientSync
from .processes import Processes


@dataclasses.dataclass
class Distribution:
    """One process by itself, until `distribute` says otherwise."""

    processes: Processes = dataclasses.field(default_factory=Processes)
    gradients: GradientSync | None = None
    ddp: Joinable | None = None
    joined: bool = False  # no more data in here, while others in ddp.join() go on

    def close(self) -> None:
        if self.gradients is not None:
            self.gradients.close()

    def source(self) -> int:
        """The process that decides: the first that has data."""
        if self.ddp is None or not self.ddp._join_config.enable:
            return 0
        candidate = -self.processes.size if self.joined else -self.processes.rank
        return -self.processes.largest([candidate], doing="step: who has data")[0]

    def mean(self, value: float) -> float:
        """The mean over the processes that have data."""
        shares = [0.0, 0.0] if self.joined else [value, 1.0]
        total, count = self.processes.total(shares, doing="step: averaging the loss")
        return total / count

    def agreement(self) -> Agreement:
        return Agreement(self.processes, "step")

    def decide(self, method, step: Callable[[], dict[str, int] | None]) -> dict[str, int] | None:
        return decide(self.processes, method, step, self.source())


def must_distribute() -> bool:
    """Whether this process is one of several, as torch.distributed knows."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
