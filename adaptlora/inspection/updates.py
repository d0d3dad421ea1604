"""Updates ΔW = scaling · B A of inspected adapters, by their factors alone: singular values, and what two have in common."""

import math
from dataclasses import dataclass, field

import torch

from ..ops import low_rank_svd, subspace_overlap
from ..ops.low_rank_svd import SVD
from .adapter import Inspection

ENERGY = 0.9  # of Σ σ², which `Spectrum.rank_90` holds


@dataclass(frozen=True)
class Spectrum:
    """
    Of one module's ΔW (N, K).

    singular_values: descending, min(R, N, K) of them.   norm: ‖ΔW‖_F.
    rank_90: how many singular values hold 90 % of the sum of their squares; 0 where all are zero.
    """

    singular_values: list[float]
    norm: float
    rank_90: int


@dataclass(frozen=True)
class ModuleComparison:
    """
    One module of two adapters; pairs are (the first's, the second's).

    norms: ‖ΔW‖_F.   difference: ‖ΔW₂ − ΔW₁‖_F.   cosine: ⟨ΔW₁, ΔW₂⟩_F / (‖ΔW₁‖ ‖ΔW₂‖).
    overlap_out, overlap_in: Σ cos² of the principal angles between the column spaces of the two ΔW, and between their row spaces,
    over the smaller dimension: from 0, orthogonal, to 1, one holds the other.   [LoRA, arXiv:2106.09685, eq. 4]
    angles_out, angles_in: those angles in degrees, ascending.
    None, and no angles, where a ΔW is zero.
    """

    name: str
    ranks: tuple[int, int]
    parameters: tuple[int, int]
    norms: tuple[float, float]
    difference: float
    cosine: float | None
    overlap_out: float | None
    overlap_in: float | None
    angles_out: list[float]
    angles_in: list[float]

    @property
    def distance(self) -> float | None:
        """‖ΔW₂ − ΔW₁‖_F / ‖ΔW₁‖_F; None where the first is zero."""
        return self.difference / self.norms[0] if self.norms[0] else None


@dataclass(frozen=True)
class Comparison:
    """
    modules: those of the same shape in both.   only_first, only_second: names that the other lacks.
    other_shapes: {name: the (N, K) of both} where they differ.   spectra: of the first and of the second, all modules.

    Cosine and distance of all ΔW together count a module that one adapter lacks as ΔW = 0 there, and leave out `uncounted`.
    """

    first: Inspection
    second: Inspection
    modules: list[ModuleComparison]
    only_first: list[str]
    only_second: list[str]
    other_shapes: dict[str, tuple[tuple[int, int], tuple[int, int]]]
    spectra: tuple[dict[str, Spectrum], dict[str, Spectrum]] = field(repr=False)

    def uncounted(self) -> list[str]:
        """Modules whose ΔW is unknown in one of the two (`Inspection.skipped`), or of another shape there."""
        return list(dict.fromkeys([*self.other_shapes, *self.first.skipped, *self.second.skipped]))

    def alone(self) -> tuple[dict[str, float], dict[str, float]]:
        """{module: ‖ΔW‖} of those that the first has and the second lacks, and the other way round."""
        without = self.uncounted()
        return tuple(
            {name: of[name].norm for name in names if name not in without}
            for names, of in zip((self.only_first, self.only_second), self.spectra, strict=True)
        )

    def scope(self) -> str:
        """Which modules `cosine` and `distance` are of, in words."""
        alone, without = sum(map(len, self.alone())), len(self.uncounted())
        text = f"{len(self.modules) + alone:,} modules"
        if alone:
            text += f", {alone:,} of them in one adapter alone (ΔW = 0 in the other)"
        return text + (f"; {without:,} not compared" if without else "")

    def cosine(self) -> float | None:
        """Of all the ΔW together, as one long vector; None where one of them is zero."""
        norms = math.prod(self._norms())
        inner = sum((module.cosine or 0.0) * math.prod(module.norms) for module in self.modules)
        return inner / norms if norms else None

    def distance(self) -> float | None:
        """‖ΔW₂ − ΔW₁‖ / ‖ΔW₁‖ of all the ΔW together; None where the first is zero."""
        before, _ = self._norms()
        apart = [norm for of in self.alone() for norm in of.values()]
        return math.hypot(*apart, *(module.difference for module in self.modules)) / before if before else None

    def _norms(self) -> list[float]:
        """‖ΔW‖ of all the modules together, of the first and of the second."""
        alone = self.alone()
        return [math.hypot(*alone[side].values(), *(module.norms[side] for module in self.modules)) for side in (0, 1)]

    def overlap(self) -> float | None:
        """Mean of `overlap_out` over the modules that have one."""
        found = [module.overlap_out for module in self.modules if module.overlap_out is not None]
        return sum(found) / len(found) if found else None


def spectra(found: Inspection) -> dict[str, Spectrum]:
    """
    {module: Spectrum} in float64, O(R² (N + K)) a module.

    Raises: ValueError (a configuration without the scalings).
    """
    return {name: _spectrum(svd) for name, svd in _decompose(found).items()}


