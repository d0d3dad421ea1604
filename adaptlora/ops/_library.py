"""The dispatcher library `torch.ops.adaptlora`, and what every registered op shares."""

import contextlib

import torch

library = torch.library.Library("adaptlora", "FRAGMENT")


def register(schema: str):
    """Define `adaptlora::<schema>` and register the decorated function as its kernel on every device."""

    def decorate(function):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(schema.split("(")[0], function, "CompositeExplicitAutograd")
        return function

    return decorate


def no_autocast(tensor: torch.Tensor):
    """Kernels choose their own precision: the matmuls inside an op must not be recast by a surrounding autocast."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of sums and of S: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_second_derivative(op: str) -> None:
    """Differentiating `adaptlora::<op>`, itself a gradient, is an error; torch would otherwise return a wrong result."""

    def backward(ctx, *grads):
        raise RuntimeError(f"adaptlora::{op}: second derivatives are not implemented")

    torch.library.register_autograd(f"adaptlora::{op}", backward, lib=library)
