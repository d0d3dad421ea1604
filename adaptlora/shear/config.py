"""What to remove from a trained adapter: one dataclass per method, checked on construction."""

import dataclasses

from ..config import _is_int, _is_number, _require, check_amount


def _check_seed(config) -> None:
    _require(_is_int(config.seed) and abs(config.seed) < 2**63, config, "seed", "must be an integer of 64 bits")


def _one_of(config, field: str, values: tuple[str, ...]) -> None:
    _require(getattr(config, field) in values, config, field, f"must be one of {', '.join(values)}")


@dataclasses.dataclass(frozen=True)
class NoRMConfig:
    """
    NoRM: keep the components that resemble the base weight most, by Sim-Search.          [NoRM, ICLR 2025, Algorithm 1]

    Args:
        search: "expected": φ_c with the directions beyond c counted as random ones are expected to overlap, in closed form;
            "official": the released procedure, whose r − c further directions are rounding noise, with a fixed seed (slow: an SVD of
            the dense update for each candidate and of the base weight); "min": as "expected", but the c that resembles the base least.
        tau, start: candidates c are max(1, ⌊tau · s · r⌋) < r for s = start, start + 1, …, and r itself.
        components: "major": the c leading singular components of B A; "minor": the c trailing ones; "pca": B A projected on the c
            leading principal axes of its rows.
        metric: "subspace": φ_c = ‖U_cᵀ U_W‖_F² / r, U_W the r leading left singular vectors of the base weight; "l2": −‖ΔW_c − W‖_F;
            "cos": ⟨ΔW_c, W⟩ / (‖ΔW_c‖ ‖W‖). The last two add nothing beyond c, so that "expected" is the plain maximum.
        keep_scaling: merge with the trained lora_alpha / r instead of 1.
        base_svd: "randomized" or "exact": how U_W is computed.
        amplification: also report ‖ΔW‖ / ‖Uᵀ W V‖ and its reverse.
        seed: of the sketch of the base weight, and of the official search's.
    Raises: ValueError naming field, rule and value.
    """

    search: str = "expected"
    tau: float = 0.1
    start: int = 1
    components: str = "major"
    metric: str = "subspace"
    keep_scaling: bool = False
    base_svd: str = "randomized"
    amplification: bool = False
    seed: int = 0

    def __post_init__(self):
        _one_of(self, "search", ("expected", "official", "min"))
        _one_of(self, "components", ("major", "minor", "pca"))
        _one_of(self, "metric", ("subspace", "l2", "cos"))
        _one_of(self, "base_svd", ("randomized", "exact"))
        _require(_is_number(self.tau) and 1e-3 <= self.tau <= 1, self, "tau", "must be in [0.001, 1]")
        _require(_is_int(self.start) and self.start >= 0, self, "start", "must be an integer ≥ 0")
        _check_seed(self)
        if self.search == "official" and (self.components, self.metric) != ("major", "subspace"):
            raise ValueError(
                'NoRMConfig: search "official" must go with components "major" and metric "subspace", '
                f"got {self.components!r} and {self.metric!r}"
            )


@dataclasses.dataclass(frozen=True)
class SVDConfig:
    """
    Keep the leading singular components of each module's B A; no base weight is needed.

    Exactly one of:
        rank: at most so many in each module.
        energy: in (0, 1]: the fewest whose squared singular values make up this part of the module's.
        ratio: in (0, 1]: those whose singular value is at least this part of the module's largest.
        budget: so many in all modules together: those with the largest singular values of scaling · B A, and one in each module.
    The trained scaling stays.   Raises: ValueError naming field, rule and value.
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None
    budget: int | None = None

    def __post_init__(self):
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"SVDConfig: exactly one of rank, energy, ratio and budget must be given, got {', '.join(given) or 'none'}"
            )
        (field,) = given
        value = getattr(self, field)
        if field in ("rank", "budget"):
            _require(_is_int(value) and value > 0, self, field, "must be an integer > 0")
        else:
            _require(_is_number(value) and 0 < value <= 1, self, field, "must be in (0, 1]")


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """
    NormAL's clip of a trained adapter: keep the first vectors of each module, as many as their norms earn.          [NormAL LoRA, Alg. 2–3]

    Vector r scores s_r = min(1, (‖a_r‖ + ‖b_r‖) / (‖a_1‖ + ‖b_1‖)); those that stay do so bit for bit, with their optimizer state.
    Exactly one of:
        target_r: average rank per module; budget k = round(target_r · #modules).
        budget: k vectors in all modules together, at least one in each, by the highest next score.
        threshold: λ in [0, 1): keep the vectors up to the last whose score exceeds λ.
    Args:
        first_below: with `threshold`, stop at the first score ≤ λ instead.
        rescale: scale by lora_alpha / r_new (/ √r_new for rsLoRA) instead of by the trained scaling.
        sort: first put each module's vectors in the order of ‖a_r‖ + ‖b_r‖, the largest first: for adapters that were trained without
            NormAL's penalty, whose order means nothing.
    Raises: ValueError naming field, rule and value.
    """

    target_r: float | None = None
    budget: int | None = None
    threshold: float | None = None
    first_below: bool = False
    rescale: bool = False
    sort: bool = False

    def __post_init__(self):
        check_amount(self)
        for field in ("first_below", "rescale", "sort"):
            _require(isinstance(getattr(self, field), bool), self, field, "must be True or False")
        _require(not self.first_below or self.threshold is not None, self, "first_below", "must go with threshold")


@dataclasses.dataclass(frozen=True)
class RandomConfig:
    """Keep max(1, round(eta · r)) rank vectors of each module, drawn at random; the trained scaling stays.          [NoRM, §2.2]"""

    eta: float = 0.5
    seed: int = 0

    def __post_init__(self):
        _require(_is_number(self.eta) and 0 < self.eta <= 1, self, "eta", "must be in (0, 1]")
        _check_seed(self)


@dataclasses.dataclass(frozen=True)
class TAIAConfig:
    """Drop the updates of all feed-forward modules, keep the others as they are.          [TAIA, arXiv:2405.20192]"""


@dataclasses.dataclass(frozen=True)
class DropConfig:
    """
    Drop whole updates at random: of `ratio` of the layers (a layer: the modules with the same first number in their names; modules
    without one are never dropped), or of `ratio` of the modules, of which at least one stays.
    """

    level: str = "layer"
    ratio: float = 0.5
    seed: int = 0

    def __post_init__(self):
        _one_of(self, "level", ("layer", "module"))
        _require(_is_number(self.ratio) and 0 <= self.ratio < 1, self, "ratio", "must be in [0, 1)")
        _check_seed(self)
