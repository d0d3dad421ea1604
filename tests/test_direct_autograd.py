"""The graph nodes of calls that go straight to C++: derivatives, checkpoints, hooks, threads, and upstream gradients of every kind."""

import contextlib
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.utils.flop_counter
from numerics import laid_out
from test_direct import ALL, Counted, assert_same_both_ways, gradients, negated, watched
from test_lora_group import QKV, group, samples_of
from test_lora_group import call as call_group
from test_lora_group import results as group_results
from test_lora_linear import SEED, Case, assert_same, call, leaves, take_grads
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from adaptlora.ops import lora_group, rank_norms

pytest.importorskip("adaptlora._C", reason="the C++ extension is not built: no direct calls")


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("ADAPTLORA_BACKEND", raising=False)


@pytest.mark.parametrize("wanted", ALL)
def test_second_derivative_is_refused(wanted):
    sample = leaves(Case())
    sample["dy"].requires_grad_()
    with watched() as took:
        y = call(sample, dropout_p=0.3)
    assert took == [True]
    (grad,) = torch.autograd.grad(y, sample[wanted], sample["dy"], create_graph=True)
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()


def loss_with_a_gradient(kind: str):
    """(a loss in which a first derivative stands beside what it was taken of, an operand of both)"""
    if kind == "norms":
        lora_A, lora_B = torch.randn(3, 4, requires_grad=True), torch.randn(5, 3, requires_grad=True)
        (norms,), _ = rank_norms([lora_A], [lora_B])
        (grad,) = torch.autograd.grad(norms.tanh().sum(), lora_A, create_graph=True)
        return norms.sum() + grad.pow(2).sum(), lora_A
    sample = leaves(Case())
    y = call(sample)
    (grad,) = torch.autograd.grad(y.tanh().sum(), sample["x"], create_graph=True)
    return y.sum() + grad.pow(2).sum(), sample["lora_A"]


@pytest.mark.parametrize("kind", ["layer", "norms"])
@pytest.mark.parametrize("ask", [torch.autograd.grad, lambda loss, operand: loss.backward(inputs=[operand])])
def test_second_derivative_is_refused_beside_a_first(kind, ask):
    """Asked for one operand alone, autograd visits only nodes on a path to it: the refusal must lie on that path."""
    loss, operand = loss_with_a_gradient(kind)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        ask(loss, operand)


def test_hessian_is_refused():
    sample = Case().sample()
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.autograd.functional.hessian(lambda A: call({**sample, "lora_A": A}).pow(2).sum(), sample["lora_A"])


