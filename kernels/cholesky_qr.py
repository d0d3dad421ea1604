"""X = Q R of a batch of tall matrices by CholeskyQR2          [Yamamoto et al., ETNA 44, 2015], G in float64"""

import torch

from ..ops import _backend, _cuda_library
from .gram import gram
from .launch import launch_on
from .small_matrices import MAX_SIZE, cuda_library, is_built, launch_arguments

# The second pass leaves no trace of a first one whose columns are this far from orthonormal, and far beyond.
_MAX_CONDITION = 2.0


def qr(X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    X = Q R, twice R = chol(XᵀX) and Q = X R⁻¹; torch's for wide matrices, more than MAX_SIZE columns, or where neither library is built

    It holds for conditions of X (with columns scaled to length 1) up to 1e6 at least; what it does not hold for is done by torch's.
    Args: X: (b, n, l), fp32, any strides.
    Returns: Q (b, n, k) with orthonormal columns, R (b, k, l) upper triangular, k = min(n, l); the diagonal of R is positive where it is
        ours. Waits for the device.
    """
    b, n, columns = X.shape
    if n < columns or not b or not 0 < columns <= MAX_SIZE or not is_built(X):
        return torch.linalg.qr(X)
    cholesky_inverse = _cholesky_inverse_cuda if X.is_cuda else _backend.extension().cholesky_inverse
    R1, inverse, _ = cholesky_inverse(gram(X))
    # Products in float64: an error of float32 in X R⁻¹ would be multiplied by the condition in Q R.
    Q = (X.double() @ inverse).float()
    R2, inverse, condition = cholesky_inverse(gram(Q))
    Q, R = (Q.double() @ inverse).float(), (R2 @ R1).float()
    # A first pass that failed has left Q = 0, of infinite condition. Written so that a NaN fails.
    failed = ~(condition <= _MAX_CONDITION)
    if failed.any():
        Q[failed], R[failed] = torch.linalg.qr(X[failed])
    return Q, R


def _cholesky_inverse_cuda(G):
    library, (b, size, _) = cuda_library(G), G.shape
    R, inverse_t = torch.empty_like(G), torch.empty_like(G)
    condition = torch.empty(b, dtype=G.dtype, device=G.device)
    workspace, limit, stream = launch_arguments(library, "cholesky_inverse", 1, G)
    with launch_on(G):
        code = library.adaptlora_cholesky_inverse_f64(
            G.data_ptr(), b, size, R.data_ptr(), inverse_t.data_ptr(), condition.data_ptr(),
            workspace if workspace is None else workspace.data_ptr(), limit, stream,
        )  # fmt: skip
    _cuda_library.check(library, "cholesky_qr", code)
    return R, inverse_t.mT, condition
