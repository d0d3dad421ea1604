"""The low-rank term alone: y += scaling · drop(x) Aᵀ diag(E) Bᵀ on the y that a base layer of any kind left, and its gradients."""

import math

import torch

from . import _backend
from ._checks import check_adapter, check_device_and_dtype, check_tokens
from ._dropout import as_seed, dropout_keep_ref, threshold
from ._library import accumulation_dtype, library, no_autocast, no_second_derivative, register

OP = "lora_delta_"
MAX_RANK = 256  # of the kernels; beyond it the reference runs


def as_2d(t: torch.Tensor) -> torch.Tensor:
    """(M, ·) of (..., ·); unlike reshape(-1, ·) also where a size is 0."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def as_output(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(..., N) of a fresh y (M, N), for an x (..., K): no view in autograd's eyes, which would let nobody write to it."""
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[1]])


def _drop(x: torch.Tensor, seed: torch.Tensor | None, p: float) -> torch.Tensor:
    """drop(x) of a 2-d x: kept elements divided by 1 − p."""
    if p == 0:
        return x
    return torch.where(dropout_keep_ref(seed, *x.shape, p), x / (1 - p), 0)


def _rank_factor(lora_A, rank_scale, scaling: float) -> torch.Tensor:
    """scaling · E as an (R,) vector of the accumulation dtype."""
    acc = accumulation_dtype(lora_A.dtype)
    if rank_scale is None:
        return torch.full((lora_A.shape[0],), scaling, dtype=acc, device=lora_A.device)
    return rank_scale.to(acc) * scaling


def delta_ref(x, lora_A, lora_B, rank_scale, scaling, dropout_p, seed):
    """(scaling · S diag(E) Bᵀ (M, N), S = drop(x) Aᵀ (M, R)) of a 2-d x, in the accumulation dtype; differentiable."""
    acc = accumulation_dtype(x.dtype)
    s = _drop(x.to(acc), seed, dropout_p) @ lora_A.to(acc).t()
    return (s * _rank_factor(lora_A, rank_scale, scaling)) @ lora_B.to(acc).t(), s


def delta_backward_ref(dy, x, s, lora_A, lora_B, rank_scale, scaling, dropout_p, seed, *, need):
    """(dx, dA, dB, dE) for 2-d dy and x, each None where not needed; G = dyᵀ S (N, R). x is read for dA, s for dB and dE."""
    need_dx, need_dA, need_dB, need_dE = need
    acc = accumulation_dtype(dy.dtype)
    factor = _rank_factor(lora_A, rank_scale, scaling)
    dy_acc = dy.to(acc)
    ds = (dy_acc @ lora_B.to(acc)) * factor if need_dx or need_dA else None
    G = (s.t() @ dy_acc).t() if need_dB or need_dE else None
    return (
        _drop(ds @ lora_A.to(acc), seed, dropout_p).to(dy.dtype) if need_dx else None,
        (ds.t() @ _drop(x.to(acc), seed, dropout_p)).to(lora_A.dtype) if need_dA else None,
        (G * factor).to(lora_B.dtype) if need_dB else None,
        ((G * lora_B).sum(0) * scaling).to(rank_scale.dtype) if need_dE else None,
    )


def lora_delta_ref(y, x, lora_A, lora_B, *, scaling=1.0, rank_scale=None, dropout_p=0.0, seed=None):
    """`lora_delta_` out of place, in plain differentiable torch operations, float64 included: the new y."""
    seed = as_seed(OP, seed, x.device) if dropout_p > 0 else None
    delta, _ = delta_ref(as_2d(x), lora_A, lora_B, rank_scale, scaling, dropout_p, seed)
    return (y + delta.reshape(y.shape)).to(y.dtype)


def has_kernels(x, N: int, lora_A) -> bool:
    """Empty operands have nothing to launch; the reference returns the right empty or zero results for them."""
    return bool(x.numel() and N and 0 < lora_A.shape[0] <= MAX_RANK)


def find_kernels(op: str, x, N: int, lora_A):
    """The module with the kernels of `op`, or None where the reference runs."""
    return _backend.kernels(x, op) if has_kernels(x, N, lora_A) else None


def shape_of_x(dy, lora_A) -> tuple[int, ...]:
    """(..., K), for a backward that may have no x."""
    return *dy.shape[:-1], lora_A.shape[1]


