"""Optimizers around optimizers, by whatever name they hold them: all that keeps state follows the ranks, or is refused by `track`."""

from collections import defaultdict

import accelerate
import pytest
import torch
from models import Net, task_loss
from test_optimizer_errors import TARGETS, normal

import adaptlora
from adaptlora.optimizer_wrappers import nested, unwrap


class Inside(torch.optim.Optimizer):
    """As timm's Lookahead: the optimizer inside goes by another name, and has the slow weights in its own state."""

    def __init__(self, optimizer):
        self._base_optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.defaults, self.state = optimizer.defaults, defaultdict(dict)
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

    @torch.no_grad()
    def step(self, closure=None):
        self._base_optimizer.step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                slow = self._base_optimizer.state[p].setdefault("lookahead_slow_buff", p.detach().clone())
                p.copy_(slow.lerp_(p, 0.5))


class Sharpness(torch.optim.Optimizer):
    """As SAM: keeps the parameters of before the ascent in its own state."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.base_optimizer, self.param_groups = optimizer, optimizer.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("old_p", p.clone()).copy_(p)
        self.base_optimizer.step(closure)


class Plain:
    """No optimizer by class, with state of its own."""

    def __init__(self, optimizer):
        self.inner, self.param_groups, self.state = optimizer, optimizer.param_groups, {}

    def zero_grad(self):
        self.inner.zero_grad()

    @torch.no_grad()
    def step(self):
        self.inner.step()
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state.setdefault(p, {}).setdefault("slow_param", p.clone())
                p.copy_(slow.lerp_(p, 0.5))


class Slow(Plain):
    """Slow weights in a list, or wherever `keep` puts them."""

    def __init__(self, optimizer, keep=lambda groups: groups):
        super().__init__(optimizer)
        self.state = optimizer.state
        self.slow = keep([[p.detach().clone() for p in group["params"]] for group in self.param_groups])


class Several:
    def __init__(self, *optimizers):
        self.parts = list(optimizers)

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()


def accelerated(optimizer):
    return accelerate.Accelerator(cpu=True).prepare_optimizer(optimizer)


def adamw(adapter):
    return torch.optim.AdamW(adapter.parameters(), lr=0.01)


def several(adapter):
    first, second = (list(layer.pair.parameters()) for layer in adapter.layers.values())
    return Several(torch.optim.SGD(first, lr=0.1, momentum=0.9), torch.optim.AdamW(second, lr=0.01))


WRAPPERS = {
    "inside": (lambda a: Inside(adamw(a)), 1),
    "sharpness": (lambda a: Sharpness(adamw(a)), 1),
    "plain": (lambda a: Plain(adamw(a)), 1),
    "two-deep": (lambda a: Plain(Sharpness(adamw(a))), 2),
    "several": (several, 0),
    "accelerate": (lambda a: accelerated(adamw(a)), 0),
    "accelerate-around": (lambda a: accelerated(Sharpness(adamw(a))), 1),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_all_that_keeps_state_follows(kind):
    build, around = WRAPPERS[kind]
    adapter = normal()
    optimizer = build(adapter)
    adapter.track(optimizer)
    outer, stepping = unwrap(optimizer)
    assert len(outer) == around and all(type(o) in (torch.optim.AdamW, torch.optim.SGD) for o in stepping)
    for _ in range(5):
        (task_loss(adapter.model) + adapter.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step(1.0)
    assert sum(adapter.ranks().values()) == 4
    for keeper in (*outer, *stepping):
        for p, state in keeper.state.items():
            assert all(value.shape == p.shape for value in state.values() if value.dim())
    assert all(sum(bool(o.state.get(p)) for o in stepping) == 1 for p in adapter.factors() if p.numel())


@pytest.mark.parametrize(
    "keep",
    [
        lambda groups: groups,
        lambda groups: groups[0],
        lambda groups: {i: tuple(group) for i, group in enumerate(groups)},
        lambda groups: groups[0][0],
    ],
)
@pytest.mark.parametrize("around", [lambda o: o, accelerated, Plain])
def test_slow_weights_outside_of_state_are_refused_before_anything_is_tracked(around, keep):
    adapter = normal()
    inner = adamw(adapter)
    slow = Slow(inner, keep) if around is not accelerated else inner
    if slow is inner:
        inner.slow = keep([[p.detach().clone() for p in group["params"]] for group in inner.param_groups])
    with pytest.raises(TypeError, match=r"must be in its `state`.* keeps one of shape \(.*\) in 'slow'\. Keep it in"):
        adapter.track(around(slow))
    assert not adapter._watched and not any(layer.pair.optimizers for layer in adapter.layers.values())
    fixed = adaptlora.attach(Net(), adaptlora.LoraConfig(r=4, **TARGETS))
    fixed.track(Slow(adamw(fixed)))


def test_attributes_that_are_no_state_are_not_refused():
    adapter = normal()
    optimizer = adamw(adapter)
    optimizer.everything = [optimizer.param_groups, list(adapter.factors())]
    optimizer.everything.append(optimizer.everything)
    optimizer.table, optimizer.other = torch.zeros(256), torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    optimizer.step = optimizer.step
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    adapter.track(optimizer)
    assert nested(optimizer) == [optimizer] and list(adapter._watched) == [optimizer]


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (
            lambda a: type("ScheduleFreeWrapper", (Slow,), {"__module__": "schedulefree.wrap"})(adamw(a)),
            "keeps copies of",
        ),
        (lambda a: type("Bare", (), {"state": {}, "inner": None})(), "must be a torch.optim.Optimizer, got Bare"),
        (lambda a: type("Hides", (Plain,), {"__delattr__": object.__delattr__})(adamw(a)), "`param_groups`, and Hides"),
    ],
)
def test_other_wrappers_that_cannot_follow_are_refused(build, text):
    adapter = normal()
    optimizer = build(adapter)
    if type(optimizer).__name__ == "Hides":
        del optimizer.param_groups
    with pytest.raises(TypeError, match=text):
        adapter.track(optimizer)
    assert not adapter._watched
