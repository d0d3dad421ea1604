"""The proximal step of the rank penalty, in place: v ← v · max(0, 1 − step · w(r) / ‖v‖).          [methods: NormAL, proximal]"""

import torch

from . import _backend
from ._checks import check_factor_lists, check_finite_number
from ._library import library, register
from .rank_norms import _split, flat_norms_ref
from .rank_penalty import check_kind, rank_weights


def _shrink_factors(norms, lora_As, steps: tuple[float, float], kind: str) -> list[torch.Tensor]:
    weights = rank_weights(kind, lora_As)
    # A vector no longer than step · w becomes exactly zero; a zero vector stays what it is.
    return [torch.where(n > 0, (1 - step * weights / n).clamp_(min=0), 1) for n, step in zip(norms, steps, strict=True)]


def _steps(step) -> tuple[float, float]:
    return tuple(step) if isinstance(step, (tuple, list)) else (step, step)


def rank_shrink_ref(lora_As, lora_Bs, step, kind="sqrt"):
    """`rank_shrink_` out of place, in plain torch operations, float64 included: (new A's, new B's)."""
    factors = _shrink_factors(flat_norms_ref(lora_As, lora_Bs), lora_As, _steps(step), kind)
    split_A, split_B = _split(lora_As, *factors)
    return (
        [(A * f[:, None]).to(A.dtype) for A, f in zip(lora_As, split_A, strict=True)],
        [(B * f).to(B.dtype) for B, f in zip(lora_Bs, split_B, strict=True)],
    )


@register("rank_shrink_(Tensor(a!)[] lora_As, Tensor(b!)[] lora_Bs, float step_A, float step_B, str kind) -> ()")
def _rank_shrink_(lora_As, lora_Bs, step_A, step_B, kind):
    scale = _backend.kernels(lora_As[0], "rank_scale")
    if scale is None:
        new_As, new_Bs = rank_shrink_ref(lora_As, lora_Bs, (step_A, step_B), kind)
        for old, new in zip([*lora_As, *lora_Bs], [*new_As, *new_Bs], strict=True):
            old.copy_(new)
        return
    norms = _backend.kernels(lora_As[0], "rank_norms").rank_norms(lora_As, lora_Bs)
    scale.rank_scale_(lora_As, lora_Bs, *_shrink_factors(norms, lora_As, (step_A, step_B), kind))


@torch.library.register_fake("adaptlora::rank_shrink_", lib=library)
def _(lora_As, lora_Bs, step_A, step_B, kind):
    return None


@torch.no_grad()
def rank_shrink_(lora_As, lora_Bs, step, kind="sqrt") -> None:
    """
    v ← v · max(0, 1 − step · w(r) / ‖v‖₂) for every a_r and b_r of every module, in place

    The exact proximal operator of step · P, P as in `rank_penalty`; vectors no longer than step · w(r) become exactly zero.

    Args:
        lora_As: list of (R_i, K_i), fp32 / bf16 / fp16 (all fp64: reference only), one device; changed in place.
        lora_Bs: list of (N_i, R_i), as many, same device; changed in place.
        step: number ≥ 0, learning rate · η; or two numbers, the first for the A's and the second for the B's.
        kind: w(r), as in `rank_penalty`.
    Raises: ValueError (kind, step, shapes), TypeError (dtype); nothing is changed then.
    """
    check_kind("rank_shrink_", kind)
    steps = _steps(step)
    if len(steps) != 2:
        raise ValueError(f"rank_shrink_: step must be one number or two, got {step!r}")
    for number in steps:
        check_finite_number("rank_shrink_", "step", number)
        if number < 0:
            raise ValueError(f"rank_shrink_: step must be ≥ 0, got {number}")
    lora_As, lora_Bs = list(lora_As), list(lora_Bs)
    check_factor_lists("rank_shrink_", lora_As, lora_Bs)
    if sum(A.shape[0] for A in lora_As) == 0:
        return
    torch.ops.adaptlora.rank_shrink_(lora_As, lora_Bs, float(steps[0]), float(steps[1]), kind)
    # An op without an autograd kernel leaves version counters alone; a graph that saved a factor must notice the change.
    torch.autograd.graph.increment_version([*lora_As, *lora_Bs])