def to_save(x, s, lora_As, lora_Bs, rank_scales) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(x, S), each None unless a gradient is made of it: dA of x, dB and dE of S; dx of neither."""
    trains_A, trains_S = (
        any(t is not None and t.requires_grad for t in of) for of in (lora_As, (*lora_Bs, *rank_scales))
    )
    return x if trains_A else None, s if trains_S else None


def check_saved(op: str, x, s, need_dA: bool, need_dB_or_dE: bool) -> None:
    if need_dA and x is None:
        raise ValueError(f"{op}: x must be given where dA is needed, got None")
    if need_dB_or_dE and s is None:
        raise ValueError(f"{op}: s must be given where dB or dE is needed, got None")


def not_aliased(dy, lora_A, grads) -> tuple[torch.Tensor, ...]:
    """(dx, dA, dB, dE) as an op returns them: dx as x, an empty tensor of its own for each None (outputs must not alias)."""
    dx, *others = grads
    grads = [None if dx is None else dx.view(shape_of_x(dy, lora_A)), *others]
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


@register(
    "lora_delta_(Tensor(a!) y, Tensor x, Tensor lora_A, Tensor lora_B, Tensor? rank_scale, Tensor? seed, "
    "float scaling, float dropout_p) -> Tensor"
)
def _lora_delta_(y, x, lora_A, lora_B, rank_scale, seed, scaling, dropout_p):
    with no_autocast(x):
        operands = (as_2d(x), lora_A, lora_B, rank_scale, scaling, dropout_p)
        kernels = find_kernels("lora_delta", x, y.shape[-1], lora_A)
        if kernels is None:
            delta, s = delta_ref(*operands, seed)
            y.copy_(y + delta.reshape(y.shape))
            return s
        y_2d = as_2d(y)
        s = kernels.lora_delta_(y_2d, *operands, threshold(dropout_p), seed)
        if y_2d.data_ptr() != y.data_ptr():  # leading dimensions that no view makes one: y_2d is a copy
            y.copy_(y_2d.view(y.shape))
        return s


def _refuse_gradients(y, x, lora_A, lora_B, rank_scale, *others):
    """The op writes y outside of any graph: asked for gradients it must not return as if it had made them."""
    needed = any(t is not None and t.requires_grad for t in (y, x, lora_A, lora_B, rank_scale))
    if needed and torch.is_grad_enabled():
        raise RuntimeError("adaptlora::lora_delta_: not differentiable: call adaptlora.ops.lora_delta_, which is")
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.adaptlora.lora_delta_(y, x, lora_A, lora_B, rank_scale, *others)


library.impl("lora_delta_", _refuse_gradients, "Autograd")


@register(
    "lora_delta(Tensor y, Tensor x, Tensor lora_A, Tensor lora_B, Tensor? rank_scale, Tensor? seed, "
    "float scaling, float dropout_p) -> (Tensor, Tensor)"
)
def _lora_delta(y, *operands):
    out = y.clone()
    return out, _lora_delta_(out, *operands)


@register(
    "lora_delta_backward(Tensor dy, Tensor? x, Tensor? s, Tensor lora_A, Tensor lora_B, Tensor? rank_scale, Tensor? seed, "
    "float scaling, float dropout_p, bool[4] need) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _lora_delta_backward(dy, x, s, lora_A, lora_B, rank_scale, seed, scaling, dropout_p, need):
    """(dx, dA, dB, dE); x may be None where dA is not needed, s where neither dB nor dE is."""
    check_saved("lora_delta_backward", x, s, need[1], need[2] or need[3])
    with no_autocast(dy):
        tokens = None if x is None else as_2d(x)
        operands = (as_2d(dy), tokens, s, lora_A, lora_B, rank_scale, scaling, dropout_p)
        kernels = find_kernels("lora_delta", dy, lora_A.shape[1], lora_A)
        if kernels is None:
            grads = delta_backward_ref(*operands, seed, need=need)
        else:
            grads = kernels.lora_delta_backward(*operands, threshold(dropout_p), seed, *need)
        return not_aliased(dy, lora_A, grads)


@torch.library.register_fake("adaptlora::lora_delta_", lib=library)
def _(y, x, lora_A, lora_B, rank_scale, seed, scaling, dropout_p):
    return x.new_empty((math.prod(x.shape[:-1]), lora_A.shape[0]), dtype=accumulation_dtype(x.dtype))


@torch.library.register_fake("adaptlora::lora_delta", lib=library)
def _(y, *operands):
    return torch.empty_like(y), torch.ops.adaptlora.lora_delta_(y, *operands)


@torch.library.register_fake("adaptlora::lora_delta_backward", lib=library)
def _(dy, x, s, lora_A, lora_B, rank_scale, seed, scaling, dropout_p, need):
    likes = (
        dy.new_empty(shape_of_x(dy, lora_A)),
        lora_A.new_empty(lora_A.shape),
        lora_B.new_empty(lora_B.shape[::-1]).t(),
        rank_scale.new_empty(rank_scale.shape) if need[3] else None,
    )
    return tuple(like if needed else dy.new_empty(0) for like, needed in zip(likes, need, strict=True))


def _setup_context(ctx, inputs, output):
    _, x, lora_A, lora_B, rank_scale, seed, ctx.scaling, ctx.dropout_p = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    saved = to_save(x, output[1], [lora_A], [lora_B], [rank_scale])
    ctx.save_for_backward(*saved, lora_A, lora_B, rank_scale, seed)


def _backward(ctx, dy, _=None):
    need = list(ctx.needs_input_grad[1:5])
    if dy is None or not any(need):
        return dy, *(None,) * 7
    x, s, lora_A, lora_B, rank_scale, seed = ctx.saved_tensors
    grads = torch.ops.adaptlora.lora_delta_backward(
        dy, x, s, lora_A, lora_B, rank_scale, seed, ctx.scaling, ctx.dropout_p, need
    )
    return dy, *(grad if needed else None for grad, needed in zip(grads, need, strict=True)), None, None, None


class _LoraDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        y, s = inputs[0], torch.ops.adaptlora.lora_delta_(*inputs)
        _setup_context(ctx, inputs, (y, s))
        ctx.mark_dirty(y)
        return y

    backward = staticmethod(_backward)


torch.library.register_autograd("adaptlora::lora_delta", _backward, setup_context=_setup_context, lib=library)
no_second_derivative("lora_delta_backward")


def autocasts(x) -> bool:
    """Whether torch's autocast is on for the device of x."""
    if not isinstance(x, torch.Tensor) or not torch.amp.is_autocast_available(x.device.type):
        return False
    return torch.is_autocast_enabled(x.device.type)


