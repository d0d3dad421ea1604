"""The LoRA linear layer: y = x Wᵀ + bias + scaling · drop(x) Aᵀ diag(E) Bᵀ and its gradients.  [LoRA, arXiv:2106.09685, eq. 3]"""

import math

import torch
import torch.nn.functional as F

from . import _backend
from ._checks import check_adapter, check_device_and_dtype, check_tensor, check_tokens
from ._dropout import as_seed, threshold
from ._library import accumulation_dtype, library, no_autocast, no_second_derivative, register
from .lora_delta import (
    as_2d,
    as_output,
    autocast_to,
    autocasts,
    check_saved,
    delta_backward_ref,
    delta_ref,
    find_kernels,
    not_aliased,
    to_save,
)

OP = "lora_linear"


def _forward_ref(x, weight, bias, lora_A, lora_B, rank_scale, scaling, dropout_p, seed):
    """(y (M, N), S (M, R)) of a 2-d x in plain torch operations; differentiable."""
    delta, s = delta_ref(x, lora_A, lora_B, rank_scale, scaling, dropout_p, seed)
    y = F.linear(x, weight, bias)
    return y + delta.to(y.dtype), s


def _backward_ref(dy, x, weight, *adapter, need):
    dx, *grads = delta_backward_ref(dy, x, *adapter, need=need)
    return (None if dx is None else dy @ weight + dx, *grads)


def lora_linear_ref(x, weight, bias, lora_A, lora_B, *, scaling=1.0, rank_scale=None, dropout_p=0.0, seed=None):
    """`lora_linear` in plain differentiable torch operations, float64 included: the definition that every kernel is tested against."""
    seed = as_seed(OP, seed, x.device) if dropout_p > 0 else None
    y, _ = _forward_ref(as_2d(x), weight, bias, lora_A, lora_B, rank_scale, scaling, dropout_p, seed)
    return y.reshape(*x.shape[:-1], weight.shape[0])


@register(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? rank_scale, Tensor? seed, "
    "float scaling, float dropout_p) -> (Tensor, Tensor)"
)
def _lora_linear(x, weight, bias, lora_A, lora_B, rank_scale, seed, scaling, dropout_p):
    with no_autocast(x):
        operands = (as_2d(x), weight, bias, lora_A, lora_B, rank_scale, scaling, dropout_p)
        kernels = find_kernels(OP, x, weight.shape[0], lora_A)
        if kernels is None:
            y, s = _forward_ref(*operands, seed)
        else:
            y, s = kernels.lora_linear(*operands, threshold(dropout_p), seed)
        return as_output(y, x), s


@register(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor? s, Tensor lora_A, Tensor lora_B, Tensor? rank_scale, "
    "Tensor? seed, float scaling, float dropout_p, bool[4] need) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _lora_linear_backward(dy, x, weight, s, lora_A, lora_B, rank_scale, seed, scaling, dropout_p, need):
    """(dx, dA, dB, dE); x may be None where dA is not needed, s where neither dB nor dE is."""
    check_saved("lora_linear_backward", x, s, need[1], need[2] or need[3])
    with no_autocast(dy):
        tokens = None if x is None else as_2d(x)
        operands = (as_2d(dy), tokens, weight, s, lora_A, lora_B, rank_scale, scaling, dropout_p)
        kernels = find_kernels(OP, dy, weight.shape[1], lora_A)
        if kernels is None:
            grads = _backward_ref(*operands, seed, need=need)
        else:
            grads = kernels.lora_linear_backward(*operands, threshold(dropout_p), seed, *need)
        return not_aliased(dy, lora_A, grads)


@torch.library.register_fake("adaptlora::lora_linear", lib=library)
def _(x, weight, bias, lora_A, lora_B, rank_scale, seed, scaling, dropout_p):
    s = x.new_empty((math.prod(x.shape[:-1]), lora_A.shape[0]), dtype=accumulation_dtype(x.dtype))
    return x.new_empty((*x.shape[:-1], weight.shape[0])), s


@torch.library.register_fake("adaptlora::lora_linear_backward", lib=library)
def _(dy, x, weight, s, lora_A, lora_B, rank_scale, seed, scaling, dropout_p, need):
    return torch.ops.adaptlora.lora_delta_backward(dy, x, s, lora_A, lora_B, rank_scale, seed, scaling, dropout_p, need)


def _setup_context(ctx, inputs, output):
    x, weight, _, lora_A, lora_B, rank_scale, seed, ctx.scaling, ctx.dropout_p = inputs
    s = output[1]
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*to_save(x, s, [lora_A], [lora_B], [rank_scale]), weight, lora_A, lora_B, rank_scale, seed)


