"""rank_norms and its gradient against the definition in float64, on every backend; rank_scale, which the gradient uses."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_all_accurate, laid_out

from adaptlora.ops import rank_norms, rank_norms_ref

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SHAPES = [(8, 63, 50), (1, 1, 1), (13, 500, 257), (0, 30, 20), (33, 64, 64), (300, 7, 90)]  # (R, K, N)


def sample(shapes=SHAPES, dtype=FP32, dtype_B=None, layout_A="contiguous", layout_B="transposed"):
    """(A's, B's, upstream gradient of every norm)."""
    lora_As = [laid_out(torch.randn(R, K).to(dtype), layout_A) for R, K, _ in shapes]
    lora_Bs = [laid_out(torch.randn(N, R).to(dtype_B or dtype), layout_B) for R, _, N in shapes]
    return lora_As, lora_Bs, [torch.randn(R) for _ in range(2) for R, _, _ in shapes]


def definition(lora_As, lora_Bs):
    """‖a_r‖ and ‖b_r‖ written out, in the accumulation dtype as eager users would."""

    def norm(factor, dim):
        return (factor if factor.dtype == FP64 else factor.float()).pow(2).sum(dim).sqrt()

    return [norm(A, 1) for A in lora_As], [norm(B, 0) for B in lora_Bs]


def results(function, lora_As, lora_Bs, upstream, dtype=None) -> dict[str, torch.Tensor]:
    """Every norm and every gradient."""
    factors = [factor.detach().to(dtype or factor.dtype).requires_grad_() for factor in [*lora_As, *lora_Bs]]
    norms_A, norms_B = function(factors[: len(lora_As)], factors[len(lora_As) :])
    norms = [*norms_A, *norms_B]
    grads = torch.autograd.grad(norms, factors, [g.to(n.dtype) for g, n in zip(upstream, norms, strict=True)])
    return {f"norms {i}": n.detach() for i, n in enumerate(norms)} | {f"gradient {i}": g for i, g in enumerate(grads)}


def assert_right(inputs) -> None:
    assert_all_accurate(
        results(rank_norms, *inputs), results(definition, *inputs, dtype=FP64), results(definition, *inputs)
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
def test_norms_and_gradients(backend, dtype):
    assert_right(sample(dtype=dtype))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout_B", ["contiguous", "transposed", "padded", "strided"])
@pytest.mark.parametrize("layout_A", ["contiguous", "transposed", "padded", "strided"])
def test_any_strides(backend, layout_A, layout_B):
    assert_right(sample(layout_A=layout_A, layout_B=layout_B))


@pytest.mark.parametrize(("dtype", "dtype_B"), [(BF16, FP32), (FP32, FP16)], ids=str)
def test_factors_of_two_dtypes(backend, dtype, dtype_B):
    assert_right(sample(dtype=dtype, dtype_B=dtype_B))


def test_modules_of_different_dtypes(backend):
    halves, singles = sample(SHAPES[:2], dtype=BF16), sample(SHAPES[2:])
    As, Bs = halves[0] + singles[0], halves[1] + singles[1]
    assert_right((As, Bs, [torch.randn(A.shape[0]) for _ in range(2) for A in As]))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 80), st.integers(0, 80)), min_size=1, max_size=6))
def test_any_shapes(backend, shapes):
    torch.manual_seed(0)
    # Without elements a norm is 0, where the definition's square root has an infinite slope.
    assert_right(sample([(R, max(K, 1), max(N, 1)) for R, K, N in shapes]))


def test_no_columns(backend):
    norms_A, norms_B = rank_norms([torch.ones(3, 0)], [torch.ones(0, 3)])
    assert torch.equal(norms_A[0], torch.zeros(3))
    assert torch.equal(norms_B[0], torch.zeros(3))


def test_worked_by_hand(backend):
    lora_A, lora_B = torch.tensor([[3.0, 4.0], [0.0, -2.0]]), torch.tensor([[5.0, 0.0], [0.0, 8.0], [12.0, 6.0]])
    (norms_A,), (norms_B,) = rank_norms([lora_A], [lora_B])
    assert norms_A.tolist() == [5.0, 2.0]
    assert norms_B.tolist() == [13.0, 10.0]


@pytest.mark.parametrize("shapes", [[], [(0, 5, 6)], [(0, 5, 6), (0, 3, 3)]], ids=str)
def test_nothing_to_norm(backend, shapes):
    lora_As, lora_Bs, _ = sample(shapes)
    norms_A, norms_B = rank_norms(lora_As, lora_Bs)
    assert [n.shape for n in norms_A] == [n.shape for n in norms_B] == [(0,)] * len(shapes)


def test_half_precision_squares_do_not_overflow(backend):
    lora_A, lora_B = torch.full((2, 30), 6e4, dtype=FP16), torch.full((20, 2), 1e-7, dtype=FP16)
    assert_right(([lora_A], [lora_B], [torch.randn(2), torch.randn(2)]))


def test_gradient_at_zero_is_zero(backend):
    lora_As, lora_Bs = [torch.randn(3, 7)], [torch.zeros(5, 3)]
    lora_As[0][1] = 0
    norms = [n for side in rank_norms([lora_As[0].requires_grad_()], [lora_Bs[0].requires_grad_()]) for n in side]
    torch.autograd.backward(norms, [torch.ones(3)] * 2)
    assert torch.equal(lora_Bs[0].grad, torch.zeros(5, 3))
    assert torch.equal(lora_As[0].grad[1], torch.zeros(7))
    assert lora_As[0].grad[[0, 2]].norm(dim=1).tolist() == pytest.approx([1, 1])


def test_only_what_needs_a_gradient_gets_one(backend):
    (A0, A1, *_), (B0, B1, *_), _ = sample()
    A1.requires_grad_()
    norms_A, norms_B = rank_norms([A0, A1], [B0, B1])
    (norms_A[1].sum() + norms_B[0].sum()).backward()
    assert A0.grad is None
    assert B0.grad is None
    torch.testing.assert_close(A1.grad, A1.detach() / A1.detach().abs())


def test_gradients_are_rank_major(backend):
    lora_A, lora_B = torch.randn(5, 12, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    (norms_A,), (norms_B,) = rank_norms([lora_A], [lora_B])
    dA, dB = torch.autograd.grad(norms_A.sum() + norms_B.sum(), [lora_A, lora_B])
    assert dA.stride() == (12, 1)
    assert dB.stride() == (1, 7)


def test_many_modules(backend):
    shapes = [(8, K, N) for K, N in ((384, 384), (384, 1536), (1536, 384)) for _ in range(70)]
    lora_As, lora_Bs, _ = sample(shapes)
    norms_A, norms_B = rank_norms(lora_As, lora_Bs)
    torch.testing.assert_close(torch.cat(norms_A), torch.cat([A.norm(dim=1) for A in lora_As]))
    torch.testing.assert_close(torch.cat(norms_B), torch.cat([B.norm(dim=0) for B in lora_Bs]))


def test_deterministic(backend):
    inputs = sample()
    first, second = results(rank_norms, *inputs), results(rank_norms, *inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_takes_any_iterables(backend):
    lora_As, lora_Bs, _ = sample()
    from_iterators, from_lists = rank_norms(iter(lora_As), tuple(lora_Bs)), rank_norms(lora_As, lora_Bs)
    assert all(torch.equal(a, b) for i in range(2) for a, b in zip(from_iterators[i], from_lists[i], strict=True))


def test_reference_is_the_definition():
    inputs = sample()
    exact = results(definition, *inputs, dtype=FP64)
    assert_all_accurate(results(rank_norms_ref, *inputs, dtype=FP64), exact, exact)


def test_gradcheck():
    (A0, A1), (B0, B1), _ = sample([(2, 5, 4), (3, 2, 6)], dtype=FP64)
    factors = tuple(factor.requires_grad_() for factor in (A0, A1, B0, B1))
    assert torch.autograd.gradcheck(lambda *f: tuple(torch.cat(side) for side in rank_norms(f[:2], f[2:])), factors)


def test_second_derivative_is_refused(backend):
    lora_A, lora_B = torch.randn(3, 4, requires_grad=True), torch.randn(5, 3)
    (norms_A,), _ = rank_norms([lora_A], [lora_B])
    (dA,) = torch.autograd.grad(norms_A.sum(), lora_A, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dA.sum().backward()


def test_changed_factor_is_noticed(backend):
    lora_A, lora_B = torch.randn(3, 4, requires_grad=True), torch.randn(5, 3)
    (norms_A,), _ = rank_norms([lora_A], [lora_B])
    with torch.no_grad():
        lora_A.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        norms_A.sum().backward()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_opcheck(backend, dtype):
    lora_As, lora_Bs, _ = sample([(3, 5, 4), (0, 2, 2), (2, 6, 7)], dtype=dtype)
    factors = [f.requires_grad_() for f in lora_As], [f.requires_grad_() for f in lora_Bs]
    torch.library.opcheck(torch.ops.adaptlora.rank_norms.default, factors)


@pytest.mark.parametrize("layout_B", ["contiguous", "transposed"])
def test_opcheck_rank_scale(backend, layout_B):
    lora_As, lora_Bs, _ = sample([(3, 5, 4), (0, 2, 2), (2, 6, 7)], layout_B=layout_B)
    torch.library.opcheck(torch.ops.adaptlora.rank_scale.default, (lora_As, lora_Bs, torch.randn(5), torch.randn(5)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded", "strided"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_rank_scale(backend, dtype, layout):
    """Row r of A and column r of B times their factor, computed in float32 and rounded once; the inputs stay."""
    lora_As, lora_Bs, _ = sample(SHAPES[:4], dtype=dtype, layout_A=layout, layout_B=layout)
    before = [factor.clone() for factor in [*lora_As, *lora_Bs]]
    factors_A, factors_B = torch.randn(22), torch.randn(22)
    scaled = torch.ops.adaptlora.rank_scale(lora_As, lora_Bs, factors_A, factors_B)
    start = 0
    for A, B, new_A, new_B in zip(lora_As, lora_Bs, scaled[:4], scaled[4:], strict=True):
        f_A, f_B = (f[start : start + A.shape[0]] for f in (factors_A, factors_B))
        assert torch.equal(new_A, (A.float() * f_A[:, None]).to(dtype))
        assert torch.equal(new_B, (B.float() * f_B).to(dtype))
        start += A.shape[0]
    assert all(torch.equal(old, now) for old, now in zip(before, [*lora_As, *lora_Bs], strict=True))


A, B = torch.ones(3, 6), torch.ones(5, 3)
BAD_FACTORS = [
    ([A], [], ValueError, r": lora_Bs must be as long as lora_As, 1, got 0"),
    ([], [B], ValueError, r": lora_Bs must be as long as lora_As, 0, got 1"),
    ([A, None], [B, B], TypeError, r": pair 1: lora_A must be a tensor, got NoneType"),
    ([A.int()], [B], TypeError, r": pair 0: lora_A must be float32.* got torch.int32"),
    ([A], [B.bool()], TypeError, r": pair 0: lora_B must be float32.* got torch.bool"),
    ([A[0]], [B], ValueError, r": pair 0: lora_A must have 2 dimension\(s\), got shape \(6,\)"),
    ([A], [torch.ones(5, 4)], ValueError, r": pair 0: lora_B must have shape \(N, R\) with R=3 .*, got \(5, 4\)"),
    ([A], [B.to("meta")], ValueError, r": pair 0: lora_B must be on the device of lora_A, cpu, got meta"),
    ([A, A.to("meta")], [B, B.to("meta")], ValueError, r": pair 1 must be on the device of pair 0, cpu, got meta"),
    ([A, A.double()], [B, B], TypeError, r": pair 1 must be float64 if and only if pair 0 is, got .*64, .*32"),
    ([A], [B.double()], TypeError, r": pair 0 must be float64 if and only if pair 0 is, got .*32, .*64"),
]


@pytest.mark.parametrize(("lora_As", "lora_Bs", "exception", "message"), BAD_FACTORS, ids=[m for *_, m in BAD_FACTORS])
def test_bad_input(backend, lora_As, lora_Bs, exception, message):
    with pytest.raises(exception, match=f"^rank_norms{message}"):
        rank_norms(lora_As, lora_Bs)
