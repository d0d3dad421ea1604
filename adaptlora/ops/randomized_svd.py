"""The leading singular triplets of dense matrices: by randomized subspace iteration, on a CPU many of them by an eigenproblem."""

import math
from typing import NamedTuple

import torch

from ..pool import over
from ._checks import check_finite, check_finite_number, check_tensor
from ._factor import grouped, lapack, qr, stacked, svd, unstacked
from ._gram_svd import gaussian, gram_svd
from ._library import accumulation_dtype, library, no_autocast, register


class RandomizedSVD(NamedTuple):
    """U (N, k), S (k,) descending, Vh (k, K), and the residual: how far U is from a singular subspace, in parts of S[0]."""

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    residual: float


def randomized_svd_ref(weights, rank) -> list[RandomizedSVD]:
    """The triplets that `randomized_svd` approaches: a full SVD, cut, float64 included."""
    results = []
    for W in weights:
        U, S, Vh = torch.linalg.svd(W.to(accumulation_dtype(W.dtype)), full_matrices=False)
        results.append(RandomizedSVD(U[:, :rank], S[:rank], Vh[:rank], 0.0))
    return results


def _subspace_iteration(W, rank: int, columns: int, n_iter: int, tol: float, seed: int):
    """
    W (b, N, K) → U, S, Vh of `columns` approximate triplets, residual (b,)          [Halko et al., arXiv:0909.4061, algorithm 4.4,
    with the Chebyshev filter of Zhou & Saad, SIAM J. Matrix Anal. Appl. 29 (2007), one factor at a time]
    """
    Q, _ = qr(W @ gaussian(W.shape[-1], columns, seed, W))
    Z = (Q.mT @ W).mT  # faster than Wᵀ Q
    for i in range(n_iter):
        Y = W @ Z
        H = Z.mT @ Z
        if (
            i and i & (i - 1) == 0
        ):  # what is missed costs as much as half a product: looked at after 1, 2, 4, 8, … iterations
            scale = H.diagonal(dim1=-2, dim2=-1).sqrt()[..., None, :]
            if _residual(((Y - Q @ H) / scale)[..., :rank], Z).max() <= tol:
                break
        # The smallest Ritz value is no larger than what the sketch has no room for. With the nodes of a Chebyshev polynomial on
        # [0, bound] as shifts of W Wᵀ all of [0, bound] is damped alike, and what is above grows as fast as a polynomial can.
        bound = torch.linalg.eigvalsh(H)[..., :1, None].clamp(min=0)
        node = (1 - math.cos(math.pi * (i + 0.5) / n_iter)) / 2
        Q, _ = qr(Y - node * bound * Q)
        Z = (Q.mT @ W).mT
    V, T = qr(Z)
    Y = W @ V
    # QᵀW = TᵀVᵀ, so this is (I − QQᵀ) W V: zero where Q spans a singular subspace.
    missed = Y - Q @ T.mT
    Q, R = qr(Y)
    X, S, Zh = svd(R)
    residual = _residual(missed @ Zh[..., :rank, :].mT, S[..., :1, None])
    return Q @ X, S, Zh @ V.mT, residual


def _scale(W: torch.Tensor) -> torch.Tensor | None:
    """Largest elements (b, 1, 1), where squares of the largest or of small singular values would leave the dtype's range; else None."""
    least, most = W.flatten(1).aminmax(dim=-1)
    largest = torch.maximum(-least, most)
    bound = torch.finfo(W.dtype).max ** 0.2
    if ((largest < bound) & (largest > 1 / bound) | (largest == 0)).all():
        return None
    return torch.where(largest > 0, largest, 1)[:, None, None]


