"""
randomized_svd: the 16 leading triplets of dense weights, float32, of singular values 1/√i, which fall slower than a trained weight's.

Bytes and FLOPs: `benchmarks.work.randomized_svd`, a sketch and a projection, which nothing that finds triplets so does without: 8 N K
bytes, 4 N K · 32 FLOPs; iterations are the price of accuracy. A full SVD has about 20 N K min(N, K) FLOPs, 160 times as many at
1024×1024.

Peers: `torch.svd_lowrank` with 2 iterations, its default, and with the 4 that are the most here, and the same 16 columns more;
`torch.linalg.svd`. "energy missed" is the part of the best product of rank 16 that each U S Vh lacks: equal work is not equal accuracy.
"""

from functools import reduce
from operator import add

import pytest
import torch

from adaptlora.benchmarks import work
from adaptlora.benchmarks.accuracy import WrongResultError
from adaptlora.benchmarks.svd import decaying, missed, svd_lowrank
from adaptlora.benchmarks.timing import default_device
from adaptlora.ops import randomized_svd

DEVICE = default_device()
RANK, OVERSAMPLE, N_ITER, COUNT = 16, 16, 4, 4
SIZES = [(576, 576), (1024, 1024), (1024, 4096)]  # (K, N)


def lowrank(weights, n_iter: int):
    return [svd_lowrank(W, RANK + OVERSAMPLE, n_iter) for W in weights]


def full(weights):
    return [torch.linalg.svd(W, full_matrices=False) for W in weights]


@pytest.mark.parametrize(("K", "N"), SIZES, ids=[f"{K}x{N}" for K, N in SIZES])
@torch.no_grad()
def test_svd(compare, quick, K, N):
    if quick and SIZES[0] != (K, N):
        pytest.skip("--quick runs the smallest size")
    W = decaying(N, K, DEVICE)
    weights = [W.clone() for _ in range(1 if quick else COUNT)]
    functions = {
        "adaptlora": lambda: randomized_svd(weights, RANK, oversample=OVERSAMPLE, n_iter=N_ITER),
        "torch.svd_lowrank, 2 iterations": lambda: lowrank(weights, 2),
        f"torch.svd_lowrank, {N_ITER} iterations": lambda: lowrank(weights, N_ITER),
        "torch.linalg.svd": lambda: full(weights),
    }
    values = torch.linalg.svdvals(W.double())
    energy = {name: missed(run()[0], W, RANK, values) for name, run in functions.items()}
    for name, least in {"adaptlora": 1e-4, "torch.linalg.svd": 1e-5}.items():
        if not energy[name] < least:
            raise WrongResultError(f"{name}: U S Vh lacks {energy[name]:.3g} of the best product, allowed {least:.3g}")
    compare(
        f"{len(weights)} weights of {N}×{K}, {RANK} triplets",
        functions,
        floor="adaptlora",
        rounds=5,
        warmup=1,
        facts={"energy missed": {name: float(f"{value:.2g}") for name, value in energy.items()}},
        work=reduce(add, [work.randomized_svd(K, N, RANK + OVERSAMPLE)] * len(weights)),
    )
