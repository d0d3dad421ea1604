"""NoRA's outer factors: the 256 leading singular triplets of all 210 linear weights of SmolLM2-135M, float32.

GFLOP of a block, with n the smaller side, m the larger one and k = min(256, n): lower triangles of the Gram matrices, 5/8 · 2 m n² in
blocks of a quarter, 2.4; M V, 2 m n k, 1.8; eigenproblems of 576 (five) and 192 (two), about 9/2 n³, 4.4, a third of it products of a
matrix and a vector. Predicted from single calls on one thread of an EPYC with AVX2, two of them at a time: 2 · 38 + 3 · 48 + 2 · 4 =
228 ms, 114 a block, beside 395 for SVDs on two threads: 3.5 times faster. Left out: QR of nearly half of the weights, SVDs of one in 23.

Ten times faster would be 40 ms a block. The eigenproblems alone, five of 32 ms and two of 2, are 82: no path through them is more than
4.8 times faster. A sketch of l = 272 columns without a single iteration is no way out: two products with W, QR of both, the core's
Gram matrix and eigenproblem, U and V out of it are 7.8 GFLOP, 65 ms at the 120 GFLOP/s that two threads reach in products.
Floor: randomized_svd, so that the other rows say how many times faster it is, and how much of it is the eigenproblems.
"""

import re

import torch
from providers import load

from adaptlora.benchmarks.models import LINEARS
from adaptlora.ops import randomized_svd
from adaptlora.pool import over

RANK, LEADING = 256, 16


def weights_of(quick: bool) -> list[torch.Tensor]:
    """All of them, or those of the first block, which has the largest ratios of singular values."""
    pattern = r".*\.layers\.0\..*_proj" if quick else LINEARS["smollm2"]
    return [m.weight for name, m in load("smollm2").named_modules() if re.fullmatch(pattern, name)]


def check(weights) -> None:
    """Energy of all triplets and the leading ones, against SVDs in float64."""
    for W, found in zip(weights, randomized_svd(weights, RANK), strict=True):
        W = W.double()
        S = torch.linalg.svdvals(W)
        energy = (found.U.double().mT @ W).square().sum() / S[:RANK].square().sum()
        assert energy > 1 - 1e-6, energy
        u, s, vh = found.U[:, :LEADING].double(), found.S[:LEADING].double(), found.Vh[:LEADING].double()
        for wrong in (W @ vh.mT - u * s, W.mT @ u - vh.mT * s, s - S[:LEADING]):
            assert torch.linalg.vector_norm(wrong) < 1e-4 * S[0], found.residual
        assert found.residual < 1e-5


def svds(weights) -> None:
    for W in weights:
        torch.linalg.svd(W, full_matrices=False)


def test_smollm2(compare, quick):
    weights = weights_of(quick)
    check(weights)
    grams = [W.mT @ W if W.shape[0] > W.shape[1] else W @ W.mT for W in weights]
    providers = {
        "torch.linalg.svd, one after the other": lambda: svds(weights),
        "randomized_svd": lambda: randomized_svd(weights, RANK),
        "its eigenproblems alone": lambda: list(over(torch.linalg.eigh, grams)),
    }
    compare(
        f"{RANK} leading triplets of {len(weights)} weights of SmolLM2-135M",
        providers,
        floor="randomized_svd",
        rounds=3,
        warmup=1,
    )
