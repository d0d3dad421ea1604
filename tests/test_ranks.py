"""RankedPair: ranks change physically, the optimizer's state follows, parked vectors keep everything, errors change nothing."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import RowMeans
from test_pruning import clipped
from test_rank_gather import bits

from adaptlora import RankedPair, ranks
from adaptlora.ranks import FACTORS, commit_ranks

K, N = 7, 5
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


def make_pair(r=6, capacity=None, dtype=torch.float64, seed=0):
    pair = RankedPair(K, N, r, capacity=capacity, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    with torch.no_grad():
        for store in pair._stores.values():
            store.copy_(torch.randn(store.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=dtype))
    return pair


def make_trained(name="adamw", r=6, capacity=None, steps=2):
    pair = make_pair(r, capacity)
    optimizer = OPTIMIZERS[name](list(pair.parameters()))
    pair.track(optimizer)
    for _ in range(steps):
        train_step(pair, optimizer)
    return pair, optimizer


def train_step(pair, optimizer):
    (pair.lora_B @ pair.lora_A).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def rows(name, tensor):
    return tensor if name == "lora_A" else tensor.t()


def snapshot(pair, optimizer=None):
    """Every rank-shaped tensor as a rank-major copy."""
    found = {}
    for name in FACTORS:
        parameter = getattr(pair, name)
        found[name, "data"] = rows(name, parameter.detach()).clone()
        if parameter.grad is not None:
            found[name, "grad"] = rows(name, parameter.grad).clone()
        for key, value in (optimizer.state.get(parameter, {}) if optimizer else {}).items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                found[name, key] = rows(name, value).clone()
    return found


def assert_rows_equal(found, expected, index):
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key][index]), key


def test_memory_is_rank_major():
    pair = make_pair()
    assert pair.lora_A.shape == (6, K) and pair.lora_A.is_contiguous()
    assert pair.lora_B.shape == (N, 6) and pair.lora_B.t().is_contiguous()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_narrow_keeps_the_prefix_bit_for_bit(name, rank):
    pair, optimizer = make_trained(name)
    before = snapshot(pair, optimizer)
    parameters = list(pair.parameters())
    pair.narrow(rank)
    assert pair.rank == rank and pair.capacity == 6
    assert all(old is new for old, new in zip(parameters, pair.parameters(), strict=True))
    assert_rows_equal(snapshot(pair, optimizer), before, slice(rank))
    train_step(pair, optimizer)


def test_narrow_and_grow_copy_nothing():
    pair, optimizer = make_trained()
    addresses = {id(p): p.data_ptr() for p in pair.parameters()}
    state = {id(p): optimizer.state[p]["exp_avg"].data_ptr() for p in pair.parameters()}
    for rank in (3, 1, 5, 6):
        pair.plan(rank).commit()
        assert {id(p): p.data_ptr() for p in pair.parameters()} == addresses
        assert {id(p): optimizer.state[p]["exp_avg"].data_ptr() for p in pair.parameters()} == state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parked_vectors_keep_values_and_state_and_take_no_step(name):
    pair, optimizer = make_trained(name)
    before = snapshot(pair, optimizer)
    pair.narrow(2)
    for _ in range(3):
        train_step(pair, optimizer)
    active = snapshot(pair, optimizer)
    pair.grow(6)
    after = snapshot(pair, optimizer)
    assert_rows_equal({key: value[2:] for key, value in after.items()}, before, slice(2, None))
    assert_rows_equal({key: value[:2] for key, value in after.items()}, active, slice(None))
    if name != "sgd":
        assert not torch.equal(after["lora_A", "data"][:2], before["lora_A", "data"][:2])


def test_training_narrowed_equals_training_a_smaller_pair():
    pair, optimizer = make_trained(steps=0)
    pair.narrow(3)
    small = RankedPair(K, N, 3, dtype=torch.float64)
    with torch.no_grad():
        small.lora_A.copy_(pair.lora_A)
        small.lora_B.copy_(pair.lora_B)
    other = OPTIMIZERS["adamw"](list(small.parameters()))
    for _ in range(4):
        train_step(pair, optimizer)
        train_step(small, other)
    assert torch.equal(pair.lora_A, small.lora_A) and torch.equal(pair.lora_B, small.lora_B)


def test_grow_beyond_the_capacity_keeps_the_output():
    pair, optimizer = make_trained()
    before, product = snapshot(pair, optimizer), (pair.lora_B @ pair.lora_A).detach()
    pair.grow(9, generator=torch.Generator().manual_seed(3))
    after = snapshot(pair, optimizer)
    assert pair.rank == pair.capacity == 9
    assert_rows_equal({key: value[:6] for key, value in after.items()}, before, slice(None))
    assert torch.equal((pair.lora_B @ pair.lora_A).detach(), product)
    assert after["lora_A", "data"][6:].abs().min() > 0 and after["lora_A", "data"][6:].abs().max() <= K**-0.5
    assert not after["lora_B", "data"][6:].any() and not after["lora_A", "exp_avg"][6:].any()
    train_step(pair, optimizer)


def test_grow_from_state_allocated_at_a_lower_rank():
    pair, optimizer = make_trained(r=1, capacity=6)
    before = snapshot(pair, optimizer)
    pair.grow(4)
    after = snapshot(pair, optimizer)
    assert_rows_equal({key: value[:1] for key, value in after.items()}, before, slice(None))
    assert not after["lora_A", "exp_avg"][1:].any()
    train_step(pair, optimizer)


def test_permute_moves_factors_state_and_gradients_alike():
    pair, optimizer = make_trained()
    (pair.lora_B @ pair.lora_A).square().sum().backward()
    before = snapshot(pair, optimizer)
    order = [3, 0, 5, 1, 4, 2]
    pair.permute(order)
    assert ("lora_A", "grad") in before
    assert_rows_equal(snapshot(pair, optimizer), before, order)


def test_non_prefix_choice():
    pair, optimizer = make_trained()
    before = snapshot(pair, optimizer)
    pair.plan(2, order=[4, 1, 0, 2, 3, 5], compact=True).commit()
    assert_rows_equal(snapshot(pair, optimizer), before, [4, 1])


def test_compact_frees_factors_gradients_and_state():
    pair, optimizer = make_trained(r=8)
    (pair.lora_B @ pair.lora_A).square().sum().backward()
    held = pair.nbytes()
    before = snapshot(pair, optimizer)
    pair.narrow(2)
    assert pair.nbytes()["factors"] == held["factors"] and pair.nbytes()["optimizer"] == held["optimizer"]
    pair.compact()
    assert_rows_equal(snapshot(pair, optimizer), before, slice(2))
    assert {key: value * 4 for key, value in pair.nbytes().items()} == held
    assert pair.capacity == 2
    for parameter in pair.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes == parameter.grad.untyped_storage().nbytes()
    train_step(pair, optimizer)


def test_a_live_graph_of_the_last_step_does_not_break_the_next():
    pair, optimizer = make_trained()
    loss = (pair.lora_B @ pair.lora_A).square().sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    pair.narrow(3)
    next_loss = (pair.lora_B @ pair.lora_A).square().sum()
    next_loss.backward()
    assert pair.lora_A.grad.shape == (3, K) and loss.grad_fn is not None


def test_post_accumulate_hooks_survive():
    pair, _ = make_trained()
    seen = []
    pair.lora_A.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)))
    pair.narrow(2)
    (pair.lora_B @ pair.lora_A).sum().backward()
    assert seen == [(2, K)]


def test_gradients_follow():
    pair = make_pair()
    (pair.lora_B @ pair.lora_A).square().sum().backward()
    before = snapshot(pair)
    pair.narrow(4)
    assert_rows_equal(snapshot(pair), before, slice(4))
    pair.grow(6)
    assert not pair.lora_A.grad[4:].any() and torch.equal(pair.lora_A.grad[:4], before["lora_A", "grad"][:4])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda pair: pair.narrow(7), ValueError, "narrow: rank must be at most the active rank 6, got 7"),
        (lambda pair: pair.grow(5), ValueError, "grow: rank must be at least the active rank 6, got 5"),
        (lambda pair: pair.plan(-1), ValueError, "rank must be an integer ≥ 0, got -1"),
        (lambda pair: pair.plan(2.0), ValueError, "rank must be an integer ≥ 0, got 2.0"),
        (lambda pair: pair.permute([0, 0, 1, 2, 3, 4]), ValueError, r"order must be a permutation of range\(6\)"),
    ],
)
def test_bad_changes_change_nothing(change, error, text):
    pair, optimizer = make_trained()
    before = snapshot(pair, optimizer)
    with pytest.raises(error, match=text):
        change(pair)
    assert pair.rank == 6
    assert_rows_equal(snapshot(pair, optimizer), before, slice(None))


def test_construction_errors():
    with pytest.raises(ValueError, match="r must be ≥ 0, got -1"):
        RankedPair(K, N, -1)
    with pytest.raises(ValueError, match="capacity must be at least r=4, got 3"):
        RankedPair(K, N, 4, capacity=3)


def test_an_optimizer_that_cannot_follow_is_refused_for_all_modules():
    pairs = {"first": make_pair(), "second": make_pair()}
    good = OPTIMIZERS["adamw"](list(pairs["first"].parameters()))
    bad = RowMeans(pairs["second"].parameters(), lr=0.1)
    pairs["first"].track(good)
    pairs["second"].track(bad)
    train_step(pairs["first"], good)
    train_step(pairs["second"], bad)
    before = snapshot(pairs["first"], good)
    with pytest.raises(
        TypeError, match="second: rank change: optimizer state must be shaped like its parameter.*RowMeans"
    ):
        commit_ranks(pairs, {"first": 2, "second": 2})
    assert [pair.rank for pair in pairs.values()] == [6, 6]
    assert_rows_equal(snapshot(pairs["first"], good), before, slice(None))


def test_running_out_of_memory_while_planning_changes_nothing(monkeypatch):
    pairs = {"first": make_pair(), "second": make_pair()}
    before = {name: snapshot(pair) for name, pair in pairs.items()}
    plan = RankedPair.plan

    def fail_on_second(self, *args, **kwargs):
        if self is pairs["second"]:
            raise RuntimeError("out of memory")
        return plan(self, *args, **kwargs)

    monkeypatch.setattr(RankedPair, "plan", fail_on_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        commit_ranks(pairs, {"first": 2, "second": 2}, compact=True)
    for name, pair in pairs.items():
        assert_rows_equal(snapshot(pair), before[name], slice(None))


@pytest.fixture
def gathers(monkeypatch):
    """How many tensors each gather moved; `fail_on` a device makes its call run out of memory."""

    class Calls(list):
        fail_on = None

    calls, gather_rows = Calls(), ranks.gather_rows

    def counted(sources, rows):
        calls.append(len(sources))
        if sources[0].device.type == calls.fail_on:
            raise RuntimeError("out of memory")
        return gather_rows(sources, rows)

    monkeypatch.setattr(ranks, "gather_rows", counted)
    return calls


def make_model(dtypes=(torch.float64, torch.float32, torch.bfloat16)):
    """Pairs of several dtypes, each with gradients and an optimizer of its own."""
    pairs, optimizers = {}, {}
    for name, dtype in zip(("adamw", "adam-amsgrad", "sgd-momentum"), dtypes, strict=True):
        pairs[name] = make_pair(dtype=dtype)
        optimizers[name] = OPTIMIZERS[name](list(pairs[name].parameters()))
        pairs[name].track(optimizers[name])
        train_step(pairs[name], optimizers[name])
        (pairs[name].lora_B @ pairs[name].lora_A).square().sum().backward()
    return pairs, optimizers


def assert_bits_equal(found, expected, index):
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(bits(value), bits(expected[key][index])), key


@pytest.mark.parametrize("compact", [True, False])
def test_all_modules_and_states_move_by_one_gather(gathers, compact):
    pairs, optimizers = make_model()
    before = {name: snapshot(pair, optimizers[name]) for name, pair in pairs.items()}
    wanted = dict(zip(pairs, (2, 0, 5), strict=True))
    commit_ranks(pairs, wanted, compact=compact)
    # Two factors and two gradients each; of AdamW two states, of AMSGrad three, of momentum one for each factor.
    assert gathers == [12 + 2 * 6 if compact else 6]
    for name, pair in pairs.items():
        assert pair.rank == wanted[name] and pair.capacity == (wanted[name] if compact else 6)
        assert_bits_equal(snapshot(pair, optimizers[name]), before[name], slice(wanted[name]))
        train_step(pair, optimizers[name])


def test_growth_beyond_the_capacity_moves_by_one_gather(gathers):
    pairs, optimizers = make_model()
    before = {name: snapshot(pair, optimizers[name]) for name, pair in pairs.items()}
    commit_ranks(pairs, dict.fromkeys(pairs, 9), generator=torch.Generator().manual_seed(1))
    assert len(gathers) == 1
    generator = torch.Generator().manual_seed(1)
    for name, pair in pairs.items():
        after = snapshot(pair, optimizers[name])
        assert_bits_equal({key: value[:6] for key, value in after.items()}, before[name], slice(None))
        drawn = torch.empty(3, K).uniform_(-(K**-0.5), K**-0.5, generator=generator)
        assert torch.equal(after.pop(("lora_A", "data"))[6:], drawn.to(pair.lora_A.dtype))
        assert not any(value[6:].any() for value in after.values())


def test_permuting_moves_every_store_by_one_gather(gathers):
    pair, optimizer = make_trained()
    pair.narrow(4)
    before = snapshot(pair, optimizer)
    assert gathers == []
    pair.permute([2, 3, 1, 0])
    assert gathers == [6]
    assert_bits_equal(snapshot(pair, optimizer), before, [2, 3, 1, 0])
    pair.permute(range(4))
    pair.grow(6)
    pair.narrow(6)
    assert gathers == [6]


def test_a_clip_of_a_whole_model_is_one_gather(gathers):
    _, adapter, optimizer = clipped(target_r=3)
    # Two modules: two factors, their gradients, and two states of AdamW for each factor.
    assert gathers == [2 * 2 * (2 + 2)]
    assert sum(adapter.ranks().values()) == 6
    optimizer.step()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_running_out_of_memory_while_moving_changes_nothing(gathers, device):
    pairs, optimizers = make_model()
    meta = RankedPair(K, N, 6, device="meta")
    before = {name: snapshot(pair, optimizers[name]) for name, pair in pairs.items()}
    addresses = [p.data_ptr() for pair in pairs.values() for p in pair.parameters()]
    gathers.fail_on = device
    order = [5, 4, 3, 2, 1, 0]
    plans = [pair.plan(2, order=order, compact=True) for pair in (*pairs.values(), meta)]
    with pytest.raises(RuntimeError, match="out of memory"):
        commit_ranks({**pairs, "meta": meta}, dict.fromkeys((*pairs, "meta"), 2), compact=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        ranks._commit(plans)
    assert [pair.rank for pair in (*pairs.values(), meta)] == [6] * 4
    assert [p.data_ptr() for pair in pairs.values() for p in pair.parameters()] == addresses
    for name, pair in pairs.items():
        assert_bits_equal(snapshot(pair, optimizers[name]), before[name], slice(None))
    gathers.fail_on = None
    for plan in plans:
        plan.commit()
    assert [pair.rank for pair in (*pairs.values(), meta)] == [2] * 4
    for name, pair in pairs.items():
        assert_bits_equal(snapshot(pair, optimizers[name]), before[name], order[:2])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_are_independent_and_keep_parked_rows(clone):
    pair, _ = make_trained()
    full = snapshot(pair)
    pair.narrow(2)
    twin = clone(pair)
    assert twin.rank == 2 and twin.optimizers == [] and twin.lora_B.t().is_contiguous()
    with torch.no_grad():
        pair.lora_A.zero_()
    twin.grow(6)
    assert_rows_equal(snapshot(twin), full, slice(None))


def test_moving_the_module_takes_the_parked_rows_along():
    pair = make_pair()
    full = snapshot(pair)
    pair.narrow(2)
    pair.to(torch.float32)
    assert pair.lora_A.dtype == torch.float32
    pair.grow(6)
    for name in FACTORS:
        assert torch.equal(rows(name, getattr(pair, name).detach()), full[name, "data"].float())


def test_assigned_parameters_are_noticed():
    pair = make_pair()
    pair.narrow(2)
    state = {name: torch.randn(value.shape, dtype=value.dtype) for name, value in pair.state_dict().items()}
    pair.load_state_dict(state, assign=True)
    pair.grow(6)
    assert torch.equal(pair.lora_A[:2], state["lora_A"]) and torch.equal(pair.lora_B[:, :2], state["lora_B"])
    assert torch.equal(pair.lora_A[2:], state["parked.lora_A"])
    assert torch.equal(pair.lora_B.t()[2:], state["parked.lora_B"])


def test_a_state_dict_takes_parked_rows_and_their_state_along():
    """What was parked comes back bit for bit, whether the optimizer is tracked before the state is loaded or after it."""
    pair, optimizer = make_trained()
    pair.narrow(2)
    train_step(pair, optimizer)
    state, saved = copy.deepcopy(pair.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert {"parked.lora_A", "parked.lora_B.exp_avg", "parked.lora_A.exp_avg_sq"} <= state.keys()
    pair.grow(5)
    expected = snapshot(pair, optimizer)
    for track_first in (True, False):
        other = make_pair(2, seed=9)
        resumed = OPTIMIZERS["adamw"](list(other.parameters()))
        if track_first:
            other.track(resumed)
        other.load_state_dict(copy.deepcopy(state))
        resumed.load_state_dict(copy.deepcopy(saved))
        if not track_first:
            assert other.state_dict().keys() == state.keys()
            other.track(resumed)
        assert other.rank == 2 and other.capacity == 6
        other.grow(5)
        assert_rows_equal(snapshot(other, resumed), expected, slice(None))
        train_step(other, resumed)


@pytest.mark.parametrize(("born", "known"), [(4, 4), (1, 2), (2, 2)])
def test_parked_state_keeps_its_place_when_ranks_change_before_the_optimizer_has_any(born, known):
    pair, optimizer = make_trained()
    pair.narrow(2)
    state = copy.deepcopy(pair.state_dict())
    twin = make_pair(2, seed=9)
    twin.load_state_dict(state)
    twin.plan(born).commit()
    other = OPTIMIZERS["adamw"](list(twin.parameters()))
    twin.track(other)
    train_step(twin, other)
    twin.grow(6)
    pair.grow(6)
    found, expected = snapshot(twin, other), snapshot(pair, optimizer)
    for key in expected.keys() - {(name, "data") for name in FACTORS}:
        assert torch.equal(found[key][known:], expected[key][known:]) and not found[key][born:known].any()


def test_a_state_dict_without_parked_rows_leaves_none():
    pair = make_pair()
    pair.narrow(2)
    state = {name: value for name, value in pair.state_dict().items() if not name.startswith("parked.")}
    pair.load_state_dict(state)
    assert pair.rank == pair.capacity == 2


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda parked: parked.pop("lora_B"), "must hold lora_A and lora_B, got .'lora_A', 'lora_A.exp_avg'"),
        (lambda parked: parked.update(lora_B=torch.zeros(3, N)), r"of lora_B must have shape \(4, 5\), got \(3, 5\)"),
        (lambda parked: parked.update(other=torch.zeros(4, N)), r"of other must have shape None, got \(4, 5\)"),
    ],
)
def test_parked_rows_that_do_not_fit_change_nothing(spoil, text):
    pair, _ = make_trained()
    pair.narrow(2)
    before, parked = pair.parked(), pair.parked()
    spoil(parked)
    with pytest.raises(ValueError, match=text):
        pair.park(parked)
    assert all(torch.equal(rows, before[key]) for key, rows in pair.parked().items())


def test_state_grows_to_the_capacity_at_once():
    """An optimizer makes state for the active rows alone; the first step up gives it room, and later ones move nothing."""
    pair = make_pair(1, capacity=6)
    optimizer = torch.optim.AdamW(pair.parameters(), lr=0.1)
    pair.track(optimizer)
    train_step(pair, optimizer)
    first = snapshot(pair, optimizer)
    pair.grow(2)
    addresses = [optimizer.state[p][key].data_ptr() for p in pair.parameters() for key in ("exp_avg", "exp_avg_sq")]
    assert_rows_equal({key: value[:1] for key, value in snapshot(pair, optimizer).items()}, first, slice(None))
    train_step(pair, optimizer)
    for rank in (3, 6, 1, 4):
        pair.plan(rank).commit()
        found = [optimizer.state[p][key].data_ptr() for p in pair.parameters() for key in ("exp_avg", "exp_avg_sq")]
        assert found == addresses


@pytest.mark.parametrize("rank", [0, 2, 9])
def test_state_dict_of_another_rank_loads(rank):
    source, target = make_pair(rank, seed=5), make_pair(6)
    target.load_state_dict(source.state_dict())
    assert (
        target.rank == rank and torch.equal(target.lora_A, source.lora_A) and torch.equal(target.lora_B, source.lora_B)
    )


@settings(deadline=None, max_examples=40)
@given(
    capacity=st.integers(1, 9),
    changes=st.lists(
        st.tuples(st.sampled_from(["rank", "permute", "compact", "step"]), st.integers(0, 12)), max_size=12
    ),
)
def test_any_sequence_of_changes_matches_a_model_of_rows(capacity, changes):
    """Against a plain list of rows: the first `rank` active, the rest parked."""
    pair, optimizer = make_trained(r=capacity, steps=1)
    store = snapshot(pair, optimizer)
    for kind, number in changes:
        rank = pair.rank
        if kind == "step":
            train_step(pair, optimizer)
            active = snapshot(pair, optimizer)
            store = {key: torch.cat([active[key], value[rank:]]) for key, value in store.items()}
        elif kind == "permute":
            order = torch.randperm(rank, generator=torch.Generator().manual_seed(number)).tolist()
            pair.permute(order)
            store = {key: torch.cat([value[order], value[rank:]]) for key, value in store.items()}
        elif kind == "compact":
            pair.compact()
            store = {key: value[:rank] for key, value in store.items()}
        else:
            pair.plan(number).commit()
            added = max(0, number - len(store["lora_A", "data"]))
            store = {key: torch.cat([value, value.new_zeros(added, value.shape[1])]) for key, value in store.items()}
            if added:
                store["lora_A", "data"][-added:] = pair.lora_A.detach()[-added:]
        assert pair.capacity == len(store["lora_A", "data"])
        assert_rows_equal(snapshot(pair, optimizer), store, slice(pair.rank))
