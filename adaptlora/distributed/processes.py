"""The processes that train or compute together, as far as they must agree: one by itself, or those of a torch.distributed group."""

import contextlib
import warnings
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.constants import default_pg_timeout

from .faults import Line


class Processes:
    """
    A single process: everything it is asked to share it has already.

    Attributes: rank, size: this process among how many.   first: whether it is the one that writes.
    """

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, names: list[str]) -> list[str]:
        """Those of `names` that this process computes."""
        return names[self.rank :: self.size]

    def broadcast(self, value, source: int = 0, *, doing: str = "broadcast"):
        """`value` of the process `source`, on all: numbers, strings, tensors of the host and collections of them."""
        return value

    def gather(self, value, *, doing: str = "gather") -> list:
        """The values of all processes, by rank, on all."""
        return [value]

    def largest(self, numbers: list[int], *, doing: str = "compare") -> list[int]:
        """The largest of each place over all processes; integers of 63 bits."""
        return numbers

    def total(self, numbers: list[float], *, doing: str = "add") -> list[float]:
        """The sum of each place over all processes, in float64."""
        return numbers

    @contextlib.contextmanager
    def agreement(self, op: str):
        """
        Processes leave the block together: with what went wrong in them, or with a ValueError (RuntimeError, for what is no ValueError)
        that names the first process in which something did.
        """
        yield


def _timeout(group) -> timedelta:
    """How long collectives of `group` wait."""
    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    return getattr(options, "_timeout", default_pg_timeout)


# {the default group: {(ranks, timeout): its group for control}}. They last as long as the default group: a group has threads and sockets,
# and torch, which would give a later one the name of one that was destroyed, has the addresses of that still.
_controls = weakref.WeakKeyDictionary()


def _control(group, ranks: list[int], timeout: timedelta):
    """
    A group with the backend gloo of the processes `ranks` of `group`, which all call this together.

    Raises: ValueError, in all of them, where torch would give it another name in each.
    """
    world = dist.group.WORLD
    found = _controls.setdefault(world, {})
    key = tuple(ranks), timeout
    if key in found:
        return found[key]
    if len(ranks) == world.size():
        found[key] = dist.new_group(backend="gloo", timeout=timeout)
        return found[key]
    # The others take no part, and so the name is made of the ranks and of how many groups there are.
    counts: list = [None] * len(ranks)
    dist.all_gather_object(counts, len(distributed_c10d._world.pg_names), group=group)
    if len(set(counts)) > 1:
        raise ValueError(
            f"distribute: the processes {ranks} must be in equally many process groups each, got {counts}: torch cannot make another group "
            "of a part of all processes otherwise"
        )
    found[key] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True, timeout=timeout)
    return found[key]


class ProcessGroup(Processes):
    """
    The processes of a torch.distributed group. What they tell each other here is small and lies on the host: it goes over a group of
    its own with the backend gloo, whatever the gradients use.

    Args: group: a process group, None for all.   timeout: how long to wait for the others; None for that of `group`.
    Attributes:
        line: asks the others how they are where a collective fails; None where they cannot be asked.
        agreed: the ranks after a change that all agreed on, and with which gradients have not been sent yet.
    Every process of `group` constructs one, at the same time.
    """

    def __init__(self, group=None, timeout: timedelta | None = None):
        self.ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
        self.rank, self.size = dist.get_rank(group), len(self.ranks)
        self.timeout = _timeout(dist.group.WORLD if group is None else group) if timeout is None else timeout
        self.control = _control(group, self.ranks, self.timeout)
        self.agreed: dict[str, int] | None = None
        self.line: Line | None = None
        line = Line(self.rank, self.gather, self.timeout.total_seconds())
        if line.reachable:
            self.line = line
        elif self.first:
            warnings.warn(
                "distribute: the processes do not reach each other's ports (of the addresses "
                f"{', '.join(sorted({contact.address for contact in line.contacts}))}), and so errors will not say which is missing",
                stacklevel=4,
            )

    def broadcast(self, value, source: int = 0, *, doing: str = "broadcast"):
        told = [value]
        self.run(doing, dist.broadcast_object_list, told, src=self.ranks[source], group=self.control)
        return told[0]

    def gather(self, value, *, doing: str = "gather") -> list:
        told: list = [None] * self.size
        self.run(doing, dist.all_gather_object, told, value, group=self.control)
        return told

    def largest(self, numbers: list[int], *, doing: str = "compare") -> list[int]:
        return self._reduced(doing, torch.tensor(numbers, dtype=torch.int64, device="cpu"), dist.ReduceOp.MAX)

    def total(self, numbers: list[float], *, doing: str = "add") -> list[float]:
        return self._reduced(doing, torch.tensor(numbers, dtype=torch.float64, device="cpu"), dist.ReduceOp.SUM)

    def _reduced(self, doing: str, tensor: torch.Tensor, op) -> list:
        self.run(doing, dist.all_reduce, tensor, op=op, group=self.control)
        return tensor.tolist()

    def show(self, facts) -> None:
        """Args: facts: see `Line`."""
        if self.line is not None:
            self.line.facts = facts

    def expect(self, doing: str, changed: bool) -> None:
        """
        Gradients are about to be sent, of other lengths than the last if `changed`.  Raises: ProcessError, unless it was agreed on or is
        so on all.
        """
        agreed, self.agreed = self.agreed, None
        if changed and self.line is not None and (agreed is None or agreed != self.line.facts()["ranks"]):
            self.line.compare(doing)

    def run(self, doing: str, collective, *arguments, **keywords):
        """Call `collective`.  Raises: ProcessError, naming the processes that do not answer, where it fails with a RuntimeError."""
        if self.line is None:
            return collective(*arguments, **keywords)
        with self.line.doing(doing):
            return collective(*arguments, **keywords)

    @contextlib.contextmanager
    def agreement(self, op: str):
        error = None
        try:
            yield
        except Exception as found:
            error = found
        bad_input = isinstance(error, ValueError)
        told = self.gather(None if error is None else (bad_input, f"{error}" if bad_input else repr(error)), doing=op)
        if error is not None:
            raise error
        for rank, what in enumerate(told):
            if what is not None:
                raise (ValueError if what[0] else RuntimeError)(f"{op}: process {rank}: {what[1]}")
