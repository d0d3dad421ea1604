"""Bytes that processes of one machine really send each other: a network of their own, and the kernel's counters of it."""

import ctypes
import fcntl
import os
import socket
import struct
import time
from pathlib import Path

from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

TAIL_PROBES = Path("/proc/sys/net/ipv4/tcp_early_retrans")


def own_network() -> bool:
    """Enter a network namespace with nothing but `lo`, for this process and those it starts; False where that is not permitted."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):  # CLONE_NEWNET
        return False
    with socket.socket() as request:
        fcntl.ioctl(request, 0x8914, struct.pack("16sh14x", b"lo", 0x41))  # SIOCSIFFLAGS: up, running
    # A busy machine acknowledges late, and would be sent the last packet again to see whether it was lost.
    if os.access(TAIL_PROBES, os.W_OK):
        TAIL_PROBES.write_text("0")
    return True


def wire_bytes() -> int:
    """Bytes that `lo` received since it came up."""
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


class Counter:
    """Bytes by the hook and on the wire, between two moments at which nothing is under way."""

    def __init__(self, barrier):
        self.barrier, self.hooked = barrier, 0

    def hook(self):
        def counting(counter, bucket):
            counter.hooked += bucket.buffer().nbytes
            return allreduce_hook(None, bucket)

        return self, counting

    def _quiet(self) -> int:
        self.barrier.wait()
        time.sleep(0.05)  # the last acknowledgements
        found = wire_bytes()
        self.barrier.wait()
        return found

    def of(self, work) -> dict[str, int]:
        self.hooked, before = 0, self._quiet()
        work()
        return {"hook": self.hooked, "wire": self._quiet() - before}
