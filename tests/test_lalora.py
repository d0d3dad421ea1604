"""La-LoRA: budgets, shares and allocations against numbers worked by hand, and the method against a plain reading of its equations."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net, bert_batch, randomise, task_loss, tiny_bert

import adaptlora
from adaptlora.methods.lalora import LaLoRA, allocate, next_budget, shares

R = 10


def make(**fields):
    fields = {"r": R, "lora_alpha": 2 * R, "target_modules": ["first", "second"]} | fields
    adapter = adaptlora.attach(Net(torch.float64), adaptlora.LaLoRAConfig(**fields))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    adapter.track(optimizer)
    return adapter, optimizer


def train_step(adapter, optimizer, seed=0):
    loss = task_loss(adapter.model, dtype=next(adapter.model.parameters()).dtype, seed=seed)
    (loss + adapter.penalty()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return adapter.step(loss)


# Budget: D ← clip(D · (1 + γ · mean growth), L, Σ r)          [Eq. 5]


@pytest.mark.parametrize(
    ("budget", "growths", "gamma", "expected"),
    [
        (10.0, [0.1, 0.3], 1.0, 12.0),
        (10.0, [0.1, 0.3], 2.0, 14.0),
        (10.0, [-0.2, 0.2], 5.0, 10.0),
        (10.0, [0.5, 0.5], 0.0, 10.0),
        (3.0, [-0.9, -0.9], 1.0, 2.0),  # not below the number of groups
        (10.0, [3.0, 3.0], 1.0, 16.0),  # not above all ranks together
        (10.0, [-5.0, -5.0], 1.0, 2.0),
    ],
)
def test_budget_by_hand(budget, growths, gamma, expected):
    assert next_budget(budget, growths, gamma, [8, 8]) == pytest.approx(expected, rel=1e-15)


# Allocation          [Eq. 8]

LN2, LN3 = math.log(2), math.log(3)


@pytest.mark.parametrize(
    ("contributions", "total", "caps", "expected"),
    [
        # nothing clamped: the softmax itself. exp: 1 and 3, so a quarter and three quarters of 8
        ([0.0, LN3], 8, [8, 8], [2.0, 6.0]),
        ([5.0, 5.0, 5.0], 6, [4, 4, 4], [2.0, 2.0, 2.0]),
        # exp 1, 3: of 5 they would be 1.25 and 3.75; the cap 3 leaves 2 to the first
        ([0.0, LN3], 5, [8, 3], [2.0, 3.0]),
        # exp 1, 1, 8 of 5: 0.5, 0.5, 4; two at 1 leave 3
        ([0.0, 0.0, 3 * LN2], 5, [8, 8, 8], [1.0, 1.0, 3.0]),
        # exp 1, 2, 16 of 12: the last at its cap 8, the rest of 4 as 1 to 2
        ([0.0, LN2, 4 * LN2], 12, [8, 8, 8], [4 / 3, 8 / 3, 8.0]),
        # a softmax that is one-hot in floating point still orders the others
        ([1000.0, 500.0, 0.0], 9, [4, 4, 4], [4.0, 4.0, 1.0]),
        ([0.0, -1000.0, -2000.0], 3, [4, 4, 4], [1.0, 1.0, 1.0]),
        ([3.0, 1.0], 8, [4, 4], [4.0, 4.0]),
        ([1.0, 2.0], 3, [1, 2], [1.0, 2.0]),
        ([7.0], 3, [4], [3.0]),
    ],
)
def test_shares_by_hand(contributions, total, caps, expected):
    assert shares(contributions, total, caps) == pytest.approx(expected, rel=1e-12)


def test_temperature_flattens():
    # exp(ln 9 / 2) = 3
    assert shares([0.0, 2 * LN3], 8, [8, 8], temperature=2.0) == pytest.approx([2.0, 6.0], rel=1e-12)


@pytest.mark.parametrize(
    ("contributions", "budget", "caps", "expected"),
    [
        # 7/3 each: one left over, to the first of equals
        ([0.0, 0.0, 0.0], 7.0, [4, 4, 4], [3, 2, 2]),
        ([0.0, 0.0, 0.0], 8.0, [4, 4, 4], [3, 3, 2]),
        # 1.75 and 5.25: the remainder .75 gets it
        ([0.0, LN3], 7.0, [8, 8], [2, 5]),
        # 4/3, 8/3, 8: .67 before .33
        ([0.0, LN2, 4 * LN2], 12.0, [8, 8, 8], [1, 3, 8]),
        # round(D): 6.4 → 6, 6.6 → 7
        ([0.0, 0.0], 6.4, [8, 8], [3, 3]),
        ([0.0, 0.0], 6.6, [8, 8], [4, 3]),
        ([9.0, 0.0, 0.0], 6.0, [4, 4, 4], [4, 1, 1]),
        ([900.0, 0.0, 0.0], 9.0, [4, 4, 4], [4, 3, 2]),
        ([0.0, 0.0, 0.0], 3.0, [4, 4, 4], [1, 1, 1]),
        ([0.0, 5.0, 0.0], 12.0, [4, 4, 4], [4, 4, 4]),
    ],
)
def test_allocation_by_hand(contributions, budget, caps, expected):
    assert allocate(contributions, budget, caps) == expected


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.tuples(st.floats(-50, 50) | st.sampled_from([0.0, 1e-9, 700.0, -1e6]), st.integers(1, 9)),
        min_size=1,
        max_size=8,
    ),
    st.floats(0, 1),
    st.sampled_from([0.01, 1.0, 30.0]),
)
def test_allocation_invariants(groups, part, temperature):
    contributions, caps = (list(values) for values in zip(*groups, strict=True))
    budget = len(caps) + part * (sum(caps) - len(caps))
    ranks = allocate(contributions, budget, caps, temperature)
    assert sum(ranks) == round(budget)
    assert all(1 <= rank <= cap for rank, cap in zip(ranks, caps, strict=True))
    # more contribution and as much room: at least as much rank
    for i, j in ((i, j) for i in range(len(caps)) for j in range(len(caps))):
        if contributions[i] - contributions[j] > 1e-6 * temperature and caps[i] >= caps[j]:
            assert ranks[i] >= ranks[j]
    parts = shares(contributions, round(budget), caps, temperature)
    assert sum(parts) == pytest.approx(round(budget), rel=1e-9)
    assert all(abs(part - rank) < 1 + 1e-9 for part, rank in zip(parts, ranks, strict=True))


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(0, 2), min_size=3, max_size=3), min_size=1, max_size=20), st.floats(0, 3))
def test_the_budget_does_not_fall_while_norms_grow(growths, gamma):
    budget, caps = 3.0, [8, 8, 8]
    for of_step in growths:
        grown = next_budget(budget, of_step, gamma, caps)
        assert budget <= grown <= 24
        budget = grown


# The method against its equations, written again without a trick


def frobenius(rows):
    return sum(value * value for row in rows for value in row) ** 0.5


def plain_contribution(modules, rank, fidelity, before):
    total = 0.0
    for k, (A, B) in enumerate(modules):
        a, b, whole_a, whole_b = frobenius(A[:rank]), frobenius(B[:rank]), frobenius(A), frobenius(B)
        f_a = f_b = 1.0
        if fidelity == "truncation":
            f_a, f_b = (a / whole_a if whole_a else 1.0), (b / whole_b if whole_b else 1.0)
        elif fidelity == "previous":
            f_a, f_b = (before[k][0] / a if a else 1.0), (before[k][1] / b if b else 1.0)
        total += f_a * b + f_b * a
    return total


def rows_of(adapter):
    wholes = [layer.pair.whole() for layer in adapter.layers.values()]
    return [(A.tolist(), B.t().tolist()) for A, B in wholes]


@pytest.mark.parametrize("fidelity", ["truncation", "previous", "off"])
@pytest.mark.parametrize("growth", ["current", "own"])
@pytest.mark.parametrize("interval", [1, 3])
def test_the_method_is_its_equations(fidelity, growth, interval):
    adapter, optimizer = make(
        fidelity=fidelity, growth=growth, interval=interval, gamma=3.0 * interval, group_by="module"
    )
    before, ranks, budget = rows_of(adapter), [1, 1], 2.0
    before_ranks = [1, 1]
    seen = set()
    for t in range(1, 22):
        train_step(adapter, optimizer, seed=t)
        if t % interval:
            assert list(adapter.ranks().values()) == ranks
            continue
        now = rows_of(adapter)
        growths, contributions = [], []
        for i, (old, new) in enumerate(zip(before, now, strict=True)):
            r_old = ranks[i] if growth == "current" else before_ranks[i]
            s_old = sum(frobenius(X[:r_old]) for X in old) / r_old
            s_new = sum(frobenius(X[: ranks[i]]) for X in new) / ranks[i]
            growths.append((s_new - s_old) / s_old)
            truncated = [tuple(frobenius(X[: ranks[i]]) for X in old)]
            contributions.append(plain_contribution([new], ranks[i], fidelity, truncated))
        budget = min(max(budget * (1 + 3.0 * interval * sum(growths) / 2), 2), 2 * R)
        before, before_ranks, ranks = now, ranks, allocate(contributions, budget, [R, R])
        assert adapter.method.budget == pytest.approx(budget, rel=1e-6)  # norms are kept in float32 where factors are
        assert list(adapter.ranks().values()) == ranks
        seen.add(tuple(ranks))
    assert len(seen) > 2 and adapter.method.t == 21


def test_the_first_rows_and_the_largest_ranks_scaling():
    adapter, _ = make(gamma=0.0)
    randomise(adapter)
    assert set(adapter.ranks().values()) == {1} and adapter.layers["first"].scaling == 2.0
    layer, x = adapter.layers["first"], torch.randn(3, 13, dtype=torch.float64)
    A, B = layer.pair.whole()
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 2.0 * x @ A[:1].t() @ B[:, :1].t())
    commit(adapter, 3)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 2.0 * x @ A[:3].t() @ B[:, :3].t())
    assert layer.scaling == 2.0


def commit(adapter, rank):
    for layer in adapter.layers.values():
        layer.pair.plan(rank).commit()


# Groups


def test_modules_of_a_block_share_a_rank_and_the_others_stand_alone():
    adapter = adaptlora.attach(tiny_bert(), adaptlora.LaLoRAConfig(r=4, target_modules="all-linear"))
    assert adapter.method.groups == ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler.dense"]
    assert adapter.method.budget == 3.0 and adapter.method.caps == [4, 4, 4]
    by_module = adaptlora.LaLoRAConfig(r=4, target_modules="all-linear", group_by="module")
    assert len(adaptlora.attach(tiny_bert(), by_module).method.groups) == 13


def test_groups_may_have_ranks_of_their_own_but_not_within_a_group():
    fields = {"r": 4, "target_modules": "all-linear"}
    own = adaptlora.LaLoRAConfig(**fields, rank_pattern={r"bert\.encoder\.layer\.0\..*": 6})
    assert adaptlora.attach(tiny_bert(), own).method.caps == [6, 4, 4]
    mixed = adaptlora.LaLoRAConfig(**fields, rank_pattern={"layer.0.attention.self.query": 6})
    model = tiny_bert()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"same r; bert.encoder.layer.0 has 6, got 4 for .*\.key"):
        adaptlora.attach(model, mixed)
    assert [p.requires_grad for p in model.parameters()] == flags


# Rank changes are views


@pytest.mark.parametrize("contribution", ["norm", "fisher"])
def test_no_step_moves_a_factor_or_its_state(contribution, monkeypatch):
    """After the first growth everything stays where it is: no copy, no gather, whatever the ranks do."""
    temperature = 0.1 if contribution == "norm" else 1e-3
    adapter, optimizer = make(gamma=2.0, contribution=contribution, temperature=temperature, group_by="module")
    t = 0
    while min(adapter.ranks().values()) < 2:
        t += train_step(adapter, optimizer, seed=t) is None or 1

    def addresses():
        state = [optimizer.state[p][k].data_ptr() for p in adapter.factors() for k in ("exp_avg", "exp_avg_sq")]
        return [p.data_ptr() for p in adapter.factors()] + state

    before, parameters = addresses(), adapter.factors()
    monkeypatch.setattr("adaptlora.ranks.gather_rows", lambda *_: pytest.fail("rows were moved"))
    changes = 0
    for later in range(t, t + 15):
        changes += train_step(adapter, optimizer, seed=later) is not None
        assert addresses() == before
    assert changes and all(old is new for old, new in zip(parameters, adapter.factors(), strict=True))


def test_parked_vectors_keep_values_and_state_and_take_no_step():
    adapter, optimizer = make(gamma=0.0)
    commit(adapter, R)
    for t in range(3):
        train_step_without_method(adapter, optimizer, t)
    commit(adapter, 2)
    parked = [layer.pair.parked() for layer in adapter.layers.values()]
    active = [p.detach().clone() for p in adapter.factors()]
    for t in range(3, 6):
        train_step_without_method(adapter, optimizer, t)
    assert not any(torch.equal(p, old) for p, old in zip(adapter.factors(), active, strict=True))
    for layer, before in zip(adapter.layers.values(), parked, strict=True):
        assert all(torch.equal(rows, before[key]) for key, rows in layer.pair.parked().items())
    commit(adapter, R)
    for layer, before in zip(adapter.layers.values(), parked, strict=True):
        assert torch.equal(layer.lora_A[2:], before["lora_A"])
        assert torch.equal(optimizer.state[layer.lora_B]["exp_avg"].t()[2:], before["lora_B.exp_avg"])


def train_step_without_method(adapter, optimizer, seed):
    task_loss(adapter.model, dtype=torch.float64, seed=seed).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_one_rank_norms_call_and_one_copy_to_the_host_a_step(monkeypatch):
    adapter, optimizer = make(gamma=3.0)
    calls = []
    real = LaLoRA._norms.__globals__["rank_norms"]
    monkeypatch.setitem(LaLoRA._norms.__globals__, "rank_norms", lambda *a: calls.append("norms") or real(*a))
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: calls.append("cpu") or cpu(t))
    for t in range(4):
        train_step(adapter, optimizer, seed=t)
    assert calls == ["norms", "cpu"] * 4


# Memory


def test_compact_leaves_what_the_ranks_say():
    adapter, optimizer = make(gamma=2.0)
    for t in range(6):
        train_step(adapter, optimizer, seed=t)
    ranks = adapter.ranks()
    assert 2 < sum(ranks.values()) < 2 * R
    logits = adapter.model(torch.ones(1, 13, dtype=torch.float64))
    whole = adapter.summary()
    adapter.compact()
    summary = adapter.summary()
    numbers = sum((layer.in_features + layer.out_features) * layer.rank for layer in adapter.layers.values())
    assert summary["adapter_bytes"] == 8 * numbers < whole["adapter_bytes"]
    assert summary["optimizer_bytes"] == 2 * 8 * numbers < whole["optimizer_bytes"]
    assert torch.equal(adapter.model(torch.ones(1, 13, dtype=torch.float64)), logits)
    assert adapter.method.phase == "final" and not adapter.method.needs_optimizer()
    for t in range(3):
        assert train_step(adapter, optimizer, seed=t) is None
    assert adapter.ranks() == ranks


# Fisher


def test_fisher_is_the_smoothed_sum_of_squared_gradients():
    adapter, optimizer = make(contribution="fisher", gamma=0.0, ema=0.75, group_by="module", interval=100)
    expected = None
    for t in range(4):
        task_loss(adapter.model, dtype=torch.float64, seed=t).backward()
        found = [
            sum(p.grad.square().sum().item() for p in layer.pair.parameters()) for layer in adapter.layers.values()
        ]
        expected = found if expected is None else [0.75 * e + 0.25 * f for e, f in zip(expected, found, strict=True)]
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
    assert adapter.method.state_dict()["fisher"] == pytest.approx(expected, rel=1e-6)


def test_fisher_decides():
    adapter, optimizer = make(contribution="fisher", gamma=2.0, temperature=1e-3, group_by="module")
    for t in range(5):
        train_step(adapter, optimizer, seed=t)
    fisher, ranks = adapter.method.fisher, adapter.method.group_ranks
    assert ranks == allocate(fisher, adapter.method.budget, [R, R], 1e-3) and ranks[0] != ranks[1]


def test_fisher_without_gradients_changes_no_ranks():
    adapter, optimizer = make(contribution="fisher", gamma=5.0)
    assert adapter.step() is None and adapter.method.t == 1 and optimizer.state_dict()
    untracked = adaptlora.attach(Net(), adaptlora.LaLoRAConfig(r=R, target_modules=["first"], contribution="fisher"))
    with pytest.raises(ValueError, match="the optimizer must be tracked before ranks change"):
        untracked.step()


# Bad numbers


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["active", "parked"])
def test_norms_that_are_not_finite_stop_and_change_nothing(bad, where):
    adapter, optimizer = make()
    for t in range(3):
        train_step(adapter, optimizer, seed=t)
    layer = adapter.layers["second"]
    A, _ = layer.pair.whole()
    row = 0 if where == "active" else R - 1
    assert layer.rank < R
    with torch.no_grad():
        kept = A[row, 2].clone()
        A[row, 2] = bad
    before = adapter.ranks(), copy.deepcopy(adapter.method.state_dict())
    with pytest.raises(ValueError, match="La-LoRA: second: norms of the rank vectors must be finite, got"):
        adapter.step()
    assert (adapter.ranks(), adapter.method.state_dict()) == before
    with torch.no_grad():
        A[row, 2] = kept
    assert train_step(adapter, optimizer) is not None or adapter.method.t == 4


def test_a_rank_change_that_fails_leaves_everything(monkeypatch):
    adapter, optimizer = make(gamma=20.0)
    train_step_without_method(adapter, optimizer, 0)
    before = adapter.ranks(), copy.deepcopy(adapter.method.state_dict())

    def fail(*args, **kwargs):
        raise MemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("adaptlora.ranks.RankedPair.plan", fail)
        with pytest.raises(MemoryError):
            adapter.step()
    assert (adapter.ranks(), adapter.method.state_dict()) == before
    change = adapter.step()
    assert change is not None and adapter.method.changes[0][0] == 1


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"gamma": -1}, "gamma must be a number ≥ 0, got -1"),
        ({"interval": 0}, "interval must be an integer > 0, got 0"),
        ({"temperature": 0}, "temperature must be a number > 0, got 0"),
        ({"group_by": "layer"}, "group_by must be one of block, module, got 'layer'"),
        ({"fidelity": "on"}, "fidelity must be one of truncation, previous, off, got 'on'"),
        ({"growth": "new"}, "growth must be one of current, own, got 'new'"),
        ({"contribution": "loss"}, "contribution must be one of norm, fisher, got 'loss'"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
    ],
)
def test_configuration_errors(fields, text):
    with pytest.raises(ValueError, match=f"LaLoRAConfig: {text}"):
        adaptlora.LaLoRAConfig(target_modules="all-linear", **fields)


# Files and resuming


@pytest.mark.parametrize("contribution", ["norm", "fisher"])
@pytest.mark.parametrize("order", ["track first", "load first"])
def test_resuming_is_exact(contribution, order):
    """From the two state dicts, through JSON for the method's own: the same bits as a run that was not interrupted."""
    fields = {"gamma": 2.0, "contribution": contribution, "fidelity": "previous", "interval": 2, "temperature": 0.1}
    adapter, optimizer = make(**fields)
    for t in range(7):
        train_step(adapter, optimizer, seed=t)
    assert 2 < sum(adapter.ranks().values()) < 2 * R
    state = copy.deepcopy(adapter.state_dict())
    state["method"] = json.loads(json.dumps(state["method"]))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = adaptlora.attach(Net(torch.float64), adapter.config)
    if order == "load first":
        resumed.load_state_dict(state)
    other = torch.optim.AdamW(resumed.parameters(), lr=0.01)
    resumed.track(other)
    if order == "track first":
        resumed.load_state_dict(state)
    other.load_state_dict(saved)
    for t in range(7, 16):
        train_step(adapter, optimizer, seed=t)
        train_step(resumed, other, seed=t)
        assert resumed.ranks() == adapter.ranks()
    assert resumed.method.state_dict() == adapter.method.state_dict() and resumed.method.history()["changes"]
    for (A, B), (C, D) in zip(
        *([layer.pair.whole() for layer in each.layers.values()] for each in (adapter, resumed)), strict=True
    ):
        assert torch.equal(A, C) and torch.equal(B, D)


