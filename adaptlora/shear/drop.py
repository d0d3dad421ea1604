"""Methods that choose without looking at the values: TAIA, random rank vectors, random layers and modules."""

import hashlib
import re

import torch

from .base import Method, Sheared, selected

_ATTENTION = re.compile(r"attn|attention|(^|\.)(att|time_mix)\.", re.IGNORECASE)
_FEED_FORWARD = re.compile(
    r"(^|[._])(mlp|ffn?|feed_?forward|intermediate|\d+[._]output[._]dense|experts?|block_sparse_moe|densereludense|"
    r"fc_?[12]|lin[12]|w[123i]|w[io](_[01])?|(gate|up|down)_(up_)?proj|dense_h_to_4h|dense_4h_to_h|c_fc)([._]|$)",
    re.IGNORECASE,
)


def is_feed_forward(name: str) -> bool:
    """Whether a module is part of a transformer's feed-forward network, from its path."""
    return not _ATTENTION.search(name) and _FEED_FORWARD.search(name) is not None


def _generator(seed: int, name: str = "") -> torch.Generator:
    """Depends on the seed and the module's name, not on what else there is."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Dropping(Method):
    """Updates stay as they are or go."""

    dropped: frozenset[str] = frozenset()

    def module(self, module, weight) -> Sheared:
        return selected(module, range(0 if module.name in self.dropped else module.lora_A.shape[0]))


class TAIA(Dropping):
    def prepare(self, names) -> None:
        self.dropped = frozenset(filter(is_feed_forward, names))
        for rule, found in (("some feed-forward module", self.dropped), ("some other", set(names) - self.dropped)):
            if not found:
                raise ValueError(
                    f"shear: method taia must find {rule} among the adapted modules, got {sorted(names)[:4]}"
                )


class Drop(Dropping):
    def prepare(self, names) -> None:
        units = self._units(names)
        count = min(round(self.config.ratio * len(units)), len(units) - (len(units) == len(set(names))))
        order = torch.randperm(len(units), generator=_generator(self.config.seed)).tolist()
        gone = [unit for i, unit in enumerate(units) if i in order[:count]]
        self.dropped = frozenset(name for unit in gone for name in unit)
        if self.dropped == set(names):
            raise ValueError(
                f"shear: ratio must leave at least one update, got {self.config.ratio} of {len(units)} layers"
            )

    def _units(self, names) -> list[list[str]]:
        if self.config.level == "module":
            return [[name] for name in names]
        layers: dict[str, list[str]] = {}
        for name in names:
            match = re.search(r"(?:^|[._])\d+(?=[._]|$)", name)
            if match:
                layers.setdefault(name[: match.end()], []).append(name)
        if not layers:
            raise ValueError(
                f"shear: method layer must find numbered layers in the modules' names, got {sorted(names)[:4]}"
            )
        return list(layers.values())


class Random(Method):
    def module(self, module, weight) -> Sheared:
        rank = module.lora_A.shape[0]
        kept = max(1, round(self.config.eta * rank))
        ranks = torch.randperm(rank, generator=_generator(self.config.seed, module.name))[:kept].sort().values.tolist()
        return selected(module, ranks, {"kept": ranks})
