"""NormAL's rank penalty P = Σ_modules Σ_r w(r) (‖a_r‖₂ + ‖b_r‖₂).          [NormAL LoRA, Eq. 5]"""

import functools
import math

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ._library import accumulation_dtype
from .rank_norms import flat_norms_ref, flat_rank_norms

PENALTIES = {
    "sqrt": math.sqrt,
    "linear": float,
    "square": lambda r: float(r * r),
    "cube": lambda r: float(r**3),
    "log": lambda r: math.log(r + 1),
    "none": lambda r: 0.0,
}


def check_kind(op: str, kind: str) -> None:
    if kind not in PENALTIES:
        raise ValueError(f"{op}: kind must be one of {', '.join(PENALTIES)}, got {kind!r}")


def _new_weights(kind: str, ranks: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    weight = PENALTIES[kind]
    return torch.tensor([weight(r) for rank in ranks for r in range(1, rank + 1)], device=device, dtype=dtype)


_weights = functools.lru_cache(maxsize=64)(_new_weights)


def rank_weights(kind: str, lora_As) -> torch.Tensor:
    """w(r), r = 1 … R_i, for the rank vectors of all modules in order: (ΣR,), on the factors' device."""
    first = lora_As[0]
    # A tensor made in one of these modes (fake tensors are a dispatch mode) must not outlive it in the cache.
    passing = torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or is_in_torch_dispatch_mode()
    return (_new_weights if passing else _weights)(
        kind, tuple(A.shape[0] for A in lora_As), first.device, accumulation_dtype(first.dtype)
    )


def rank_penalty_ref(lora_As, lora_Bs, kind="sqrt") -> torch.Tensor:
    """`rank_penalty` in plain differentiable torch operations, float64 included."""
    check_kind("rank_penalty", kind)
    norms_A, norms_B = flat_norms_ref(lora_As, lora_Bs)
    return (rank_weights(kind, lora_As) * (norms_A + norms_B)).sum()


def rank_penalty(lora_As, lora_Bs, kind="sqrt") -> torch.Tensor:
    """
    P = Σ_modules Σ_r w(r) (‖a_r‖₂ + ‖b_r‖₂), r counted from 1          [NormAL LoRA, Eq. 5]

    Args:
        lora_As: list of (R_i, K_i), fp32 / bf16 / fp16 (all fp64: reference only), one device; R_i may be 0.
        lora_Bs: list of (N_i, R_i), as many, same device.
        kind: w(r): "sqrt" √r, "linear" r, "square" r², "cube" r³, "log" ln(r + 1), "none" 0.
    Returns: 0-dim tensor, fp32 (fp64 for fp64). Differentiable in every factor, with gradient 0 at v = 0.
    Raises: ValueError (kind, no modules, shapes), TypeError (dtype).
    One pass over the factors forward (`rank_norms`) and one backward, whatever the number of modules.   Deterministic: yes.
    """
    check_kind("rank_penalty", kind)
    lora_As = list(lora_As)
    if not lora_As:
        raise ValueError("rank_penalty: lora_As must hold at least one module, got none")
    norms_A, norms_B = flat_rank_norms("rank_penalty", lora_As, lora_Bs)
    return torch.dot(rank_weights(kind, lora_As), norms_A + norms_B)