def test_second_derivative_of_the_norms_is_refused():
    lora_A, lora_B = torch.randn(3, 4, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    with watched() as took:
        (norms_A,), (norms_B,) = rank_norms([lora_A], [lora_B])
    assert took == [True]
    for grad in torch.autograd.grad((norms_A * norms_B).sum(), [lora_A, lora_B], create_graph=True):
        with pytest.raises(RuntimeError, match="adaptlora::rank_scale: second derivatives are not implemented"):
            grad.sum().backward(retain_graph=True)


def test_create_graph_gives_the_same_gradients():
    sample = leaves(Case())
    y = call(sample, dropout_p=0.3)
    inputs = [sample[name] for name in ALL]
    without, with_graph = (
        torch.autograd.grad(y, inputs, sample["dy"], retain_graph=True, create_graph=create) for create in (False, True)
    )
    assert all(map(torch.equal, without, with_graph))
    assert not any(grad.requires_grad for grad in without)


def test_backward_twice():
    sample = leaves(Case())
    y = call(sample, dropout_p=0.3)
    y.backward(sample["dy"], retain_graph=True)
    first = take_grads(sample)
    y.backward(sample["dy"])
    assert_same(first, take_grads(sample))
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        y.backward(sample["dy"])


def test_gradients_accumulate():
    sample = leaves(Case())
    once = gradients(sample, dropout_p=0.3, seed=1), gradients(sample, dropout_p=0.3, seed=2)
    for seed in (1, 2):
        call(sample, dropout_p=0.3, seed=seed).backward(sample["dy"])
    assert_same({name: sample[name].grad for name in ALL}, {name: once[0][name] + once[1][name] for name in ALL})


def test_outputs_may_be_changed_in_place():
    """Nothing of them is saved."""
    sample, samples = leaves(Case(batch=(2, 9))), samples_of(group(*QKV))
    expected = (call(sample) * 2).detach()
    y = call(sample).mul_(2)
    assert torch.equal(y, expected)
    y.backward(sample["dy"] / 2)
    assert_same(
        take_grads(sample), {f"d{n}": g for n, g in zip("xABE", list(gradients(sample).values())[1:], strict=True)}
    )
    for sample in samples:
        sample["lora_A"].requires_grad_()
    ys = call_group(samples)
    assert all(y.relu_().requires_grad for y in ys)
    sum(y.sum() for y in ys).backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    sample, samples = Case().sample(), samples_of(group(*QKV))

    def run():
        given = {name: t.detach().requires_grad_(name in ALL) for name, t in sample.items()}
        y, *ys = checkpoint(
            lambda x: (
                call({**given, "x": x}, dropout_p=0.3),
                *call_group([{**s, "x": x} for s in samples], dropout_p=0.3),
            ),
            given["x"],
            use_reentrant=reentrant,
        )
        torch.randn(5)  # moves the generator between forward and backward
        torch.autograd.backward([y, *ys], [sample["dy"], *(s["dy"] for s in samples)])
        return {"y": y.detach(), **take_grads(given)}

    with_checkpoint = assert_same_both_ways(run, calls=4)
    torch.manual_seed(7)
    given = {name: t.detach().requires_grad_(name in ALL) for name, t in sample.items()}
    y, *ys = call(given, dropout_p=0.3), *call_group([{**s, "x": given["x"]} for s in samples], dropout_p=0.3)
    torch.autograd.backward([y, *ys], [sample["dy"], *(s["dy"] for s in samples)])
    assert_same(with_checkpoint, {"y": y.detach(), **take_grads(given)})


@pytest.mark.parametrize("around", ["forward", "backward"])
def test_checkpoint_recomputes_on_the_other_path(around):
    """A mode around one of the two alone: what is saved directly and through the dispatcher must be the same, in one order."""
    mode = torch.utils.flop_counter.FlopCounterMode(display=False)
    sample, samples = leaves(Case()), samples_of(group(*QKV))
    options, group_options = {"dropout_p": 0.3, "seed": SEED}, {"dropout_p": 0.3, "seeds": [1, 2, 3]}

    def run(x):
        return call({**sample, "x": x}, **options), *call_group([{**s, "x": x} for s in samples], **group_options)

    dys = [sample["dy"], *(s["dy"] for s in samples)]
    torch.autograd.backward(run(sample["x"]), dys)
    expected = take_grads(sample)
    with mode if around == "forward" else contextlib.nullcontext():
        ys = checkpoint(run, sample["x"], use_reentrant=False)
    with mode if around == "backward" else contextlib.nullcontext():
        torch.autograd.backward(ys, dys)
    found = take_grads(sample)
    torch.testing.assert_close(found.pop("dx"), expected.pop("dx"))  # the dispatcher sums the modules' in another order
    assert_same(found, expected)


def test_profiler_sees_the_ops():
    sample = leaves(Case())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(sample, dropout_p=0.3).backward(sample["dy"])
        rank_norms([sample["lora_A"]], [sample["lora_B"]])[0][0].sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert names >= {f"adaptlora::{op}" for op in ("lora_linear", "lora_linear_backward", "rank_norms", "rank_scale")}


def test_saved_tensors_hooks():
    sample = leaves(Case())
    expected = gradients(sample, dropout_p=0.3, seed=SEED)
    packed, unpacked = [], []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (packed.append(t.shape), t.clone())[1], lambda t: (unpacked.append(t.shape), t)[1]
    ):
        y = call(sample, dropout_p=0.3, seed=SEED)
    y.backward(sample["dy"])
    assert sorted(packed) == sorted(unpacked)
    assert packed == [(37, 63), (37, 13), (50, 63), (13, 63), (50, 13), (13,), ()]  # x, S, W, A, B, E, seed
    assert_same(expected, {"y": y.detach()} | {name: sample[name].grad for name in ALL})


def test_a_hook_that_raises():
    def pack(tensor):
        raise KeyError("from the hook")

    sample = leaves(Case())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), pytest.raises(KeyError, match="from the hook"):
        call(sample)
    assert call(sample).requires_grad


def test_hooks_of_parameters():
    sample = leaves(Case())
    fired = []
    sample["lora_A"].register_hook(lambda grad: 2 * grad)
    sample["lora_B"].register_post_accumulate_grad_hook(lambda parameter: fired.append(parameter.grad.clone()))
    call(sample, dropout_p=0.3, seed=1).backward(sample["dy"])
    expected = gradients(sample, dropout_p=0.3, seed=1)
    assert torch.equal(sample["lora_A"].grad, 2 * expected["lora_A"])
    assert len(fired) == 1 and torch.equal(fired[0], expected["lora_B"])


