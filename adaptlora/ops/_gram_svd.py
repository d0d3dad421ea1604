"""Many leading singular triplets of one matrix, from the symmetric eigenproblem of its smaller side where that loses no digits."""

import torch

from ._factor import qr, svd

# In units of rounding: LAPACK's SVD of SmolLM2's weights leaves up to 20 of orthonormality and a residual of up to 12. Past the first
# U takes a QR, past the second the triplets are an SVD's.
_ORTHONORMAL = 32
_ACCURATE = 24
_PROBES = 16


def gaussian(rows: int, columns: int, seed: int, like: torch.Tensor) -> torch.Tensor:
    """The same numbers on every device, for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu").to(like)


def gram_svd(W: torch.Tensor, k: int, seed: int):
    """
    W (N, K) → U (N, k), S (k,) descending, Vh (k, K), residual ()

    M, the one of W and Wᵀ that is (m, n) with m ≥ n, has MᵀM = V Λ Vᵀ; σ_i = ‖M v_i‖, u_i = M v_i / σ_i of the k largest λ_i. Rounding
    E of MᵀM and of its eigenvectors, about ε σ_1², shows in u_iᵀ u_j as E_ij / σ_i σ_j: as the square of σ_1/σ_k. So U is measured, and is
    made of M V by QR where it is not orthonormal; what that moves, and E outside of V, is in the residual

        max_i max(‖Mᵀ u_i − σ_i v_i‖, ‖M v_i − σ_i u_i‖) / σ_1,

    and where that is not as small as rounding an SVD of M takes over. Norms are estimated by 16 random projections of seed `seed`.
    """
    M = W if W.shape[0] >= W.shape[1] else W.mT
    eps = torch.finfo(M.dtype).eps
    V = torch.linalg.eigh(_gram(M)).eigenvectors.mT[-k:].flip(0)
    U = V @ M.mT
    S = torch.linalg.vector_norm(U, dim=1)
    U /= S[:, None]
    probes = gaussian(sum(M.shape), _PROBES, seed, M).mT.split(M.shape, dim=1)
    if not _largest(probes[1][:, :k] @ U @ U.mT - probes[1][:, :k]) <= _ORTHONORMAL * eps:  # NaN where σ_i = 0
        Q, R = qr(M @ V.mT)
        S, U = R.diagonal().abs(), Q.mT * torch.where(R.diagonal() < 0, -1, 1)[:, None]
    S, U, V = _descending(S, U, V)
    residual = _residual(M, U, S, V, probes)
    if residual > _ACCURATE * eps:
        U, S, V = svd(M)
        U, S, V = U[:, :k].mT, S[:k], V[:k]
        residual = _residual(M, U, S, V, probes)
    left, right = (U, V) if M is W else (V, U)
    return left.mT.contiguous(), S, right.contiguous(), residual


def _gram(M: torch.Tensor) -> torch.Tensor:
    """MᵀM on and below the diagonal, which is what an eigensolver reads; above it what blocks of a quarter of the columns leave."""
    n = M.shape[1]
    G, width = M.new_zeros(n, n), -(-n // 4)
    for i in range(0, n, width):
        torch.mm(M[:, i:].mT, M[:, i : i + width], out=G[i:, i : i + width])
    return G


def _descending(S: torch.Tensor, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """S from its largest on, and the rows that belong to it, which are copied only where rounding has swapped neighbours."""
    if (S[1:] <= S[:-1]).all():
        return S, *rows
    S, order = S.sort(descending=True, stable=True)
    return S, *(matrix[order] for matrix in rows)


def _largest(projections: torch.Tensor) -> torch.Tensor:
    """The largest column's norm, of a matrix whose projections on Gaussian vectors are the rows."""
    return projections.square().mean(0).max().sqrt()


def _residual(M, U, S, V, probes) -> torch.Tensor:
    """`gram_svd`'s, from U (k, m), S (k,), V (k, n); 0 for zero matrices."""
    of_U, of_V = probes
    missed = torch.maximum(
        _largest(of_V @ M.mT @ U.mT - of_V @ V.mT * S),
        _largest(of_U @ M @ V.mT - of_U @ U.mT * S),
    )
    return torch.where(S[0] > 0, missed / S[0], 0)
