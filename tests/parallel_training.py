"""One training by one process or by several, on the same global batches: for tests of what must come out alike."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import adaptlora

K, N = 12, 3
CONFIGS = {
    "normal": lambda: adaptlora.NormALConfig(r=6, target_r=3, t_p=3, t_c=5, eta_p=0.01, target_modules="all-linear"),
    "proximal": lambda: adaptlora.NormALConfig(
        r=6, target_r=3, t_p=4, t_c=4, penalty_step="proximal", target_modules="all-linear"
    ),
    "adaptive": lambda: adaptlora.NormALConfig(
        r=6, target_r=3, min_steps=2, max_steps=6, target_modules=["0", "2"], modules_to_save=["4"]
    ),
    "lalora": lambda: adaptlora.LaLoRAConfig(r=6, gamma=20.0, target_modules="all-linear"),
    "fisher": lambda: adaptlora.LaLoRAConfig(r=6, gamma=20.0, contribution="fisher", target_modules="all-linear"),
    "nora": lambda: adaptlora.NoRAConfig(r=3, r_out=8, target_modules="all-linear"),
    "dylora": lambda: adaptlora.DyLoRAConfig(r=6, target_modules="all-linear"),
    "pissa": lambda: adaptlora.NormALConfig(
        r=3, target_r=2, t_p=3, t_c=5, init_lora_weights="pissa", target_modules="all-linear"
    ),
    "adalora": lambda: _adalora("final"),
    "adalora update": lambda: _adalora("update"),
}


def _adalora(removal: str) -> adaptlora.AdaLoRAConfig:
    return adaptlora.AdaLoRAConfig(
        init_r=6, target_r=3, tinit=2, tfinal=2, deltaT=1, total_step=8, removal=removal, target_modules="all-linear"
    )


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(K, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, N)).double()


def process() -> tuple[int, int]:
    """(rank, number of processes)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def batches(count: int, size: int = 8, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Global batches, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    return [(torch.randn(size, K, **options), torch.randn(size, N, **options)) for _ in range(count)]


class Loop:
    """
    An adapter of `kind` on `network`, its optimizer and the ranks after every step.

    Args: wrap: "ddp", "bare" (distributed without a wrapper), or "" for one process.   options: of `Adapter.distribute`.
    """

    def __init__(self, kind: str, wrap: str = "", *, model=None, **options):
        # DDP sends the parameters of process 0, so that the others may begin with others.
        self.model = model or network(process()[0] if wrap == "ddp" else 0)
        self.adapter = adaptlora.attach(self.model, CONFIGS[kind]())
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=1e-2)
        self.adapter.track(self.optimizer)
        self.wrapped = DistributedDataParallel(self.model) if wrap == "ddp" else self.model
        if wrap:
            self.adapter.distribute(self.wrapped, **options)
        self.no_sync = self.wrapped.no_sync if wrap == "ddp" else self.adapter.no_sync
        self.ranks: list[list[int]] = []

    def step(self, micro_batches, scale: float = 1.0) -> None:
        """One optimizer step over this process's share of what all are given; `scale` of the whole loss."""
        total, count = 0.0, len(micro_batches)
        for i, (x, y) in enumerate(micro_batches, start=1):
            with contextlib.nullcontext() if i == count else self.no_sync():
                loss = (self.wrapped(x) - y).square().mean() / count
                (scale * (loss + self.adapter.penalty() / count)).backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.adapter.step(total)
        self.ranks.append(list(self.adapter.ranks().values()))

    def state(self) -> dict:
        """Everything that is to be the same: numbers, and tensors by name."""
        tensors = {f"{i}": p.detach().clone() for i, p in enumerate(self.adapter.parameters())}
        for i, p in enumerate(self.adapter.parameters()):
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"{i}.{key}"] = torch.as_tensor(value).clone()
        return {"ranks": self.ranks, "tensors": tensors, "method": self.adapter.method.state_dict()}


def train(kind: str, wrap: str = "", *, steps: int = 8, accumulation: int = 1, seed: int = 1) -> dict:
    rank, size = process()
    loop = Loop(kind, wrap)
    every = batches(steps * accumulation, seed=seed)
    for step in range(steps):
        here = every[step * accumulation : (step + 1) * accumulation]
        loop.step([(x.chunk(size)[rank], y.chunk(size)[rank]) for x, y in here])
    return loop.state()


def assert_same(found: dict, expected: dict, tolerance: float = 1e-10) -> None:
    assert found["ranks"] == expected["ranks"]
    for name, value in expected["method"].items():
        if isinstance(value, float):
            assert abs(found["method"][name] - value) <= 1e-9 * abs(value), name
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        difference = (found["tensors"][name] - tensor).norm()
        assert difference <= tolerance * tensor.norm(), f"{name}: {difference / tensor.norm():.1e}"


def assert_equal(found: dict, expected: dict) -> None:
    """To the bit."""
    assert found["ranks"] == expected["ranks"] and found["method"] == expected["method"]
    assert found["tensors"].keys() == expected["tensors"].keys()
    assert all(torch.equal(found["tensors"][name], tensor) for name, tensor in expected["tensors"].items())
