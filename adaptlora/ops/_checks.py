"""Argument checks that several ops share. Each message names the op, the argument, the rule and the value."""

import math

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(op: str, name: str, tensor, dims: int) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.dim() != dims:
        raise ValueError(f"{op}: {name} must have {dims} dimension(s), got shape {tuple(tensor.shape)}")


def check_factors(op: str, lora_A, lora_B, K: int | None = None, N: int | None = None) -> None:
    """lora_A (R, K) and lora_B (N, R): floating, one device, one rank, and the K and N of the layer where given."""
    check_tensor(op, "lora_A", lora_A, 2)
    check_tensor(op, "lora_B", lora_B, 2)
    if K is not None and lora_A.shape[1] != K:
        raise ValueError(f"{op}: lora_A must have shape (R, K) with K={K} (x.shape[-1]), got {tuple(lora_A.shape)}")
    if lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(
            f"{op}: lora_B must have shape (N, R) with R={lora_A.shape[0]} (lora_A.shape[0]), got {tuple(lora_B.shape)}"
        )
    if N is not None and lora_B.shape[0] != N:
        raise ValueError(f"{op}: lora_B must have shape (N, R) with N={N} (weight.shape[0]), got {tuple(lora_B.shape)}")
    if lora_A.device != lora_B.device:
        raise ValueError(f"{op}: lora_B must be on the device of lora_A, {lora_A.device}, got {lora_B.device}")


def check_factor_lists(op: str, lora_As, lora_Bs) -> None:
    """Lists of pairs of equal length, all on one device; each pair as in `check_factors`."""
    if len(lora_As) != len(lora_Bs):
        raise ValueError(f"{op}: lora_Bs must be as long as lora_As, {len(lora_As)}, got {len(lora_Bs)}")
    for i, (lora_A, lora_B) in enumerate(zip(lora_As, lora_Bs, strict=True)):
        check_factors(f"{op}: pair {i}", lora_A, lora_B)
        if lora_A.device != lora_As[0].device:
            raise ValueError(
                f"{op}: pair {i} must be on the device of pair 0, {lora_As[0].device}, got {lora_A.device}"
            )
        if (lora_A.dtype == torch.float64) != (lora_As[0].dtype == torch.float64) or (
            (lora_B.dtype == torch.float64) != (lora_As[0].dtype == torch.float64)
        ):
            raise TypeError(
                f"{op}: pair {i} must be float64 if and only if pair 0 is, got {lora_A.dtype}, {lora_B.dtype}"
            )


def check_dropout(op: str, p: float) -> None:
    if not (isinstance(p, (int, float)) and 0.0 <= p < 1.0):
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {p!r}")


def check_finite_number(op: str, name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{op}: {name} must be a finite number, got {value!r}")
