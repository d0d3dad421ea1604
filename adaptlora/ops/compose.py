"""An inner pair times frozen outer factors: the factors (A' outer_A, outer_Bᵀ B') that a nested adapter runs with, and their gradients."""

import torch

from . import _backend
from ._checks import check_tensor
from ._library import library, no_autocast, register

OP = "compose"


def compose_ref(lora_A, lora_B, outer_A, outer_B) -> tuple[torch.Tensor, torch.Tensor]:
    """`compose` in plain differentiable torch operations, float64 included."""
    with no_autocast(lora_A):
        return lora_A @ outer_A, (lora_B.t() @ outer_B).t()


def backward_ref(dA_eff, dB_eff, outer_A, outer_B) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dA' and dB' of the upstream gradients that there are, in plain torch operations."""
    with no_autocast(outer_A):
        dA = None if dA_eff is None else dA_eff @ outer_A.t()
        dB = None if dB_eff is None else (dB_eff.t() @ outer_B.t()).t()
    return dA, dB


def _check(lora_A, lora_B, outer_A, outer_B) -> None:
    check_tensor(OP, "lora_A", lora_A, 2)
    r, r_out = lora_A.shape
    for name, tensor, rule, shape in (
        ("lora_B", lora_B, "(r_out, r)", (r_out, r)),
        ("outer_A", outer_A, "(r_out, K)", (r_out, None)),
        ("outer_B", outer_B, "(r_out, N)", (r_out, None)),
    ):
        check_tensor(OP, name, tensor, 2)
        if any(size not in (None, got) for size, got in zip(shape, tensor.shape, strict=True)):
            raise ValueError(
                f"{OP}: {name} must have shape {rule} with (r, r_out)={(r, r_out)} (lora_A.shape), got {tuple(tensor.shape)}"
            )
        if tensor.device != lora_A.device:
            raise ValueError(f"{OP}: {name} must be on the device of lora_A, {lora_A.device}, got {tensor.device}")
        if tensor.dtype != lora_A.dtype:
            raise TypeError(f"{OP}: {name} must have the dtype of lora_A, {lora_A.dtype}, got {tensor.dtype}")
    for name, tensor in (("outer_A", outer_A), ("outer_B", outer_B)):
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{OP}: {name} must be frozen (no gradient for it is computed), got requires_grad=True")


def _extension(*tensors):
    """The module adaptlora._C where it has kernels for these, or None; on other backends torch's GEMMs are as good as any."""
    on_cpu = all(t is None or (t.is_cpu and t.dtype == torch.float32) for t in tensors)
    return _backend.extension() if on_cpu and _backend.choose(tensors[-1]) == "cpp" else None


@register("compose(Tensor lora_A, Tensor lora_B, Tensor outer_A, Tensor outer_B) -> (Tensor, Tensor)")
def _compose(*operands):
    extension = _extension(*operands)
    return (extension.compose if extension else compose_ref)(*operands)


@register(
    "compose_backward(Tensor? dA_eff, Tensor? dB_eff, Tensor outer_A, Tensor outer_B, bool[2] need) -> (Tensor, Tensor)"
)
def _compose_backward(dA_eff, dB_eff, outer_A, outer_B, need):
    """dA' and dB', each an empty tensor unless needed; what is needed has its upstream gradient."""
    operands = (dA_eff if need[0] else None, dB_eff if need[1] else None, outer_A, outer_B)
    extension = _extension(*operands)
    grads = (extension.compose_backward if extension else backward_ref)(*operands)
    return tuple(outer_A.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("adaptlora::compose", lib=library)
def _(lora_A, lora_B, outer_A, outer_B):
    R, K, N = lora_A.shape[0], outer_A.shape[1], outer_B.shape[1]
    return lora_A.new_empty(R, K), lora_B.new_empty(R, N).t()


@torch.library.register_fake("adaptlora::compose_backward", lib=library)
def _(dA_eff, dB_eff, outer_A, outer_B, need):
    r_out = outer_A.shape[0]
    dA = dA_eff.new_empty(dA_eff.shape[0], r_out) if need[0] else outer_A.new_empty(0)
    dB = dB_eff.new_empty(dB_eff.shape[1], r_out).t() if need[1] else outer_A.new_empty(0)
    return dA, dB


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx, dA_eff, dB_eff):
    need = [d is not None and wanted for d, wanted in zip((dA_eff, dB_eff), ctx.needs_input_grad, strict=False)]
    if not any(need):
        return (None,) * 4
    grads = torch.ops.adaptlora.compose_backward(dA_eff, dB_eff, *ctx.saved_tensors, need)
    return *(grad if needed else None for grad, needed in zip(grads, need, strict=True)), None, None


def _setup_context_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.need = inputs[4]
    ctx.save_for_backward(*inputs[2:4])


def _backward_of_backward(ctx, gA, gB):
    need = [g is not None and wanted for g, wanted in zip((gA, gB), ctx.need, strict=True)]
    if not any(need):
        return (None,) * 5
    # The transpose of a transposed product is the product itself; a side that nothing asks for goes along as zeros.
    gA = gA if need[0] else torch.zeros_like(gB.t())
    gB = gB if need[1] else torch.zeros_like(gA).t()
    grads = torch.ops.adaptlora.compose(gA, gB, *ctx.saved_tensors)
    return *(grad if needed else None for grad, needed in zip(grads, need, strict=True)), None, None, None


torch.library.register_autograd("adaptlora::compose", _backward, setup_context=_setup_context, lib=library)
torch.library.register_autograd(
    "adaptlora::compose_backward", _backward_of_backward, setup_context=_setup_context_backward, lib=library
)


def compose(lora_A, lora_B, outer_A, outer_B) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A_eff = A' outer_A and B_eff = outer_Bᵀ B', both in one launch on a CPU.          [NoRA: the factors of a nested pair]

    Args:
        lora_A: A' (r, r_out), fp32 (kernels), bf16 / fp16 / fp64 (reference), any strides.
        lora_B: B' (r_out, r), dtype and device of lora_A.
        outer_A: (r_out, K), outer_B: (r_out, N), dtype and device of lora_A, frozen. Rank-major memory is what is fast.
    Returns: A_eff (r, K) and B_eff (N, r), both rank-major, accumulated in fp32. Differentiable any number of times.
    Raises: ValueError (shape, device, unfrozen outer factors), TypeError (dtype).
    Saved for backward: the outer factors.   Deterministic: yes, to the bit for any number of threads on a CPU.
    """
    direct = _backend.direct(lora_A)
    factors = None if direct is None else direct.compose_direct(lora_A, lora_B, outer_A, outer_B)
    if factors is not None:
        return factors
    _check(lora_A, lora_B, outer_A, outer_B)
    return torch.ops.adaptlora.compose(lora_A, lora_B, outer_A, outer_B)
