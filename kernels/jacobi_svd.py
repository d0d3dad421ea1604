"""SVD of a batch of small square matrices by one-sided Jacobi: csrc/linalg/jacobi_svd.h, a block a matrix."""

import torch

from ..ops import _backend, _cuda_library
from .launch import launch_on
from .small_matrices import MAX_SIZE, cuda_library, is_built, launch_arguments


def svd(core: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    core = U diag(S) Vh; torch's for what is not square, larger than MAX_SIZE, not converged, or where neither library is built

    Args: core: (b, m, l), fp32, any strides.
    Returns: U (b, m, k), S (b, k) descending, Vh (b, k, l), k = min(m, l). Waits for the device.
    """
    b, m, size = core.shape
    if m != size or not b or not 0 < size <= MAX_SIZE or not is_built(core):
        return torch.linalg.svd(core, full_matrices=False)
    U, S, Vh, info = _jacobi_svd_cuda(core) if core.is_cuda else _backend.extension().jacobi_svd(core)
    failed = info < 0
    if failed.any():
        U[failed], S[failed], Vh[failed] = torch.linalg.svd(core[failed])
    return U, S, Vh


def _jacobi_svd_cuda(core):
    library, (b, size, _) = cuda_library(core), core.shape
    Ut, Vh = (torch.empty(core.shape, dtype=core.dtype, device=core.device) for _ in range(2))
    S = torch.empty((b, size), dtype=core.dtype, device=core.device)
    info = torch.empty(b, dtype=torch.int32, device=core.device)
    workspace, limit, stream = launch_arguments(library, "jacobi_svd", 2, core)
    with launch_on(core):
        code = library.adaptlora_jacobi_svd_f32(
            core.data_ptr(), *core.stride(), b, size, Ut.data_ptr(), S.data_ptr(), Vh.data_ptr(), info.data_ptr(),
            workspace if workspace is None else workspace.data_ptr(), limit, stream,
        )  # fmt: skip
    _cuda_library.check(library, "jacobi_svd", code)
    return Ut.mT, S, Vh, info
