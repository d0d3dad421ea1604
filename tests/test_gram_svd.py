"""randomized_svd where many triplets are wanted of a matrix on a CPU: as accurate as an SVD, which takes over where it must."""

import functools

import pytest
import torch
from numerics import FLOOR, assert_accurate, laid_out
from test_randomized_svd import with_spectrum

from adaptlora.ops import _gram_svd, randomized_svd, randomized_svd_ref

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16
EPS = torch.finfo(FP32).eps
SHAPES = {"square": (90, 90), "tall": (150, 60), "wide": (60, 150)}
# σ_1 / σ_k, and whether an SVD must take over; None: it depends on the machine's rounding.
CONDITIONS = {"well": (3.0, False), "middling": (12.0, None), "ill": (1e5, True)}


def spectrum(n: int, condition: float) -> torch.Tensor:
    return condition ** -torch.linspace(0, 1, n, dtype=FP64)


def departure(basis: torch.Tensor) -> float:
    """‖QᵀQ − I‖ of columns or rows, whichever are fewer."""
    Q = basis.double() if basis.shape[0] >= basis.shape[1] else basis.double().mT
    return torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(Q.shape[1]), 2).item()


def missed(W, found) -> float:
    """The largest of ‖W v_i − σ_i u_i‖ and ‖Wᵀ u_i − σ_i v_i‖, in parts of the largest singular value."""
    W, U, S, V = W.double(), found.U.double(), found.S.double(), found.Vh.double().mT
    errors = [torch.linalg.vector_norm(e, dim=0).max() for e in (W @ V - U * S, W.mT @ U - V * S)]
    return (max(errors) / torch.linalg.matrix_norm(W, 2)).item()


@pytest.fixture
def factorized(monkeypatch):
    """Names of the factorizations that ran besides the eigenproblem."""
    names = []
    for name in ("qr", "svd"):

        def counted(name, real, X):
            names.append(name)
            return real(X)

        monkeypatch.setattr(_gram_svd, name, functools.partial(counted, name, getattr(_gram_svd, name)))
    return names


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("condition", "takes_svd"), CONDITIONS.values(), ids=CONDITIONS)
@pytest.mark.parametrize("fraction", [0.4, 1.0])
@pytest.mark.parametrize("orthonormal", [_gram_svd._ORTHONORMAL, 0], ids=["measured", "qr"])
def test_as_accurate_as_an_svd(shape, condition, takes_svd, fraction, orthonormal, factorized, monkeypatch):
    monkeypatch.setattr(_gram_svd, "_ORTHONORMAL", orthonormal)
    n = min(shape)
    k = int(fraction * n)
    W = with_spectrum(*shape, spectrum(n, condition ** (1 / fraction))).float()
    (exact,), (eager,) = randomized_svd_ref([W.double()], k), randomized_svd_ref([W], k)
    (found,) = randomized_svd([W], k)
    assert takes_svd in (None, "svd" in factorized) and (orthonormal or "qr" in factorized)
    assert found.S.diff().max() <= 0
    assert_accurate("S", found.S, exact.S, eager.S)
    if k == n:  # what is cut off otherwise swaps with what is kept, of an SVD too
        cut = [part.U * part.S @ part.Vh for part in (found, exact, eager)]
        assert_accurate("U S Vh", *cut)
    for ours, theirs in ((found.U, eager.U), (found.Vh, eager.Vh)):
        assert departure(ours) <= 2 * departure(theirs) + FLOOR[FP32]
    assert missed(W, found) <= 2 * missed(W, eager) + FLOOR[FP32]


@pytest.mark.parametrize("condition", [1.5, 30.0, 300.0, 1e4])
def test_the_residual_is_what_the_triplets_miss(condition):
    W = with_spectrum(200, 120, spectrum(120, condition)).float()
    (found,) = randomized_svd([W], 80)
    assert 0.7 * missed(W, found) <= found.residual <= 3 * missed(W, found) + EPS


def test_wrong_vectors_are_seen(monkeypatch, factorized):
    """Vectors of another matrix: orthonormal, and no SVD's."""
    W, other = with_spectrum(80, 60, spectrum(60, 3.0)).float(), torch.randn(60, 60)
    real = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda G: real(G + 1e-4 * (other + other.mT)))
    (found,) = randomized_svd([W], 30)
    assert factorized == ["qr", "svd"] and missed(W, found) <= 20 * EPS


