"""G = XᵀX of a batch of tall matrices, in float64: what CholeskyQR loses is the square of the condition times the rounding of G."""

import torch
import triton
import triton.language as tl

from .devices import generation
from .launch import capability, launch_on, multiprocessors
from .tiles import ALL_REGISTERS

# Columns of a tile by columns of X, and warps; rows of X a step.
_TILES = ((16, 4), (32, 4), (64, 8))
_ROWS = 32


@triton.jit(do_not_specialize=["n", "columns", "rows"])
def _gram_kernel(
    x_ptr, g_ptr, n, columns, rows, stride_xb, stride_xn, stride_xl, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """
    G[p, b, i, j] = Σ_{k in part p} X[b, k, i] X[b, k, j]

    Program (t, p, b) owns tile t = (I, J), I ≤ J, and its mirror image, of part p: `rows` rows (whole blocks) of X.
    """
    blocks = tl.cdiv(columns, BLOCK_L)
    pid_i, pid_j = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    pid_n, pid_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if pid_i <= pid_j:
        offs_i = (pid_i * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
        offs_j = (pid_j * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
        mask_i, mask_j = offs_i < columns, offs_j < columns
        x_ptr += pid_b * stride_xb
        acc = tl.zeros((BLOCK_L, BLOCK_L), tl.float64)
        for start in range(pid_n * rows, tl.minimum(n, (pid_n + 1) * rows), BLOCK_N):
            offs_n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            mask_n = offs_n < n
            left = x_ptr + offs_i[:, None] * stride_xl + offs_n[None, :] * stride_xn
            right = x_ptr + offs_n[:, None] * stride_xn + offs_j[None, :] * stride_xl
            x_i = tl.load(left, mask=mask_i[:, None] & mask_n[None, :], other=0.0).to(tl.float64)
            x_j = tl.load(right, mask=mask_n[:, None] & mask_j[None, :], other=0.0).to(tl.float64)
            acc = tl.dot(x_i, x_j, acc, out_dtype=tl.float64)
        matrices = tl.num_programs(2)
        g_ptr += (pid_n * matrices + pid_b) * columns * columns
        mask = mask_i[:, None] & mask_j[None, :]
        tl.store(g_ptr + offs_i[:, None] * columns + offs_j[None, :], acc, mask=mask)
        if pid_i < pid_j:
            tl.store(g_ptr + offs_j[None, :] * columns + offs_i[:, None], acc, mask=mask)


def gram(X: torch.Tensor) -> torch.Tensor:
    """
    Args: X: (b, n, l), fp32, any strides; b, n, l ≥ 1.
    Returns: XᵀX (b, l, l), fp64, accumulated in fp64.
    """
    b, n, columns = X.shape
    if generation(capability(X.device)) >= 100:  # triton 3.7.1 compiles no float64 products for these
        X = X.double()
        return X.mT @ X
    BLOCK_L, warps = next((tile for tile in _TILES if columns <= tile[0]), _TILES[-1])
    blocks, steps = triton.cdiv(columns, BLOCK_L), triton.cdiv(n, _ROWS)
    parts = max(1, min(steps, 2 * multiprocessors(X.device) // (b * blocks * (blocks + 1) // 2)))
    rows = triton.cdiv(steps, parts) * _ROWS
    parts = triton.cdiv(n, rows)
    G = torch.empty((parts, b, columns, columns), dtype=torch.float64, device=X.device)
    with launch_on(X):
        _gram_kernel[(blocks * blocks, parts, b)](
            X, G, n, columns, rows, *X.stride(), BLOCK_L=BLOCK_L, BLOCK_N=_ROWS, num_warps=warps, num_stages=2,
            maxnreg=ALL_REGISTERS,
        )  # fmt: skip
    return G[0] if parts == 1 else G.sum(0)
