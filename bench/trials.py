"""What trials have in common that kill, stop or cut off training: a journal that outlives its process, and a digest of the final state."""

import hashlib
import json
import mmap
import os
import random
import struct
import time
from pathlib import Path

import numpy as np
import torch

from adaptlora.checksums import checksum
from adaptlora.encoding import encode

PHASES = ("start", "step", "clip", "save")


class Journal:
    """What a child leaves though it is killed: its phase in shared memory, and a line for each step in a file."""

    def __init__(self, file: Path):
        self.file = file
        self.memory = mmap.mmap(-1, 16)

    def phase(self, name: str, step: int = 0) -> None:
        self.memory[:16] = struct.pack("2q", PHASES.index(name), step)

    def where(self) -> str:
        return PHASES[struct.unpack("2q", self.memory[:16])[0]]

    def step(self) -> int:
        return struct.unpack("2q", self.memory[:16])[1]

    def loss(self, step: int, loss: float) -> None:
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(f"{step} {loss.hex()}\n")

    def losses(self) -> dict[int, set[str]]:
        """{step: every loss that any attempt had there}"""
        found: dict[int, set[str]] = {}
        for line in self.file.read_text(encoding="utf-8").splitlines():
            step, loss = line.split()
            found.setdefault(int(step), set()).add(loss)
        return found


def digest(adapter, optimizer) -> dict[str, str]:
    """SHA-256 of each part of what the next step would depend on."""
    numpy_state = np.random.get_state()
    parts = {
        "adapter": adapter.state_dict(),
        "optimizer": optimizer.state_dict(),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]),
    }
    found = {}
    for name, part in parts.items():
        tensors: dict[str, torch.Tensor] = {}
        text = json.dumps(encode("digest", "", part, tensors), sort_keys=True)  # Trainer sorts what it writes
        text += "".join(checksum(tensor.flatten()) for tensor in tensors.values())
        found[name] = hashlib.sha256(text.encode()).hexdigest()
    return found


def start_random() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def wait(pid: int, seconds: float | None = None) -> int | None:
    """The child's exit status, negative for a signal; None if it still runs after `seconds`."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, 0 if end is None else os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.0005)
