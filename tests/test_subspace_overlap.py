"""subspace_overlap against its definition in float64."""

import pytest
import torch
from numerics import assert_accurate, laid_out

from adaptlora.ops import subspace_overlap, subspace_overlap_ref

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def bases(*shapes, dtype=FP32, layout="contiguous"):
    return [laid_out(torch.linalg.qr(torch.randn(shape)).Q.to(dtype), layout) for shape in shapes]


def definition(U, U_base):
    """Σ_j (u_i · w_j)², one vector of the base after the other."""
    return sum((U * w[..., None]).sum(-2).square() for w in U_base.unbind(-1)) if U_base.shape[-1] else U.sum(-2) * 0


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded", "strided"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("shape", [(50, 8, 8), (63, 1, 33), (500, 33, 13), (64, 64, 64)], ids=str)
def test_definition(shape, dtype, layout):
    N, m, r = shape
    U, U_base = bases((N, m), (N, r), dtype=dtype, layout=layout)
    acc = FP64 if dtype == FP64 else FP32
    exact = definition(U.double(), U_base.double())
    assert_accurate("q", subspace_overlap(U, U_base), exact, definition(U.to(acc), U_base.to(acc)), precision=acc)
    torch.testing.assert_close(subspace_overlap_ref(U.double(), U_base.double()), exact)


def test_batches():
    U, U_base = bases((2, 3, 40, 5), (2, 3, 40, 7))
    torch.testing.assert_close(subspace_overlap(U, U_base)[1, 2], subspace_overlap(U[1, 2], U_base[1, 2]))


def test_inside_and_outside():
    whole = torch.linalg.qr(torch.randn(40, 40, dtype=FP64)).Q
    q = subspace_overlap(whole[:, :6], whole[:, 3:20])
    torch.testing.assert_close(q, torch.tensor([0, 0, 0, 1, 1, 1], dtype=FP64), rtol=0, atol=1e-14)


def test_no_columns():
    assert subspace_overlap(torch.ones(5, 0), torch.ones(5, 2)).shape == (0,)
    assert torch.equal(subspace_overlap(torch.ones(5, 2), torch.ones(5, 0)), torch.zeros(2))


BAD = [
    ((torch.ones(5, 2), torch.ones(6, 2)), ValueError, r"U_base must have shape \(..., N, r\) with \(5,\) for"),
    ((torch.ones(5), torch.ones(5, 2)), ValueError, r"U must have shape \(..., N, columns\), got \(5,\)"),
    ((torch.ones(5, 2), torch.ones(5, 2, dtype=FP64)), TypeError, "U_base must have the dtype of U, torch.float32"),
    (
        (torch.ones(5, 2), torch.ones(5, 2, device="meta")),
        ValueError,
        "U_base must be on the device of U, cpu, got meta",
    ),
    ((torch.ones(5, 2), [1.0]), TypeError, "U_base must be a floating-point tensor, got list"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        subspace_overlap(*arguments)


def test_opcheck():
    torch.library.opcheck(torch.ops.adaptlora.subspace_overlap.default, tuple(bases((2, 9, 3), (2, 9, 4))))
