"""What every method of shearing does: a module's update in, a smaller one out."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from ..lora_files import LoraModule


@dataclasses.dataclass
class Sheared:
    """
    One module after shearing.

    Attributes:
        module: name, factors and scaling of what is left; rank 0 means that the update is gone.
        rank_before.
        facts: what the method found, as numbers and lists that JSON can hold.
        kept: the vectors that are left, by the places they had; None where what is left are other vectors.
    """

    module: LoraModule
    rank_before: int
    facts: dict = dataclasses.field(default_factory=dict)
    kept: list[int] | None = None

    @property
    def rank(self) -> int:
        return self.module.lora_A.shape[0]

    def order(self) -> list[int] | None:
        """The permutation that makes the vectors that are left a module's first; None where they are."""
        order = self.kept + [vector for vector in range(self.rank_before) if vector not in set(self.kept)]
        return None if order == list(range(self.rank_before)) else order


class Method(ABC):
    """
    A method of shearing. `prepare` sees every name first, `module` one module at a time, `finish` all that is left at the end.

    `module` must depend on its arguments and on `prepare` alone: modules are computed in any order, by any process.
    """

    needs_base = False

    def __init__(self, config):
        self.config = config

    def prepare(self, names: Sequence[str]) -> None:  # noqa: B027 - most methods have nothing to prepare
        """Raises: ValueError (a configuration that does not fit these modules)."""

    @abstractmethod
    def module(self, module: LoraModule, weight: Callable[[], torch.Tensor] | None) -> Sheared:
        """
        Args:
            module: factors of any floating dtype.
            weight: gives the base weight (N, K), where `needs_base`.
        """

    def finish(self, sheared: list[Sheared]) -> list[Sheared]:
        return sheared


def replaced(module: LoraModule, lora_A, lora_B, scaling: float) -> LoraModule:
    """`module` with other factors, in the dtype it had; a bias of lora_B keeps the effect that the old scaling gave it."""
    bias = module.bias
    if bias is not None and scaling != module.scaling:
        bias = (bias.to(torch.float32) * (module.scaling / scaling)).to(bias.dtype)
    return dataclasses.replace(
        module,
        lora_A=lora_A.to(module.lora_A.dtype).contiguous(),
        lora_B=lora_B.to(module.lora_B.dtype).contiguous(),
        scaling=scaling,
        bias=bias,
    )


def selected(
    module: LoraModule, kept: Sequence[int], facts: dict | None = None, scaling: float | None = None
) -> Sheared:
    """`module` with only these rank vectors, bit for bit, and another scaling where one is given."""
    kept = list(kept)
    index = torch.tensor(kept, dtype=torch.long, device=module.lora_A.device)
    scaling = module.scaling if scaling is None else scaling
    smaller = replaced(module, module.lora_A[index], module.lora_B[:, index], scaling)
    return Sheared(smaller, module.lora_A.shape[0], facts or {}, kept)


def remaining(sheared: Sequence[Sheared]) -> list[Sheared]:
    """Those with an update left.  Raises: ValueError (none has)."""
    left = [s for s in sheared if s.rank]
    if not left:
        raise ValueError(f"shear: at least one module must keep an update, got only zeros in {len(sheared)} modules")
    return left


def numerical_rank(S: torch.Tensor, R: int) -> int:
    """How many singular values of a product of rank-R factors are more than rounding error."""
    return int((R * torch.finfo(S.dtype).eps * S[:1] < S).sum())
