"""A small model whose blocks call three layers with one x, and adapters on it whose layers are grouped or compute alone."""

import pytest
import torch
from models import randomise
from torch import nn

import adaptlora
from adaptlora.nn import grouped_outputs
from adaptlora.nn.lora_group import LoraGroup

CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


class Attention(nn.Module):
    """q, k and v of one x, and an output of another; `between` is called with (self, x) after q."""

    def __init__(self, size=12, dtype=torch.float64, between=None):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(size, size, dtype=dtype) for _ in range(4))
        self.between = between

    def forward(self, x):
        q = self.q(x)
        if self.between is not None:
            x = self.between(self, x)
        return self.o((q * self.k(x)).tanh() + self.v(x))


class Tower(nn.Sequential):
    def __init__(self, *blocks):
        super().__init__(*(blocks or (Attention(), Attention())))


def attached(model=None, group: bool = True, **fields):
    torch.manual_seed(0)
    model = Tower() if model is None else model
    adapter = adaptlora.attach(model, adaptlora.LoraConfig(**CONFIG | fields), group_projections=group)
    randomise(adapter)
    return adapter


def twins(make=Tower, **fields):
    """(grouped, alone): adapters on two equal models."""
    found = []
    for group in (True, False):
        torch.manual_seed(3)
        found.append(attached(make(), group, **fields))
    return found


@pytest.fixture(name="any_size", autouse=True)
def groups_of_any_size(monkeypatch):
    """Groups compute for every x, however small."""
    monkeypatch.setattr(grouped_outputs, "FEWEST_TOKENS", 0)


@pytest.fixture(name="computed")
def computed_layers(monkeypatch):
    """Grows by the number of layers whenever a group computes."""
    sizes, forward = [], LoraGroup.forward

    def counted(group, x):
        sizes.append(len(group.layers))
        return forward(group, x)

    monkeypatch.setattr(LoraGroup, "forward", counted)
    return sizes


def x_of(size=12, seed=1, dtype=torch.float64):
    return torch.randn(3, 5, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def step(adapter, x, seed=7):
    """y, dx and the gradients of all factors, whose dropout `seed` fixes."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = adapter.model(x)
    y.sin().square().mean().backward()
    found = [y.detach(), x.grad, *(factor.grad for factor in adapter.factors()), torch.get_rng_state()]
    adapter.model.zero_grad()
    return found


def suffixes(adapter, under=""):
    return [tuple(n.rpartition(".")[2] for n in names) for names in adapter.summary()["groups"] if under in names[0]]
