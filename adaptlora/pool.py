"""A function over many modules, several at once, with bits that do not depend on how many."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import torch

_setting = threading.Lock()


def _use_one_core(threads: int) -> None:
    """
    For the calling thread alone. What a thread sets is also what threads that come to torch later begin with: another one sets that
    back, so that a training beside this one keeps its cores.
    """
    with _setting:
        torch.get_num_threads()  # a thread takes the common number at its first use of torch
        torch.set_num_threads(1)
        restoring = threading.Thread(target=torch.set_num_threads, args=(threads,))
        restoring.start()
        restoring.join()


def check_workers(op: str, workers) -> None:
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise ValueError(f"{op}: workers must be None or an integer > 0, got {workers!r}")


def over(function: Callable, items: Iterable, workers: int | None = None) -> Iterator[tuple[object, object]]:
    """
    (item, function(item)) for each item, in the order in which they are done.

    Each call runs in a thread of its own whose torch operations use one core: a product's sums are then taken in the same order on any
    number of cores and of processes, and small factorizations keep all cores busy. No more than `workers` calls (torch's number of
    threads without it) are under way at a time; the next item is taken when one is done, so that memory holds no more than these need.
    An error in a call is raised here and stops the rest.
    """
    threads = torch.get_num_threads()
    pending, items = {}, iter(items)
    pool = ThreadPoolExecutor(workers or threads, initializer=_use_one_core, initargs=(threads,))
    try:
        while True:
            for item in items:
                pending[pool.submit(function, item)] = item
                if len(pending) >= (workers or threads):
                    break
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                yield pending.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)
