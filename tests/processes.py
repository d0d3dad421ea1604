"""Several processes of one gloo group, for tests: forked from a server that has imported what they need, so that they start at once."""

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

_PRELOAD = [
    "torch",
    "torch._dynamo",  # what the first optimizer imports
    "torch.distributed.algorithms.join",
    "torch.nn.parallel",
    "adaptlora",
    "adaptlora.distributed",
    "adaptlora.distributed.setup",  # FSDP2
    "pytest",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _work(rank: int, size: int, folder: str, seconds: float, pipe, function, arguments) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{size}", "LOCAL_RANK": f"{rank}", "LOCAL_WORLD_SIZE": f"{size}"}
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
        )
        result = function(*arguments)
        dist.destroy_process_group()
        pipe.send_bytes(pickle.dumps((True, result)))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    pipe.close()


def outcomes(size: int, function, *arguments, seconds: float = 60) -> list[tuple[bool, object] | None]:
    """
    (whether it returned, its result or its traceback) of function(*arguments) on each of `size` processes; None for one that was killed.

    Args: function: of a module's top level.   seconds: the timeout of collectives, and with some more of the whole.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            worker = context.Process(
                target=_work, args=(rank, size, folder, seconds, theirs, function, arguments), daemon=True
            )
            worker.start()
            theirs.close()
            workers.append((worker, mine))
        found = []
        try:
            for _, pipe in workers:
                try:
                    found.append(pickle.loads(pipe.recv_bytes()) if pipe.poll(seconds + 60) else (False, "it hung"))
                except EOFError:
                    found.append(None)
        finally:
            for worker, _ in workers:
                worker.join(5)
                worker.kill()
                worker.join()
    return found


def run(size: int, function, *arguments, seconds: float = 60) -> list:
    """The results of function(*arguments) on `size` processes.  Raises: AssertionError with the traceback of the first that failed."""
    results = []
    for rank, outcome in enumerate(outcomes(size, function, *arguments, seconds=seconds)):
        assert outcome is not None, f"process {rank} was killed"
        assert outcome[0], f"process {rank}: {outcome[1]}"
        results.append(outcome[1])
    return results
