"""rank_shrink_: the proximal step in place, exact zeros, what it must leave alone, and that autograd notices."""

import math

import pytest
import torch
from numerics import assert_accurate
from test_rank_norms import BAD_FACTORS, SHAPES, sample

from adaptlora.ops import lora_linear, rank_penalty, rank_shrink_, rank_shrink_ref
from adaptlora.ops.rank_penalty import PENALTIES

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def shrunk(lora_As, lora_Bs, step_A, step_B, kind):
    """v · max(0, 1 − step · w(r) / ‖v‖) vector by vector, in the dtype given."""

    def one(v, amount):
        norm = torch.linalg.vector_norm(v)
        return v * max(0, 1 - amount / norm) if norm else v

    new_As = [
        torch.stack([one(row, step_A * PENALTIES[kind](r)) for r, row in enumerate(A, start=1)]) if len(A) else A
        for A in lora_As
    ]
    new_Bs = [
        torch.stack([one(row, step_B * PENALTIES[kind](r)) for r, row in enumerate(B.t(), start=1)]).t()
        if B.shape[1]
        else B
        for B in lora_Bs
    ]
    return [*new_As, *new_Bs]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded", "strided"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
def test_proximal_formula(backend, dtype, layout):
    lora_As, lora_Bs, _ = sample(SHAPES[:4], dtype=dtype, layout_A=layout, layout_B=layout)
    old = [factor.clone() for factor in [*lora_As, *lora_Bs]]
    exact = shrunk([f.double() for f in old[:4]], [f.double() for f in old[4:]], 0.9, 0.4, "sqrt")
    eager = shrunk(old[:4], old[4:], 0.9, 0.4, "sqrt")
    rank_shrink_(lora_As, lora_Bs, (0.9, 0.4))
    for i, (out, *expected) in enumerate(zip([*lora_As, *lora_Bs], exact, eager, strict=True)):
        assert_accurate(f"factor {i}", out, *expected)


@pytest.mark.parametrize("kind", PENALTIES)
def test_every_kind(backend, kind):
    lora_As, lora_Bs, _ = sample([(5, 40, 30), (3, 20, 60)])
    expected = shrunk(lora_As, lora_Bs, 0.05, 0.05, kind)
    rank_shrink_(lora_As, lora_Bs, 0.05, kind)
    for out, right in zip([*lora_As, *lora_Bs], expected, strict=True):
        torch.testing.assert_close(out, right)


def test_worked_by_hand(backend):
    """step 1, w = √r: norms 5, 2, √3 lose 1, √2, √3; the last vector is no longer than its loss."""
    lora_A, lora_B = torch.tensor([[3.0, 4.0], [0.0, -2.0], [1.0, 2**0.5]]), torch.tensor([[0.5, 6.0, 0.0]])
    rank_shrink_([lora_A], [lora_B], 1.0)
    kept = 2 - 2**0.5
    torch.testing.assert_close(lora_A[:2], torch.tensor([[2.4, 3.2], [0.0, -kept]]))
    assert lora_A[2].norm() < 1e-6
    torch.testing.assert_close(lora_B, torch.tensor([[0.0, 6 - 2**0.5, 0.0]]))
    assert lora_B[0, 0] == 0


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_short_vectors_become_exactly_zero(backend, dtype):
    lora_A, lora_B = torch.full((4, 9), 0.1, dtype=dtype), torch.full((7, 4), 5.0, dtype=dtype)
    rank_shrink_([lora_A], [lora_B], 0.5)
    assert torch.equal(lora_A, torch.zeros(4, 9, dtype=dtype))
    assert (lora_B > 0).all()


def test_zero_vectors_stay_zero(backend):
    lora_A, lora_B = torch.randn(3, 5), torch.zeros(6, 3)
    lora_A[1] = 0
    rank_shrink_([lora_A], [lora_B], 0.1)
    assert torch.equal(lora_B, torch.zeros(6, 3))
    assert torch.equal(lora_A[1], torch.zeros(5))
    assert lora_A.isfinite().all()


@pytest.mark.parametrize(("step", "kind"), [(0, "sqrt"), (0.0, "cube"), ((0.0, 0), "log"), (3.0, "none")], ids=str)
def test_no_step_changes_no_bit(backend, step, kind):
    lora_As, lora_Bs, _ = sample()
    lora_As[0][2] = 0
    lora_Bs[0].zero_()
    before = [factor.clone() for factor in [*lora_As, *lora_Bs]]
    rank_shrink_(lora_As, lora_Bs, step, kind)
    assert all(torch.equal(old, now) for old, now in zip(before, [*lora_As, *lora_Bs], strict=True))


def test_lowers_the_penalty_by_its_gradient_step(backend):
    """While no vector vanishes, a proximal step is a gradient step of the same P."""
    lora_A, lora_B = torch.randn(4, 30, requires_grad=True), torch.randn(20, 4, requires_grad=True)
    dA, dB = torch.autograd.grad(rank_penalty([lora_A], [lora_B]), [lora_A, lora_B])
    expected = lora_A.detach() - 0.1 * dA, lora_B.detach() - 0.1 * dB
    rank_shrink_([lora_A], [lora_B], 0.1)
    torch.testing.assert_close((lora_A.detach(), lora_B.detach()), expected)


def test_parked_rows_are_left_alone(backend):
    """Factors that are views of larger stores, as in a pair that was narrowed."""
    store_A, store_B = torch.randn(8, 10), torch.randn(8, 12)
    parked = store_A[3:].clone(), store_B[3:].clone()
    rank_shrink_([store_A[:3]], [store_B[:3].t()], 100.0)
    assert torch.equal(store_A, torch.cat([torch.zeros(3, 10), parked[0]]))
    assert torch.equal(store_B, torch.cat([torch.zeros(3, 12), parked[1]]))


