"""LoRA linear layers that share x, each of its own rank: y_i = x W_iᵀ + bias_i + s_i · drop_i(x) A_iᵀ diag(E_i) B_iᵀ, and gradients."""

import math
from itertools import islice

import torch

from . import _backend
from ._checks import check_dropout, check_tokens
from ._dropout import as_seed, new_seed, threshold
from ._library import accumulation_dtype, library, no_autocast, no_second_derivative, register
from .lora_delta import MAX_RANK, as_2d, as_output, check_saved, shape_of_x, to_save
from .lora_linear import autocast, check_linear, lora_linear_ref

OP = "lora_group"


def lora_group_ref(
    x, weights, biases, lora_As, lora_Bs, *, scalings, rank_scales=None, dropout_p=0.0, seeds=None
) -> list[torch.Tensor]:
    """`lora_group` in plain differentiable torch operations, float64 included: `lora_linear_ref` of each module."""
    absent = [None] * len(weights)
    rank_scales, seeds = (absent if given is None else given for given in (rank_scales, seeds))
    return [
        lora_linear_ref(x, weight, bias, A, B, scaling=scaling, rank_scale=E, dropout_p=dropout_p, seed=seed)
        for weight, bias, A, B, scaling, E, seed in zip(
            weights, biases, lora_As, lora_Bs, scalings, rank_scales, seeds, strict=True
        )
    ]


def _present(vectors: list[torch.Tensor], matrices: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """
    Vectors as long as their matrix has rows; None where the op was given an empty one for rows, which stands for an absent one.

    A None in the op's list itself would do for the kernels, but torch's autograd gives such a list no gradients at all.
    """
    return [v if v.numel() or not len(matrix) else None for v, matrix in zip(vectors, matrices, strict=True)]


def _kernels(x, weights, lora_As):
    """For x, or a dy: kernels that take all modules in one launch, or None, where they run one by one, as lora_linear would each."""
    launches = x.numel() and all(W.numel() for W in weights) and 0 < max(A.shape[0] for A in lora_As) <= MAX_RANK
    kernels = _backend.kernels(x, OP) if launches else None
    return kernels if hasattr(kernels, OP) else None


@register(
    "lora_group(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] lora_As, Tensor[] lora_Bs, Tensor[] rank_scales, "
    "Tensor[] seeds, float[] scalings, float dropout_p) -> (Tensor[], Tensor)"
)
def _lora_group(x, weights, biases, lora_As, lora_Bs, rank_scales, seeds, scalings, dropout_p):
    """The y's, and S (M, ΣR), the modules' columns in order."""
    biases, rank_scales = _present(biases, weights), _present(rank_scales, lora_As)
    kernels = _kernels(x, weights, lora_As)
    if kernels is None:
        seeds = seeds or [None] * len(weights)
        modules = zip(weights, biases, lora_As, lora_Bs, rank_scales, seeds, scalings, strict=True)
        outputs = [torch.ops.adaptlora.lora_linear(x, *module, dropout_p) for module in modules]
        return [y for y, _ in outputs], torch.cat([s for _, s in outputs], 1)
    with no_autocast(x):
        ys, s = kernels.lora_group(
            as_2d(x), weights, biases, lora_As, lora_Bs, rank_scales, scalings, dropout_p, threshold(dropout_p), seeds or None
        )  # fmt: skip
    return [as_output(y, x) for y in ys], s


@register(
    "lora_group_backward(Tensor?[] dys, Tensor? x, Tensor[] weights, Tensor? s, Tensor[] lora_As, Tensor[] lora_Bs, "
    "Tensor[] rank_scales, Tensor[] seeds, float[] scalings, float dropout_p, bool need_dx, bool[] need_dA, bool[] need_dB, "
    "bool[] need_dE) -> (Tensor, Tensor[], Tensor[], Tensor[])"
)
def _lora_group_backward(
    dys, x, weights, s, lora_As, lora_Bs, rank_scales, seeds, scalings, dropout_p, need_dx, need_dA, need_dB, need_dE
):
    """
    dx and lists dA, dB, dE, each empty where not needed. Of a module without dy nothing is needed, and at least one has a dy. x may be
    None where no dA is needed, s where neither a dB nor a dE is.
    """
    check_saved("lora_group_backward", x, s, any(need_dA), any(need_dB + need_dE))
    # torch resolves lazily negated tensors before an op, but not in a list of optional ones.
    dys = [None if dy is None else dy.resolve_neg() for dy in dys]
    like = next(dy for dy in dys if dy is not None)
    rank_scales = _present(rank_scales, lora_As)
    kernels = _kernels(like, weights, lora_As)
    if kernels is None:
        dx, lists = None, ([None] * len(dys), [None] * len(dys), [None] * len(dys))
        seeds = seeds or [None] * len(weights)
        columns = [None] * len(dys) if s is None else s.split([A.shape[0] for A in lora_As], 1)
        modules = list(zip(columns, lora_As, lora_Bs, rank_scales, seeds, scalings, strict=True))
        for i, dy in enumerate(dys):
            if dy is None:
                continue
            need = [need_dx, need_dA[i], need_dB[i], need_dE[i]]
            dx_i, lists[0][i], lists[1][i], lists[2][i] = torch.ops.adaptlora.lora_linear_backward(
                dy, x, weights[i], *modules[i], dropout_p, need
            )
            if need_dx:
                dx = dx_i if dx is None else dx.add_(dx_i)
    else:
        with no_autocast(like):
            dx, *lists = kernels.lora_group_backward(
                [None if dy is None else as_2d(dy) for dy in dys],
                None if x is None else as_2d(x), weights, s, lora_As, lora_Bs, rank_scales, scalings, dropout_p, threshold(dropout_p),
                seeds or None, need_dx, need_dA, need_dB, need_dE,
            )  # fmt: skip
    # As in lora_linear, an empty tensor of its own for each gradient that is not needed.
    lists = ([like.new_empty(0) if grad is None else grad for grad in grads] for grads in lists)
    return like.new_empty(0) if dx is None else dx.view(shape_of_x(like, lora_As[0])), *lists


@torch.library.register_fake("adaptlora::lora_group", lib=library)
def _(x, weights, biases, lora_As, lora_Bs, rank_scales, seeds, scalings, dropout_p):
    s = x.new_empty((math.prod(x.shape[:-1]), sum(A.shape[0] for A in lora_As)), dtype=accumulation_dtype(x.dtype))
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights], s


