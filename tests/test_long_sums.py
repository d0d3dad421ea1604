"""The gradients of the factors are sums over all tokens; their error must not grow with the number of tokens."""

import pytest
import torch
from numerics import assert_accurate, errors

from adaptlora.ops import lora_linear

K, N, R = 48, 40, 3


@pytest.fixture
def one_thread():
    """Several threads sum parts of their own: one has the longest sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gradients(M: int, dtype: torch.dtype, layer) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(M)
    x, dy, W, A, B = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((M, K), (M, N), (N, K), (R, K), (N, R))
    )
    A.requires_grad_()
    B.requires_grad_()
    return torch.autograd.grad(layer(x, W, A, B), (A, B), dy)


def plain(x, W, A, B):
    return x @ W.t() + 2 * (x @ A.t()) @ B.t()


def fused(x, W, A, B):
    return lora_linear(x, W, None, A, B, scaling=2.0)


def test_errors_do_not_grow_with_the_tokens(backend, one_thread):
    found = {}
    for M in (250, 16_000, 16_013):  # less than a run of tiles; whole runs; a part of a tile at the end
        exact, eager, ours = (
            gradients(M, dtype, layer)
            for dtype, layer in ((torch.float64, plain), (torch.float32, plain), (torch.float32, fused))
        )
        for name, *three in zip(("dA", "dB"), ours, exact, eager, strict=True):
            assert_accurate(f"{name}, M = {M}", *three)
        found[M] = [errors(mine, right)[0] for mine, right in zip(ours, exact, strict=True)]
    if backend == "cpp":
        for M in (16_000, 16_013):
            assert all(long < 2 * short for long, short in zip(found[M], found[250], strict=True)), found
