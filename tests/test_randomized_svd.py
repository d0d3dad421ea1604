"""randomized_svd against the full SVD in float64, and how its residual tells what is missing."""

import math

import pytest
import torch
from numerics import FLOOR, laid_out

from adaptlora.ops import randomized_svd, randomized_svd_ref

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def with_spectrum(N: int, K: int, S) -> torch.Tensor:
    S = torch.as_tensor(S, dtype=FP64)
    U, V = (torch.linalg.qr(torch.randn(n, len(S), dtype=FP64)).Q for n in (N, K))
    return (U * S) @ V.mT


def gap(U: torch.Tensor, U_exact: torch.Tensor) -> float:
    """Sine of the largest angle between two subspaces."""
    U, U_exact = U.double(), U_exact.double()
    return torch.linalg.matrix_norm(U_exact - U @ (U.mT @ U_exact), 2).item()


DECAY = [2.0**-i for i in range(40)]


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16, FP16], ids=str)
@pytest.mark.parametrize(("N", "K"), [(90, 70), (50, 200), (200, 45)], ids=["square", "wide", "tall"])
def test_leading_triplets(N, K, dtype):
    W = with_spectrum(N, K, DECAY).to(dtype)
    acc = FP64 if dtype == FP64 else FP32
    (exact,) = randomized_svd_ref([W.double()], 5)
    (found,) = randomized_svd([W], 5, n_iter=8, tol=0.0)
    assert [part.shape for part in found[:3]] == [(N, 5), (5,), (5, K)] and found.U.dtype == acc
    torch.testing.assert_close(found.S.double(), exact.S, rtol=0, atol=4 * FLOOR[acc])
    assert max(gap(found.U, exact.U), gap(found.Vh.mT, exact.Vh.mT)) <= 64 * FLOOR[acc]
    for basis in (found.U, found.Vh.mT):
        assert torch.linalg.matrix_norm(basis.mT @ basis - torch.eye(5, dtype=acc), 2) <= 8 * FLOOR[acc]
    torch.testing.assert_close(W.to(acc) @ found.Vh.mT, found.U * found.S, rtol=0, atol=8 * FLOOR[acc])


def test_a_slow_spectrum_needs_more_iterations_and_the_residual_says_so():
    W = with_spectrum(150, 120, [1 / (1 + 0.05 * i) for i in range(120)])
    (exact,) = randomized_svd_ref([W], 20)
    runs = {n: randomized_svd([W], 20, n_iter=n, tol=0.0)[0] for n in (0, 2, 8, 60)}
    residuals = [run.residual for run in runs.values()]
    assert residuals == sorted(residuals, reverse=True)
    for run in runs.values():
        # Of U itself, one product with W later than the residual's: (I − UUᵀ) W V.
        left = W @ run.Vh.mT - run.U @ (run.U.mT @ W @ run.Vh.mT)
        assert torch.linalg.vector_norm(left, dim=0).max() / run.S[0] <= run.residual + 1e-12
        assert (
            torch.linalg.matrix_norm(W.mT @ run.U - run.Vh.mT * run.S, 2) <= 1.5 * run.residual * math.sqrt(20) + 1e-13
        )
    assert runs[0].residual > 0.05 and runs[60].residual < 1e-6 and gap(runs[60].U, exact.U) < 1e-5


def test_tol_stops_early():
    W = with_spectrum(150, 120, [1 / (1 + 0.05 * i) for i in range(120)])
    early, late = (randomized_svd([W], 20, n_iter=50, tol=tol)[0].residual for tol in (0.02, 0.0))
    assert late < 1e-9 < 1e-4 < early <= 0.02


def test_the_filter_does_more_than_powers_with_as_many_products():
    W = with_spectrum(300, 200, [1 / (1 + 0.02 * i) for i in range(200)])
    (exact,) = randomized_svd_ref([W], 20)
    Q = torch.linalg.qr(W @ torch.randn(200, 36, dtype=FP64)).Q
    for _ in range(5):
        Q = torch.linalg.qr(W @ (W.mT @ Q)).Q
    powers = (Q @ torch.linalg.svd(Q.mT @ W, full_matrices=False).U)[:, :20]
    assert gap(randomized_svd([W], 20, n_iter=4)[0].U, exact.U) < 0.3 * gap(powers, exact.U)