def test_a_saved_adapter_is_a_peft_adapter_of_todays_ranks(tmp_path):
    from peft import PeftModel

    adapter = adaptlora.attach(
        tiny_bert(), adaptlora.LaLoRAConfig(r=6, lora_alpha=12, target_modules="all-linear", gamma=6.0)
    )
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    adapter.track(optimizer)
    for t in range(5):
        adapter.model(**bert_batch(seed=t)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
    assert len(set(adapter.ranks().values())) > 1
    adapter.save(tmp_path)
    logits = adapter.model(**bert_batch()).logits
    reloaded = PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    torch.testing.assert_close(reloaded(**bert_batch()).logits, logits, rtol=1e-5, atol=1e-6)
    ours = adaptlora.load(tiny_bert(), tmp_path)
    assert ours.ranks() == adapter.ranks()
    history = json.loads((tmp_path / "rank_history.json").read_text())
    assert history["groups"]["bert.pooler.dense"] == ["bert.pooler.dense"] and history["steps"] == 5
    ranks = list(history["start"])
    for _, group, rank in history["changes"]:
        ranks[group] = rank
    assert ranks == adapter.method.group_ranks
    ours.save(tmp_path)
    assert not (tmp_path / "rank_history.json").exists()


def test_a_file_whose_groups_differ_within_is_refused(tmp_path):
    source = adaptlora.attach(
        tiny_bert(), adaptlora.LoraConfig(r=4, target_modules="all-linear", rank_pattern={"layer.0.output.dense": 2})
    )
    source.save(tmp_path)
    adapter = adaptlora.attach(tiny_bert(), adaptlora.LaLoRAConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match="modules of one group must have the same rank; bert.encoder.layer.0 has 4"):
        adapter.load(tmp_path)
    assert set(adapter.ranks().values()) == {1}
    by_module = adaptlora.LaLoRAConfig(r=4, target_modules="all-linear", group_by="module")
    adapter = adaptlora.attach(tiny_bert(), by_module)
    adapter.load(tmp_path)
    assert adapter.method.budget == 4 * 12 + 2 and adapter.ranks() == source.ranks()