def _backward(ctx, dy, _):
    if dy is None:
        return (None,) * 9
    x, s, weight, lora_A, lora_B, rank_scale, seed = ctx.saved_tensors
    wants = ctx.needs_input_grad
    need = [wants[0], wants[3], wants[4], wants[5]]
    grads = torch.ops.adaptlora.lora_linear_backward(
        dy, x, weight, s, lora_A, lora_B, rank_scale, seed, ctx.scaling, ctx.dropout_p, need
    )
    dx, dA, dB, dE = (grad if needed else None for grad, needed in zip(grads, need, strict=True))
    return dx, None, None, dA, dB, dE, None, None, None


torch.library.register_autograd("adaptlora::lora_linear", _backward, setup_context=_setup_context, lib=library)
no_second_derivative("lora_linear_backward")


def check_linear(op: str, x, weight, bias, lora_A, lora_B, rank_scale, scaling, dropout_p) -> None:
    check_tokens(op, "x", x)
    check_tensor(op, "weight", weight, 2)
    K, N = x.shape[-1], weight.shape[0]
    if weight.shape[1] != K:
        raise ValueError(f"{op}: weight must have shape (N, K) with K={K} (x.shape[-1]), got {tuple(weight.shape)}")
    if bias is not None and not isinstance(bias, torch.Tensor):
        raise TypeError(f"{op}: bias must be a tensor or None, got {type(bias).__name__}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"{op}: bias must have shape (N,) with N={N} (weight.shape[0]), got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        check_device_and_dtype(op, name, tensor, x)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} must be frozen (no gradient for it is computed), got requires_grad=True")
    check_adapter(op, x, lora_A, lora_B, rank_scale, scaling, dropout_p, N, "weight.shape[0]")


def autocast(x, *others) -> tuple:
    """(x, *others) as torch's linear would see them: cast to autocast's dtype where that is enabled for the device of x."""
    if not autocasts(x):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(autocast_to(dtype, tensor) for tensor in (x, *others))


def lora_linear(
    x, weight, bias, lora_A, lora_B, *, scaling=1.0, rank_scale=None, dropout_p=0.0, seed=None
) -> torch.Tensor:
    """
    y = x Wᵀ + bias + scaling · drop(x) Aᵀ diag(E) Bᵀ          [LoRA, arXiv:2106.09685, eq. 3]

    Args:
        x: (..., K), fp32 / bf16 / fp16 (fp64: reference only), any strides; under autocast it is cast as torch's linear would.
        weight: (N, K), dtype of x, frozen; any strides, so that a transposed Conv1D weight works as it is.
        bias: (N,) or None, dtype of x, frozen.
        lora_A: (R, K), dtype of x or fp32.  R may be 0: the plain frozen linear.
        lora_B: (N, R), dtype of x or fp32.
        scaling: number s, lora_alpha / r for plain LoRA.
        rank_scale: E (R,) or None for ones; differentiable. A 0/1 mask, AdaLoRA's Λ and DyLoRA's prefix are this operand.
        dropout_p: probability in [0, 1) of dropping an element of the adapter's x; the base sees all of x.
        seed: int or 0-dim int64 tensor that fixes the dropout mask; None draws one from torch's generator.
    Returns: y (..., N), dtype of x; products with A and B are accumulated in fp32.
    Raises: ValueError (shape, device, range, unfrozen base), TypeError (dtype).
    Saved for backward: x where lora_A requires grad, S = drop(x) Aᵀ (M, R) where lora_B or rank_scale does, weight, A, B and the seed;
        no mask.   Deterministic: yes.
    """
    direct = _backend.direct(x)
    if direct is not None:
        y = direct.lora_linear_direct(x, weight, bias, lora_A, lora_B, rank_scale, scaling, dropout_p, seed)
        if y is not None:
            return y
    x, weight, bias = autocast(x, weight, bias)
    check_linear(OP, x, weight, bias, lora_A, lora_B, rank_scale, scaling, dropout_p)
    seed = as_seed(OP, seed, x.device) if dropout_p > 0 else None
    return torch.ops.adaptlora.lora_linear(
        x, weight, bias, lora_A, lora_B, rank_scale, seed, float(scaling), float(dropout_p)
    )[0]
