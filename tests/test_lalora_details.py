"""La-LoRA beyond its main road: contributions in numbers, GradScaler, files and states that do not fit, optimizers that cannot follow."""

import copy

import pytest
import torch
from models import Net, randomise
from optimizers import RowMeans
from test_lalora import R, make, train_step

import adaptlora


def norm(rows):
    return rows.double().norm().item()


@pytest.mark.parametrize("fidelity", ["truncation", "previous", "off"])
@pytest.mark.parametrize("group_by", ["block", "module"])
def test_contributions_in_numbers(fidelity, group_by):
    """Eq. 9 and 10 as floats, with several modules a group, zero factors among them, at ranks between 1 and r."""
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.ModuleDict(
        {"q": torch.nn.Linear(6, 5), "k": torch.nn.Linear(6, 7)}) for _ in range(2))}).double()  # fmt: skip
    config = adaptlora.LaLoRAConfig(
        r=8, lora_alpha=8, target_modules=["q", "k"], fidelity=fidelity, group_by=group_by, gamma=0.0
    )
    adapter = adaptlora.attach(model, config)
    pairs = {name: layer.pair for name, layer in adapter.layers.items()}
    for pair in pairs.values():
        pair.plan(3).commit()
    method = adapter.method
    method.group_ranks = [3] * len(method.groups)
    method._measure(method._norms())
    before = {name: [factor.clone() for factor in pair.whole()] for name, pair in pairs.items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, pair in pairs.items():
            for factor in pair.whole():
                if name != "layers.0.q":  # its B stays zero
                    factor.copy_(torch.randn(factor.shape, generator=generator, dtype=torch.float64))
    expected = dict.fromkeys(method.groups, 0.0)
    for name, pair in pairs.items():
        A, B = pair.whole()
        a, b = norm(A[:3]), norm(B[:, :3])
        f_a, f_b = {
            "truncation": (a / norm(A), b / norm(B) if norm(B) else 1.0),
            "previous": (norm(before[name][0][:3]) / a, norm(before[name][1][:, :3]) / b if b else 1.0),
            "off": (1.0, 1.0),
        }[fidelity]
        expected[name.rpartition(".")[0] if group_by == "block" else name] += f_a * b + f_b * a
    assert method._contributions(method._norms()) == pytest.approx(list(expected.values()), rel=1e-6)


def test_growth_of_a_group_that_was_zero_is_zero():
    adapter, _ = make(group_by="module")
    layer = adapter.layers["first"]
    with torch.no_grad():
        layer.lora_A.zero_()
    adapter.method._measure(adapter.method._norms())
    with torch.no_grad():
        layer.lora_A.fill_(1.0)
    assert adapter.method._growths(adapter.method._norms()) == [0.0, 0.0]


class Scaled(torch.optim.Optimizer):
    """What a fused optimizer looks like to hooks while a GradScaler steps it; it leaves the factors alone."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        pass


def scaled_step(adapter, optimizer, scale, overflow=False):
    adapter.model(torch.randn(4, 13, dtype=torch.float64)).square().sum().backward()
    for p in adapter.factors():
        p.grad *= float("inf") if overflow else scale
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(float(scale)), torch.tensor(float(overflow))
    optimizer.step()
    optimizer.zero_grad()


def make_scaled():
    torch.manual_seed(0)
    adapter = adaptlora.attach(
        Net(torch.float64),
        adaptlora.LaLoRAConfig(r=R, target_modules=["first", "second"], contribution="fisher", gamma=0.0),
    )
    randomise(adapter)
    optimizer = Scaled(adapter.parameters())
    adapter.track(optimizer)
    return adapter, optimizer


def test_fisher_reads_gradients_as_they_are_without_the_scaler():
    found = {}
    for scale in (1, 1024):
        adapter, optimizer = make_scaled()
        torch.manual_seed(1)
        for _ in range(3):
            scaled_step(adapter, optimizer, scale)
            adapter.step()
        found[scale] = adapter.method.state_dict()["fisher"]
    assert found[1024] == pytest.approx(found[1], rel=1e-5)


def test_a_step_that_the_scaler_skips_leaves_no_trace_in_fisher():
    adapter, optimizer = make_scaled()
    scaled_step(adapter, optimizer, 1024, overflow=True)
    assert adapter.step() is None and adapter.method.t == 1 and set(adapter.ranks().values()) == {1}
    scaled_step(adapter, optimizer, 1)
    adapter.step()
    before = adapter.method.state_dict()["fisher"]
    assert all(0 < value < float("inf") for value in before)
    scaled_step(adapter, optimizer, 1024, overflow=True)
    adapter.step()
    assert adapter.method.state_dict()["fisher"] == before


def test_two_optimizers_are_one_step_of_fisher():
    adapters = []
    for split in (False, True):
        adapter = adaptlora.attach(
            Net(torch.float64), adaptlora.LaLoRAConfig(r=R, target_modules=["first", "second"], contribution="fisher")
        )
        factors = adapter.factors()
        groups = [factors[::2], factors[1::2]] if split else [factors]
        optimizers = [torch.optim.SGD(group, lr=0.01) for group in groups]
        for optimizer in optimizers:
            adapter.track(optimizer)
        for t in range(3):
            torch.manual_seed(t)
            adapter.model(torch.randn(4, 13, dtype=torch.float64)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
            adapter.step()
        adapters.append(adapter.method.state_dict()["fisher"])
    assert adapters[0] == pytest.approx(adapters[1], rel=1e-12)


def test_state_that_only_looks_like_rank_rows_at_rank_1_is_refused():
    adapter = adaptlora.attach(Net(), adaptlora.LaLoRAConfig(r=R, target_modules=["first"], gamma=50.0))
    optimizer = RowMeans(adapter.parameters(), lr=0.01)
    adapter.track(optimizer)
    adapter.model(torch.ones(2, 13)).square().sum().backward()
    optimizer.step()
    with pytest.raises(TypeError, match="optimizer state must be shaped like its parameter.*RowMeans keeps"):
        adapter.step()
    assert adapter.ranks() == {"first": 1}


# From outside


def plain_file(tmp_path, **ranks):
    source = adaptlora.attach(
        Net(torch.float64),
        adaptlora.LoraConfig(r=3, lora_alpha=6, target_modules=["first", "second"], rank_pattern=ranks),
    )
    randomise(source)
    source.save(tmp_path)


def test_a_loaded_adapter_has_room_to_grow_without_moving(tmp_path, monkeypatch):
    plain_file(tmp_path)
    adapter, optimizer = make(gamma=0.0, temperature=100.0)
    adapter.load(tmp_path)
    assert adapter.method.group_ranks == [3, 3] and adapter.method.budget == 6.0
    assert all(layer.pair.capacity == R for layer in adapter.layers.values())
    torch.testing.assert_close(adapter.method.sizes, adapter.method._sizes(adapter.method._norms()))
    adapter.method.budget = 8.0
    train_step(adapter, optimizer, seed=0)  # the state of the optimizer gets its room
    monkeypatch.setattr("adaptlora.ranks.gather_rows", lambda *_: pytest.fail("rows were moved"))
    for budget in (12.0, 17.0, 9.0, 20.0):
        adapter.method.budget = budget
        train_step(adapter, optimizer, seed=1)
        assert sum(adapter.ranks().values()) == budget


def test_a_load_that_the_optimizer_cannot_follow_changes_nothing(tmp_path):
    plain_file(tmp_path)
    adapter, _ = make()
    optimizer = RowMeans(adapter.parameters(), lr=0.01)
    adapter.track(optimizer)
    adapter.model(torch.ones(2, 13, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    before = adapter.ranks(), copy.deepcopy(adapter.method.state_dict())
    with pytest.raises(TypeError, match="RowMeans keeps"):
        adapter.load(tmp_path)
    assert (adapter.ranks(), adapter.method.state_dict()) == before


def test_ranks_come_from_the_model_where_its_state_was_loaded():
    adapter, optimizer = make(gamma=0.0)
    other, _ = make(gamma=0.0)
    for layer in other.layers.values():
        layer.pair.plan(4).commit()
    adapter.model.load_state_dict(other.model.state_dict())
    adapter.method.budget = 8.0
    train_step(adapter, optimizer)
    assert sum(adapter.ranks().values()) == 8 == sum(adapter.method.group_ranks)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda s: s["method"].update(group_ranks=[1]), "method's group_ranks must be a list of 2"),
        (lambda s: s["method"].update(group_ranks="ab"), "method's group_ranks must be a list of 2"),
        (lambda s: s["method"].update(sizes=[1.0, "x"]), "method's state must hold numbers"),
        (lambda s: s["method"].update(truncated=[[1.0], [1.0]]), "method's truncated must be of 2 modules"),
        (lambda s: s["scalings"].update(first="x"), "scalings must give first a finite number, got 'x'"),
        (lambda s: s["parked"]["second"].pop("lora_A"), "second: parked rows must hold lora_A and lora_B"),
    ],
)
def test_states_that_do_not_fit_change_nothing(spoil, text):
    source, optimizer = make(gamma=2.0)
    for t in range(4):
        train_step(source, optimizer, seed=t)
    state = copy.deepcopy(source.state_dict())
    spoil(state)
    adapter, _ = make(gamma=2.0)
    before = adapter.ranks(), copy.deepcopy(adapter.method.state_dict()), [f.clone() for f in adapter.factors()]
    with pytest.raises(ValueError, match=f"load_state_dict: {text}"):
        adapter.load_state_dict(state)
    assert (adapter.ranks(), adapter.method.state_dict()) == before[:2]
    assert all(map(torch.equal, adapter.factors(), before[2]))


def test_parked_state_that_waits_for_an_optimizer_goes_with_compact():
    source, optimizer = make(gamma=2.0)
    for t in range(4):
        train_step(source, optimizer, seed=t)
    for layer in source.layers.values():
        layer.pair.plan(1).commit()
    adapter, _ = make(gamma=2.0)
    fresh = adaptlora.attach(Net(torch.float64), adapter.config)
    fresh.load_state_dict(source.state_dict())
    assert any("exp_avg" in key for layer in fresh.layers.values() for key in layer.pair.parked())
    fresh.compact()
    assert not any(layer.pair.parked() for layer in fresh.layers.values())
    adapter.load_state_dict(fresh.state_dict())


def test_a_compacted_adapter_can_be_sheared():
    adapter, optimizer = make(gamma=2.0)
    for t in range(6):
        train_step(adapter, optimizer, seed=t)
    adapter.compact()
    report = adaptlora.shear(adapter, adaptlora.SVDConfig(rank=1))
    assert set(adapter.ranks().values()) == {1} == set(report.ranks().values())
