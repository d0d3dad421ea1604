"""NoRM: the components of an update that resemble the base weight, chosen by Sim-Search.          [NoRM, ICLR 2025]"""

import math

import torch

from ..ops import low_rank_svd, randomized_svd, randomized_svd_ref, subspace_overlap
from ..ops._checks import check_finite
from .base import Method, Sheared, numerical_rank, replaced
from .components import Components, major, minor, pca


def candidates(r: int, tau: float, start: int) -> list[int]:
    """max(1, ⌊τ·s·r⌋) < r for s = start, start + 1, …, and r itself; ascending, each once."""
    found = {r}
    s = start
    while tau * s < 1:
        found.add(max(1, int(r * tau * s + 1e-9)))  # 100 · 0.29 is a little less than 29
        s += 1
    return sorted(c for c in found if c <= r)


def expected_overlap(q: torch.Tensor, r: int, N: int, base_rank: int) -> list[float]:
    """
    φ_c = [Σ_{i≤c} q_i + (r − c)(r − Σ_{i≤c} q_i) / (N − c)] / r for c = 1 … r

    Args:
        q: (k,), q_i = ‖u_iᵀ U_W‖². Beyond k there is nothing to keep: φ_c is φ_k, and with k = 0 what random directions overlap.
        base_rank: columns of U_W: r, or fewer where W has fewer rows or columns; it and N then bound the r's of the equation.
    """
    known = q.double().cumsum(0).tolist()
    curve = []
    for c in range(1, r + 1):
        c = min(c, len(known))
        inside = known[c - 1] if c else 0.0
        further = min(r, N) - c
        random = further * (base_rank - inside) / (N - c) if further else 0.0
        curve.append((inside + random) / r)
    return curve


def official_overlap(delta: torch.Tensor, U_base: torch.Tensor, r: int, c: int, generator: torch.Generator) -> float:
    """
    φ_c as released: a sketch of c columns, no oversampling and no power iteration, and the r left singular vectors of the rank-c result

    Args: delta: the dense (N, K) update.   U_base: (N, r).
    """
    if c < r:
        sketch = torch.randn(delta.shape[1], c, generator=generator, dtype=torch.float32, device="cpu").to(delta)
        Q, _ = torch.linalg.qr(delta @ sketch)
        delta = Q @ (Q.mT @ delta)
    U = torch.linalg.svd(delta, full_matrices=False).U[:, :r]
    return float((U.mT @ U_base).double().square().sum()) / r


class NoRM(Method):
    needs_base = True

    def module(self, module, weight) -> Sheared:
        config, W = self.config, weight()
        r = module.lora_A.shape[0]
        (found,) = low_rank_svd([module.lora_A], [module.lora_B])
        W = W.to(found.U)
        check_finite("shear", f"the base weight of {module.name}", W)
        decompose = {"major": major, "minor": minor, "pca": pca}[config.components]
        # A bias of lora_B needs a component to go with.
        rank = max(numerical_rank(found.S, r), int(module.bias is not None))
        parts = decompose(found, rank)
        facts = {"singular_values": found.S.tolist()}
        if config.metric == "subspace" or config.amplification:
            base = self._base(W, r)
            facts["base_residual"] = base.residual
        scaling = module.scaling if config.keep_scaling else 1.0
        curve = self._curve(parts, base if config.metric == "subspace" else None, W, r, scaling)
        among = candidates(r, config.tau, config.start)
        if config.search == "official":
            delta = module.lora_B.to(W) @ module.lora_A.to(W)
            generator = torch.Generator().manual_seed(config.seed)
            curve = [math.nan] * r
            for c in among:
                curve[c - 1] = official_overlap(delta, base.U, r, c, generator)
        best = (min if config.search == "min" else max)(curve[c - 1] for c in among)
        c = next(c for c in among if curve[c - 1] == best)
        kept = min(c, len(parts.right))
        smaller = replaced(module, parts.right[:kept], parts.left[:, :kept], scaling)
        facts |= {
            "c": c,
            "candidates": among,
            "phi": [None if math.isnan(phi) else phi for phi in curve],
            "metric": config.metric,
        }
        if config.amplification:
            facts |= amplification(found, base, W, r, module.scaling)
        return Sheared(smaller, r, facts)

    def _base(self, W: torch.Tensor, r: int):
        if self.config.base_svd == "exact" or self.config.search == "official":
            return randomized_svd_ref([W], r)[0]
        return randomized_svd([W], r, seed=self.config.seed)[0]

    def _curve(self, parts: Components, base, W: torch.Tensor, r: int, scaling: float) -> list[float]:
        """What the metric gives each c = 1 … r."""
        if self.config.metric == "subspace":
            return expected_overlap(subspace_overlap(parts.basis, base.U), r, len(W), base.U.shape[1])
        left = scaling * parts.left
        squares = left.double().square().sum(0).cumsum(0).tolist()
        inner = (left * (W @ parts.right.mT)).double().sum(0).cumsum(0).tolist()
        whole = float(W.double().square().sum())
        curve = []
        for c in range(1, r + 1):
            square, product = (sums[min(c, len(sums)) - 1] if sums else 0.0 for sums in (squares, inner))
            if self.config.metric == "l2":
                curve.append(-math.sqrt(max(0.0, square - 2 * product + whole)))
            else:
                curve.append(product / math.sqrt(square * whole) if square * whole > 0 else 0.0)
        return curve


def amplification(delta, base, W: torch.Tensor, r: int, scaling: float) -> dict[str, float]:
    """‖ΔW‖ / ‖Uᵀ W V‖ with the r leading vectors of ΔW = scaling · B A, and ‖W‖ / ‖U_Wᵀ ΔW V_W‖ with those of W.   [NoRM, Table 5]"""
    size = float(scaling * torch.linalg.vector_norm(delta.S))
    seen = float(torch.linalg.matrix_norm(delta.U[:, :r].mT @ W @ delta.Vh[:r].mT))
    within = (base.U.mT @ delta.U) * delta.S @ (delta.Vh @ base.Vh.mT)
    reverse = float(scaling * torch.linalg.matrix_norm(within))
    return {
        "amplification": size / seen if seen else None,
        "reverse_amplification": float(torch.linalg.matrix_norm(W)) / reverse if reverse else None,
    }