@torch.library.register_fake("adaptlora::lora_group_backward", lib=library)
def _(
    dys, x, weights, s, lora_As, lora_Bs, rank_scales, seeds, scalings, dropout_p, need_dx, need_dA, need_dB, need_dE
):
    like = next(dy for dy in dys if dy is not None)
    modules = zip(lora_As, lora_Bs, rank_scales, zip(need_dA, need_dB, need_dE, strict=True), strict=True)
    grads = [
        torch.ops.adaptlora.lora_delta_backward(like, x, s, A, B, E, None, 1.0, 0.0, [False, *need])[1:]
        for A, B, E, need in modules
    ]
    return like.new_empty(shape_of_x(like, lora_As[0]) if need_dx else 0), *map(list, zip(*grads, strict=True))


def _setup_context(ctx, inputs, output):
    x, weights, _, lora_As, lora_Bs, rank_scales, seeds, ctx.scalings, ctx.dropout_p = inputs
    s = output[1]
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    ctx.lengths = [len(tensors) for tensors in (weights, lora_As, lora_Bs, rank_scales, seeds)]
    saved = to_save(x, s, lora_As, lora_Bs, rank_scales)
    ctx.save_for_backward(*saved, *weights, *lora_As, *lora_Bs, *rank_scales, *seeds)


def _backward(ctx, dys, _):
    x, s, *tensors = ctx.saved_tensors
    tensors = iter(tensors)
    weights, lora_As, lora_Bs, rank_scales, seeds = (list(islice(tensors, length)) for length in ctx.lengths)
    want_dx, _, _, *wants, _, _, _ = ctx.needs_input_grad
    none = [None] * len(weights)
    if all(dy is None for dy in dys):
        return None, none, none, none, none, none, [None] * len(seeds), None, None
    need = [[needed and dy is not None for needed, dy in zip(want, dys, strict=True)] for want in wants]
    dx, *lists = torch.ops.adaptlora.lora_group_backward(
        dys, x, weights, s, lora_As, lora_Bs, rank_scales, seeds, ctx.scalings, ctx.dropout_p, want_dx, *need
    )
    grads = (
        [grad if needed else None for grad, needed in zip(*pair, strict=True)] for pair in zip(lists, need, strict=True)
    )
    return dx if want_dx else None, none, none, *grads, [None] * len(seeds), None, None