def compare(first: Inspection, second: Inspection) -> Comparison:
    """
    Two adapters of one model, such as one before and after a clip, module by module.

    ΔW is never formed: cosine, distance and angles follow from both SVDs, and the distance from that of the stacked factors.
    Raises: ValueError (no module of one name and shape in both; a configuration without the scalings).
    """
    both = [name for name in first.factors if name in second.factors]
    shapes = {name: (_shape(first, name), _shape(second, name)) for name in both}
    common = [name for name in both if shapes[name][0] == shapes[name][1]]
    if not common:
        rule = f"have a module of the same name and shape as one of {str(first.path)!r}, such as {next(iter(first.factors))}"
        raise ValueError(f"compare: second must {rule}; got {str(second.path)!r}, with {next(iter(second.factors))}")
    decompositions = _decompose(first), _decompose(second)
    differences = _differences(first, second, common)
    ranks, parameters = (
        [{module.name: getattr(module, what) for module in found.modules} for found in (first, second)]
        for what in ("rank", "parameters")
    )
    modules = []
    for name in common:
        svds = [svd[name] for svd in decompositions]
        norms = [svd.S.norm().item() for svd in svds]
        out, into = (_angles(*bases) for bases in zip(*map(_bases, svds), strict=True))
        modules.append(
            ModuleComparison(
                name,
                tuple(of[name] for of in ranks),
                tuple(of[name] for of in parameters),
                tuple(norms),
                differences[name],
                _cosine(*svds) if all(norms) else None,
                *(overlap for overlap, _ in (out, into)),
                *(angles for _, angles in (out, into)),
            )
        )
    return Comparison(
        first,
        second,
        modules,
        [name for name in first.factors if name not in second.factors],
        [name for name in second.factors if name not in first.factors],
        {name: pair for name, pair in shapes.items() if pair[0] != pair[1]},
        tuple({name: _spectrum(svd) for name, svd in of.items()} for of in decompositions),
    )


def _shape(found: Inspection, name: str) -> tuple[int, int]:
    lora_A, lora_B = found.factors[name]
    return lora_B.shape[0], lora_A.shape[1]


def _scaled(found: Inspection, names) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """lora_A and scaling · lora_B in float64."""
    scalings = found.scalings()
    factors = [found.factors[name] for name in names]
    return [A.double() for A, _ in factors], [
        scalings[name] * B.double() for name, (_, B) in zip(names, factors, strict=True)
    ]


def _decompose(found: Inspection) -> dict[str, SVD]:
    return dict(zip(found.factors, low_rank_svd(*_scaled(found, list(found.factors))), strict=True))


def _spectrum(svd: SVD) -> Spectrum:
    energy = svd.S.square().cumsum(0)
    enough = int((energy < ENERGY * energy[-1]).sum()) + 1 if len(energy) and energy[-1] > 0 else 0
    return Spectrum(svd.S.tolist(), svd.S.norm().item(), enough)


def _bases(svd: SVD) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal columns of ΔW's column space (N, k) and row space (K, k), k its numerical rank."""
    floor = max(svd.U.shape[0], svd.Vh.shape[1]) * torch.finfo(svd.S.dtype).eps
    k = int((floor * svd.S[:1] < svd.S).sum())
    return svd.U[:, :k], svd.Vh[:k].mT


def _angles(basis: torch.Tensor, other: torch.Tensor) -> tuple[float | None, list[float]]:
    """(overlap, principal angles in degrees) of two orthonormal bases (d, k₁), (d, k₂); (None, []) if one has no column."""
    fewest = min(basis.shape[1], other.shape[1])
    if not fewest:
        return None, []
    cosines = torch.linalg.svdvals(basis.mT @ other).clamp(max=1)
    overlap = subspace_overlap(basis, other).sum().item() / fewest
    return min(1.0, overlap), [math.degrees(math.acos(cosine)) for cosine in cosines.tolist()]


def _cosine(svd: SVD, other: SVD) -> float:
    """⟨U S Vh, U' S' Vh'⟩ = Σ ((U S)ᵀ U' S') ∘ (Vh Vh'ᵀ)"""
    inner = ((svd.U * svd.S).mT @ (other.U * other.S) * (svd.Vh @ other.Vh.mT)).sum()
    return max(-1.0, min(1.0, (inner / (svd.S.norm() * other.S.norm())).item()))


def _differences(first: Inspection, second: Inspection, names: list[str]) -> dict[str, float]:
    """{module: ‖ΔW₂ − ΔW₁‖_F}, the norm of [B₂, −B₁] [A₂; A₁]: a difference of squared norms would lose the small ones."""
    (A1, B1), (A2, B2) = _scaled(first, names), _scaled(second, names)
    lora_As = [torch.cat(pair) for pair in zip(A2, A1, strict=True)]
    lora_Bs = [torch.cat([after, -before], 1) for after, before in zip(B2, B1, strict=True)]
    return {name: svd.S.norm().item() for name, svd in zip(names, low_rank_svd(lora_As, lora_Bs), strict=True)}
