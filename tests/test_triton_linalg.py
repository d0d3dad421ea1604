"""Gram matrices, CholeskyQR2, SVD and subspace overlap beside the Triton kernels: on a CUDA GPU, or in the interpreter."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from numerics import FLOOR, assert_accurate, laid_out
from test_jacobi_svd import MATRICES, with_values
from test_low_rank_svd import assert_svd
from test_low_rank_svd import sample as factors
from test_subspace_overlap import bases, definition
from test_triton_kernels import DEVICE, LAYOUTS, pytestmark  # noqa: F401 - a mark

from adaptlora.kernels import cholesky_qr, gram, jacobi_svd, small_matrices
from adaptlora.kernels import subspace_overlap as overlap
from adaptlora.ops import _backend, randomized_svd, randomized_svd_ref, subspace_overlap

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# (b, n, l): below, at and above the widths of the tiles.
SIZES = [(1, 1, 1), (2, 13, 3), (3, 32, 16), (1, 100, 17), (2, 63, 33), (1, 70, 70), (1, 200, 130)]


@pytest.fixture
def on_triton(monkeypatch):
    monkeypatch.setenv("ADAPTLORA_BACKEND", "triton")


@pytest.fixture
def lapack(monkeypatch):
    """Shapes of the batches that torch's own factorizations are given."""
    given = []
    for name in ("qr", "svd"):
        function = getattr(torch.linalg, name)

        def watch(matrix, *args, function=function, **options):
            if matrix.dim() == 3:
                given.append(tuple(matrix.shape))
            return function(matrix, *args, **options)

        monkeypatch.setattr(torch.linalg, name, watch)
    return given


def tall(n: int, size: int, condition: float) -> torch.Tensor:
    Q = torch.linalg.qr(torch.randn(n, size, dtype=FP64)).Q
    V = torch.linalg.qr(torch.randn(size, size, dtype=FP64)).Q
    return (Q * torch.logspace(0, -math.log10(condition), size, dtype=FP64)) @ V


def assert_qr(X, Q, R) -> None:
    """Beside torch's QR in float32: orthogonality and product no worse than twice its errors and a rounding of each sum."""
    (n, size), exact = X.shape, X.double()
    assert (Q.shape, R.shape, Q.dtype, R.dtype) == ((n, min(n, size)), (min(n, size), size), FP32, FP32)
    assert torch.equal(R, R.triu())
    eager = torch.linalg.qr(X)
    for ours, theirs in (
        (_orthogonality(Q), _orthogonality(eager.Q)),
        (_product(exact, Q, R), _product(exact, *eager)),
    ):
        assert ours <= 2 * theirs + FLOOR[FP32], (ours, theirs)


def _orthogonality(Q) -> float:
    return torch.linalg.matrix_norm(
        Q.double().mT @ Q.double() - torch.eye(Q.shape[1], dtype=FP64, device=Q.device)
    ).item()


def _product(exact, Q, R) -> float:
    return (
        torch.linalg.matrix_norm(Q.double() @ R.double() - exact) / torch.linalg.matrix_norm(exact).clamp_min(1e-300)
    ).item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gram(size, layout):
    X = laid_out(torch.randn(size, device=DEVICE), layout)
    exact = X.double().mT @ X.double()
    assert_accurate("G", gram.gram(X), exact, exact)


@pytest.mark.parametrize("multiprocessors", [1, 3, 1000])
def test_gram_in_any_number_of_parts(multiprocessors, monkeypatch):
    monkeypatch.setattr(gram, "multiprocessors", lambda device: multiprocessors)
    X = torch.randn(2, 301, 20, device=DEVICE)
    exact = X.double().mT @ X.double()
    assert_accurate("G", gram.gram(X), exact, exact)


def test_gram_where_triton_has_no_float64_products(monkeypatch):
    monkeypatch.setattr(gram, "capability", lambda device: 100)
    X = torch.randn(2, 30, 7, device=DEVICE)
    assert torch.equal(gram.gram(X), X.double().mT @ X.double())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_qr(lapack, size, layout):
    X = laid_out(torch.randn(size, device=DEVICE), layout)
    Q, R = cholesky_qr.qr(X)
    assert not lapack
    for i in range(len(X)):
        assert_qr(X[i], Q[i], R[i])
    assert (R.diagonal(dim1=1, dim2=2) > 0).all()


@pytest.mark.parametrize("condition", [1, 1e3, 1e6])
def test_qr_holds_up_to_a_condition_of_a_million(lapack, condition):
    X = torch.stack([tall(300, 24, condition) for _ in range(2)]).to(DEVICE, FP32)
    Q, R = cholesky_qr.qr(X)
    assert not lapack
    for i in range(2):
        assert_qr(X[i], Q[i], R[i])


def test_qr_where_the_triangle_amplifies_errors(lapack):
    """|R⁻¹| |R| of a triangle of ones and minus ones is about 2^l: an error of X R⁻¹ in float32 comes back that much larger."""
    R = 2 * torch.eye(18, dtype=FP64) - torch.ones(18, 18, dtype=FP64).triu()
    X = (tall(90, 18, 1) @ R).to(DEVICE, FP32)
    Q, found = cholesky_qr.qr(X[None])
    assert not lapack
    assert_qr(X, Q[0], found[0])


def test_qr_of_columns_of_any_length(lapack):
    X = torch.randn(1, 90, 12, device=DEVICE) * torch.logspace(-30, 30, 12, device=DEVICE)
    Q, R = cholesky_qr.qr(X)
    assert not lapack
    assert _orthogonality(Q[0]) <= 1e-6
    lengths = torch.linalg.vector_norm(X[0].double(), dim=0)
    assert ((Q[0].double() @ R[0].double() - X[0]) / lengths).abs().max() <= 1e-6


