"""Products of a trained inner pair with frozen outer factors, made once and differentiated as often as they are used."""

import dataclasses

import torch
from torch import nn

from ..ops._library import no_autocast


def compose(lora_A, lora_B, outer_A, outer_B, rest=None) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A_eff = A' outer_A, B_effᵀ = B'ᵀ outer_B, in plain differentiable torch operations.

    Args:
        lora_A: A' (r, r_out).   lora_B: B' (r_out, r).   outer_A: (r_out, K).   outer_B: (r_out, N).
        rest: more rank vectors to put behind, a pair (q, K) and (q, N), or None.
    Returns: A_eff (r + q, K) and B_eff (N, r + q), both rank-major.
    """
    with no_autocast(lora_A):
        rows_A, rows_B = lora_A @ outer_A, lora_B.t() @ outer_B
    if rest is not None:
        rows_A, rows_B = torch.cat([rows_A, rest[0]]), torch.cat([rows_B, rest[1]])
    return rows_A, rows_B.t()


class _Composed(torch.autograd.Function):
    """
    (A_eff, B_eff) as functions of A' and B', for products that are there already: one node a call, and no product of its own.

    dA' = dA_eff outer_Aᵀ and dB'ᵀ = dB_effᵀ outer_Bᵀ, over the rows that A' and B' made. Second derivatives are right: both are linear.
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
        outer_A, outer_B = ctx.saved_tensors
        dA = dB = None
        with no_autocast(outer_A):
            if dA_eff is not None and ctx.needs_input_grad[0]:
                dA = dA_eff[: ctx.rank] @ outer_A.t()
            if dB_eff is not None and ctx.needs_input_grad[1]:
                dB = (dB_eff[:, : ctx.rank].t() @ outer_B.t()).t()
        return dA, dB, None, None, None, None


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
        return _Composed.apply(*operands, *factors)

    def __reduce__(self):
        return ComposedFactors, ()