def autocast_to(dtype: torch.dtype, tensor):
    """`tensor` as autocast would cast it: floating-point tensors other than float64. The checks see what else there is."""
    castable = isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if castable else tensor


def _check_writable(y, *operands) -> None:
    """What torch would refuse to change in place, before it is changed: autograd looks at a custom op only afterwards."""
    if any(stride == 0 and size > 1 for size, stride in zip(y.shape, y.stride(), strict=True)):
        raise ValueError(
            f"{OP}: y must not have elements that share memory, got {tuple(y.shape)} with strides {y.stride()}"
        )
    if torch.compiler.is_compiling():
        return
    if y.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{OP}: y must not be an inference tensor outside of inference_mode, got one")
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (y, *operands)):
        return
    if y._is_view() and (meta := torch._C._autograd._get_creation_meta(y)) != torch._C._autograd.CreationMeta.DEFAULT:
        raise ValueError(
            f"{OP}: y must not be a view that autograd cannot follow (one of several, as of chunk; made without gradients; made by "
            f"a custom Function, as of bitsandbytes for an x of three dimensions), got {meta.name}: give y.clone()"
        )
    if y.requires_grad and (y._base if y._is_view() else y).is_leaf:
        raise ValueError(
            f"{OP}: y must not be a leaf that requires grad, or a view of one, got one while gradients are on"
        )


def lora_delta_(y, x, lora_A, lora_B, *, scaling=1.0, rank_scale=None, dropout_p=0.0, seed=None) -> torch.Tensor:
    """
    y += scaling · drop(x) Aᵀ diag(E) Bᵀ, in place          [LoRA, arXiv:2106.09685, eq. 3, on a base layer of any kind]

    With y = base(x) this is a LoRA layer over any base: bitsandbytes' and torchao's quantised linears, for example.

    Args:
        y: (..., N), fp32 / bf16 / fp16 (fp64: reference only), any strides without overlap, no memory of x; changed in place.
        x: (..., K), the leading dimensions, dtype and device of y; any strides. Under autocast it is cast to the dtype of y.
        lora_A: (R, K), dtype of x or fp32.  R may be 0: y stays.
        lora_B: (N, R), dtype of x or fp32.
        scaling: number s, lora_alpha / r for plain LoRA.
        rank_scale: E (R,) or None for ones; differentiable.
        dropout_p: probability in [0, 1) of dropping an element of x.
        seed: int or 0-dim int64 tensor that fixes the dropout mask; None draws one from torch's generator.
    Returns: y itself; the product is accumulated in fp32, added to y in fp32 and rounded once. Gradients: dy, unchanged, for the
        old y; dx, dA, dB and dE for the others.
    Raises: ValueError (shape, device, range, a y that must not change), TypeError (dtype); y is unchanged then.
    Saved for backward: x where lora_A requires grad, S = drop(x) Aᵀ (M, R) where lora_B or rank_scale does, A, B and the seed; not y and
        no mask.   Deterministic: yes.
    """
    check_tokens(OP, "y", y)
    if autocasts(x):
        x = autocast_to(y.dtype, x)
    check_tokens(OP, "x", x)
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{OP}: y must have the leading dimensions of x, {tuple(x.shape[:-1])}, got shape {tuple(y.shape)}"
        )
    check_device_and_dtype(OP, "y", y, x)
    check_adapter(OP, x, lora_A, lora_B, rank_scale, scaling, dropout_p, y.shape[-1], "y.shape[-1]")
    _check_writable(y, x, lora_A, lora_B, rank_scale)
    seed = as_seed(OP, seed, x.device) if dropout_p > 0 else None
    operands = (y, x, lora_A, lora_B, rank_scale, seed, float(scaling), float(dropout_p))
    if torch.compiler.is_compiling():
        # dynamo traces the Function but forgets the graph of a y that came from outside of what it compiles.
        return y.copy_(torch.ops.adaptlora.lora_delta(*operands)[0])
    return _LoraDelta.apply(*operands)
