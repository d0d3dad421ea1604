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


def check_tokens(op: str, name: str, x) -> None:
    """x (..., K): floating, at least one dimension."""
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() == 0:
        last = "N" if name == "y" else "K"
        raise ValueError(f"{op}: {name} must have shape (..., {last}), got a 0-dim tensor")


def check_factors(
    op: str, lora_A, lora_B, K: int | None = None, N: int | None = None, N_is: str = "weight.shape[0]"
) -> None:
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
        raise ValueError(f"{op}: lora_B must have shape (N, R) with N={N} ({N_is}), got {tuple(lora_B.shape)}")
    if lora_A.device != lora_B.device:
        raise ValueError(f"{op}: lora_B must be on the device of lora_A, {lora_A.device}, got {lora_B.device}")


def check_device_and_dtype(op: str, name: str, tensor, x, *, or_float32: bool = False) -> None:
    """On the device of x, and of its dtype (or float32)."""
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on the device of x, {x.device}, got {tensor.device}")
    if tensor.dtype != x.dtype and not (or_float32 and tensor.dtype == torch.float32):
        rule = f"{x.dtype}, or float32" if or_float32 else f"{x.dtype}"
        raise TypeError(f"{op}: {name} must have the dtype of x, {rule}, got {tensor.dtype}")


def check_adapter(op: str, x, lora_A, lora_B, rank_scale, scaling, dropout_p, N: int, N_is: str) -> None:
    """The operands of scaling · drop(x) Aᵀ diag(E) Bᵀ for a checked x and a layer of N outputs, in words `N_is`."""
    check_factors(op, lora_A, lora_B, x.shape[-1], N, N_is)
    if rank_scale is not None:
        if not isinstance(rank_scale, torch.Tensor):
            raise TypeError(f"{op}: rank_scale must be a tensor or None, got {type(rank_scale).__name__}")
        if rank_scale.shape != lora_A.shape[:1]:
            raise ValueError(
                f"{op}: rank_scale must have shape (R,) with R={lora_A.shape[0]} (lora_A.shape[0]), got {tuple(rank_scale.shape)}"
            )
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B), ("rank_scale", rank_scale)):
        if tensor is not None:
            check_device_and_dtype(op, name, tensor, x, or_float32=True)
    check_finite_number(op, "scaling", scaling)
    check_dropout(op, dropout_p)


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
    # Compared, as torch.compile cannot trace math.isfinite of a number that it holds as a symbol.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name} must be a finite number, got {value!r}")


def check_finite(op: str, name: str, tensor: torch.Tensor) -> None:
    """No NaN and no infinity; waits for the device."""
    # A NaN or infinity makes the sum one, and summing is many times faster; a sum of large numbers may overflow without.
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise ValueError(f"{op}: {name} must be finite, got {int((~tensor.isfinite()).sum())} NaN or infinite values")
