"""Bytes and FLOPs that a computation cannot do without, counted from shapes: the one home of these formulas.

Bytes are those that a single ideal implementation moves: every operand read once for each pass over it that cannot be shared with
another, every result written once, nothing in between stored that can be computed again. FLOPs are those of the matrix products (a
multiplication and an addition are two) and, where there are none, of the elementwise arithmetic. Drawing a dropout mask counts nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

FACTOR_BYTES = 4  # an adapter's factors and their gradients are float32 whatever the base is


@dataclass(frozen=True)
class Work:
    """
    bytes: read and written in all.   flops: of products in `dtype`.
    footprint: bytes of distinct memory, which decides which cache holds it; by default all of `bytes`.
    """

    bytes: int
    flops: int
    dtype: torch.dtype = torch.float32
    footprint: int | None = None

    @property
    def touched(self) -> int:
        return self.bytes if self.footprint is None else self.footprint

    def __add__(self, other: "Work") -> "Work":
        """Both, one after the other, over different memory."""
        return Work(self.bytes + other.bytes, self.flops + other.flops, self.dtype, self.touched + other.touched)


def layer(
    M: int, K: int, N: int, R: int, dtype: torch.dtype, *, bias: bool = True, siblings: int = 1, dx: bool = True
) -> Work:
    """
    Forward and backward (dx, dA, dB) of `siblings` adapted linears of one x (M, K), y (M, N) each; R = 0: the frozen linear.
    Without dx, of an x that nothing before it is trained for, W is not read again.

    bytes, e an element of x, W and y, f = 4 of the factors:
        forward     x once, W, bias, y written: e(MK + NK + N + MN); A, B read, S written: f(RK + RN + MR)
        backward    dy once, W, dx written: e(MN + NK + MK); x again for dA: e·MK; A, B, S read, dA, dB written: f(2RK + 2RN + MR)
    FLOPs: 4·M·N·K for y and dx; 6·M·R·(K + N): 2 for S and y, 2 for dS and dx, 2 for dA and dB.
    """
    e, f = dtype.itemsize, FACTOR_BYTES
    shared = e * M * K * (1 + dx + bool(R))
    own = e * (2 * M * N + (1 + dx) * N * K + N * bias) + f * (3 * R * (K + N) + 2 * M * R)
    footprint = e * M * K * (1 + dx) + siblings * (e * (2 * M * N + N * K + N * bias) + f * (2 * R * (K + N) + M * R))
    flops = 2 * M * N * K * (1 + dx) + 6 * M * R * (K + N) - (0 if dx else 2 * M * R * K)
    return Work(shared + siblings * own, siblings * flops, dtype, footprint)


def penalty(elements: int) -> Work:
    """NormAL's penalty with its gradient over factors of E elements: F read for the norms, read again, the gradient written: 12E bytes.
    FLOPs: 2E for the norms, E to scale."""
    return Work(3 * FACTOR_BYTES * elements, 3 * elements, footprint=2 * FACTOR_BYTES * elements)


def shrink(elements: int) -> Work:
    """The proximal step over factors of E elements: F read for the norms, then read and written: 12E bytes. FLOPs as `penalty`."""
    return Work(3 * FACTOR_BYTES * elements, 3 * elements, footprint=FACTOR_BYTES * elements)


def rank_change(kept: int) -> Work:
    """A rank change with AdamW that frees the rest: what stays, of factors and two moments, read and written: 24 bytes a number."""
    return Work(2 * 3 * FACTOR_BYTES * kept, 0)


def low_rank_svd(K: int, N: int, R: int) -> Work:
    """SVD of B A from its factors: A, B read, U, S, Vh written. FLOPs: R²(N + K) multiply-adds to orthogonalise and as many to rotate;
    what grows with R³ is left out."""
    return Work(FACTOR_BYTES * (2 * R * (K + N) + R), 4 * R * R * (K + N))


def randomized_svd(K: int, N: int, columns: int) -> Work:
    """
    Leading triplets of W (N, K) from a subspace of `columns` vectors: W is read twice, for a sketch and for the projection on it, each
    time as a product with all of them, and as many vectors of U and Vh are written. Iterations, which are the price of accuracy, and
    what orthogonalises the vectors are left out.
    """
    vectors = FACTOR_BYTES * columns * (N + K)
    footprint = FACTOR_BYTES * N * K + vectors
    return Work(FACTOR_BYTES * 2 * N * K + vectors, 4 * N * K * columns, footprint=footprint)


def adamw(elements: int) -> Work:
    """AdamW over E numbers: parameter, gradient, two moments read, three of them written: 28E bytes. FLOPs are not counted."""
    return Work(28 * elements, 0, footprint=16 * elements)


def training_step(
    linears: Iterable[tuple[int, int, int, bool, bool]], frozen: Iterable[tuple[int, int]], M: int, attention_flops: int
) -> Work:
    """
    A step in float32, forward and backward, and AdamW over the factors. Norms, activations, softmax and the embedding are not counted,
    so that this is a lower limit.

    Args:
        linears: (K, N, R, bias, dx) of every adapted linear.     frozen: (K, N) of the other linears that all M tokens go through.
        M: tokens.   attention_flops: see `attention`.
    """
    linears = list(linears)
    total = Work(0, attention_flops)
    for K, N, R, bias, dx in linears:
        total += layer(M, K, N, R, torch.float32, bias=bias, dx=dx)
    for K, N in frozen:
        total += layer(M, K, N, 0, torch.float32, bias=False)
    return total + adamw(sum(R * (K + N) for K, N, R, *_ in linears))


def attention(M: int, tokens: int, width: int, blocks: int, *, causal: bool = False) -> int:
    """
    FLOPs of QKᵀ and of its product with V, for texts of `tokens` tokens, M in all: 4·M·tokens·width forward, twice that backward.
    Causal: a token sees itself and those before it, (tokens + 1) / 2 in the mean.
    """
    return blocks * (6 * M * (tokens + 1) * width if causal else 12 * M * tokens * width)
