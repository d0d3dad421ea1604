"""An update as an ordered sum of rank-one terms: which ones c of them are, for each way of counting."""

from typing import NamedTuple

import torch


class Components(NamedTuple):
    """
    B A = Σ_i left_i right_iᵀ up to rounding, of which c keeps the first c: left (N, k), right (k, K) with orthonormal rows;
    basis (N, k) with orthonormal columns, whose first c span the first c left vectors.
    """

    left: torch.Tensor
    right: torch.Tensor
    basis: torch.Tensor


def major(found, rank: int) -> Components:
    """The `rank` singular components, the largest first."""
    return Components(found.U[:, :rank] * found.S[:rank], found.Vh[:rank], found.U[:, :rank])


def minor(found, rank: int) -> Components:
    """The `rank` singular components, the smallest first."""
    backwards = torch.arange(rank - 1, -1, -1, device=found.S.device)
    return Components(found.U[:, backwards] * found.S[backwards], found.Vh[backwards], found.U[:, backwards])


def pca(found, rank: int) -> Components:
    """B A projected on the principal axes of its rows, the axis of most variance first: B A v_i v_iᵀ."""
    left = found.U[:, :rank] * found.S[:rank]
    axes = torch.linalg.svd(left - left.mean(0), full_matrices=False).Vh
    projected = left @ axes.mT
    return Components(projected, axes @ found.Vh[:rank], torch.linalg.qr(projected).Q)