def test_qr_leaves_to_torch_what_it_cannot_do(lapack):
    zero, dependent = torch.zeros(50, 6), torch.randn(50, 6)
    dependent[:, 4] = 2 * dependent[:, 1]
    X = torch.stack([torch.randn(50, 6), zero, dependent, tall(50, 6, 1e12).float()]).to(DEVICE)
    Q, R = cholesky_qr.qr(X)
    assert lapack == [(3, 50, 6)]
    for i in range(4):
        assert_qr(X[i], Q[i], R[i])


@pytest.mark.parametrize("shape", [(2, 5, 9), (1, 300, 257), (0, 5, 3), (2, 5, 0)], ids=str)
def test_qr_of_other_shapes_is_torchs(lapack, shape):
    X = torch.randn(shape, device=DEVICE)
    Q, R = cholesky_qr.qr(X)
    assert lapack == [shape]
    for i in range(len(X)):
        assert_qr(X[i], Q[i], R[i])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("R", [1, 2, 33])
def test_svd(lapack, R, layout):
    core = laid_out(torch.stack([make(R) for make in MATRICES.values()]).to(DEVICE, FP32), layout)
    U, S, Vh = jacobi_svd.svd(core)
    assert not lapack
    exact = torch.linalg.svdvals(core.double())
    largest = exact[:, :1].clamp_min(torch.finfo(FP32).tiny)
    identity = torch.eye(R, device=DEVICE)
    assert ((S - exact).abs() <= 1e-5 * largest).all()
    assert (U.mT @ U - identity).abs().max() <= 1e-5 and (Vh @ Vh.mT - identity).abs().max() <= 1e-5
    product = (U.double() * S.double()[:, None]) @ Vh.double()
    assert ((product - core).abs() <= 1e-5 * largest[..., None]).all()


@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 9, 5), (1, 257, 257), (0, 5, 5), (2, 0, 0)], ids=str)
def test_svd_of_other_shapes_is_torchs(lapack, shape):
    core = torch.randn(shape, device=DEVICE)
    U, S, Vh = jacobi_svd.svd(core)
    assert lapack == [shape]
    if core.numel():
        product = torch.linalg.matrix_norm((U * S[:, None]).double() @ Vh.double() - core)
        assert (product <= 1e-5 * torch.linalg.matrix_norm(core)).all()


def test_svd_that_does_not_converge_is_torchs(lapack, monkeypatch):
    core = torch.stack([with_values(torch.linspace(1, 2, 7, dtype=FP64)) for _ in range(3)]).to(DEVICE, FP32)
    owner, name = (jacobi_svd, "_jacobi_svd_cuda") if DEVICE == "cuda" else (_backend.extension(), "jacobi_svd")
    solver = getattr(owner, name)

    def fails(matrices):
        parts = solver(matrices)
        for part in parts:
            part[1] = -1
        return parts

    monkeypatch.setattr(owner, name, fails)
    U, S, Vh = jacobi_svd.svd(core)
    assert lapack == [(1, 7, 7)]
    assert ((U * S[:, None]) @ Vh - core).abs().max() <= 1e-5


def test_without_libraries_torch_factorizes(lapack, monkeypatch):
    for module in (cholesky_qr, jacobi_svd):
        monkeypatch.setattr(module, "is_built", lambda tensor: False)
    cholesky_qr.qr(torch.randn(1, 9, 4, device=DEVICE))
    jacobi_svd.svd(torch.randn(1, 4, 4, device=DEVICE))
    assert lapack == [(1, 9, 4), (1, 4, 4)]
    assert small_matrices.cuda_library(torch.ones(1)) is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(50, 8, 8), (63, 1, 33), (130, 33, 13), (64, 64, 70)], ids=str)
def test_subspace_overlap(on_triton, shape, dtype, layout):
    N, m, r = shape
    U, U_base = (basis.to(DEVICE) for basis in bases((2, N, m), (2, N, r), dtype=dtype))
    U, U_base = laid_out(U, layout), laid_out(U_base, layout)
    exact, eager = definition(U.double(), U_base.double()), definition(U.float(), U_base.float())
    assert_accurate("q", subspace_overlap(U, U_base), exact, eager)
    assert_accurate("q of one", subspace_overlap(U[1], U_base[1]), exact[1], eager[1])


@pytest.mark.parametrize("shape", [(0, 3, 4), (9, 0, 4), (9, 3, 0)], ids=str)
def test_subspace_overlap_of_nothing(shape):
    N, m, r = shape
    q = overlap.subspace_overlap(torch.ones(2, N, m, device=DEVICE), torch.ones(2, N, r, device=DEVICE))
    assert torch.equal(q, torch.zeros(2, m, device=DEVICE))


def test_subspace_overlap_of_many_leading_dimensions(on_triton):
    U, U_base = (basis.to(DEVICE) for basis in bases((2, 3, 40, 5), (2, 3, 40, 7)))
    exact = definition(U.double(), U_base.double())
    assert_accurate("q", subspace_overlap(U, U_base), exact, definition(U, U_base))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_low_rank_svd(on_triton, lapack, layout, dtype):
    lora_As, lora_Bs = factors(dtype=dtype, layout=layout)
    assert_svd([A.to(DEVICE) for A in lora_As], [B.to(DEVICE) for B in lora_Bs])


def test_randomized_svd(on_triton):
    W = tall(90, 40, 1e8).to(DEVICE, FP32)
    (found,), (exact,) = randomized_svd([W], 5), randomized_svd_ref([W.double()], 5)
    assert found.residual <= 1e-5
    assert (found.S - exact.S).abs().max() <= 1e-5 * exact.S[0]
    assert ((exact.U.mT @ found.U.double()).abs().diagonal() >= 1 - 1e-5).all()
