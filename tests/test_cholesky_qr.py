"""The triangular factor of a Gram matrix and its inverse against float64: the C++ function, and a CUDA block's schedule on threads."""

import math

import linalg_threads
import pytest
import torch

from adaptlora.ops import _backend

FP32, FP64 = torch.float32, torch.float64
EPS = {dtype: torch.finfo(dtype).eps for dtype in (FP32, FP64)}


@pytest.fixture
def cholesky_inverse():
    if _backend.extension() is None:
        pytest.skip("the C++ extension adaptlora._C is not built")
    return _backend.extension().cholesky_inverse


def tall(size: int, condition: float) -> torch.Tensor:
    """(3 size + 5, size) of that condition, its singular values evenly apart on a logarithmic scale."""
    Q, V = (torch.linalg.qr(torch.randn(n, size, dtype=FP64)).Q for n in (3 * size + 5, size))
    return (Q * torch.logspace(0, -math.log10(condition), size, dtype=FP64)) @ V


def assert_factor(gram, R, inverse, tolerance) -> None:
    """gram = RᵀR and R R⁻¹ = 1, triangular both; as Cholesky does it, errors are those of a matrix with a diagonal of ones."""
    scale = gram.double().diagonal().sqrt()
    exact, R64, inverse64 = (part.double() for part in (gram, R, inverse))
    assert torch.equal(R, R.triu()) and torch.equal(inverse, inverse.triu()) and (R.diagonal() > 0).all()
    assert ((R64.mT @ R64 - exact).abs() / scale / scale[:, None]).max() <= tolerance
    identity = torch.eye(len(R), dtype=FP64)
    assert ((inverse64 @ R64 - identity).abs() <= tolerance * (inverse64.abs() @ R64.abs() + identity)).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 33, 64, 256])
def test_factor(cholesky_inverse, size, dtype):
    X = torch.stack([tall(size, condition) for condition in (1, 10, 100)])
    gram = (X.mT @ X).to(dtype)
    R, inverse, condition = cholesky_inverse(gram)
    for i in range(3):
        assert_factor(gram[i], R[i], inverse[i], 4 * size * EPS[dtype])
    assert condition[0].item() == pytest.approx(1, rel=1e-4) and (condition <= 110).all()
    assert size < 3 or (condition.diff() > 0).all()


def test_only_the_upper_triangle_is_read_and_columns_may_differ_in_length(cholesky_inverse):
    X = tall(20, 10) * torch.logspace(-100, 100, 20, dtype=FP64)
    gram = X.mT @ X
    R, inverse, condition = (
        part[0] for part in cholesky_inverse(gram.triu().add(torch.full_like(gram, math.nan).tril(-1))[None])
    )
    assert_factor(gram, R, inverse, 80 * EPS[FP64])
    assert 1 <= condition <= 100


@pytest.mark.parametrize(
    "kind", ["zero", "zero column", "equal columns", "too ill-conditioned", "indefinite", "NaN", "infinite"]
)
def test_singular(cholesky_inverse, kind):
    X = tall(9, 1e12 if kind == "too ill-conditioned" else 2)
    if kind == "zero":
        X.zero_()
    elif kind == "zero column":
        X[:, 4] = 0
    elif kind == "equal columns":
        X[:, 4] = X[:, 2]
    gram = torch.stack([tall(9, 2), X])
    gram = gram.mT @ gram
    gram[1] *= -1 if kind == "indefinite" else 1
    if kind in ("NaN", "infinite"):
        gram[1, 3, 3] = math.nan if kind == "NaN" else math.inf
    R, inverse, condition = cholesky_inverse(gram)
    assert_factor(gram[0], R[0], inverse[0], 40 * EPS[FP64])
    assert condition[0] < 3 and condition[1] == math.inf
    assert not R[1].any() and not inverse[1].any()


def test_nothing(cholesky_inverse):
    for shape in ((0, 4, 4), (2, 0, 0)):
        R, inverse, condition = cholesky_inverse(torch.zeros(shape, dtype=FP64))
        assert (R.shape, inverse.shape, condition.shape) == (shape, shape, shape[:1])


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.ones(3, 3), r"gram must have shape \(b, l, l\)"),
        (torch.ones(1, 3, 4), r"gram must have shape \(b, l, l\) on the CPU, got \[1, 3, 4\]"),
        (torch.ones(1, 3, 3, dtype=torch.float16), "gram must be float32 or float64, got Half"),
        (torch.ones(1, 257, 257), "gram must have at most 256 rows, got 257"),
    ],
    ids=range(4),
)
def test_bad_input(cholesky_inverse, gram, message):
    with pytest.raises(RuntimeError, match=f"^cholesky_inverse: {message}"):
        cholesky_inverse(gram)


@pytest.mark.parametrize(("groups", "lanes"), [(1, 1), (5, 1), (2, 3), (4, 2)])
def test_schedule_of_a_block(groups, lanes):
    """ThreadSanitizer reports what no barrier separates."""
    for size in (1, 2, 7, 12):
        X = tall(size, 30)
        gram = X.mT @ X
        R, inverse, condition = linalg_threads.cholesky_inverse(gram, groups, lanes)
        assert_factor(gram, R, inverse, 4 * size * EPS[FP64])
        assert condition <= 31
    R, inverse, condition = linalg_threads.cholesky_inverse(torch.zeros(5, 5, dtype=FP64), groups, lanes)
    assert not R.any() and not inverse.any() and condition == math.inf
