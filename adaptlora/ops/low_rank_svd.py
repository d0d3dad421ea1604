"""SVD of B A from its factors, for all modules: the (N, K) product is never formed."""

from typing import NamedTuple

import torch

from ._checks import check_factor_lists, check_finite
from ._factor import grouped, qr, stacked, svd, unstacked
from ._library import accumulation_dtype, library, no_autocast, register


class SVD(NamedTuple):
    """U (N, k) with orthonormal columns, S (k,) descending, Vh (k, K) with orthonormal rows."""

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor


def low_rank_svd_ref(lora_As, lora_Bs) -> list[SVD]:
    """`low_rank_svd` by its definition: the SVD of the dense product, float64 included."""
    results = []
    for A, B in zip(lora_As, lora_Bs, strict=True):
        acc = accumulation_dtype(A.dtype)
        U, S, Vh = torch.linalg.svd(B.to(acc) @ A.to(acc), full_matrices=False)
        k = _components(A, B)
        results.append(SVD(U[:, :k], S[:k], Vh[:k]))
    return results


def _components(lora_A, lora_B) -> int:
    return min(*lora_A.shape, lora_B.shape[0])


@register("low_rank_svd(Tensor[] lora_As, Tensor[] lora_Bs) -> (Tensor[], Tensor[], Tensor[])")
def _low_rank_svd(lora_As, lora_Bs):
    results = [None] * len(lora_As)
    for indices in grouped(lora_As, lora_Bs):
        acc = accumulation_dtype(lora_As[indices[0]].dtype)
        with no_autocast(lora_As[indices[0]]):
            A, B = (stacked([factors[i] for i in indices], acc) for factors in (lora_As, lora_Bs))
            Q_B, R_B = qr(B)
            Q_A, R_A = qr(A.mT)
            U, S, Vh = svd(R_B @ R_A.mT)
            parts = unstacked(Q_B @ U), unstacked(S), unstacked(Vh @ Q_A.mT)
        for i, *part in zip(indices, *parts, strict=True):
            results[i] = part
    return tuple(map(list, zip(*results, strict=True)))


@torch.library.register_fake("adaptlora::low_rank_svd", lib=library)
def _(lora_As, lora_Bs):
    U, S, Vh = [], [], []
    for A, B in zip(lora_As, lora_Bs, strict=True):
        acc, k = accumulation_dtype(A.dtype), _components(A, B)
        U.append(B.new_empty(B.shape[0], k, dtype=acc))
        S.append(A.new_empty(k, dtype=acc))
        Vh.append(A.new_empty(k, A.shape[1], dtype=acc))
    return U, S, Vh


@torch.no_grad()
def low_rank_svd(lora_As, lora_Bs) -> list[SVD]:
    """
    B A = U diag(S) Vh for every module: QR of B and of Aᵀ, and an SVD of the (R, R) product of their triangles; exact

    Modules of equal shape are computed as one batch. It costs O(R² (N + K)) a module instead of the O(N K min(N, K)) of the product's SVD.

    Args:
        lora_As: list of (R_i, K_i), fp32 / fp64, or bf16 / fp16 (computed in fp32), one device, any strides; R_i may be 0.
        lora_Bs: list of (N_i, R_i), as many, same device.
    Returns: list of SVD(U (N_i, k), S (k,), Vh (k, K_i)), k = min(R_i, N_i, K_i), fp32 (fp64 for fp64). Where singular values are zero
        or equal, their vectors are one orthonormal choice of many. Not differentiable.
    Raises: ValueError (lengths, shapes, devices, NaN or infinite values), TypeError (dtype).   Deterministic: yes.
    """
    lora_As, lora_Bs = list(lora_As), list(lora_Bs)
    check_factor_lists("low_rank_svd", lora_As, lora_Bs)
    for name, factors in (("lora_As", lora_As), ("lora_Bs", lora_Bs)):
        for i, factor in enumerate(factors):
            check_finite("low_rank_svd", f"{name}[{i}]", factor)
    if not lora_As:
        return []
    return [SVD(*parts) for parts in zip(*torch.ops.adaptlora.low_rank_svd(lora_As, lora_Bs), strict=True)]