torch.library.register_autograd("adaptlora::lora_group", _backward, setup_context=_setup_context, lib=library)
no_second_derivative("lora_group_backward")


def _check_lists(**lists) -> None:
    """Lists, not tensors that could be iterated over, of one length ≥ 1."""
    for name, items in lists.items():
        if not isinstance(items, (list, tuple)):
            raise TypeError(f"{OP}: {name} must be a list or tuple, got {type(items).__name__}")
    length = len(lists["weights"])
    if not length:
        raise ValueError(f"{OP}: weights must hold at least one tensor, got none")
    for name, items in lists.items():
        if len(items) != length:
            raise ValueError(f"{OP}: {name} must be as long as weights, {length}, got {len(items)}")


def lora_group(
    x, weights, biases, lora_As, lora_Bs, *, scalings, rank_scales=None, dropout_p=0.0, seeds=None
) -> list[torch.Tensor]:
    """
    y_i = x W_iᵀ + bias_i + scaling_i · drop_i(x) A_iᵀ diag(E_i) B_iᵀ: q, k and v, or gate and up, in one call

    Args:
        x: (..., K), fp32 / bf16 / fp16 (fp64: reference only), any strides; under autocast it is cast as torch's linear would.
        weights: list of (N_i, K), dtype of x, frozen; any strides.
        biases: list of (N_i,) or None, dtype of x, frozen.
        lora_As: list of (R_i, K), dtype of x or fp32; ranks differ, and where R_i is 0 the module is its frozen linear.
        lora_Bs: list of (N_i, R_i), dtype of x or fp32.
        scalings: list of numbers.
        rank_scales: list of E_i (R_i,) or None, differentiable; None for ones everywhere.
        dropout_p: probability in [0, 1) of dropping an element of a module's x; each module has a mask of its own, as in PEFT.
        seeds: list of int, 0-dim int64 tensor or None, which fix the masks; None for a list of None. Each None draws a seed from
            torch's generator, in order: those that `lora_linear` would draw, called on the modules one after the other.
    Returns: list of y_i (..., N_i), dtype of x; products with A_i and B_i are accumulated in fp32.
    Raises: ValueError (shape, length, device, range, unfrozen base), TypeError (dtype, not a list).
    Saved for backward: x where a lora_A requires grad, S (M, ΣR_i) with the columns drop_i(x) A_iᵀ where a lora_B or E does, W_i, A_i,
        B_i, E_i and the seeds; no mask.   Deterministic: yes.
    A module whose y_i takes no part in the loss gets no gradients and adds nothing to dx.
    """
    absent = [None] * len(weights) if isinstance(weights, (list, tuple)) else []
    rank_scales, seeds = (absent if given is None else given for given in (rank_scales, seeds))
    direct = _backend.direct(x)
    if direct is not None:
        ys = direct.lora_group_direct(x, weights, biases, lora_As, lora_Bs, rank_scales, scalings, dropout_p, seeds)
        if ys is not None:
            return ys
    _check_lists(
        weights=weights, biases=biases, lora_As=lora_As, lora_Bs=lora_Bs, scalings=scalings, rank_scales=rank_scales,
        seeds=seeds,
    )  # fmt: skip
    check_dropout(OP, dropout_p)
    check_tokens(OP, "x", x)
    x, *bases = autocast(x, *weights, *biases)
    weights, biases = bases[: len(weights)], bases[len(weights) :]
    for i, operands in enumerate(zip(weights, biases, lora_As, lora_Bs, rank_scales, scalings, strict=True)):
        check_linear(f"{OP}: module {i}", x, *operands, dropout_p)
    keys = []
    if dropout_p > 0:
        keys = [seed if seed is None else as_seed(f"{OP}: module {i}", seed, x.device) for i, seed in enumerate(seeds)]
        keys = [
            new_seed(x.device) if key is None else key for key in keys
        ]  # drawn when every argument is known to be right
    biases, rank_scales = ([x.new_empty(0) if t is None else t for t in tensors] for tensors in (biases, rank_scales))
    lists = (weights, biases, list(lora_As), list(lora_Bs), rank_scales, keys, [float(scaling) for scaling in scalings])
    return torch.ops.adaptlora.lora_group(x, *lists, float(dropout_p))[0]
