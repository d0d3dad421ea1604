"""Optimizer state that nobody can place is refused before anything changes; `register_optimizer_state` places it; wrappers."""

import copy

import pytest
import torch
import torchao.optim
from models import Net, task_loss
from optimizers import RowMeans
from test_optimizers import ALL, assert_same, cut, make_pair, make_trained, sliced, train_step

import adaptlora
from adaptlora import optimizer_state
from adaptlora.optimizer_state import Packed, Rows
from adaptlora.ranks import FACTORS, commit_ranks

TARGETS = {"target_modules": ["first", "second"]}


def normal():
    return adaptlora.attach(Net(), adaptlora.NormALConfig(r=4, target_r=2, t_p=1, t_c=2, **TARGETS))


@pytest.fixture
def register(monkeypatch):
    """`register_optimizer_state`, undone afterwards."""
    monkeypatch.setattr(optimizer_state, "_registered", dict(optimizer_state._registered))
    yield adaptlora.register_optimizer_state
    optimizer_state._layout.cache_clear()


class Keeps(torch.optim.SGD):
    """Keeps what `make(parameter)` returns."""

    def __init__(self, parameters, make):
        super().__init__(parameters, lr=0.1)
        self.make = make

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p not in self.state:
                    self.state[p] = {"kept": self.make(p)}
        return super().step(closure)


class Soap:
    """As a projector object or a preconditioner may be."""


UNPLACED = {
    "list": (lambda p: [torch.eye(p.shape[0]), torch.eye(p.shape[1])], r"'kept' of type list"),
    "dict": (lambda p: {"inner": (1, {"Q": torch.eye(p.shape[0])})}, r"'kept' of type dict"),
    "object": (lambda p: Soap(), r"'kept' of type Soap"),
    "flat": (lambda p: p.detach().flatten(), r"'kept' of shape \(52,\)"),
    "transposed": (lambda p: p.detach().t().clone(), r"'kept' of shape \(13, 4\)"),
    "matrix": (lambda p: torch.zeros(1, 1), r"'kept' of shape \(1, 1\)"),
    "features": (lambda p: torch.zeros(p.shape[1]), r"'kept' of shape \(13,\)"),
}


@pytest.mark.parametrize("kind", UNPLACED)
def test_state_that_cannot_be_placed_is_refused_at_the_first_step(kind):
    make, what = UNPLACED[kind]
    adapter = normal()
    optimizer = Keeps(adapter.parameters(), make)
    adapter.track(optimizer)
    task_loss(adapter.model).backward()
    optimizer.step()
    before = [p.detach().clone() for p in adapter.factors()], copy.deepcopy(adapter.method.state_dict())
    kept = {p: state["kept"] for p, state in optimizer.state.items()}
    for _ in range(2):
        with pytest.raises(TypeError, match=rf"^first: rank change: .*Keeps keeps {what}.*register_optimizer_state"):
            adapter.step(1.0)
    assert set(adapter.ranks().values()) == {4} and adapter.method.state_dict() == before[1]
    assert all(map(torch.equal, adapter.factors(), before[0]))
    assert all(optimizer.state[p]["kept"] is value for p, value in kept.items())


@pytest.mark.parametrize("plain", [3, 0.5, None, "text", [1, 2.0], {"a": (1, None)}, torch.tensor(2.0), torch.ones(1)])
def test_numbers_and_text_need_no_place(plain):
    pair, optimizer = make_trained(lambda p: Keeps(p, lambda _: plain))
    pair.narrow(2)
    assert all(state["kept"] is plain for state in optimizer.state.values())


def test_one_element_at_rank_1_is_a_scalar_only_where_that_is_sure():
    pair, _ = make_trained(lambda p: Keeps(p, lambda _: torch.ones(1)), rank=1)
    with pytest.raises(TypeError, match=r"one number, to follow the rank; Keeps keeps 'kept' of shape \(1,\)"):
        pair.grow(2)
    pair, optimizer = make_trained(torch.optim.SGD, rank=1)
    for p in pair.parameters():
        optimizer.state[p] = {"step": torch.ones(1), "other": torch.tensor(1.0)}
    pair.grow(2)


