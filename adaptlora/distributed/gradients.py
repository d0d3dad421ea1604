"""Gradients averaged over processes in one buffer: one all-reduce, as long as the ranks say, launched when the last gradient is there."""

import contextlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves

from .processes import ProcessGroup

_DOING = "averaging gradients"  # as errors call it


def _rows(tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """`tensor`, of the parameter's shape, as its memory is ordered: a rank-major lora_B is read along its ranks."""
    transposed = parameter.dim() == 2 and not parameter.is_contiguous() and parameter.t().is_contiguous()
    return tensor.t() if transposed else tensor


class Bucket:
    """
    All gradients of one dtype and device in one buffer, for a communication hook: what torch's hooks ask of DDP's GradBucket.

    Behind the gradients there is one number for each parameter, 1 where this process has a gradient for it and else 0.
    """

    def __init__(self, parameters: list[nn.Parameter], index: int = 0, last: bool = True):
        self._parameters, self._index, self._last = parameters, index, last
        self.shapes = [_rows(p, p).shape for p in parameters]
        self.sizes = [p.numel() for p in parameters]
        first = parameters[0]
        self.there = [p.grad is not None for p in parameters]
        pieces = [
            first.new_zeros(size) if p.grad is None else _rows(p.grad.detach(), p).reshape(-1)
            for p, size in zip(parameters, self.sizes, strict=True)
        ]
        self._buffer = torch.cat([*pieces, first.new_tensor([float(there) for there in self.there])])

    def buffer(self) -> torch.Tensor:
        return self._buffer

    def set_buffer(self, tensor: torch.Tensor) -> None:
        self._buffer = tensor

    def gradients(self) -> list[torch.Tensor]:
        """Views of the buffer, rank-major factors as rows of ranks."""
        parts = self._buffer.split([*self.sizes, len(self.sizes)])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=False)]

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

    def write_back(self) -> None:
        """Every parameter gets its average; one that had no gradient in any process has none still."""
        gradients = self.gradients()
        held = [i for i, there in enumerate(self.there) if there]
        torch._foreach_copy_(
            [_rows(self._parameters[i].grad.detach(), self._parameters[i]) for i in held], [gradients[i] for i in held]
        )
        if len(held) < len(gradients):
            elsewhere = self._buffer[-len(gradients) :].tolist()
            for i, parameter in enumerate(self._parameters):
                if not self.there[i] and elsewhere[i] > 0:
                    grad = torch.empty_like(parameter)
                    _rows(grad, parameter).copy_(gradients[i])
                    parameter.grad = grad


class _Pass:
    """One backward pass."""

    def __init__(self, task: int, sync: bool, pending: set[int]):
        self.task, self.sync, self.pending = task, sync, pending
        self.launched: list[tuple[Bucket, Callable[[], object]]] | None = None
        self.late = False  # whether a gradient changed after the launch


class GradientSync:
    """
    Averages the gradients of `parameters` over processes in every backward pass in which `wanted()` said so when `root` was called.

    Hooks on the parameters see when all gradients are there, and launch; the end of the backward pass waits and writes back. What takes no
    part in a pass counts as zero. Shapes may change between passes. A second backward pass before the optimizer's step adds its average.

    Args:
        root: the module whose outputs backward passes begin at.   parameters: what trains, on all processes in the same order.
        group: the process group of the all-reduce, None for the default one.
        wanted: whether gradients are to be averaged now (not within no_sync).
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
        comm_hook: tuple[object, Callable] | None = None,
    ):
        self._parameters, self._processes, self._group = list(parameters), processes, group
        self._wanted, self._comm_hook = wanted, comm_hook
        self._paused = False
        self._pass: _Pass | None = None
        self._active: Callable[[], int] | None = None
        self._launches, self._lengths = 0, None
        self._handles = [root.register_forward_hook(self._called)]
        for index, parameter in enumerate(self._parameters):
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._ready(index)))

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
        task = torch._C._current_graph_task_id()
        current = self._pass
        if current is None or current.task != task:
            # An earlier pass that is still there ended with an error.
            pending = {i for i, p in enumerate(self._parameters) if p.requires_grad and p.numel()}
            current = self._pass = _Pass(task, sync, pending)
            Variable._execution_engine.queue_callback(lambda: self._end(current))
        current.sync |= sync

    def _ready(self, index: int):
        def ready(_):
            if self._pass is None:
                # No output of the root was differentiated: a part of it was called, or it is compiled.
                if not self._syncs():
                    return
                self._begin(True)
            current = self._pass
            if not current.sync:
                return
            if current.launched is not None:
                current.late = True
            current.pending.discard(index)
            if not current.pending and current.launched is None:
                current.launched = self._launch()

        return ready

    def facts(self) -> dict:
        """What all processes must have alike where they average: how often they began to, and the length of each buffer."""
        return {"launch": self._launches, "lengths": self._lengths}

    def buckets(self) -> list[Bucket]:
        """The gradients as they are now, to be averaged.  Raises: ProcessError, naming processes with gradients of other lengths."""
        by_kind: dict[tuple, list[nn.Parameter]] = {}
        for p in self._parameters:
            if p.requires_grad and p.numel():
                by_kind.setdefault((p.dtype, p.device), []).append(p)
        numbered = enumerate(by_kind.values(), start=1)
        found = [Bucket(parameters, number - 1, number == len(by_kind)) for number, parameters in numbered]
        lengths = [bucket.buffer().numel() for bucket in found]
        changed = lengths != self._lengths
        self._launches, self._lengths = self._launches + 1, lengths
        self._processes.expect(_DOING, changed)
        return found

    @torch.no_grad()
    def _launch(self) -> list[tuple[Bucket, Callable[[], object]]]:
        return [(bucket, self.start(bucket)) for bucket in self.buckets()]

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
        if current is not self._pass:
            return
        try:
            if not current.sync:
                return
            if current.launched is None:
                current.launched = self._launch()
            self.finish(current.launched)
            if current.late:
                # A parameter was used again after the others were done, by a checkpointed part: its gradient was not whole.
                current.launched = self._launch()
                self.finish(current.launched)
            for bucket, _ in current.launched:
                bucket.write_back()
        finally:
            self._pass = None

    def finish(self, launched: list[tuple[Bucket, Callable[[], object]]]) -> None:
        """Wait for what `start` began.  Raises: ProcessError."""
        for _, wait in launched:
            self._processes.run(_DOING, wait)
