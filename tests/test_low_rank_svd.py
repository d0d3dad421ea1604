"""low_rank_svd against the SVD of the dense product in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import FLOOR, assert_accurate, laid_out

from adaptlora.ops import low_rank_svd, low_rank_svd_ref

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SHAPES = [
    (8, 63, 50),
    (1, 1, 1),
    (13, 500, 257),
    (0, 30, 20),
    (33, 64, 64),
    (8, 63, 50),
    (40, 30, 20),
    (5, 3, 90),
]  # (R, K, N)


def sample(shapes=SHAPES, dtype=FP32, layout="contiguous"):
    lora_As = [laid_out(torch.randn(R, K).to(dtype), layout) for R, K, _ in shapes]
    return lora_As, [laid_out(torch.randn(N, R).to(dtype), layout) for R, _, N in shapes]


def assert_svd(lora_As, lora_Bs, autocast=False) -> None:
    """Values, product and orthogonality of every module, by the tolerance rule beside torch's SVD of the product in the same dtype."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = low_rank_svd(lora_As, lora_Bs)
    for (U, S, Vh), A, B in zip(found, lora_As, lora_Bs, strict=True):
        N, R, K = *B.shape, A.shape[1]
        k = min(R, K, N)
        acc = FP64 if A.dtype == FP64 else FP32
        assert (U.shape, S.shape, Vh.shape) == ((N, k), (k,), (k, K)) and {U.dtype, S.dtype, Vh.dtype} == {acc}
        product = B.double() @ A.double()
        ((_, exact, _),) = low_rank_svd_ref([A.double()], [B.double()])
        (eager,) = low_rank_svd_ref([A.to(acc)], [B.to(acc)])
        assert_accurate("S", S, exact, eager.S)
        assert_accurate("U S Vh", (U * S) @ Vh, product, (eager.U * eager.S) @ eager.Vh)
        assert torch.equal(S, S.sort(descending=True).values)
        for name, basis in (("U", U), ("Vh", Vh.mT)):
            # As LAPACK: a few roundings for each of the sums.
            error = torch.linalg.matrix_norm(basis.mT @ basis - torch.eye(k, dtype=acc)).item()
            assert error <= 4 * math.sqrt(max(k, 1)) * FLOOR[acc], (name, error)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
def test_ragged_modules(dtype):
    assert_svd(*sample(dtype=dtype))


@pytest.mark.parametrize("layout", ["transposed", "padded", "strided"])
def test_any_strides(layout):
    assert_svd(*sample(layout=layout))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60), st.integers(1, 60)), max_size=5))
def test_any_shapes(shapes):
    torch.manual_seed(0)
    assert_svd(*sample(shapes))


def test_no_modules():
    assert low_rank_svd([], []) == []


@pytest.mark.parametrize("rank", [0, 1, 3], ids=lambda rank: f"rank {rank} of 8")
@pytest.mark.parametrize("where", ["zero vectors", "dependent vectors"])
def test_fewer_directions_than_vectors(where, rank):
    A, B = torch.randn(8, 60), torch.randn(50, 8)
    if where == "zero vectors":
        A[rank:], B[:, rank:] = 0, 0
    else:
        A = torch.randn(8, rank) @ torch.randn(rank, 60)
    assert_svd([A], [B])
    S = low_rank_svd([A], [B])[0].S
    assert (S[rank:] <= 1e-6 * max(S[0].item(), 1e-30)).all()


def test_equal_singular_values():
    A, B = torch.linalg.qr(torch.randn(60, 8)).Q.mT.contiguous(), torch.linalg.qr(torch.randn(50, 8)).Q
    assert_svd([A], [3 * B])


def test_far_apart_singular_values():
    A, B = torch.randn(8, 60), torch.randn(50, 8) * torch.logspace(0, -12, 8)
    assert_svd([A], [B])


def test_large_and_small_numbers():
    A, B = torch.randn(4, 30), torch.randn(20, 4)
    assert_svd([1e12 * A, 1e-12 * A], [1e12 * B, 1e-12 * B])


def test_batches_do_not_change_a_module_much_and_own_their_memory():
    lora_As, lora_Bs = sample([(8, 63, 50)] * 3)
    found = low_rank_svd(lora_As, lora_Bs)
    (alone,) = low_rank_svd(lora_As[1:2], lora_Bs[1:2])
    torch.testing.assert_close(found[1].S, alone.S)
    assert len({part.untyped_storage().data_ptr() for svd in found for part in svd}) == 9


def test_arguments_stay_as_they_are_and_nothing_is_recorded():
    lora_As, lora_Bs = sample([(8, 63, 50)])
    before = lora_As[0].clone()
    U, _, _ = low_rank_svd([lora_As[0].requires_grad_()], lora_Bs)[0]
    assert not U.requires_grad and torch.equal(lora_As[0].detach(), before)


BAD = [
    (([torch.ones(2, 3)], []), ValueError, r"low_rank_svd: lora_Bs must be as long as lora_As, 1, got 0"),
    (([torch.ones(2, 3)], [torch.ones(4, 3)]), ValueError, r"lora_B must have shape \(N, R\) with R=2"),
    (([torch.ones(2, 3, dtype=torch.int64)], [torch.ones(4, 2)]), TypeError, "lora_A must be float32"),
    (
        ([torch.tensor([[1.0, math.nan]])], [torch.ones(4, 1)]),
        ValueError,
        r"low_rank_svd: lora_As\[0\] must be finite, got 1 NaN or infinite values",
    ),
    (([torch.ones(1, 2)], [torch.full((4, 1), math.inf)]), ValueError, r"lora_Bs\[0\] must be finite, got 4"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        low_rank_svd(*arguments)


def test_autocast_leaves_the_precision_alone():
    assert_svd(*sample([(8, 63, 50)]), autocast=True)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.adaptlora.low_rank_svd.default, sample([(3, 7, 5), (3, 7, 5), (4, 2, 6)], dtype))
