"""AdaLoraLinear and its TripletPair: results against float64, a third factor that follows ranks, and what goes with it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import Net
from numerics import assert_all_accurate
from torch import nn

import adaptlora
from adaptlora.nn import AdaLoraLinear, LoraGroup, dequantised_weight
from adaptlora.ops._dropout import dropout_keep_ref
from adaptlora.triplets import TripletPair

K, N, R, SCALING = 37, 29, 5, 1.7


def layer_of(dtype=torch.float32, base=None, r=R, **options):
    torch.manual_seed(0)
    layer = AdaLoraLinear(nn.Linear(K, N).to(dtype) if base is None else base, r, scaling=SCALING, **options)
    for factor in layer.pair.factors().values():
        nn.init.normal_(factor, std=0.3)
    return layer


def written_out(layer, x, p=0.0, seed=None):
    """PEFT's forward, in the dtype of x."""
    lora_A, lora_B, lora_E = (getattr(layer, f).to(x.dtype) for f in ("lora_A", "lora_B", "lora_E"))
    dropped = x
    if p:
        keep = dropout_keep_ref(torch.tensor(seed), x.shape[:-1].numel(), K, p).reshape(x.shape)
        dropped = torch.where(keep, x / (1 - p), 0)
    y = F.linear(x, dequantised_weight(layer.base_layer).to(x.dtype), layer.bias.to(x.dtype))
    return y + SCALING * (dropped @ (lora_A * lora_E).T @ lora_B.T)


def results(layer, function, x, dy):
    x = x.detach().clone().requires_grad_()
    y = function(x)
    wanted = {"dx": x, **{f"d{f[-1]}": getattr(layer, f) for f in ("lora_A", "lora_B", "lora_E")}}
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy), strict=True))}


def assert_right(layer, p=0.0):
    x, dy = torch.randn(3, 7, K).to(layer.bias.dtype), torch.randn(3, 7, N).to(layer.bias.dtype)
    seed = None
    if p:
        with torch.random.fork_rng():
            seed = torch.randint(2**63 - 1, ()).item()
    ours = results(layer, layer, x, dy)
    exact = results(layer, lambda x: written_out(layer, x, p, seed), x.double(), dy.double())
    eager = results(layer, lambda x: written_out(layer, x, p, seed), x, dy)
    assert_all_accurate(ours, {name: value.double() for name, value in exact.items()}, eager)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_y_and_gradients(backend, dtype, p):
    assert_right(layer_of(dtype, dropout_p=p), p)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_rank_changes(backend, rank):
    layer = layer_of()
    layer.pair.plan(rank, order=[4, 2, 0, 1, 3], compact=True).commit()
    assert layer.lora_E.shape == (rank, 1)
    assert_right(layer)


def test_a_quantised_base(backend):
    from test_quantised_bases import torchao_int8

    layer = AdaLoraLinear(torchao_int8(nn.Linear(64, 32))[0], 4, scaling=SCALING)
    nn.init.normal_(layer.lora_E)
    x = torch.randn(9, 64)
    lora_A, lora_B = layer.effective_factors()
    exact = F.linear(x.double(), dequantised_weight(layer.base_layer).double(), layer.bias.double())
    exact += SCALING * (x.double() @ lora_A.double().t() @ lora_B.double().t())
    theirs = layer.base_layer(x) + SCALING * (x @ lora_A.t() @ lora_B.t())
    assert_all_accurate({"y": layer(x).detach()}, {"y": exact}, {"y": theirs.detach()})


def test_start():
    """PEFT's: N(0, 0.02²) and E = 0, drawn by the configuration's seed alone."""
    config = adaptlora.AdaLoRAConfig(init_r=100, target_r=8, total_step=9, target_modules=["first", "second"])
    one, two = (adaptlora.attach(Net(torch.float64), config) for _ in range(2))
    for layer, other in zip(one.layers.values(), two.layers.values(), strict=True):
        assert not layer.lora_E.any() and layer.rank == 100
        for factor in (layer.lora_A, layer.lora_B):
            assert abs(factor.std().item() / 0.02 - 1) < 0.1 and abs(factor.mean().item()) < 0.002
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters(), strict=True))
    x = torch.randn(5, 13, dtype=torch.float64)
    assert torch.equal(one.model(x), Net(torch.float64)(x))
    assert (
        adaptlora.trained_parameters(Net(), config) == sum(p.numel() for p in one.parameters()) == 100 * (30 + 28 + 2)
    )


