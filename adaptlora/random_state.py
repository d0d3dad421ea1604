"""The random number generators that a training loop draws from: their state, out of a process and into one."""

import hashlib
import random
import warnings

import numpy as np
import torch


def random_state(model: torch.nn.Module) -> dict:
    """That of torch (and of the model's GPUs), Python and NumPy: numbers, strings, tensors and collections of them."""
    name, keys, *rest = np.random.get_state()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "cuda": {str(device.index): torch.cuda.get_rng_state(device) for device in devices},
    }


def set_random_state(state: dict, model: torch.nn.Module) -> None:
    """Inverse of `random_state`. The state of the one GPU that a model was on goes to the one that it is on now."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    devices = [p.device.index for p in model.parameters() if p.device.type == "cuda"]
    moved = len(state["cuda"]) == len(set(devices)) == 1
    for index, of_device in state["cuda"].items():
        device = devices[0] if moved else int(index)
        if device < torch.cuda.device_count():
            torch.cuda.set_rng_state(of_device, device)
        else:
            warnings.warn(
                f"the checkpoint has the random state of cuda:{index}, which is not there: dropout will differ",
                stacklevel=6,
            )


def seed_from(state: dict, process: int) -> None:
    """Start all generators where only `state`, that of process 0, and the number of the process say: SHA-256 of both is the seed."""
    text = bytes(state["torch"].tolist()) + process.to_bytes(8, "little")
    seed = int.from_bytes(hashlib.sha256(text).digest()[:7], "little")
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