def test_lbfgs_is_refused_when_it_is_tracked_and_where_ranks_change_without():
    adapter = normal()
    lbfgs = torch.optim.LBFGS(adapter.parameters())
    text = "rank change: the optimizer's state must be resizable, got LBFGS: it keeps flat vectors over all parameters"
    with pytest.raises(TypeError, match=text):
        adapter.track(lbfgs)
    assert not adapter._watched and not any(layer.pair.optimizers for layer in adapter.layers.values())
    plain = adaptlora.attach(Net(), adaptlora.LoraConfig(r=4, **TARGETS))
    plain.track(torch.optim.LBFGS(plain.parameters()))
    assert plain.step() is None
    pair = make_pair(4)
    lbfgs = torch.optim.LBFGS(pair.parameters())
    pair.track(lbfgs)
    for change in (lambda: pair.narrow(2), pair.compact, lambda: commit_ranks({"module": pair}, {"module": 2})):
        with pytest.raises(TypeError, match=text):
            change()
    assert pair.rank == 4


def test_an_optimizer_whose_state_lies_elsewhere_is_refused():
    adapter = normal()
    offload = torchao.optim.CPUOffloadOptimizer.__new__(torchao.optim.CPUOffloadOptimizer)
    offload.optim_dict, offload.d_param_groups = {}, [{"params": adapter.parameters()}]
    with pytest.raises(TypeError, match="got CPUOffloadOptimizer: it keeps a copy of every parameter"):
        adapter.track(offload)

    class Bare(torch.optim.Optimizer):
        def __init__(self, parameters):
            self.param_groups = [{"params": list(parameters)}]

    bare = Bare(adapter.parameters())
    with pytest.raises(TypeError, match="the optimizer must keep its state in `state`, and Bare has none"):
        adapter.track(bare)
    assert not adapter._watched


def test_state_that_is_there_already_is_refused_when_it_is_tracked():
    adapter = normal()
    optimizer = RowMeans(adapter.parameters(), lr=0.1)
    task_loss(adapter.model).backward()
    optimizer.step()
    with pytest.raises(TypeError, match=r"first: rank change: optimizer state must be .*RowMeans keeps 'row_mean'"):
        adapter.track(optimizer)
    assert not adapter._watched and not any(layer.pair.optimizers for layer in adapter.layers.values())


@pytest.mark.parametrize("thaw", [lambda m: m.requires_grad_(True), lambda m: m.first.base_layer.bias.requires_grad_()])
def test_a_base_that_is_not_frozen_is_refused(thaw):
    adapter = normal()
    thaw(adapter.model)
    with pytest.raises(ValueError, match=r"track: first\.(weight|bias) must be frozen.*requires_grad_\(False\)"):
        adapter.track(torch.optim.AdamW(adapter.parameters()))
    assert not adapter._watched
    adapter.model.first.base_layer.requires_grad_(False)
    adapter.model.second.base_layer.requires_grad_(False)
    adapter.track(torch.optim.AdamW(adapter.parameters()))


# Layouts of one's own


def row_means(factor, key, value, shape):
    if key == "row_mean":
        return 0 if factor == "lora_A" else None
    return NotImplemented


@pytest.mark.parametrize("cls", [RowMeans, type("Subclass", (RowMeans,), {})])
def test_a_registered_layout_places_state(register, cls):
    register(RowMeans, row_means)
    pair, optimizer = make_trained(lambda p: cls(p, lr=0.1, momentum=0.9))
    before = {f: copy.deepcopy(optimizer.state[getattr(pair, f)]) for f in FACTORS}
    pair.permute([5, 1, 2, 0, 4, 3])
    pair.narrow(2)
    assert torch.equal(optimizer.state[pair.lora_A]["row_mean"], before["lora_A"]["row_mean"][[5, 1]])
    assert torch.equal(optimizer.state[pair.lora_B]["row_mean"], before["lora_B"]["row_mean"])
    assert torch.equal(optimizer.state[pair.lora_B]["momentum_buffer"], before["lora_B"]["momentum_buffer"][:, [5, 1]])
    train_step(pair, optimizer, 3)
    pair.grow(6)
    assert torch.equal(optimizer.state[pair.lora_A]["row_mean"][2:], before["lora_A"]["row_mean"][[2, 0, 4, 3]])