def test_merge_and_unmerge_and_detach():
    config = adaptlora.AdaLoRAConfig(init_r=4, target_r=2, total_step=9, target_modules=["first", "second"])
    model = Net(torch.float64)
    adapter, x = adaptlora.attach(model, config), torch.randn(5, 13, dtype=torch.float64)
    plain = model(x)
    for layer in adapter.layers.values():
        nn.init.normal_(layer.lora_E)
    adapted = model(x)
    assert (adapted - plain).norm() > 1e-5
    torch.testing.assert_close(adapter.merge()(x), adapted, rtol=1e-13, atol=1e-13)
    assert torch.equal(adapter.unmerge()(x), adapted)
    assert torch.equal(adapter.detach()(x), plain)


def test_it_is_no_lora_linear_of_a_group():
    with pytest.raises(TypeError, match="layer 0 must be a LoraLinear, got AdaLoraLinear"):
        LoraGroup([layer_of()])


# The pair


def read_pair(r=4):
    pair = TripletPair(5, 3, r, dtype=torch.float64)
    for factor in pair.parameters():
        for tensor in pair.sensitivity.of(factor).values():
            tensor.copy_(torch.randn_like(tensor))
    return pair


def test_vectors_grow_as_they_began():
    """New triplets change nothing: their E is zero, and so is what was read of them."""
    pair = read_pair(2)
    before, read = pair.factors(), {key: rows.clone() for key, rows in pair.statistics().items()}
    before = {name: values.clone() for name, values in before.items()}
    pair.grow(4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pair.lora_A[:2], before["lora_A"]) and torch.equal(pair.lora_B[:, :2], before["lora_B"])
    assert torch.equal(pair.lora_E[:2], before["lora_E"]) and not pair.lora_E[2:].any()
    assert 0 < pair.lora_A[2:].std() < 0.1 and 0 < pair.lora_B[:, 2:].std() < 0.1
    for key, rows in pair.statistics().items():
        assert torch.equal(rows[:2], read[key]) and not rows[2:].any()


def test_what_was_read_goes_where_the_pair_goes():
    pair = read_pair()
    copies = [copy.deepcopy(pair), TripletPair(5, 3, 4, dtype=torch.float64), TripletPair(5, 3, 2, dtype=torch.float64)]
    for other in copies[1:]:
        other.load_state_dict(pair.state_dict())
    for other in copies:
        assert_same(other.statistics(), pair.statistics())
        pair.sensitivity.of(pair.lora_A)["mean"].add_(1)
        assert not torch.equal(other.statistics()["lora_A.mean"], pair.statistics()["lora_A.mean"])
        pair.sensitivity.of(pair.lora_A)["mean"].sub_(1).copy_(other.sensitivity.of(other.lora_A)["mean"])
        # and follows the ranks there, in an order
        other.plan(2, order=[3, 1, 0, 2], compact=True).commit()
        assert_same(other.statistics(), {key: rows[[3, 1]] for key, rows in pair.statistics().items()})
    pair.float()
    assert all(rows.dtype == torch.float32 for rows in pair.statistics().values())
    pair.plan(1, compact=True).commit()
    assert all(len(rows) == 1 for rows in pair.statistics().values())


def assert_same(found, expected):
    assert found.keys() == expected.keys() and found
    assert all(torch.equal(found[key], rows) for key, rows in expected.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_A.mean": None}, "keys must be mean and uncertainty of factors, got .*'lora_A.uncertainty'"),
        ({"lora_C.mean": torch.zeros(4, 1)}, "keys must be mean and uncertainty of factors, got .*'lora_C.mean'"),
        ({"lora_B.mean": torch.zeros(3, 4)}, r"lora_B.mean must have shape \(4, 3\), got \(3, 4\)"),
        ({"lora_E.uncertainty": torch.zeros(4)}, r"lora_E.uncertainty must have shape \(4, 1\), got \(4,\)"),
    ],
)
def test_statistics_that_do_not_fit(change, message):
    pair = read_pair()
    given = {key: rows for key, rows in (pair.statistics() | change).items() if rows is not None}
    before = {key: rows.clone() for key, rows in pair.statistics().items()}
    with pytest.raises(ValueError, match=message):
        pair.take_statistics(given)
    assert_same(pair.statistics(), before)
    state = pair.state_dict()
    state = {key: v for key, v in state.items() if "sensitivity" not in key}
    with pytest.raises(RuntimeError, match=message):
        pair.load_state_dict(state | {f"sensitivity.{key}": rows for key, rows in given.items()})
    with pytest.raises(ValueError, match=r"there must be none, got \['lora_A.mean'\]"):
        adaptlora.RankedPair(5, 3, 4).take_statistics({"lora_A.mean": torch.zeros(4, 5)})
