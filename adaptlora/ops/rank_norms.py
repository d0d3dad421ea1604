"""‖a_r‖₂ and ‖b_r‖₂ of every rank vector of every module, and the scaling of rank vectors that its gradient needs."""

import torch

from . import _backend
from ._checks import check_factor_lists
from ._library import accumulation_dtype, library, no_autocast, no_second_derivative, register


def flat_norms_ref(lora_As, lora_Bs) -> tuple[torch.Tensor, torch.Tensor]:
    """Row norms of the A's and column norms of the B's, each concatenated over modules in order: two (ΣR,) tensors."""
    acc = accumulation_dtype(lora_As[0].dtype)
    return (
        torch.cat([torch.linalg.vector_norm(A.to(acc), dim=1) for A in lora_As]),
        torch.cat([torch.linalg.vector_norm(B.to(acc), dim=0) for B in lora_Bs]),
    )


def rank_norms_ref(lora_As, lora_Bs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`rank_norms` in plain differentiable torch operations, float64 included."""
    check_factor_lists("rank_norms", lora_As, lora_Bs)
    return _split(lora_As, *flat_norms_ref(lora_As, lora_Bs)) if lora_As else ([], [])


def _split(lora_As, *flat):
    ranks = [A.shape[0] for A in lora_As]
    return tuple(list(norms.split(ranks)) for norms in flat)


@register("rank_norms(Tensor[] lora_As, Tensor[] lora_Bs) -> (Tensor, Tensor)")
def _rank_norms(lora_As, lora_Bs):
    kernels = _backend.kernels(lora_As[0], "rank_norms") if sum(A.shape[0] for A in lora_As) else None
    with no_autocast(lora_As[0]):
        return (kernels.rank_norms if kernels else flat_norms_ref)(lora_As, lora_Bs)


@register("rank_scale(Tensor[] lora_As, Tensor[] lora_Bs, Tensor factors_A, Tensor factors_B) -> Tensor[]")
def _rank_scale(lora_As, lora_Bs, factors_A, factors_B):
    """New pairs with every rank vector multiplied by its factor; the A's, then the B's, both rank-major in memory."""
    kernels = _backend.kernels(lora_As[0], "rank_scale") if sum(A.shape[0] for A in lora_As) else None
    if kernels:
        scaled_As, scaled_Bs = kernels.rank_scale(lora_As, lora_Bs, factors_A, factors_B)
        return [*scaled_As, *scaled_Bs]
    split_A, split_B = _split(lora_As, factors_A, factors_B)
    return [
        *((A * f[:, None]).to(A.dtype).contiguous() for A, f in zip(lora_As, split_A, strict=True)),
        *((B.t() * f[:, None]).to(B.dtype).contiguous().t() for B, f in zip(lora_Bs, split_B, strict=True)),
    ]


@torch.library.register_fake("adaptlora::rank_norms", lib=library)
def _(lora_As, lora_Bs):
    total = sum(A.shape[0] for A in lora_As)
    acc = accumulation_dtype(lora_As[0].dtype)
    return lora_As[0].new_empty(total, dtype=acc), lora_As[0].new_empty(total, dtype=acc)


@torch.library.register_fake("adaptlora::rank_scale", lib=library)
def _(lora_As, lora_Bs, factors_A, factors_B):
    return [*(A.new_empty(A.shape) for A in lora_As), *(B.new_empty(B.shape[::-1]).t() for B in lora_Bs)]


def _setup_context(ctx, inputs, output):
    lora_As, lora_Bs = inputs
    ctx.modules = len(lora_As)
    ctx.save_for_backward(*lora_As, *lora_Bs, *output)


def _backward(ctx, *grads):
    *factors, norms_A, norms_B = ctx.saved_tensors
    lora_As, lora_Bs = factors[: ctx.modules], factors[ctx.modules :]
    # The gradient of ‖v‖ is v / ‖v‖, and 0 at v = 0.
    scales = [torch.where(norms > 0, grad / norms, 0) for norms, grad in zip((norms_A, norms_B), grads, strict=True)]
    scaled = torch.ops.adaptlora.rank_scale(lora_As, lora_Bs, *scales)
    return scaled[: ctx.modules], scaled[ctx.modules :]


torch.library.register_autograd("adaptlora::rank_norms", _backward, setup_context=_setup_context, lib=library)
no_second_derivative("rank_scale")


def flat_rank_norms(op: str, lora_As, lora_Bs) -> tuple[torch.Tensor, torch.Tensor]:
    """Checked `rank_norms` before the split into modules; `op` is the name that errors carry."""
    lora_As, lora_Bs = list(lora_As), list(lora_Bs)
    direct = _backend.direct(lora_As[0]) if lora_As else None
    norms = None if direct is None else direct.rank_norms_direct(lora_As, lora_Bs)
    if norms is not None:
        return norms
    check_factor_lists(op, lora_As, lora_Bs)
    return torch.ops.adaptlora.rank_norms(lora_As, lora_Bs)


def rank_norms(lora_As, lora_Bs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """
    ‖a_r‖₂ (row r of A) and ‖b_r‖₂ (column r of B) of every module, in one launch.          [NormAL, Eq. 5; La-LoRA, Eq. 7]

    Args:
        lora_As: list of (R_i, K_i), fp32 / bf16 / fp16 (all fp64: reference only), one device, any strides; R_i may be 0.
        lora_Bs: list of (N_i, R_i), as many, same device.
    Returns: (norms_A, norms_B), two lists of (R_i,) tensors, fp32 (fp64 for fp64). Differentiable; the gradient at v = 0 is 0.
    Raises: ValueError (lengths, shapes, devices), TypeError (dtype).
    Saved for backward: the factors and the norms.   Deterministic: yes.
    """
    lora_As = list(lora_As)
    if not lora_As and not lora_Bs:
        return [], []
    return _split(lora_As, *flat_rank_norms("rank_norms", lora_As, lora_Bs))
