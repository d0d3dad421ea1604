"""One-sided Jacobi SVD against LAPACK in float64: the C++ function, and the schedule of a CUDA block on threads."""

import linalg_threads
import pytest
import torch
from numerics import laid_out

from adaptlora.ops import _backend

FP32, FP64 = torch.float32, torch.float64
BOUND = {FP32: 1e-5, FP64: 2e-14}


@pytest.fixture
def jacobi_svd():
    if _backend.extension() is None:
        pytest.skip("the C++ extension adaptlora._C is not built")
    return _backend.extension().jacobi_svd


def orthogonal(R: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(R, R, dtype=FP64)).Q


def with_values(values: torch.Tensor) -> torch.Tensor:
    return (orthogonal(len(values)) * values) @ orthogonal(len(values))


def hilbert(R: int) -> torch.Tensor:
    i = torch.arange(R, dtype=FP64)
    return 1 / (1 + i + i[:, None])


MATRICES = {
    "random": lambda R: torch.randn(R, R, dtype=FP64),
    "orthogonal": orthogonal,
    "diagonal": lambda R: torch.diag(torch.arange(R, dtype=FP64)),
    "Hilbert": hilbert,
    "graded": lambda R: with_values(torch.logspace(0, -12, R, dtype=FP64)),
    "graded rows": lambda R: torch.randn(R, R, dtype=FP64) * torch.logspace(0, -12, R, dtype=FP64)[:, None],
    "repeated": lambda R: with_values(1.0 + torch.arange(R, dtype=FP64) % 2),
    "zero": lambda R: torch.zeros(R, R, dtype=FP64),
    "rank 1": lambda R: torch.randn(R, 1, dtype=FP64) @ torch.randn(1, R, dtype=FP64),
    "half rank": lambda R: torch.randn(R, (R + 1) // 2, dtype=FP64) @ torch.randn((R + 1) // 2, R, dtype=FP64),
    "zero columns": lambda R: torch.randn(R, R, dtype=FP64) * (torch.arange(R) % 2),
    "one number": lambda R: torch.full((R, R), 0.1, dtype=FP64),
    "huge": lambda R: torch.randn(R, R, dtype=FP64) * 1e36,
    "tiny": lambda R: torch.randn(R, R, dtype=FP64) * 1e-36,
    "denormal": lambda R: torch.randn(R, R, dtype=FP64) * 1e-40,
}
# Large ones are slow on one thread.
CASES = [(kind, R, dtype) for kind in MATRICES for R in (1, 2, 3, 33, 64) for dtype in (FP32, FP64)]
CASES += [(kind, 256, FP32) for kind in ("random", "Hilbert", "repeated", "zero", "rank 1")]


def assert_svd(a, U, S, Vh, info) -> None:
    """Of one matrix: a = U diag(S) Vh, orthogonal U and V, S as LAPACK has it in float64, all to 1e-5 of the largest in float32."""
    bound, exact = BOUND[a.dtype], torch.linalg.svdvals(a.double())
    U, S, Vh = (part.double() for part in (U, S, Vh))
    eye, largest = torch.eye(len(a), dtype=FP64), exact[0] if exact[0] else 1
    assert info > 0
    assert ((S - exact).abs() / largest <= bound).all()
    assert (S >= 0).all() and torch.equal(S, S.sort(descending=True).values)
    assert ((U.mT @ U - eye).abs() <= bound).all()
    assert ((Vh @ Vh.mT - eye).abs() <= bound).all()
    assert (((U * S) @ Vh - a.double()).abs() / largest <= bound).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("kind", "R", "dtype"), CASES, ids=lambda part: str(part))
def test_against_lapack(jacobi_svd, kind, R, dtype):
    a = MATRICES[kind](R).to(dtype)
    assert_svd(a, *(part[0] for part in jacobi_svd(a[None])))


@pytest.mark.parametrize("R", [2, 33, 64])
def test_column_scaled_values_are_each_accurate(jacobi_svd, R):
    """A well-conditioned matrix times a diagonal: small values too have all their digits, of which LAPACK in float32 has none."""
    scales = torch.logspace(4, -4, R, dtype=FP64)[torch.randperm(R)]
    a = (with_values(torch.linspace(1, 2, R, dtype=FP64)) * scales).float()
    U, S, Vh, info = (part[0] for part in jacobi_svd(a[None]))
    exact = torch.linalg.svdvals(a.double())
    assert_svd(a, U, S, Vh, info)
    relative, lapack = (
        ((values.double() - exact) / exact).abs().max().item() for values in (S, torch.linalg.svdvals(a))
    )
    assert relative <= 1e-5
    assert R == 2 or lapack > 1e-2, lapack


def test_batches_strides_and_nothing(jacobi_svd):
    a = torch.randn(3, 2, 13, 13)[:, 0]
    together = jacobi_svd(a)
    for layout in ("contiguous", "transposed", "padded", "strided"):
        for found, expected in zip(jacobi_svd(laid_out(a, layout)), together, strict=True):
            assert torch.equal(found, expected)
    for i in range(3):
        assert all(
            torch.equal(part[i], alone[0]) for part, alone in zip(together, jacobi_svd(a[i : i + 1]), strict=True)
        )
    for shape in ((0, 4, 4), (2, 0, 0)):
        U, S, Vh, info = jacobi_svd(torch.zeros(shape))
        assert (U.shape, S.shape, Vh.shape, info.shape) == (shape, shape[:2], shape, shape[:1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_converge(jacobi_svd, value):
    a = torch.randn(2, 5, 5)
    a[1, 2, 3] = value
    assert (jacobi_svd(a)[3] > 0).tolist() == [True, False]


@pytest.mark.parametrize(
    ("a", "message"),
    [
        (torch.ones(3, 3), r"a must have shape \(b, R, R\)"),
        (torch.ones(1, 3, 4), r"a must have shape \(b, R, R\) on the CPU, got \[1, 3, 4\]"),
        (torch.ones(1, 3, 3, dtype=torch.int32), "a must be float32 or float64, got Int"),
        (torch.ones(1, 257, 257), "a must have at most 256 rows, got 257"),
    ],
    ids=range(4),
)
def test_bad_input(jacobi_svd, a, message):
    with pytest.raises(RuntimeError, match=f"^jacobi_svd: {message}"):
        jacobi_svd(a)


@pytest.mark.parametrize(("groups", "lanes"), [(1, 1), (5, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("kind", ["random", "rank 1", "zero columns", "zero", "repeated"])
def test_schedule_of_a_block(kind, groups, lanes):
    """More and fewer groups than pairs, columns that end within the lanes; ThreadSanitizer reports what no barrier separates."""
    for R in (1, 2, 7, 12):
        a = MATRICES[kind](R).float()
        assert_svd(a, *linalg_threads.jacobi_svd(a, groups, lanes))


def test_groups_do_not_change_a_bit():
    a = torch.randn(13, 13)
    alone = linalg_threads.jacobi_svd(a, 1, 1)[:3]
    assert all(torch.equal(x, y) for x, y in zip(alone, linalg_threads.jacobi_svd(a, 6, 1)[:3], strict=True))