def test_a_subclass_may_have_a_layout_of_its_own(register):
    register(RowMeans, lambda *_: pytest.fail("the layout of the base class was asked"))
    own = type("Own", (RowMeans,), {})
    register(own, row_means)
    pair, _ = make_trained(lambda p: own(p, lr=0.1))
    pair.narrow(2)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_state_of_three_dimensions(register, dim):
    """Two numbers for every element, the ranks wherever they are."""

    def make(p):
        ranks_last = torch.arange(2.0 * p.numel()).view(2, *(p.shape if p.shape[0] == 5 else p.t().shape))
        return ranks_last.movedim(2, dim).contiguous()

    register(Keeps, lambda factor, key, value, shape: dim)
    pair, optimizer = make_trained(lambda p: Keeps(p, make))
    before = {p: state["kept"].clone() for p, state in optimizer.state.items()}
    pair.permute([3, 0, 5, 1, 4, 2])
    pair.narrow(2)
    for p, value in before.items():
        assert torch.equal(optimizer.state[p]["kept"], value.index_select(dim, torch.tensor([3, 0])))
    pair.narrow(0)
    pair.grow(6)
    for p, value in before.items():
        assert torch.equal(optimizer.state[p]["kept"], value.index_select(dim, torch.tensor([3, 0, 5, 1, 4, 2])))


def test_new_ranks_begin_as_the_layout_says(register):
    register(Keeps, lambda factor, key, value, shape: Rows(0 if factor == "lora_A" else 1, fresh=7.0))
    pair, optimizer = make_trained(lambda p: Keeps(p, torch.zeros_like))
    pair.grow(8)
    for p in pair.parameters():
        name, kept = "lora_A" if p is pair.lora_A else "lora_B", optimizer.state[p]["kept"]
        assert not cut(kept, name, "", range(6)).any() and (cut(kept, name, "", [6, 7]) == 7).all()


def test_state_that_is_stored_packed(register):
    """Halves under two keys, of which neither alone is the number."""

    def unpack(state, key):
        return state["high"].double() + state["low"]

    def pack(state, key, numbers):
        return {"high": numbers.half(), "low": numbers - numbers.half().double()}

    def layout(factor, key, value, shape):
        if key == "low":
            return None
        return Packed(0 if factor == "lora_A" else 1, unpack, pack, ("high", "low"))

    register(torch.optim.SGD, layout)
    pair, optimizer = make_trained(torch.optim.SGD)
    values = {p: torch.randn(p.shape, dtype=torch.float64) for p in pair.parameters()}
    for p, value in values.items():
        optimizer.state[p] = pack({}, "high", value)
    pair.plan(3, order=[4, 1, 0, 2, 3, 5]).commit()
    assert pair.nbytes()["optimizer"] == sum(3 * 10 * n + 3 * 8 * n for n in (7, 5))
    pair.grow(6)
    for p, value in values.items():
        name = "lora_A" if p is pair.lora_A else "lora_B"
        torch.testing.assert_close(unpack(optimizer.state[p], "high"), cut(value, name, "", [4, 1, 0, 2, 3, 5]))


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (2, r"a tensor with 6 entries in dimension 2.*Keeps keeps 'kept' of shape \(6, 7\)"),
        (1, "a tensor with 6 entries in dimension 1"),
        (-1, "a tensor with 6 entries in dimension -1"),
        (True, "layout of Keeps must return int, Rows, Packed, None or NotImplemented, got True for 'kept'"),
        ("rows", "must return int, Rows, Packed, None or NotImplemented, got 'rows'"),
        (Packed(1, lambda state, key: state[key], None, ("kept",)), "must have 6 entries in dimension 1 when it is"),
    ],
)
def test_layouts_that_do_not_fit_change_nothing(register, answer, text):
    register(Keeps, lambda *_: answer)
    pair, _ = make_trained(lambda p: Keeps(p, torch.clone))
    before = [p.detach().clone() for p in pair.parameters()]
    with pytest.raises(TypeError, match=text):
        pair.narrow(2)
    assert pair.rank == 6 and all(map(torch.equal, pair.parameters(), before))


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((3, row_means), "optimizer_class must be a subclass of torch.optim.Optimizer, got 3"),
        ((dict, row_means), "optimizer_class must be a subclass of torch.optim.Optimizer, got <class 'dict'>"),
        ((RowMeans, 0), "layout must be callable, got 0"),
    ],
)
def test_bad_registrations(register, args, text):
    with pytest.raises(TypeError, match=text):
        register(*args)


# Wrappers, and state on another device