def _residual(missed: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """The largest column of what is missed, in parts of the largest column of `of`; 0 for zero matrices."""
    largest = [torch.linalg.vector_norm(columns, dim=-2).amax(-1) for columns in (missed, of)]
    return torch.where(largest[1] > 0, largest[0] / largest[1], 0)


def _in_range(factorize, W: torch.Tensor, *options):
    """`factorize(W, *options)` → U, S, Vh, residual (b,), given W (b, N, K) whose squares are in the dtype's range."""
    scale = _scale(W)
    if scale is None:
        return factorize(W, *options)
    U, S, Vh, residual = factorize(W / scale, *options)
    return U, S * scale[..., 0], Vh, residual


def _eigenproblem(W: torch.Tensor, k: int, seed: int):
    return tuple(part[None] for part in gram_svd(W[0], k, seed))


def _eigenproblem_is_cheaper(W: torch.Tensor, rank: int, n_iter: int) -> bool:
    """Measured with n_iter=4: from an eighth (192×576) to a quarter (576×576) of the smaller side on. A bare sketch stays one."""
    return n_iter > 0 and 5 * rank > min(W.shape) and lapack(W)


@register(
    "randomized_svd(Tensor[] weights, int rank, int oversample, int n_iter, float tol, int seed)"
    " -> (Tensor[], Tensor[], Tensor[], Tensor)"
)
def _randomized_svd(weights, rank, oversample, n_iter, tol, seed):
    results, alone = [None] * len(weights), []
    for indices in grouped(weights):
        first = weights[indices[0]]
        k = min(rank, *first.shape)
        columns = min(rank + oversample, *first.shape)
        if _eigenproblem_is_cheaper(first, rank, n_iter):
            alone += indices
            continue
        with no_autocast(first):
            W = stacked([weights[i] for i in indices], accumulation_dtype(first.dtype))
            U, S, Vh, residual = _in_range(_subspace_iteration, W, k, columns, n_iter, tol, seed)
        parts = unstacked(U[..., :k]), unstacked(S[..., :k]), unstacked(Vh[..., :k, :]), residual.double()
        for i, *part in zip(indices, *parts, strict=True):
            results[i] = part

    @torch.no_grad()  # gradients and autocast are a thread's own
    def one(i):
        W = weights[i]
        with no_autocast(W):
            parts = _in_range(_eigenproblem, stacked([W], accumulation_dtype(W.dtype)), min(rank, *W.shape), seed)
        U, S, Vh, residual = (part[0] for part in parts)
        return U, S, Vh, residual.double()

    for i, part in over(one, alone) if len(alone) > 1 else ((i, one(i)) for i in alone):
        results[i] = part
    U, S, Vh, residuals = zip(*results, strict=True)
    return list(U), list(S), list(Vh), torch.stack(residuals)


@torch.library.register_fake("adaptlora::randomized_svd", lib=library)
def _(weights, rank, oversample, n_iter, tol, seed):
    U, S, Vh = [], [], []
    for W in weights:
        acc, k = accumulation_dtype(W.dtype), min(rank, *W.shape)
        U.append(W.new_empty(W.shape[0], k, dtype=acc))
        S.append(W.new_empty(k, dtype=acc))
        Vh.append(W.new_empty(k, W.shape[1], dtype=acc))
    return U, S, Vh, weights[0].new_empty(len(weights), dtype=torch.float64)


@torch.no_grad()
def randomized_svd(weights, rank, *, oversample=16, n_iter=4, tol=1e-5, seed=0) -> list[RandomizedSVD]:
    """
    W ≈ U diag(S) Vh, the `rank` leading triplets, by randomized subspace iteration          [Halko et al., arXiv:0909.4061]

    A Gaussian sketch of rank + oversample columns, then up to `n_iter` iterations (W Wᵀ − shift) ·, re-orthonormalised each time, whose
    shifts make of them a Chebyshev polynomial: several times as effective as powers of W Wᵀ. Weights of equal shape are one batch. The
    sketch depends on `seed` and shape alone, so equal calls give equal bits.

    On a CPU, where rank > min(N_i, K_i) / 5 and n_iter > 0, the symmetric eigenproblem of the smaller side is cheaper than iterations, and
    as accurate as an SVD, which takes over where it would not be (`gram_svd`); several such weights are factorized at once, a thread each.
    oversample, n_iter and tol then mean nothing.

    Args:
        weights: list of (N_i, K_i), fp32 / fp64, or bf16 / fp16 (computed in fp32), one device, any strides.
        rank: number of triplets, ≥ 1; of a matrix with fewer rows or columns, as many as those.
        oversample: further columns of the sketch, ≥ 0.   n_iter: most iterations, ≥ 0.
        tol: stop earlier, after 1, 2, 4, … iterations, where the residual is below it.   seed: of the sketch.
    Returns: list of RandomizedSVD(U (N_i, k), S (k,), Vh (k, K_i), residual), fp32 (fp64 for fp64), k = min(rank, N_i, K_i). residual is
        the largest ‖(I − QQᵀ) W v_i‖ / S[0], i ≤ k, with Q the subspace before the last product with W: an upper estimate of what U
        lacks; of an eigenproblem the largest ‖Wᵀ u_i − σ_i v_i‖ or ‖W v_i − σ_i u_i‖, estimated. Not differentiable.
    Raises: ValueError (shapes, devices, rank, options, NaN or infinite values), TypeError (dtype).   Deterministic: yes.
    """
    weights = list(weights)
    for i, W in enumerate(weights):
        check_tensor("randomized_svd", f"weights[{i}]", W, 2)
        if 0 in W.shape:
            raise ValueError(f"randomized_svd: weights[{i}] must have rows and columns, got shape {tuple(W.shape)}")
        if W.device != weights[0].device:
            raise ValueError(
                f"randomized_svd: weights[{i}] must be on the device of weights[0], {weights[0].device}, got {W.device}"
            )
    for name, value, least in (
        ("rank", rank, 1),
        ("oversample", oversample, 0),
        ("n_iter", n_iter, 0),
        ("seed", seed, None),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
            rule = "an integer" if least is None else f"an integer ≥ {least}"
            raise ValueError(f"randomized_svd: {name} must be {rule}, got {value!r}")
    check_finite_number("randomized_svd", "tol", tol)
    for i, W in enumerate(weights):
        check_finite("randomized_svd", f"weights[{i}]", W)
    if not weights:
        return []
    *parts, residuals = torch.ops.adaptlora.randomized_svd(weights, rank, oversample, n_iter, float(tol), seed)
    return [RandomizedSVD(*part) for part in zip(*parts, residuals.tolist(), strict=True)]
