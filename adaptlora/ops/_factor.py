"""The two dense factorizations that the SVD ops are made of, batched over matrices of one shape."""

import torch

from . import _backend


def qr(X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """X = Q R: X (b, n, l), fp32 / fp64 → Q (b, n, min(n, l)) with orthonormal columns, R (b, min(n, l), l)."""
    kernels = _kernels(X, "cholesky_qr")
    return torch.linalg.qr(X) if kernels is None else kernels.qr(X)


def svd(core: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """core = U diag(S) Vh: core (b, m, l), fp32 / fp64, small → U (b, m, k), S (b, k) descending, Vh (b, k, l), k = min(m, l)."""
    kernels = _kernels(core, "jacobi_svd")
    return torch.linalg.svd(core, full_matrices=False) if kernels is None else kernels.svd(core)


def lapack(tensor: torch.Tensor) -> bool:
    """Whether it is LAPACK that factorizes: on a CPU, but for Triton's interpreter."""
    return tensor.is_cpu and _backend.choose(tensor) != "triton"


def _kernels(tensor: torch.Tensor, module: str):
    """The module beside the Triton kernels; on a CPU it is LAPACK through torch that factorizes."""
    return _backend.kernels(tensor, module) if _backend.choose(tensor) == "triton" else None


def grouped(*lists: list[torch.Tensor]):
    """Indices of the entries that agree in shape, dtype and device in every list: what can be stacked, in order of appearance."""
    groups: dict[tuple, list[int]] = {}
    for i, tensors in enumerate(zip(*lists, strict=True)):
        groups.setdefault(tuple((t.shape, t.dtype, t.device) for t in tensors), []).append(i)
    return groups.values()


def stacked(tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """(b, …) of `dtype`; a view where there is one tensor of it already."""
    return tensors[0].to(dtype)[None] if len(tensors) == 1 else torch.stack([t.to(dtype) for t in tensors])


def unstacked(batch: torch.Tensor) -> list[torch.Tensor]:
    """The matrices of a batch, each with memory of its own."""
    return [batch[0]] if len(batch) == 1 else [matrix.clone() for matrix in batch]
