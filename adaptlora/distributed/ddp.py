"""In the place of DistributedDataParallel's reducer: its shapes are those of the start, and it would keep buckets of them for ever."""

from collections.abc import Callable
from types import SimpleNamespace

from torch.nn.parallel import DistributedDataParallel

from .gradients import Bucket, GradientSync
from .processes import ProcessGroup

# What `take_over` sets on a DDP: copies and pickles of it have none of these, and are plain.
_OVERRIDES = ("register_comm_hook", "_sync_buffers", "_sync_final_model", "__getstate__")


class _Shadow:
    """What DDP waits for in a process that has no more data: its empty share of the others' all-reduce."""

    def __init__(self, sync: GradientSync, bucket: Bucket):
        self._sync, self._launched = sync, [(bucket, sync.start(bucket))]

    def wait(self) -> None:
        self._sync.finish(self._launched)


class StandIn:
    """
    What DistributedDataParallel calls of its C++ reducer and of its logger, while `sync` averages the gradients: in `join()` a process
    without data takes part in the others' all-reduces by it, and in their rank changes by `follow`.

    Attributes: group: the process group that DDP was made with.
    """

    def __init__(self, sync: GradientSync, follow: Callable[[], None], group):
        self._sync, self._follow, self._closed = sync, follow, False
        self.group = group

    def close(self) -> None:
        """Nothing averages the gradients of the DDP from here on, and its next forward pass says so."""
        self._closed = True

    # The reducer

    def prepare_for_forward(self) -> None:
        """Raises: RuntimeError after `close`."""
        if self._closed:
            raise RuntimeError(
                "DistributedDataParallel: its gradients were averaged by an adapter, which was detached or distributed with another "
                "wrapper, and now nobody would average them: wrap the model anew"
            )
        self._sync.divide_by(None)

    def _set_forward_pass_work_handle(self, work, divide_by_initial_world_size: bool) -> None:
        if not divide_by_initial_world_size:
            # Each process that has data added 1.
            self._sync.divide_by(lambda: round(work.get_future().wait()[0].item()))

    def _rebuild_buckets(self) -> bool:
        return False

    def prepare_for_backward(self, outputs: list) -> None:
        """Nothing: hooks see what takes part."""

    def _get_zeros_like_grad_buckets(self) -> list[Bucket]:
        return [bucket.empty() for bucket in self._sync.buckets()]

    def _run_comm_hook(self, bucket: Bucket) -> _Shadow:
        return _Shadow(self._sync, bucket)

    def _push_all_rebuilt_params(self) -> None:
        self._follow()

    def _remove_autograd_hooks(self) -> None:
        self._sync.close()

    def _set_static_graph(self) -> None:
        """Nothing, for the reducer and the logger: every pass may be another."""

    def _delay_all_reduce(self) -> None:
        """Nothing: all-reduces wait for the end of the pass in any case."""

    # The logger

    def set_runtime_stats_and_log(self) -> None:
        """Nothing: there are no bucket statistics."""

    def set_error_and_log(self, error: str) -> None:
        """Nothing: DDP raises it too."""

    def _set_uneven_input_join(self) -> None:
        """Nothing to note."""

    def _get_ddp_logging_data(self) -> SimpleNamespace:
        return SimpleNamespace(strs_map={}, ints_map={})

    def _set_ddp_runtime_logging_sample_rate(self, rate: int) -> None:
        """Nothing: there are no statistics."""


def check_ddp(ddp: DistributedDataParallel) -> None:
    """Raises: ValueError if gradients cannot be taken over from it."""
    if ddp.mixed_precision is not None:
        raise ValueError(
            "distribute: DistributedDataParallel must have mixed_precision=None (use autocast), got a policy"
        )
    if ddp.device_ids and len(ddp.device_ids) > 1:
        raise ValueError(f"distribute: DistributedDataParallel must hold one device, got {ddp.device_ids}")
    if ddp._delay_all_reduce_params:
        raise ValueError(
            "distribute: DistributedDataParallel must have delay_all_reduce_named_params=None, got "
            f"{len(ddp._delay_all_reduce_params)} parameters"
        )
    if ddp._use_python_reducer:
        raise ValueError(
            "distribute: DistributedDataParallel must not use the Python reducer, got "
            'torch._dynamo.config.optimize_ddp = "python_reducer" where it was made'
        )


def first_group(ddp: DistributedDataParallel):
    """The process group that it was made with."""
    return ddp.reducer.group if isinstance(ddp.reducer, StandIn) else ddp.process_group


def take_over(
    ddp: DistributedDataParallel, sync: GradientSync, processes: ProcessGroup, ignored_buffers: set[str], follow, final
) -> StandIn:
    """
    Put a stand-in in the place of the reducer, whose hooks and buckets go.

    Args: ignored_buffers: frozen buffers that need not be sent with every call.   follow: see `StandIn`.
        final: called with the process whose state counts, at the end of `join()`.
    Returns: the stand-in.
    """
    group = first_group(ddp)
    if not isinstance(ddp.reducer, StandIn):
        ddp.reducer._remove_autograd_hooks()
    ddp.reducer = ddp.logger = stand_in = StandIn(sync, follow, group)
    # These two are about parameters that take no part, which need no searching here.
    ddp.find_unused_parameters = ddp.static_graph = False
    ddp.parameters_to_ignore = set(ddp.parameters_to_ignore) | ignored_buffers
    ddp._assign_modules_buffers()
    ddp.register_comm_hook = sync.register_comm_hook
    kind = type(ddp)

    def sync_final(is_last_joiner: bool) -> None:
        kind._sync_final_model(ddp, is_last_joiner)
        final(ddp._authoritative_rank)

    def plain_state() -> dict:
        # DDP pickles with the default group alone, and one with another timeout may be in its place.
        now, ddp.process_group = ddp.process_group, group
        try:
            state = kind.__getstate__(ddp)
        finally:
            ddp.process_group = now
        return {name: value for name, value in state.items() if name not in _OVERRIDES}

    ddp._sync_buffers = lambda: processes.run("DistributedDataParallel: sending buffers", kind._sync_buffers, ddp)
    ddp._sync_final_model = sync_final
    ddp.__getstate__ = plain_state
    return stand_in
