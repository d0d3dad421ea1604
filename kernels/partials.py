"""The sum over the parts of split reductions, in a fixed order, of up to three of them in one launch."""

import torch
import triton
import triton.language as tl

from .launch import launch_on, padded

_BLOCK = 1024
_SIZES = [f"{size}_{job}" for size in ("parts", "count", "width", "stride") for job in range(3)]


@triton.jit(do_not_specialize=_SIZES)
def _sum_partials_kernel(
    part_ptrs, out_ptrs, parts_0, parts_1, parts_2, count_0, count_1, count_2, width_0, width_1, width_2,
    stride_0, stride_1, stride_2, JOBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """
    out_j[i, c] = Σ_p part_j[p, i, c], p in order, rounded to the dtype of out_j

    Program (b, j) owns block b of BLOCK neighbouring elements of job j; parts, elements, row length and row stride are j's.
    """
    parts, counts = (parts_0, parts_1, parts_2), (count_0, count_1, count_2)
    widths, strides = (width_0, width_1, width_2), (stride_0, stride_1, stride_2)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for j in tl.static_range(JOBS):
        if tl.program_id(1) == j:
            mask = offs < counts[j]
            part_ptr = part_ptrs[j]
            acc = tl.zeros((BLOCK,), tl.float32)
            for _ in range(parts[j]):
                acc += tl.load(part_ptr + offs, mask=mask, other=0.0)
                part_ptr += counts[j]
            place = offs // widths[j] * strides[j] + offs % widths[j]
            tl.store(out_ptrs[j] + place, acc.to(out_ptrs[j].dtype.element_ty), mask=mask)


def sum_partials(*jobs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """out ← Σ_p part[p] for every (part, out): part (P, I, C) fp32 contiguous, out (I, C) of any dtype with unit column stride."""
    parts, outs = zip(*jobs, strict=True)
    with launch_on(outs[0]):
        _sum_partials_kernel[(triton.cdiv(max(out.numel() for out in outs), _BLOCK), len(jobs))](
            parts, outs, *padded([part.shape[0] for part in parts]), *padded([out.numel() for out in outs]),
            *padded([out.shape[1] for out in outs]), *padded([out.stride(0) for out in outs]),
            JOBS=len(jobs), BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