def test_leading_triplets_and_energy_of_a_slow_spectrum():
    W = with_spectrum(300, 200, 1 / (1 + 0.02 * torch.arange(200.0, dtype=FP64))).float()
    (exact,) = randomized_svd_ref([W.double()], 100)
    (found,) = randomized_svd([W], 100)
    energy = torch.linalg.matrix_norm(found.U.double().mT @ W.double()).square()
    assert energy >= (1 - 1e-6) * exact.S.square().sum()
    leading = [part.U[:, :16] * part.S[:16] @ part.Vh[:16] for part in (found, exact)]
    assert torch.linalg.matrix_norm(leading[0] - leading[1]) <= 1e-4 * torch.linalg.matrix_norm(W)


@pytest.mark.parametrize("dtype", [FP64, BF16], ids=str)
def test_other_dtypes(dtype):
    W = with_spectrum(70, 50, spectrum(50, 100.0)).to(dtype)
    acc = FP64 if dtype == FP64 else FP32
    (exact,), (found,) = randomized_svd_ref([W.double()], 40), randomized_svd([W], 40)
    assert {part.dtype for part in found[:3]} == {acc}
    torch.testing.assert_close(found.S.double(), exact.S, rtol=0, atol=4 * FLOOR[acc])
    eps = torch.finfo(acc).eps
    assert max(departure(found.U), departure(found.Vh)) <= 64 * eps and found.residual <= 64 * eps


@pytest.mark.parametrize("size", [1e25, 1e-25, 1e36])
def test_numbers_whose_squares_leave_the_range(size):
    W = with_spectrum(60, 50, spectrum(50, 5.0)).float()
    (plain,), (found,) = randomized_svd([W], 40), randomized_svd([W * size], 40)
    assert found.S.shape == (40,)
    torch.testing.assert_close(found.S, plain.S * size, rtol=1e-5, atol=0)
    assert max(departure(found.U), departure(found.Vh)) <= 64 * EPS and found.residual <= 64 * EPS


@pytest.mark.parametrize("rank", [0, 1, 30])
def test_rank_deficient(rank):
    W = torch.randn(60, rank) @ torch.randn(rank, 50)
    (found,) = randomized_svd([W], 40)
    assert max(departure(found.U), departure(found.Vh)) <= 64 * EPS and found.residual <= 64 * EPS
    assert (found.S[rank:] <= 64 * EPS * found.S[0]).all() and (found.S.diff() <= 0).all()


@pytest.mark.parametrize("layout", ["transposed", "padded", "strided"])
def test_any_strides(layout):
    W = with_spectrum(40, 30, spectrum(30, 5.0)).float()
    (found,), (plain,) = randomized_svd([laid_out(W, layout)], 20), randomized_svd([W], 20)
    torch.testing.assert_close(found.S, plain.S)
    assert found.U.is_contiguous() and found.Vh.is_contiguous()


def test_few_triplets_and_bare_sketches_are_still_sketched(monkeypatch):
    W = torch.randn(100, 100)
    monkeypatch.setattr(torch.linalg, "eigh", lambda G: pytest.fail("an eigenproblem"))
    randomized_svd([W], 20)
    randomized_svd([W], 90, n_iter=0)
    with pytest.raises(pytest.fail.Exception):
        randomized_svd([W], 21)


def test_bits_do_not_depend_on_the_number_of_threads():
    weights = [torch.randn(shape).requires_grad_() for shape in [(90, 70), (70, 90), (30, 90), (90, 70)]]
    threads, runs = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            with torch.autocast("cpu", dtype=BF16):
                runs.append(randomized_svd(weights, 40))
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(threads)
    for W, one, three in zip(weights, *runs, strict=True):
        assert one.residual == three.residual < 64 * EPS and not one.U.requires_grad
        assert all(torch.equal(a, b) for a, b in zip(one[:3], three[:3], strict=True))
        assert missed(W.detach(), one) <= 64 * EPS


def test_beside_weights_that_are_sketched():
    weights = [torch.randn(300, 300), torch.randn(40, 300), torch.randn(300, 300), torch.randn(300, 40)]
    for W, found in zip(weights, randomized_svd(weights, 32), strict=True):
        (alone,) = randomized_svd([W], 32)
        torch.testing.assert_close(found.S, alone.S)
        assert found.U.shape == (len(W), 32) and (found.residual < 1e-5) == (40 in W.shape)


def test_opcheck():
    weights = [torch.randn(9, 7), torch.randn(9, 7), torch.randn(4, 3)]
    torch.library.opcheck(torch.ops.adaptlora.randomized_svd.default, (weights, 4, 2, 4, 1e-5, 0))
