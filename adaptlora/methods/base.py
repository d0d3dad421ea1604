"""What a method is: it watches norms and losses while training and decides ranks. It never touches a kernel."""

from typing import Protocol

import torch

from ..nn import LoraLinear


class Method(Protocol):
    """
    `Adapter` calls, once per optimizer step and in this order: `penalty` (zero or more times before the backward pass), then
    `step` after the optimizer's step. A method that raises in `step` has changed nothing of its own state that
    `state_dict` does not hold: the adapter restores it.
    """

    t: int
    t_p: int | None
    t_c: int | None
    phase: str

    def needs_optimizer(self) -> bool:
        """Whether this or a later `step` shrinks vectors or changes ranks, and so needs a tracked optimizer."""

    def may_change_ranks(self) -> bool:
        """Whether the next `step` may return new ranks."""

    def needs_loss(self) -> bool:
        """Whether the next `step` decides by the task loss."""

    def penalty(self) -> torch.Tensor | None:
        """Term to add to the task loss now, a 0-dim tensor with gradient; None for nothing."""

    def step(self, loss: float | None, optimizers: list[torch.optim.Optimizer]) -> dict[str, int] | None:
        """Advance by one optimizer step; the new rank of every module if ranks change now, else None."""

    def start_from(self, ranks: dict[str, int]) -> None:
        """The modules were given other ranks from outside (a file).  Raises: ValueError (they do not suit the configuration)."""

    def scaling(self, name: str, layer: LoraLinear, rank: int) -> float:
        """The module's scaling after a change to `rank`."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class FixedRank:
    """Plain LoRA as a method: nothing is penalised and no rank changes."""

    phase = "fixed"
    t_p = t_c = None

    def __init__(self, config, layers: dict[str, LoraLinear]):
        self.t = 0

    def needs_optimizer(self) -> bool:
        return False

    def may_change_ranks(self) -> bool:
        return False

    def needs_loss(self) -> bool:
        return False

    def start_from(self, ranks) -> None:
        """Any ranks will do."""

    def penalty(self) -> None:
        return None

    def step(self, loss, optimizers) -> None:
        self.t += 1

    def scaling(self, name, layer, rank) -> float:
        return layer.scaling

    def state_dict(self) -> dict:
        return {"t": self.t}

    def load_state_dict(self, state: dict) -> None:
        self.t = state["t"]