@pytest.mark.parametrize("size", [1e25, 1e-25, 1e36])
def test_numbers_whose_squares_leave_the_range(size):
    W = with_spectrum(60, 50, DECAY).float()
    (plain,), (found,) = randomized_svd([W], 5), randomized_svd([W * size], 5)
    torch.testing.assert_close(found.S, plain.S * size, rtol=1e-5, atol=0)
    assert gap(found.U, plain.U) < 1e-4 and abs(found.residual - plain.residual) < 1e-5


def test_more_triplets_than_there_are():
    for shape in ((30, 7), (7, 30), (1, 1)):
        W = torch.randn(shape, dtype=FP64)
        (found,) = randomized_svd([W], 64)
        torch.testing.assert_close(found.U * found.S @ found.Vh, W)
        torch.testing.assert_close(found.S, torch.linalg.svdvals(W))
        assert found.residual < 1e-14


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_rank_deficient(rank):
    W = torch.randn(60, rank) @ torch.randn(rank, 50)
    (found,) = randomized_svd([W], 8)
    assert torch.linalg.matrix_norm((found.U * found.S) @ found.Vh - W) <= 1e-6 * torch.linalg.matrix_norm(W)
    assert (found.S[rank:] <= 1e-6 * max(found.S[0].item(), 1e-30)).all()
    assert torch.linalg.matrix_norm(found.U.mT @ found.U - torch.eye(8)) <= 1e-5


def test_equal_calls_give_equal_bits_and_the_seed_counts():
    weights = [torch.randn(40, 30), torch.randn(30, 40), torch.randn(40, 30)]
    first, again, other = (randomized_svd(weights, 4, n_iter=0, seed=seed) for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)) and a.residual == b.residual
        assert not torch.equal(a.U, c.U)
    state = torch.get_rng_state()
    randomized_svd(weights, 4)
    assert torch.equal(state, torch.get_rng_state())


def test_a_batch_gives_what_each_gives_alone():
    weights = [with_spectrum(40, 30, DECAY[:30]).float() for _ in range(3)]
    for found, W in zip(randomized_svd(weights, 4), weights, strict=True):
        (alone,) = randomized_svd([W], 4)
        torch.testing.assert_close(found.S, alone.S)
        assert gap(found.U, alone.U) < 1e-5


@pytest.mark.parametrize("layout", ["transposed", "padded", "strided"])
def test_any_strides(layout):
    W = with_spectrum(40, 30, DECAY[:30]).float()
    (found,), (plain,) = randomized_svd([laid_out(W, layout)], 4), randomized_svd([W], 4)
    torch.testing.assert_close(found.S, plain.S)


BAD = [
    ({"weights": [torch.ones(3)]}, ValueError, r"randomized_svd: weights\[0\] must have 2 dimension"),
    ({"weights": [torch.ones(3, 3), torch.ones(3, 0)]}, ValueError, r"weights\[1\] must have rows and columns"),
    ({"weights": [torch.ones(3, 3, dtype=torch.int8)]}, TypeError, "must be float32"),
    ({"weights": [torch.full((3, 3), math.nan)]}, ValueError, r"weights\[0\] must be finite, got 9 NaN"),
    ({"rank": 0}, ValueError, "rank must be an integer ≥ 1, got 0"),
    ({"rank": 2.0}, ValueError, "rank must be an integer ≥ 1, got 2.0"),
    ({"oversample": -1}, ValueError, "oversample must be an integer ≥ 0, got -1"),
    ({"n_iter": True}, ValueError, "n_iter must be an integer ≥ 0, got True"),
    ({"seed": None}, ValueError, "seed must be an integer, got None"),
    ({"tol": math.nan}, ValueError, "tol must be a finite number, got nan"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input(changed, error, message):
    arguments = {"weights": [torch.ones(3, 3)], "rank": 2} | changed
    with pytest.raises(error, match=message):
        randomized_svd(**arguments)


def test_no_weights():
    assert randomized_svd([], 4) == []


def test_opcheck():
    weights = [torch.randn(9, 7), torch.randn(9, 7), torch.randn(4, 3)]
    torch.library.opcheck(torch.ops.adaptlora.randomized_svd.default, (weights, 4, 2, 1, 1e-5, 0))
