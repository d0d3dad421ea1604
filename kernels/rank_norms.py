"""‖a_r‖₂ and ‖b_r‖₂ of every rank vector of every module, in one launch."""

import torch
import triton
import triton.language as tl

from .launch import launch_on
from .rank_table import load_vector, vector_row, vector_table


@triton.jit(do_not_specialize=["total"])
def _rank_norms_kernel(table_ptr, norms_a_ptr, norms_b_ptr, total, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """
    norm[v] = (Σ_i v[i]²)^½

    One program owns one rank vector: the `total` vectors a_r come first in the table, then as many b_r.
    """
    pid = tl.program_id(0)
    address, stride, length, code = vector_row(table_ptr, pid, VECTOR)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        values = load_vector(address, offs * stride, offs < length, code, VECTOR)
        acc += values * values
    norm = tl.sqrt_rn(tl.sum(acc, axis=0))
    if pid < total:
        tl.store(norms_a_ptr + pid, norm)
    else:
        tl.store(norms_b_ptr + pid - total, norm)


def rank_norms(As, Bs) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args: As: list of at least one (R_i, K_i), Bs: list of (N_i, R_i), fp32 / bf16 / fp16 in any mixture, any strides.
    Returns: norms of the rows of the A's and of the columns of the B's, modules in order: two (ΣR,) fp32 tensors.
    """
    total = sum(A.shape[0] for A in As)
    norms_a = torch.empty(total, dtype=torch.float32, device=As[0].device)
    norms_b = torch.empty_like(norms_a)
    if total:
        table, vector = vector_table(As, Bs)
        with launch_on(norms_a):
            _rank_norms_kernel[(2 * total,)](table, norms_a, norms_b, total, VECTOR=vector, BLOCK=1024, num_warps=4)
    return norms_a, norms_b
