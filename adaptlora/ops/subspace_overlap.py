"""How much of each vector of a basis lies in the subspace of another basis."""

import torch

from . import _backend
from ._checks import FLOATS
from ._library import accumulation_dtype, library, no_autocast, register


def subspace_overlap_ref(U, U_base) -> torch.Tensor:
    """`subspace_overlap` in plain torch operations, float64 included."""
    acc = accumulation_dtype(U.dtype)
    return (U.to(acc).mT @ U_base.to(acc)).square().sum(-1)


@register("subspace_overlap(Tensor U, Tensor U_base) -> Tensor")
def _subspace_overlap(U, U_base):
    kernels = _backend.kernels(U, "subspace_overlap") if _backend.choose(U) == "triton" else None
    with no_autocast(U):
        return subspace_overlap_ref(U, U_base) if kernels is None else kernels.subspace_overlap(U, U_base)


@torch.library.register_fake("adaptlora::subspace_overlap", lib=library)
def _(U, U_base):
    return U.new_empty((*U.shape[:-2], U.shape[-1]), dtype=accumulation_dtype(U.dtype))


@torch.no_grad()
def subspace_overlap(U, U_base) -> torch.Tensor:
    """
    q_i = ‖u_iᵀ U_base‖² for every column u_i of U          [NoRM, φ of Sim-Search for every c at once]

    For orthonormal columns q_i is between 0 (orthogonal to the subspace) and 1 (inside), and r / N on average for a random direction.

    Args:
        U: (..., N, m), fp32 / fp64, or bf16 / fp16 (accumulated in fp32), any strides.
        U_base: (..., N, r), same leading dimensions, dtype and device.
    Returns: q (..., m), fp32 (fp64 for fp64). Not differentiable.
    Raises: ValueError (shapes, device), TypeError (dtype).   Deterministic: yes.
    """
    for name, basis in (("U", U), ("U_base", U_base)):
        if not isinstance(basis, torch.Tensor) or basis.dtype not in FLOATS:
            found = getattr(basis, "dtype", type(basis).__name__)
            raise TypeError(f"subspace_overlap: {name} must be a floating-point tensor, got {found}")
        if basis.dim() < 2:
            raise ValueError(f"subspace_overlap: {name} must have shape (..., N, columns), got {tuple(basis.shape)}")
    if U.shape[:-1] != U_base.shape[:-1]:
        raise ValueError(
            f"subspace_overlap: U_base must have shape (..., N, r) with {tuple(U.shape[:-1])} for (..., N), got {tuple(U_base.shape)}"
        )
    if U_base.device != U.device:
        raise ValueError(f"subspace_overlap: U_base must be on the device of U, {U.device}, got {U_base.device}")
    if U_base.dtype != U.dtype:
        raise TypeError(f"subspace_overlap: U_base must have the dtype of U, {U.dtype}, got {U_base.dtype}")
    return torch.ops.adaptlora.subspace_overlap(U, U_base)
