"""Methods of one's own: `register_method`."""

import dataclasses

import pytest
import torch
from models import Net, task_loss
from processes import run

import adaptlora
from adaptlora.methods import METHODS, Method


@dataclasses.dataclass
class HalfConfig(adaptlora.LoraConfig):
    at: int = 2


class Half(Method):
    """Half of every module's vectors, the last ones first, go at one step."""

    orders: dict = {}  # noqa: RUF012

    def needs_optimizer(self):
        return self.t < self.config.at

    def may_change(self):
        return self.t + 1 == self.config.at

    def step(self, loss, optimizers):
        changes, self.t = self.may_change(), self.t + 1
        if not changes:
            return None
        self.orders = {name: list(range(layer.rank))[::-1] for name, layer in self.layers.items()}
        return {name: layer.rank // 2 for name, layer in self.layers.items()}

    def step_state(self):
        return {"t": self.t, "orders": self.orders}

    def changed(self, ranks):
        self.orders = {}


@pytest.fixture(autouse=True)
def registrations():
    """What a test registers is gone after it."""
    kept = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(kept)


def half(**fields):
    return HalfConfig(**{"r": 6, "target_modules": ["first", "second"]} | fields)


def train(folder=None, steps=3):
    """The adapter after `steps` steps, saved before each but the first; a checkpoint in `folder` is where it begins."""
    adapter = adaptlora.attach(Net(), half())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.track(optimizer)
    if torch.distributed.is_initialized():
        adapter.distribute()
    path = folder and adaptlora.last_checkpoint(folder)
    done = adaptlora.load_checkpoint(path, adapter, optimizer).step if path else 0
    for step in range(done, steps):
        task_loss(adapter.model, seed=step).backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
        if folder:
            adaptlora.save_checkpoint(folder, adapter, optimizer, step=step + 1)
    return adapter


def values(adapter):
    return [factor.detach().clone() for factor in adapter.factors()]


def _train_registered():
    adaptlora.register_method(HalfConfig)(Half)
    adapter = train()
    return adapter.ranks(), values(adapter)


def test_a_registered_method_trains_saves_and_goes_on(tmp_path):
    with pytest.raises(TypeError, match=r"one of adaptlora's .*DyLoRAConfig, got test_register_method.HalfConfig"):
        adaptlora.attach(Net(), half())
    assert adaptlora.register_method(HalfConfig)(Half) is Half
    assert adaptlora.trained_parameters(Net(), half()) == 6 * (13 + 17 + 17 + 11)
    adapter = train()
    assert adapter.ranks() == {"first": 3, "second": 3} and adapter.summary()["method"] == "Half"
    train(tmp_path, steps=1)
    assert train(tmp_path, steps=2).ranks() == adapter.ranks()
    resumed = train(tmp_path)
    for one, other in zip(values(adapter), values(resumed), strict=True):
        assert torch.equal(one, other)
    adapter.save(tmp_path / "saved")
    assert adaptlora.load(Net(), tmp_path / "saved").ranks() == adapter.ranks()


def test_several_processes_train_a_registered_method():
    adaptlora.register_method(HalfConfig)(Half)
    expected = train()
    for ranks, of_process in run(2, _train_registered, seconds=120):
        assert ranks == expected.ranks()
        for one, other in zip(of_process, values(expected), strict=True):
            torch.testing.assert_close(one, other)


def test_what_cannot_be_registered():
    before = dict(METHODS)

    class Plain(adaptlora.LoraConfig):
        pass

    for config in (Plain, half(), dict, HalfConfig.__name__):
        with pytest.raises(TypeError, match="register_method: config must be a dataclass derived from LoraConfig"):
            adaptlora.register_method(config)
    with pytest.raises(
        TypeError, match="register_method: method must be a class derived from Method, got <class 'object'>"
    ):
        adaptlora.register_method(HalfConfig)(object)
    with pytest.raises(ValueError, match="register_method: NormALConfig must have no method yet, and it has NormAL"):
        adaptlora.register_method(adaptlora.NormALConfig)
    assert before == METHODS
