"""Truncation by singular values of B A, module by module or over all modules."""

import dataclasses

import torch

from ..ops import low_rank_svd
from .base import Method, Sheared, numerical_rank, replaced


class SVDTruncation(Method):
    def prepare(self, names) -> None:
        if self.config.budget is not None and self.config.budget < len(names):
            raise ValueError(
                f"shear: budget must be at least one vector for each of the {len(names)} modules, got {self.config.budget}"
            )

    def module(self, module, weight) -> Sheared:
        (found,) = low_rank_svd([module.lora_A], [module.lora_B])
        rank = module.lora_A.shape[0]
        within = numerical_rank(found.S, rank)
        kept = max(1, min(self._kept(found.S), within))
        root = found.S[:kept].sqrt()
        # Where B A is 0, roots would make both factors 0, and neither would get a gradient again.
        lora_A = root[:, None] * found.Vh[:kept] if within else module.lora_A[:kept]
        smaller = replaced(module, lora_A, found.U[:, :kept] * root, module.scaling)
        return Sheared(smaller, rank, {"singular_values": (module.scaling * found.S).tolist()})

    def _kept(self, S: torch.Tensor) -> int:
        config = self.config
        if config.rank is not None:
            return config.rank
        if config.energy is not None:
            energy = S.double().square().cumsum(0)
            return int((energy < config.energy * energy[-1]).sum()) + 1
        if config.ratio is not None:
            return int((config.ratio * S[:1] <= S).sum())
        return len(S)

    def finish(self, sheared: list[Sheared]) -> list[Sheared]:
        if self.config.budget is None:
            return sheared
        # One each, then the largest of the rest; equal values go to the earlier module.
        rest = [(-S, i) for i, s in enumerate(sheared) for S in s.facts["singular_values"][1 : s.rank]]
        kept = [1] * len(sheared)
        for _, i in sorted(rest)[: self.config.budget - len(sheared)]:
            kept[i] += 1
        return [
            dataclasses.replace(
                s, module=replaced(s.module, s.module.lora_A[:k], s.module.lora_B[:, :k], s.module.scaling)
            )
            for s, k in zip(sheared, kept, strict=True)
        ]
