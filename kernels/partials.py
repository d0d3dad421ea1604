"""The sum over the parts of split reductions, in a fixed order, of several reductions in one launch."""

import torch
import triton
import triton.language as tl

from .launch import launch_on

_BLOCK = 1024


@triton.jit(do_not_specialize=["parts", "counts", "widths", "strides_o", "first_pids"])
def _sum_partials_kernel(
    part_ptrs, out_ptrs, parts, counts, widths, strides_o, first_pids, JOBS: tl.constexpr, BLOCK: tl.constexpr
):
    """
    out_j[i, c] = Σ_p part_j[p, i, c], p in order, rounded to the dtype of out_j

    One program owns BLOCK neighbouring elements of one job j; those of job j start at first_pids[j].
    """
    pid = tl.program_id(0)
    for j in tl.static_range(JOBS):
        if (pid >= first_pids[j]) & (pid < first_pids[j + 1]):
            offs = (pid - first_pids[j]).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = offs < counts[j]
            part_ptr = part_ptrs[j]
            acc = tl.zeros((BLOCK,), tl.float32)
            for _ in range(parts[j]):
                acc += tl.load(part_ptr + offs, mask=mask, other=0.0)
                part_ptr += counts[j]
            at = offs // widths[j] * strides_o[j] + offs % widths[j]
            tl.store(out_ptrs[j] + at, acc.to(out_ptrs[j].dtype.element_ty), mask=mask)


def sum_partials(*jobs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """out ← Σ_p part[p] for every (part, out): part (P, I, C) fp32 contiguous, out (I, C) of any dtype with unit column stride."""
    parts, outs = zip(*jobs, strict=True)
    first_pids = [0]
    for out in outs:
        first_pids.append(first_pids[-1] + triton.cdiv(out.numel(), _BLOCK))
    with launch_on(outs[0]):
        _sum_partials_kernel[(first_pids[-1],)](
            parts, outs, tuple(part.shape[0] for part in parts), tuple(out.numel() for out in outs),
            tuple(out.shape[1] for out in outs), tuple(out.stride(0) for out in outs), tuple(first_pids),
            JOBS=len(jobs), BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