def test_parameters_stay_leaves_without_graph(backend):
    lora_A = torch.nn.Parameter(torch.randn(3, 5))
    lora_A.grad = torch.ones(3, 5)
    rank_shrink_([lora_A], [torch.nn.Parameter(torch.randn(4, 3))], 0.1)
    assert lora_A.is_leaf
    assert lora_A.requires_grad
    assert torch.equal(lora_A.grad, torch.ones(3, 5))


@pytest.mark.parametrize("saved", ["lora_A", "lora_B"])
def test_graph_that_saved_a_factor_notices(backend, saved):
    factors = {"lora_A": torch.randn(2, 6), "lora_B": torch.randn(5, 2)}
    spare = {"lora_A": torch.randn(2, 6), "lora_B": torch.randn(5, 2)}
    x = torch.randn(3, 6, requires_grad=True)
    y = lora_linear(x, torch.randn(5, 6), None, *factors.values())
    spare[saved] = factors[saved]
    version = factors[saved]._version
    rank_shrink_([spare["lora_A"]], [spare["lora_B"]], 0.1)
    assert factors[saved]._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_penalty_graph_notices(backend):
    lora_A, lora_B = torch.randn(2, 6, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    penalty = rank_penalty([lora_A], [lora_B])
    rank_shrink_([lora_A], [lora_B], 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


def test_in_inference_mode(backend):
    lora_As, lora_Bs, _ = sample(SHAPES[:2])
    expected = shrunk(lora_As, lora_Bs, 0.1, 0.1, "sqrt")
    with torch.inference_mode():
        inside = [f.clone() for f in lora_As], [f.clone() for f in lora_Bs]
        rank_shrink_(*inside, 0.1)
        rank_shrink_(lora_As, lora_Bs, 0.1)
    for out in ([*inside[0], *inside[1]], [*lora_As, *lora_Bs]):
        for now, right in zip(out, expected, strict=True):
            torch.testing.assert_close(now, right)


@pytest.mark.parametrize("shapes", [[], [(0, 5, 6)], [(0, 5, 6), (2, 3, 3)]], ids=str)
def test_rank_zero(backend, shapes):
    lora_As, lora_Bs, _ = sample(shapes)
    rank_shrink_(lora_As, lora_Bs, 100.0)
    assert not any(factor.any() for factor in [*lora_As, *lora_Bs])


def test_reference_is_out_of_place():
    lora_As, lora_Bs, _ = sample(SHAPES[:2])
    before = [factor.clone() for factor in [*lora_As, *lora_Bs]]
    new_As, new_Bs = rank_shrink_ref(lora_As, lora_Bs, 0.3)
    assert all(torch.equal(old, now) for old, now in zip(before, [*lora_As, *lora_Bs], strict=True))
    for out, right in zip([*new_As, *new_Bs], shrunk(lora_As, lora_Bs, 0.3, 0.3, "sqrt"), strict=True):
        torch.testing.assert_close(out, right)


def test_opcheck(backend):
    lora_As, lora_Bs, _ = sample([(3, 5, 4), (2, 6, 7)])
    torch.library.opcheck(torch.ops.adaptlora.rank_shrink_.default, (lora_As, lora_Bs, 0.1, 0.2, "sqrt"))


BAD_OPTIONS = [
    ({"step": -0.1}, r"step must be ≥ 0, got -0.1"),
    ({"step": (0.1, -1)}, r"step must be ≥ 0, got -1"),
    ({"step": math.nan}, r"step must be a finite number, got nan"),
    ({"step": math.inf}, r"step must be a finite number, got inf"),
    ({"step": "1"}, r"step must be a finite number, got '1'"),
    ({"step": None}, r"step must be a finite number, got None"),
    ({"step": (0.1, 0.2, 0.3)}, r"step must be one number or two, got \(0.1, 0.2, 0.3\)"),
    ({"step": ()}, r"step must be one number or two, got \(\)"),
    ({"step": 0.1, "kind": "cubic"}, r"kind must be one of sqrt, .*, got 'cubic'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[m for _, m in BAD_OPTIONS])
def test_bad_options_change_nothing(backend, options, message):
    lora_A, lora_B = torch.randn(3, 6), torch.randn(5, 3)
    before = lora_A.clone(), lora_B.clone(), lora_A._version, lora_B._version
    with pytest.raises(ValueError, match=f"^rank_shrink_: {message}"):
        rank_shrink_([lora_A], [lora_B], **options)
    assert torch.equal(lora_A, before[0])
    assert torch.equal(lora_B, before[1])
    assert (lora_A._version, lora_B._version) == before[2:]


@pytest.mark.parametrize(("lora_As", "lora_Bs", "exception", "message"), BAD_FACTORS, ids=[m for *_, m in BAD_FACTORS])
def test_bad_factors_change_nothing(backend, lora_As, lora_Bs, exception, message):
    """Also not the good pair before the bad one."""
    first_A, first_B = torch.randn(3, 6), torch.randn(5, 3)
    before = first_A.clone(), first_B.clone()
    # With a pair in front every index grows by one, and lengths too.
    with pytest.raises(exception, match=r"^rank_shrink_: (pair|lora_Bs must be as long)"):
        rank_shrink_([first_A, *lora_As], [first_B, *lora_Bs], 0.1)
    with pytest.raises(exception, match=f"^rank_shrink_{message}"):
        rank_shrink_(lora_As, lora_Bs, 0.1)
    assert torch.equal(first_A, before[0])
    assert torch.equal(first_B, before[1])
