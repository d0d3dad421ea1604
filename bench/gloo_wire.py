"""Bytes that the network's counters see when gloo's collectives run over TCP: payload, and what gloo and TCP put around it."""

import math

# A message is announced by its sender, asked for by its receiver, and sent: each with this in front (gloo/transport/tcp/pair.h).
PREAMBLE = 48
# IPv4 20, TCP 20, time stamps 12; the counters of `lo` leave the Ethernet header out.
HEADER = 52
# The three, and one that acknowledges; how many acknowledgements ride on other packets is up to the kernel.
PACKETS = 4
LARGEST_PACKET = 65536 - HEADER
LARGEST_SEGMENT = 1 << 20  # gloo/allreduce.h


def gloo_segments(nbytes: int, itemsize: int, n: int) -> list[int]:
    """Sizes of the pieces that gloo's ring sends on, two or more for each process; fewer of what is very small (gloo/allreduce.cc)."""
    limit = itemsize * max(1, LARGEST_SEGMENT // itemsize)
    count = math.ceil(max(math.ceil(nbytes / limit), 2 * n) / n) * n
    size = math.ceil(math.ceil(nbytes / count) / itemsize) * itemsize
    return [min(size, nbytes - start) for start in range(0, nbytes, size)]


def wire_all_reduce(nbytes: int, itemsize: int, n: int) -> int:
    """Bytes that `lo` counts for gloo's all-reduce among n processes of one machine, all of them together."""
    return sum(2 * (n - 1) * _wire_message(size) for size in gloo_segments(nbytes, itemsize, n)) if n > 1 else 0


def wire_all_gather(nbytes: int, n: int) -> int:
    """The same for gloo's all-gather of `nbytes` in all: each of n shares goes round in two halves (gloo/allgather.cc)."""
    share = nbytes // n
    halves = [share // 2, share - share // 2]
    return n * (n - 1) * sum(map(_wire_message, halves))


def wire_broadcast(nbytes: int, n: int) -> int:
    """The same for gloo's broadcast: every process but the first receives it once (gloo/broadcast.cc)."""
    return (n - 1) * _wire_message(nbytes)


def _wire_message(size: int) -> int:
    return size + 3 * PREAMBLE + HEADER * (PACKETS + (size + PREAMBLE - 1) // LARGEST_PACKET)
