"""In the place of DistributedDataParallel's reducer: its shapes are those of the start, and it would keep buckets of them for ever."""

from collections.abc import Callable

from torch.nn.parallel import DistributedDataParallel

from .gradients import Bucket, GradientSync
from .processes import ProcessGroup


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
    """

    def __init__(self, sync: GradientSync, follow: Callable[[], None]):
        self._sync, self._follow = sync, follow

    # The reducer

    def prepare_for_forward(self) -> None:
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

    # The logger

    def set_runtime_stats_and_log(self) -> None:
        """Nothing: there are no bucket statistics."""

    def set_error_and_log(self, error: str) -> None:
        """Nothing: DDP raises it too."""

    def _set_uneven_input_join(self) -> None:
        """Nothing to note."""

    def _get_ddp_logging_data(self) -> dict:
        return {}


def check_ddp(ddp: DistributedDataParallel) -> None:
    """Raises: ValueError if gradients cannot be taken over from it."""
    if ddp.mixed_precision is not None:
        raise ValueError(
            "distribute: DistributedDataParallel must have mixed_precision=None (use autocast), got a policy"
        )
    if ddp.device_ids and len(ddp.device_ids) > 1:
        raise ValueError(f"distribute: DistributedDataParallel must hold one device, got {ddp.device_ids}")


def take_over(
    ddp: DistributedDataParallel, sync: GradientSync, processes: ProcessGroup, ignored_buffers: set[str], follow, final
) -> None:
    """
    Put a stand-in in the place of the reducer, whose hooks and buckets go.

    Args: ignored_buffers: frozen buffers that need not be sent with every call.   follow: see `StandIn`.
        final: called with the process whose state counts, at the end of `join()`.
    """
    if not isinstance(ddp.reducer, StandIn):
        ddp.reducer._remove_autograd_hooks()
    ddp.reducer = ddp.logger = StandIn(sync, follow)
    # These two are about parameters that take no part, which need no searching here.
    ddp.find_unused_parameters = ddp.static_graph = False
    ddp.parameters_to_ignore = set(ddp.parameters_to_ignore) | ignored_buffers
    ddp._assign_modules_buffers()
    ddp.register_comm_hook = sync.register_comm_hook
    sync_buffers = ddp._sync_buffers
    ddp._sync_buffers = lambda: processes.run("DistributedDataParallel: sending buffers", sync_buffers)
    sync_final_model = type(ddp)._sync_final_model

    def sync_final(is_last_joiner: bool) -> None:
        sync_final_model(ddp, is_last_joiner)
        final(ddp._authoritative_rank)

    ddp._sync_final_model = sync_final
