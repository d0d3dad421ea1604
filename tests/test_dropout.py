"""The dropout mask: Philox itself, the layout of its counters, its statistics, and the same bits from every backend."""

import pytest
import torch

from adaptlora.ops import _backend, lora_linear
from adaptlora.ops._dropout import as_seed, dropout_keep_ref, new_seed, philox, threshold

MASK = 0xFFFFFFFF
# Known-answer tests of Random123 (kat_vectors, philox4x32 10): counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([MASK] * 4, [MASK] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return value - (1 << 64) if value >> 63 else value


def seed_of(key: list[int]) -> torch.Tensor:
    return torch.tensor(signed(key[1] << 32 | key[0]))


def philox_in_integers(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's unbounded integers, written from the paper and apart from the package's."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = right >> 32 ^ c1 ^ k0, right & MASK, left >> 32 ^ c3 ^ k1, left & MASK
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return [c0, c1, c2, c3]


def keep_of(backend: str, seed: torch.Tensor, M: int, K: int, p: float) -> torch.Tensor:
    if backend == "cpp":
        return _backend.extension().dropout_keep(seed, M, K, threshold(p))
    return dropout_keep_ref(seed, M, K, p)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    words = philox([torch.tensor(word) for word in counter], seed_of(key))
    assert " ".join(f"{word.item():08x}" for word in words) == answer
    assert " ".join(f"{word:08x}" for word in philox_in_integers(counter, key)) == answer


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
@pytest.mark.parametrize(("M", "K"), [(1, 1), (3, 4), (5, 7), (2, 33)])
def test_mask_layout(backend, seed, M, K):
    """Element (m, k) is lane k & 3 of counter (k >> 2, m, 0, 0), kept when its upper 24 bits reach the threshold."""
    p = 0.3
    key = [seed & MASK, seed >> 32 & MASK]
    expected = [
        [philox_in_integers([k >> 2, m, 0, 0], key)[k & 3] >> 8 >= threshold(p) for k in range(K)] for m in range(M)
    ]
    keep = keep_of(backend, torch.tensor(seed), M, K, p)
    assert keep.dtype == torch.bool
    assert keep.tolist() == expected


@pytest.mark.skipif(_backend.extension() is None, reason="the C++ extension adaptlora._C is not built")
@pytest.mark.parametrize("p", [0.0, 1e-7, 0.05, 0.5, 0.999, 1 - 2**-24])
@pytest.mark.parametrize(("M", "K"), [(1, 130), (67, 63), (300, 17)])
def test_extension_makes_the_same_mask(p, M, K):
    seed = new_seed(torch.device("cpu"))
    assert torch.equal(keep_of("cpp", seed, M, K, p), dropout_keep_ref(seed, M, K, p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_applies_exactly_this_mask(backend, dtype):
    """With W = 0 and A = B = I the layer is its dropout, forward and backward."""
    M, K, p = 37, 45, 0.3
    x = torch.ones(M, K, dtype=dtype, requires_grad=True)
    eye = torch.eye(K, dtype=dtype)
    y = lora_linear(x, torch.zeros(K, K, dtype=dtype), None, eye, eye, dropout_p=p, seed=11)
    y.backward(torch.ones_like(y))
    keep = dropout_keep_ref(torch.tensor(11), M, K, p)
    for out in (y, x.grad):
        assert torch.equal(out != 0, keep)
        torch.testing.assert_close(out, keep.to(dtype) / (1 - p))


def test_leading_dimensions_count_as_rows(backend):
    x, eye, weight = torch.ones(2, 3, 8), torch.eye(8), torch.zeros(8, 8)
    y = lora_linear(x, weight, None, eye, eye, dropout_p=0.5, seed=5)
    assert torch.equal(y.reshape(6, 8), lora_linear(x.reshape(6, 8), weight, None, eye, eye, dropout_p=0.5, seed=5))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.3, 0.5, 0.9])
def test_keep_rate(p):
    M, K = 512, 511
    keep = dropout_keep_ref(torch.tensor(3), M, K, p).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(keep.mean().item() - (1 - p)) < 5 * sigma / (M * K) ** 0.5
    for dim, count in ((0, M), (1, K)):
        rates = (keep.mean(dim) - (1 - p)) / (sigma / count**0.5)
        assert rates.abs().max() < 6, "a row or column is kept too often or too seldom"
        assert abs(rates.pow(2).mean() - 1) < 0.5, "rows or columns vary more or less than independent ones"


@pytest.mark.parametrize(
    ("rows", "columns"), [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (2, 0), (16, 0), (0, 64)]
)
def test_neighbours_are_independent(rows, columns):
    p, M, K = 0.5, 512, 512
    keep = dropout_keep_ref(torch.tensor(8), M, K, p).double() * 2 - 1
    products = keep[rows:, columns:] * keep[: M - rows, : K - columns]
    assert abs(products.mean().item()) < 5 / products.numel() ** 0.5


@pytest.mark.parametrize("other", [1, -1, 1 << 32, 1 << 62], ids=hex)
def test_different_seeds_are_independent(other):
    p, M, K = 0.3, 256, 256
    masks = [dropout_keep_ref(torch.tensor(seed), M, K, p) for seed in (0, other)]
    agree = p**2 + (1 - p) ** 2
    rate = (masks[0] == masks[1]).double().mean().item()
    assert abs(rate - agree) < 5 * (agree * (1 - agree) / (M * K)) ** 0.5


def test_smaller_mask_is_a_corner_of_a_larger_one(backend):
    seed = torch.tensor(21)
    large = keep_of(backend, seed, 70, 90, 0.4)
    assert torch.equal(keep_of(backend, seed, 41, 33, 0.4), large[:41, :33])


def test_threshold():
    assert [threshold(p) for p in (0.0, 0.5, 0.25, 2**-24)] == [0, 1 << 23, 1 << 22, 1]
    assert all(abs(threshold(p) / 2**24 - p) <= 2**-25 for p in (0.1, 0.3, 0.05, 1 / 3))


def test_seed_forms():
    device = torch.device("cpu")
    assert torch.equal(as_seed("op", 7, device), torch.tensor(7))
    assert as_seed("op", -1, device).item() == -1
    given = torch.tensor(9)
    assert as_seed("op", given, device) is given
    torch.manual_seed(4)
    drawn = as_seed("op", None, device)
    torch.manual_seed(4)
    assert drawn == new_seed(device)
    assert drawn.dtype == torch.int64
    assert drawn.dim() == 0
    assert new_seed(device) != new_seed(device)
