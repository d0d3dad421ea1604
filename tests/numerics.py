"""The tolerance rule of every kernel test, which benchmarks apply too (adaptlora.benchmarks.accuracy), and tensors in other layouts."""

import math

import torch

from adaptlora.benchmarks.accuracy import FLOOR, NORMS, assert_accurate, assert_all_accurate, errors

__all__ = ["FLOOR", "NORMS", "assert_accurate", "assert_all_accurate", "errors", "laid_out"]


def laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """A tensor equal to `values` with other strides; memory between its elements is NaN, so that reading it shows."""
    *rows, last = values.shape
    if layout == "contiguous":
        return values.contiguous()
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "padded":  # rows apart and off every vector alignment
        view = values.new_full((*rows, last + 5), math.nan)[..., 3 : 3 + last]
    elif layout == "strided":  # elements apart
        view = values.new_full((*rows, 2 * last + 1), math.nan)[..., 1 : 1 + 2 * last : 2]
    else:
        raise ValueError(f"laid_out: unknown layout {layout!r}")
    view.copy_(values)
    return view