@pytest.mark.parametrize(
    "dy",
    [
        torch.ones(()).expand(3, 7, 50),
        torch.randn(50).expand(3, 7, 50),
        torch.randn(3, 1, 50).expand(3, 7, 50),
        torch.randn(50, 7, 3).permute(2, 1, 0),
        laid_out(torch.randn(3, 7, 50), "strided"),
    ],
    ids=["one number", "one row", "rows", "permuted", "strided"],
)
def test_upstream_gradients_of_any_strides(dy):
    sample = Case(batch=(3, 7)).sample() | {"dy": dy}
    out = assert_same_both_ways(lambda: gradients(sample, dropout_p=0.3))
    sample["dy"] = dy.contiguous()
    torch.manual_seed(7)
    for name, grad in gradients(sample, dropout_p=0.3).items():
        torch.testing.assert_close(out[name], grad, msg=name)


def test_threads():
    """Layers of two threads at once, drawing no seeds from the generator they share."""
    cases = [Case(batch=(64,), K=96, N=80, R=8), Case(batch=(3, 20), K=64, N=130, R=5)]
    samples = [case.sample() for case in cases]

    def steps(i: int) -> list[dict]:
        return [gradients(samples[i], dropout_p=0.3, seed=step) for step in range(25)]

    expected = [steps(i) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for out, right in zip(pool.map(steps, [0, 1] * 4), expected * 4, strict=True):
            for got, step in zip(out, right, strict=True):
                assert_same(got, step)


def test_threads_draw_different_seeds():
    sample = Case().sample()
    with ThreadPoolExecutor(2) as pool:
        ys = list(pool.map(lambda _: call(sample, dropout_p=0.5), range(40)))
    assert len({y.numpy().tobytes() for y in ys}) == 40


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
def test_anomaly_mode_names_the_node():
    sample = leaves(Case())
    with torch.autograd.detect_anomaly(check_nan=True), pytest.raises(RuntimeError, match="returned nan values"):
        call(sample).backward(torch.full_like(sample["dy"], math.nan))


@pytest.mark.parametrize("kind", ["negated", "zero", "subclass", "batched", "mode"])
def test_upstream_gradients_that_are_not_plain(kind):
    sample = Case().sample()
    dy, expected = sample["dy"], gradients(sample)
    if kind == "negated":
        assert_same(gradients(sample | {"dy": negated(dy)}), expected)
        return
    given = leaves(Case()) | sample
    wanted = [given[name].requires_grad_() for name in ALL]
    y = call(given)
    if kind == "zero":
        assert not any(g.any() for g in torch.autograd.grad(y, wanted, torch._efficientzerotensor(dy.shape)))
    elif kind == "subclass":
        grads = torch.autograd.grad(y, wanted, TwoTensor(dy, 2 * dy))
        assert all(torch.equal(g.a, expected[name]) for name, g in zip(ALL, grads, strict=True))
    elif kind == "batched":
        grads = torch.autograd.grad(y, wanted, torch.stack([dy, 2 * dy]), is_grads_batched=True)
        assert all(torch.equal(g[0], expected[name]) for name, g in zip(ALL, grads, strict=True))
    else:
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, Counted() as seen:
            torch.autograd.grad(y, wanted, dy)
        assert counter.get_total_flops() > 0
        assert any(name.startswith("adaptlora::lora_") for name in seen.names)


def test_upstream_gradients_of_a_group_that_are_not_plain():
    samples = samples_of(group(*QKV))
    expected = group_results(lora_group, samples, dropout_p=0.3, seeds=[1, 2, 3])
    samples[1]["dy"] = negated(samples[1]["dy"])
    with watched() as took:
        out = group_results(lora_group, samples, dropout_p=0.3, seeds=[1, 2, 3])
        torch.testing.assert_close(out.pop("dx"), expected.pop("dx"))  # may be summed in another order
        assert_same(out, expected)
        samples[1]["dy"] = torch._efficientzerotensor(samples[1]["dy"].shape)
        out = group_results(lora_group, samples, dropout_p=0.3, seeds=[1, 2, 3])
    assert took == [True, True]
    assert not out["dA1"].any() and torch.equal(out["dA0"], expected["dA0"])


def test_seeds_that_are_not_plain():
    sample = Case().sample()
    seed = torch._neg_view(torch.tensor(5))
    assert torch.equal(call(sample, dropout_p=0.3, seed=seed), call(sample, dropout_p=0.3, seed=-5))


@pytest.mark.parametrize("name", ["x", "weight", "bias", "lora_A", "lora_B", "rank_scale"])
def test_forward_derivatives_are_refused(name):
    sample = leaves(Case())
    with torch.autograd.forward_ad.dual_level():
        value = sample[name].detach()
        sample[name] = torch.autograd.forward_ad.make_dual(value, torch.ones_like(value))
        with watched() as took, pytest.raises(NotImplementedError, match="forward mode AD"):
            call(sample)
    assert True not in took
