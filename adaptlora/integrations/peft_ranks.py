"""Parameters of PEFT's at other ranks: the same objects, in PEFT's memory format, with their gradients and optimizer state."""

import torch
from torch import nn

from ..optimizer_wrappers import check_wrappers, holding, nested
from ..rank_slots import factor_rows, to_rows
from ..ranks import RankedPair, RankPlan, commit_ranks
from ..state_layouts import RANK_DIM, Packed


class BorrowedPair(RankedPair):
    """
    Two parameters that belong to somebody else, for one rank change. They stay the same objects and contiguous, and so does all that
    has their shape: a fused optimizer walks through parameter, gradient and state by memory alone.

    Args:
        lora_A: (R, K).   lora_B: (N, R).   optimizers: whose state follows.
        values: (A (R', K), B (N, R')) of other vectors that take the place of these; no state follows then.
    """

    def __init__(self, lora_A: nn.Parameter, lora_B: nn.Parameter, optimizers, values=None):
        nn.Module.__init__(self)
        self.lora_A, self.lora_B = lora_A, lora_B
        self._stores = {name: factor_rows(name, self._parameters[name].data) for name in self.factor_names}
        self._tracked = {} if values else {optimizer: {} for optimizer in optimizers}
        self._waiting = {}
        self._values = dict(zip(self.factor_names, values, strict=True)) if values else None
        self._plan: RankPlan | None = None

    def plan(self, *args, **options) -> RankPlan:
        self._plan = super().plan(*args, **options)
        return self._plan

    def lay_out(self) -> None:
        """Rows that were moved, contiguous in the shape that they are used in, before anything takes them."""
        plan = self._plan
        if self._values is not None:
            plan.grads.clear()
            for slot in plan.slots:
                like = {"dtype": slot.store.dtype, "device": slot.store.device, "copy": True}
                values = self._values[slot.factor].to(memory_format=torch.contiguous_format, **like)
                slot.store = factor_rows(slot.factor, values)
            return
        for slot in (*plan.slots, *plan.grads.values()):
            if not isinstance(slot.layout, Packed):
                dim = RANK_DIM[slot.factor] if slot.layout is None else slot.layout.dim
                slot.store = to_rows(slot.active(plan.rank).contiguous(), dim)


class Followers:
    """
    The optimizer of some factors, seen to hold them and no state that a rank change could not reach; or none.

    Raises: TypeError, ValueError (as `Adapter.track`).
    """

    def __init__(self, op: str, optimizer, factors: list[nn.Parameter]):
        self.optimizers, self._holders = [], []
        if optimizer is None:
            return
        around, stepping = holding(op, optimizer, factors, "the model's parameters with requires_grad")
        check_wrappers(op, optimizer, around, factors)
        self.optimizers, self._holders = [*around, *stepping], nested(optimizer)

    def forget(self, parameters: list[nn.Parameter]) -> None:
        """Their state goes; they stay in their groups."""
        for optimizer in self.optimizers:
            for parameter in parameters:
                optimizer.state.pop(parameter, None)

    def release(self, parameters: list[nn.Parameter]) -> None:
        """Their state goes, and they leave their groups, which stay even where they are empty: schedulers know how many there are."""
        self.forget(parameters)
        gone = {id(parameter) for parameter in parameters}
        for holder in self._holders:
            for group in getattr(holder, "param_groups", ()):
                stays = [id(parameter) not in gone for parameter in group["params"]]
                for field in {"params", "param_names"} & group.keys():
                    group[field][:] = [entry for entry, kept in zip(group[field], stays, strict=True) if kept]


def change_ranks(pairs: dict[str, BorrowedPair], ranks: dict[str, int], orders: dict[str, list[int]]) -> None:
    """
    `commit_ranks` of parameters that are somebody else's: all or none.

    Raises: as `commit_ranks`; then ranks, weights, gradients and optimizer state are as they were.
    """

    def lay_out() -> None:
        for pair in pairs.values():
            pair.lay_out()

    commit_ranks(pairs, ranks, orders=orders, compact=True, prepared=lay_out)
