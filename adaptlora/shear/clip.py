"""NormAL's clip of a trained adapter: the prefix of each module's vectors that their norms earn.  [NormAL LoRA, Algorithms 2–3]"""

import math

from ..lora_files import peft_config
from ..methods.normal import budget_ranks, scores, threshold_ranks
from ..ops import rank_norms
from .base import Method, Sheared, selected


class Clip(Method):
    def module(self, module, weight) -> Sheared:
        """The module as it was, with its vectors' scores; how many stay depends on all modules."""
        norms_A, norms_B = (norms.tolist() for (norms,) in rank_norms([module.lora_A], [module.lora_B]))
        if not all(map(math.isfinite, norms_A + norms_B)):
            raise ValueError(
                f"shear: {module.name}: norms of the rank vectors must be finite, got {norms_A} and {norms_B}"
            )
        order = range(len(norms_A))
        if self.config.sort:
            order = sorted(order, key=lambda vector: -(norms_A[vector] + norms_B[vector]))
        facts = {"scores": scores([norms_A[vector] for vector in order], [norms_B[vector] for vector in order])}
        return Sheared(module, len(norms_A), facts | ({"order": order} if self.config.sort else {}))

    def finish(self, sheared: list[Sheared]) -> list[Sheared]:
        config, of_modules = self.config, [s.facts["scores"] for s in sheared]
        if config.threshold is not None:
            ranks = threshold_ranks(of_modules, config.threshold, config.first_below)
        else:
            budget = config.budget if config.target_r is None else round(config.target_r * len(sheared))
            ranks = budget_ranks(of_modules, budget)
        return [
            selected(s.module, s.facts.get("order", range(s.rank_before))[:rank], s.facts, self._scaling(s, rank))
            for s, rank in zip(sheared, ranks, strict=True)
        ]

    def _scaling(self, sheared: Sheared, rank: int) -> float:
        scaling, rslora = sheared.module.scaling, sheared.module.use_rslora
        if not self.config.rescale:
            return scaling
        return scaling * peft_config.divisor(sheared.rank_before, rslora) / peft_config.divisor(rank, rslora)
