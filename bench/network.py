"""A network whose cables can be pulled: processes in namespaces of their own, joined by a bridge in another. For root on Linux."""

import os
import signal
import subprocess
import time

from loopback import own_network

INTERFACE = "eth0"


def _ip(pid: int, *arguments: str) -> None:
    subprocess.run(["nsenter", "-t", f"{pid}", "-n", "ip", *arguments], check=True, capture_output=True)


def _entered(pid: int) -> bool:
    return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")


def permitted() -> bool:
    """Whether processes here may have networks of their own."""
    pid = os.fork()
    if not pid:
        os._exit(not own_network())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class Switch:
    """A bridge, and a cable from it to every process that is plugged in; gone when closed."""

    def __init__(self):
        self.pid = os.fork()
        if not self.pid:
            own_network()
            while True:
                signal.pause()
        while not _entered(self.pid):
            time.sleep(0.001)
        _ip(self.pid, "link", "add", "bridge", "type", "bridge")
        _ip(self.pid, "link", "set", "bridge", "up")

    def plug(self, rank: int, pid: int) -> None:
        """Give the process `pid`, which has entered a network of its own, the address of `rank`."""
        while not _entered(pid):
            time.sleep(0.001)
        port = f"port{rank}"
        _ip(self.pid, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", f"{pid}")
        _ip(self.pid, "link", "set", port, "master", "bridge", "up")
        _ip(pid, "address", "add", f"{address(rank)}/24", "dev", INTERFACE)
        _ip(pid, "link", "set", INTERFACE, "up")

    def pull(self, rank: int) -> None:
        _ip(self.pid, "link", "set", f"port{rank}", "down")

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def address(rank: int) -> str:
    return f"10.77.0.{rank + 1}"
