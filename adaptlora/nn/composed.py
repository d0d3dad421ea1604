"""Products of a trained inner pair with frozen outer factors, made once and differentiated as often as they are used."""

import dataclasses

import torch
from torch import nn

from .. import ops
from ..ops import _backend


def compose(lora_A, lora_B, outer_A, outer_B, rest=None) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `ops.compose`, where torch.compile traces in plain torch operations, which it fuses with what is around them.

    Args:
        rest: more rank vectors to put behind, a pair (q, K) and (q, N), or None.
    Returns: A_eff (r + q, K) and B_eff (N, r + q), both rank-major.
    """
    products = ops.compose_ref if torch.compiler.is_compiling() else ops.compose
    A_eff, B_eff = products(lora_A, lora_B, outer_A, outer_B)
    if rest is not None:
        A_eff, B_eff = torch.cat([A_eff, rest[0]]), torch.cat([B_eff.t(), rest[1]]).t()
    return A_eff, B_eff


class _Composed(torch.autograd.Function):
    """
    (A_eff, B_eff) as functions of A' and B', for products that are there already: one node a call, and no product of its own.

    The gradients are those of `ops.compose`, over the rows that A' and B' made. csrc/autograd.cpp has the same node for plain calls.
    """

    @staticmethod
    def forward(ctx, lora_A, lora_B, outer_A, outer_B, A_eff, B_eff):
        ctx.save_for_backward(outer_A, outer_B)
        ctx.set_materialize_grads(False)
        ctx.rank = lora_A.shape[0]
        # Aliases: a graph must not hang on the tensors that are kept.
        return A_eff.detach(), B_eff.detach()

    @staticmethod
    def backward(ctx, dA_eff, dB_eff):
        upstream = [
            d.narrow(side, 0, ctx.rank) if d is not None and ctx.needs_input_grad[side] else None
            for side, d in enumerate((dA_eff, dB_eff))
        ]
        need = [d is not None for d in upstream]
        grads = (None, None)
        if any(need):
            grads = torch.ops.adaptlora.compose_backward(*upstream, *ctx.saved_tensors, need)
        return *(grad if needed else None for grad, needed in zip(grads, need, strict=True)), None, None, None, None


@dataclasses.dataclass(frozen=True)
class _Entry:
    key: list
    sources: tuple  # keep the memory that `key` names from being given to other tensors
    factors: tuple[torch.Tensor, torch.Tensor]


def _key(tensors) -> list | None:
    """What changes when torch writes to one of `tensors` or puts another in its place; None where that cannot be told."""
    if any(type(t) not in (torch.Tensor, nn.Parameter) or t.is_inference() for t in tensors):
        return None
    return [(t.data_ptr(), t.shape, t.dtype, t.device, t._version) for t in tensors]


class ComposedFactors:
    """
    (A_eff, B_eff) of `compose`, kept from call to call while their operands stay what they are. Copies and pickles start empty.
    """

    def __init__(self):
        self._entry: _Entry | None = None

    def forget(self) -> None:
        self._entry = None

    def get(self, operands: tuple, rest, *, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            operands: (A', B', outer_A, outer_B).   rest: called for the `rest` of `compose`.
            keep: whether products may be used that an earlier call left, and these be left for a later one.
        """
        key = _key(operands) if keep else None
        if key is None or self._entry is None or self._entry.key != key:
            self.forget()
            # Made as ordinary tensors: a later call may record gradients with them.
            with torch.inference_mode(False), torch.no_grad():
                factors = compose(*operands, rest())
            if key is not None:
                self._entry = _Entry(key, tuple(t.detach() for t in operands), factors)
        else:
            factors = self._entry.factors
        direct = _backend.direct(operands[0])
        composed = None if direct is None else direct.composed_direct(operands, *factors)
        return _Composed.apply(*operands, *factors) if composed is None else composed

    def __reduce__(self):
        return ComposedFactors, ()
