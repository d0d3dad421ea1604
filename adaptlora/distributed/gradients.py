"""Gradients averaged over processes in one buffer: one all-reduce, as long as the ranks say, launched when the last gradient is there."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves

from .faults import ProcessError
from .processes import ProcessGroup

_DOING = "averaging gradients"  # as errors call it
_NUMBERS = 16  # steps are counted up to here and from 0 again: half precision adds such numbers well enough
_CHECKED = 64  # on a GPU, where reading waits for the device, every so many passes are compared


def _rank_major(parameter: nn.Parameter) -> bool:
    """Whether a matrix lies in memory column by column, as lora_B does: rank vector by rank vector."""
    return parameter.dim() == 2 and not parameter.is_contiguous() and parameter.t().is_contiguous()


def _copy(into: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    if into:  # torch refuses none
        torch._foreach_copy_(into, values)


class Bucket:
    """
    All gradients of one dtype and device in one buffer, for a communication hook: what torch's hooks ask of DDP's GradBucket.

    Behind the gradients there is one number for each parameter, 1 where this process has a gradient for it and else 0; then a 1 and the
    number of the step, from which all see whether they are in the same one. The buffer and its views are for parameters of
    these shapes and orders in memory, and are filled anew for every pass.
    """

    def __init__(self, parameters: list[nn.Parameter], index: int = 0, last: bool = True, number: int = 0):
        self._parameters, self._index, self._last = parameters, index, last
        self._sizes = [p.numel() for p in parameters]
        self._rank_major = [_rank_major(p) for p in parameters]
        self._own = parameters[0].new_empty(sum(self._sizes) + len(parameters) + 2)
        self._look_at(self._own)
        self.fill(number)

    def _look_at(self, buffer: torch.Tensor) -> None:
        self._buffer = buffer
        *parts, self._marks, self._numbers = buffer.split([*self._sizes, len(self._sizes), 2])
        self._parts = [
            part.view(p.t().shape).t() if rank_major else part.view(p.shape)
            for part, p, rank_major in zip(parts, self._parameters, self._rank_major, strict=True)
        ]

    @torch.no_grad()
    def fill(self, number: int) -> "Bucket":
        """The gradients as they are now, in the step `number`.  Raises: ValueError (a sparse gradient)."""
        gradients = [p.grad for p in self._parameters]
        for p, grad in zip(self._parameters, gradients, strict=True):
            if grad is not None and grad.layout is not torch.strided:
                raise ValueError(f"{_DOING}: gradients must be dense, got {grad.layout} of shape {tuple(p.shape)}")
        self._number = number % _NUMBERS
        self.set_buffer(self._own)
        self._held = [i for i, grad in enumerate(gradients) if grad is not None]
        if len(self._held) < len(gradients):
            self._buffer.zero_()
        self._marks[self._held] = 1
        self._numbers[0], self._numbers[1] = 1, self._number
        _copy([self._parts[i] for i in self._held], [gradients[i] for i in self._held])
        return self

    def buffer(self) -> torch.Tensor:
        return self._buffer

    def set_buffer(self, tensor: torch.Tensor) -> None:
        if tensor is not self._buffer:
            self._look_at(tensor)

    def gradients(self) -> list[torch.Tensor]:
        """Views of the buffer, rank-major factors as rows of ranks."""
        return [part.t() if turned else part for part, turned in zip(self._parts, self._rank_major, strict=True)]

    def parameters(self) -> list[nn.Parameter]:
        return self._parameters

    def index(self) -> int:
        return self._index

    def is_last(self) -> bool:
        return self._last

    def empty(self) -> "Bucket":
        """The same without a gradient, for a process that has no more data."""
        self._buffer.zero_()
        return self

    def differs(self, processes: int) -> bool:
        """Whether one of so many processes is in another step; waits for the device."""
        count, numbers = self._numbers.tolist()
        rounding = 4 * _NUMBERS * torch.finfo(self._numbers.dtype).eps
        return abs(numbers - count * self._number) > count * max(0.5 / processes, rounding)

    @torch.no_grad()
    def write_back(self) -> None:
        """Every parameter gets its average; one that had no gradient in any process has none still."""
        _copy([self._parameters[i].grad for i in self._held], [self._parts[i] for i in self._held])
        if len(self._held) < len(self._parameters):
            for i, there in enumerate(self._marks.tolist()):
                if there > 0 and self._parameters[i].grad is None:
                    self._parameters[i].grad = torch.empty_like(self._parameters[i]).copy_(self._parts[i])


class _Pass:
    """One backward pass.  sync: whether gradients are averaged in it.   launches: whether there is anything to average."""

    def __init__(self, task: int):
        self.task, self.sync, self.launches = task, False, False


class GradientSync:
    """
    Averages the gradients of `parameters` over processes in every backward pass in which `wanted()` said so when `root` was called.

    Passes begin at `root`'s outputs or at the first gradient, and at their end, when no more can come, all gradients are sent. What takes
    no part in a pass counts as zero. Shapes may change between passes. A second pass before the optimizer's step adds its average.
    Copies and pickles of it do nothing.

    Args:
        root: the module whose outputs backward passes begin at.   parameters: what trains, on all processes in the same order.
        group: the process group of the all-reduce, None for the default one.
        wanted: whether gradients are to be averaged now (not within no_sync).
        step: how many optimizer steps were made, by which processes notice that one of them made a pass more.
        comm_hook: (state, hook), called as hook(state, bucket) -> Future of the averaged buffer, as DDP's hooks are; None for the average.
    """

    def __init__(
        self,
        root: nn.Module,
        parameters: Sequence[nn.Parameter],
        processes: ProcessGroup,
        *,
        group=None,
        wanted: Callable[[], bool],
        step: Callable[[], int] = int,
        comm_hook: tuple[object, Callable] | None = None,
    ):
        self._parameters, self._processes, self._group = list(parameters), processes, group
        self._step, self._wanted, self._comm_hook = step, wanted, comm_hook
        self._paused = False
        # Held by the engine alone, until the pass is over or has failed.
        self._pass: Callable[[], _Pass | None] = _no_pass
        self._active: Callable[[], int] | None = None
        self._launches, self._lengths = 0, None
        self._layout, self._buckets = None, []
        self._handles = [root.register_forward_hook(_Hook(self, "_called"))]
        self._handles += [p.register_post_accumulate_grad_hook(_Hook(self, "_ready")) for p in self._parameters]

    def register_comm_hook(self, state: object, hook: Callable) -> None:
        """hook(state, bucket) from now on, in the place of the all-reduce and its division."""
        self._comm_hook = (state, hook)

    def close(self) -> None:
        """Average no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextlib.contextmanager
    def paused(self):
        """Backward passes in here leave their gradients as they are."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def divide_by(self, active: Callable[[], int] | None) -> None:
        """In the next pass divide by what `active()` returns, the number of processes that have data, and not by all."""
        self._active = active

    def _called(self, module, arguments, output):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        sync = self._syncs()
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                tensor.register_hook(lambda _: self._begin(sync))

    def _syncs(self) -> bool:
        return not self._paused and self._wanted()

    def _begin(self, sync: bool) -> None:
        """At an output of the root: gradients are sent at the end, also where no parameter of this process takes part."""
        current = self._pass()
        if current is None or current.task != torch._C._current_graph_task_id():
            current = self._new_pass()
        current.sync |= sync
        current.launches = True

    def _new_pass(self) -> _Pass:
        current = _Pass(torch._C._current_graph_task_id())
        self._pass = weakref.ref(current)
        Variable._execution_engine.queue_callback(functools.partial(self._end, current))
        return current

    def _ready(self, parameter) -> None:
        current = self._pass()
        if current is None:
            # No output of the root was differentiated: a part of it was called, or it is compiled.
            current = self._new_pass()
            current.sync = self._syncs()
        current.launches = True

    def facts(self) -> dict:
        """What all processes must have alike where they average: how often they began to, and the length of each buffer."""
        return {"launch": self._launches, "lengths": self._lengths}

    def buckets(self) -> list[Bucket]:
        """The gradients as they are now, to be averaged.  Raises: ProcessError, naming processes with gradients of other lengths."""
        layout = [(p.requires_grad, p.shape, p.is_contiguous(), p.dtype, p.device) for p in self._parameters]
        number = self._step()
        if layout == self._layout:
            found = [bucket.fill(number) for bucket in self._buckets]
        else:
            found = self._buckets = self._new_buckets(number)
            self._layout = layout
        lengths = [bucket.buffer().numel() for bucket in found]
        changed = lengths != self._lengths
        self._launches, self._lengths = self._launches + 1, lengths
        self._processes.expect(_DOING, changed)
        return found

    def _new_buckets(self, number: int) -> list[Bucket]:
        by_kind: dict[tuple, list[nn.Parameter]] = {}
        for p in self._parameters:
            if p.requires_grad and p.numel():
                by_kind.setdefault((p.dtype, p.device), []).append(p)
        numbered = enumerate(by_kind.values(), start=1)
        return [Bucket(parameters, i - 1, i == len(by_kind), number) for i, parameters in numbered]

    def start(self, bucket: Bucket) -> Callable[[], object]:
        """Begin to average a bucket; what is returned waits for it."""
        if self._comm_hook is not None:
            state, hook = self._comm_hook
            future = self._processes.run(_DOING, hook, state, bucket)

            def received():
                found = future.wait()
                bucket.set_buffer(found[0] if isinstance(found, list) else found)

            return received
        count = self._processes.size if self._active is None else self._active()
        bucket.buffer().div_(count)
        return self._processes.run(_DOING, dist.all_reduce, bucket.buffer(), group=self._group, async_op=True).wait

    @torch.no_grad()
    def _end(self, current: _Pass) -> None:
        if current is not self._pass():
            return
        self._pass = _no_pass
        if not (current.sync and current.launches):
            return
        try:
            launched = [(bucket, self.start(bucket)) for bucket in self.buckets()]
            self.finish(launched)
        except BaseException:
            self._layout = None  # the buffers may still be on their way
            raise
        for bucket, _ in launched:
            bucket.write_back()

    def finish(self, launched: list[tuple[Bucket, Callable[[], object]]]) -> None:
        """Wait for what `start` began.  Raises: ProcessError, also where processes are in different steps."""
        for _, wait in launched:
            self._processes.run(_DOING, wait)
        for bucket, _ in launched:
            looks = bucket.buffer().device.type == "cpu" or self._launches % _CHECKED == 0
            if looks and bucket.differs(self._processes.size):
                raise ProcessError(
                    f"{_DOING}: all processes must make the same backward passes in each step, and one of step {self._step()} met one of "
                    "another step of another process (a loss of one process alone belongs within no_sync)"
                )

    def __reduce__(self):
        return _Inert, ()


def _no_pass() -> None:
    """Of a GradientSync between two passes."""


class _Inert:
    """What copies and pickles have in the place of a GradientSync: their model belongs to one process."""

    def _called(self, module, arguments, output) -> None:
        """Nothing."""

    def _ready(self, parameter) -> None:
        """Nothing."""


class _Hook:
    """A method of a GradientSync as a hook that can be copied with the module it is on."""

    def __init__(self, sync, method: str):
        self._sync, self._method = sync, method

    def __call__(self, *arguments):
        return getattr(self._sync, self._method)(*arguments)