class Lookahead(torch.optim.Optimizer):
    """Slow weights around another optimizer, whose groups are its own."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def step(self, closure=None):
        self.optimizer.step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow_param", p.detach().clone())
                p.data.copy_(slow.lerp_(p.detach(), 0.5))


def test_a_wrapper_with_state_of_its_own_follows_too():
    adapter = normal()
    inner = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    outer = Lookahead(inner)
    adapter.track(outer)
    for _ in range(4):
        task_loss(adapter.model).backward()
        outer.step()
        outer.zero_grad()
        adapter.step(1.0)
    assert sum(adapter.ranks().values()) == 4
    for p in adapter.factors():
        assert outer.state[p]["slow_param"].shape == inner.state[p]["exp_avg"].shape == p.shape


def test_a_wrappers_state_that_cannot_follow_is_refused():
    adapter = normal()
    outer = Lookahead(torch.optim.AdamW(adapter.parameters(), lr=0.01))
    outer.state[adapter.factors()[0]]["slow_param"] = [torch.zeros(2)]
    with pytest.raises(TypeError, match="Lookahead keeps 'slow_param' of type list"):
        adapter.track(outer)


def test_state_on_another_device_stays_there():
    pair, optimizer = make_trained(lambda p: Keeps(p, lambda q: torch.empty_like(q, device="meta")))
    before = [p.detach().clone() for p in pair.parameters()]
    for rank, compact in ((3, False), (5, False), (8, False), (2, True)):
        pair.plan(rank, compact=compact, order=range(pair.rank - 1, -1, -1)).commit()
        kept = [optimizer.state[p]["kept"] for p in pair.parameters()]
        assert all(k.is_meta and k.shape == p.shape for k, p in zip(kept, pair.parameters(), strict=True))
    assert pair.lora_A.device.type == "cpu" and before[0].shape == (6, 7)


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_a_failure_in_one_module_leaves_all_as_they_were(name):
    good, optimizer = make_trained(ALL[name])
    whole, other = sliced(good, optimizer, ALL[name], range(6))
    bad, _ = make_trained(lambda p: RowMeans(p, lr=0.1))
    with pytest.raises(TypeError, match="second: rank change: .*RowMeans"):
        commit_ranks({"first": good, "second": bad}, {"first": 2, "second": 2}, compact=True)
    assert_same(good, optimizer, whole, other)


def two_optimizers(adapter):
    first, second = (list(layer.pair.parameters()) for layer in adapter.layers.values())
    both = [torch.optim.SGD(first, lr=0.1, momentum=0.9), torch.optim.AdamW(second, lr=0.01)]
    return both, both, lambda: [optimizer.step() for optimizer in both]


def lookahead(adapter):
    inner = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    outer = Lookahead(inner)
    return [outer], [inner, outer], outer.step


@pytest.mark.parametrize("load_first", [False, True])
@pytest.mark.parametrize("build", [two_optimizers, lookahead])
def test_parked_state_comes_back_to_the_optimizer_that_had_it(build, load_first):
    """A run that resumes with parked rows is the run that never stopped, whichever is first: `track` or `load_state_dict`."""

    def make():
        config = adaptlora.LaLoRAConfig(r=6, gamma=0.0, group_by="module", **TARGETS)
        adapter = adaptlora.attach(Net(torch.float64), config)
        return adapter, *build(adapter)

    def run(cut_at=None):
        adapter, tracked, optimizers, step = make()
        for optimizer in tracked:
            adapter.track(optimizer)
        for t, budget in enumerate((4.0, 12.0, 3.0, 12.0, 12.0, 6.0)):
            if t == cut_at:
                state, states = copy.deepcopy(adapter.state_dict()), copy.deepcopy([o.state_dict() for o in optimizers])
                assert any(state["parked"].values())
                adapter, tracked, optimizers, step = make()
                if load_first:
                    adapter.load_state_dict(state)
                for optimizer in tracked:
                    adapter.track(optimizer)
                if not load_first:
                    adapter.load_state_dict(state)
                for optimizer, stored in zip(optimizers, states, strict=True):
                    optimizer.load_state_dict(stored)
                kept = adapter.state_dict()["parked"]
                assert all(
                    torch.equal(kept[n][key], rows) for n, had in state["parked"].items() for key, rows in had.items()
                )
            task_loss(adapter.model, dtype=torch.float64, seed=t).backward()
            step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            adapter.method.budget = budget
            adapter.step()
        return adapter

    whole, resumed = run(), run(cut_at=3)
    assert whole.ranks() == resumed.ranks()
    assert all(map(torch.equal, whole.factors(), resumed.factors()))
