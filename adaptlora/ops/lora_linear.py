"""The LoRA linear layer: y = x Wᵀ + bias + scaling · drop(x) Aᵀ diag(E) Bᵀ and its gradients.  [LoRA, arXiv:2106.09685, eq. 3]"""

import torch
import torch.nn.functional as F

from . import _backend
from ._checks import FLOATS, check_dropout, check_factors, check_finite_number, check_tensor
from ._dropout import as_seed, dropout_keep_ref, threshold
from ._library import accumulation_dtype, library, no_autocast, no_second_derivative, register

OP = "lora_linear"
_MAX_RANK = 256  # of the kernels; beyond it the reference runs


def _as_2d(t: torch.Tensor) -> torch.Tensor:
    """(M, ·) of (..., ·); unlike reshape(-1, ·) also where a size is 0."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _drop(x: torch.Tensor, seed: torch.Tensor | None, p: float) -> torch.Tensor:
    """drop(x) of a 2-d x: kept elements divided by 1 − p."""
    if p == 0:
        return x
    return torch.where(dropout_keep_ref(seed, *x.shape, p), x / (1 - p), 0)


def _forward_ref(x, weight, bias, lora_A, lora_B, rank_factor, dropout_p, seed):
    """(y (M, N), S (M, R)) of a 2-d x in plain torch operations; differentiable."""
    acc = accumulation_dtype(x.dtype)
    s = _drop(x.to(acc), seed, dropout_p) @ lora_A.to(acc).t()
    y = F.linear(x, weight, bias)
    return y + ((s * rank_factor) @ lora_B.to(acc).t()).to(y.dtype), s


def _backward_ref(dy, x, weight, s, lora_A, lora_B, rank_scale, scaling, dropout_p, seed, need):
    """(dx, dA, dB, dE), each None where not needed; G = dyᵀ S (N, R)."""
    need_dx, need_dA, need_dB, need_dE = need
    acc = accumulation_dtype(x.dtype)
    factor = _rank_factor(lora_A, rank_scale, scaling)
    dy_acc = dy.to(acc)
    ds = (dy_acc @ lora_B.to(acc)) * factor if need_dx or need_dA else None
    G = (s.t() @ dy_acc).t() if need_dB or need_dE else None
    return (
        dy @ weight + _drop(ds @ lora_A.to(acc), seed, dropout_p).to(dy.dtype) if need_dx else None,
        (ds.t() @ _drop(x.to(acc), seed, dropout_p)).to(lora_A.dtype) if need_dA else None,
        (G * factor).to(lora_B.dtype) if need_dB else None,
        ((G * lora_B).sum(0) * scaling).to(rank_scale.dtype) if need_dE else None,
    )


def _rank_factor(lora_A, rank_scale, scaling: float) -> torch.Tensor:
    """scaling · E as an (R,) vector of the accumulation dtype."""
    acc = accumulation_dtype(lora_A.dtype)
    if rank_scale is None:
        return torch.full((lora_A.shape[0],), scaling, dtype=acc, device=lora_A.device)
    return rank_scale.to(acc) * scaling


def lora_linear_ref(x, weight, bias, lora_A, lora_B, *, scaling=1.0, rank_scale=None, dropout_p=0.0, seed=None):
    """`lora_linear` in plain differentiable torch operations, float64 included: the definition that every kernel is tested against."""
    seed = as_seed(OP, seed, x.device) if dropout_p > 0 else None
    factor = _rank_factor(lora_A, rank_scale, scaling)
    y, _ = _forward_ref(_as_2d(x), weight, bias, lora_A, lora_B, factor, dropout_p, seed)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _kernels(x, weight, lora_A):
    # Empty operands have nothing to launch; the reference returns the right empty or zero results for them.
    launches = x.numel() and weight.shape[0] and 0 < lora_A.shape[0] <= _MAX_RANK
    return _backend.kernels(x, OP) if launches else None


@register(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? rank_scale, Tensor? seed, "
    "float scaling, float dropout_p) -> (Tensor, Tensor)"
)
def _lora_linear(x, weight, bias, lora_A, lora_B, rank_scale, seed, scaling, dropout_p):
    with no_autocast(x):
        x_2d = _as_2d(x)
        kernels = _kernels(x, weight, lora_A)
        if kernels is None:
            factor = _rank_factor(lora_A, rank_scale, scaling)
            y, s = _forward_ref(x_2d, weight, bias, lora_A, lora_B, factor, dropout_p, seed)
        else:
            y, s = kernels.lora_linear(
                x_2d, weight, bias, lora_A, lora_B, rank_scale, scaling, dropout_p, threshold(dropout_p), seed
            )
        return y.view(*x.shape[:-1], weight.shape[0]), s


@register(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor s, Tensor lora_A, Tensor lora_B, Tensor? rank_scale, "
    "Tensor? seed, float scaling, float dropout_p, bool[4] need) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _lora_linear_backward(dy, x, weight, s, lora_A, lora_B, rank_scale, seed, scaling, dropout_p, need):
    with no_autocast(x):
        operands = (_as_2d(dy), _as_2d(x), weight, s, lora_A, lora_B, rank_scale, scaling, dropout_p)
        kernels = _kernels(x, weight, lora_A)
        if kernels is None:
            dx, *grads = _backward_ref(*operands, seed, need)
        else:
            dx, *grads = kernels.lora_linear_backward(*operands, threshold(dropout_p), seed, *need)
        # An empty tensor of its own for each gradient that is not needed: outputs of an op must not alias.
        grads = [None if dx is None else dx.view(x.shape), *grads]
        return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("adaptlora::lora_linear", lib=library)
def _(x, weight, bias, lora_A, lora_B, rank_scale, seed, scaling, dropout_p):
    s = x.new_empty((x.shape[:-1].numel(), lora_A.shape[0]), dtype=accumulation_dtype(x.dtype))
    return x.new_empty((*x.shape[:-1], weight.shape[0])), s


@torch.library.register_fake("adaptlora::lora_linear_backward", lib=library)
def _(dy, x, weight, s, lora_A, lora_B, rank_scale, seed, scaling, dropout_p, need):
    none = x.new_empty(0)
    dB = lora_B.new_empty(lora_B.shape[::-1]).t()
    likes = (
        x.new_empty(x.shape),
        lora_A.new_empty(lora_A.shape),
        dB,
        rank_scale.new_empty(rank_scale.shape) if need[3] else none,
    )
    return tuple(like if needed else x.new_empty(0) for like, needed in zip(likes, need, strict=True))


def _setup_context(ctx, inputs, output):
    x, weight, _, lora_A, lora_B, rank_scale, seed, ctx.scaling, ctx.dropout_p = inputs
    s = output[1]
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, s, lora_A, lora_B, rank_scale, seed)


def _backward(ctx, dy, _):
    if dy is None:
        return (None,) * 9
    x, weight, s, lora_A, lora_B, rank_scale, seed = ctx.saved_tensors
    wants = ctx.needs_input_grad
    need = [wants[0], wants[3], wants[4], wants[5]]
    grads = torch.ops.adaptlora.lora_linear_backward(
        dy, x, weight, s, lora_A, lora_B, rank_scale, seed, ctx.scaling, ctx.dropout_p, need
    )
    dx, dA, dB, dE = (grad if needed else None for grad, needed in zip(grads, need, strict=True))
    return dx, None, None, dA, dB, dE, None, None, None


torch.library.register_autograd("adaptlora::lora_linear", _backward, setup_context=_setup_context, lib=library)
no_second_derivative("lora_linear_backward")


def _check(x, weight, bias, lora_A, lora_B, rank_scale, scaling, dropout_p) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"{OP}: x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() == 0:
        raise ValueError(f"{OP}: x must have shape (..., K), got a 0-dim tensor")
    check_tensor(OP, "weight", weight, 2)
    K, N = x.shape[-1], weight.shape[0]
    if weight.shape[1] != K:
        raise ValueError(f"{OP}: weight must have shape (N, K) with K={K} (x.shape[-1]), got {tuple(weight.shape)}")
    check_factors(OP, lora_A, lora_B, K, N)
    for name, vector in (("bias", bias), ("rank_scale", rank_scale)):
        if vector is not None and not isinstance(vector, torch.Tensor):
            raise TypeError(f"{OP}: {name} must be a tensor or None, got {type(vector).__name__}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"{OP}: bias must have shape (N,) with N={N} (weight.shape[0]), got {tuple(bias.shape)}")
    if rank_scale is not None and rank_scale.shape != lora_A.shape[:1]:
        raise ValueError(
            f"{OP}: rank_scale must have shape (R,) with R={lora_A.shape[0]} (lora_A.shape[0]), got {tuple(rank_scale.shape)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias), ("lora_A", lora_A), ("rank_scale", rank_scale)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{OP}: {name} must be on the device of x, {x.device}, got {tensor.device}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise TypeError(f"{OP}: {name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{OP}: {name} must be frozen (no gradient for it is computed), got requires_grad=True")
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B), ("rank_scale", rank_scale)):
        if tensor is not None and tensor.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{OP}: {name} must have the dtype of x, {x.dtype}, or float32, got {tensor.dtype}")
    check_finite_number(OP, "scaling", scaling)
    check_dropout(OP, dropout_p)


def _autocast(t, dtype: torch.dtype):
    """`t` as torch's autocast would cast it: floating-point tensors other than float64. The checks see what else there is."""
    castable = isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64
    return t.to(dtype) if castable else t


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
    Saved for backward: x, S = drop(x) Aᵀ (M, R), A, B and the seed; no mask.   Deterministic: yes.
    """
    if (
        isinstance(x, torch.Tensor)
        and torch.amp.is_autocast_available(x.device.type)
        and torch.is_autocast_enabled(x.device.type)
    ):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (_autocast(t, dtype) for t in (x, weight, bias))
    _check(x, weight, bias, lora_A, lora_B, rank_scale, scaling, dropout_p)
    seed = as_seed(OP, seed, x.device) if dropout_p > 0 else None
    return torch.ops.adaptlora.lora_linear(
        x, weight, bias, lora_A, lora_B, rank_scale, seed, float(scaling), float(dropout_p)
    )[0]
