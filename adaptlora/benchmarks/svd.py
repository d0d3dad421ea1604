"""Singular values of adapters and of weights, float32, all linears of a block at once: what shearing, NoRA, PiSSA and MiLoRA need.

Counted: work.low_rank_svd and work.randomized_svd. Floors: of a product B A, QR and SVD by torch.linalg, one module after the other; of a
dense weight, torch.linalg.svd.
"""

from collections.abc import Iterator
from functools import reduce
from operator import add

import torch

from ..ops import low_rank_svd, randomized_svd
from . import work
from .accuracy import WrongResultError
from .case import Case, Options
from .models import MODELS

OVERSAMPLE, N_ITER = 16, 4


def _factors(name: str, r: int, device: torch.device) -> tuple[list, list]:
    generator = torch.Generator().manual_seed(0)
    sizes = MODELS[name].block
    lora_As = [torch.randn(r, K, generator=generator).to(device) / K**0.5 for K, _ in sizes]
    return lora_As, [torch.randn(N, r, generator=generator).to(device) / N**0.5 for _, N in sizes]


def one_by_one(lora_As, lora_Bs) -> list[tuple]:
    """QR of both factors and an SVD of the product of their triangles, module by module."""
    found = []
    for A, B in zip(lora_As, lora_Bs, strict=True):
        Q_B, R_B = torch.linalg.qr(B)
        Q_A, R_A = torch.linalg.qr(A.mT)
        U, S, Vh = torch.linalg.svd(R_B @ R_A.mT)
        found.append((Q_B @ U, S, Vh @ Q_A.mT))
    return found


def dense(lora_As, lora_Bs) -> list[tuple]:
    """Of the (N, K) products."""
    return [torch.linalg.svd(B @ A, full_matrices=False) for A, B in zip(lora_As, lora_Bs, strict=True)]


def missed(triplets, W: torch.Tensor, rank: int, values: torch.Tensor) -> float:
    """
    By how much more ‖W − U S Vh‖² is than that of the best product of this rank, as a part of ‖best‖²; 0 is the best, 1 a product of zeros.

    Args: triplets: U (N, ≥ rank), S, Vh (≥ rank, K).   W: (N, K).   values: all singular values of W in float64.
    """
    U, S, Vh = triplets[0][:, :rank].double(), triplets[1][:rank].double(), triplets[2][:rank].double()
    energy = values.square()
    return (((W.double() - (U * S) @ Vh).square().sum() - energy[rank:].sum()) / energy[:rank].sum()).item()


def assert_triplets(title: str, found, weights, rank: int, *, off: float, least: float) -> None:
    """
    Args: off: of a singular value, as a part of the largest.   least: of what the product `missed`.
    Raises: WrongResultError.
    """
    for triplets, W in zip(found, weights, strict=True):
        values = torch.linalg.svdvals(W.double())
        wrong = ((triplets[1][:rank] - values[:rank]).abs().max() / values[0]).item()
        if not wrong <= off:
            raise WrongResultError(f"{title}: a singular value is off by {wrong:.3g}, allowed {off:.3g}")
        lacks = missed(triplets, W, rank, values)
        if not lacks <= least:
            raise WrongResultError(f"{title}: U S Vh lacks {lacks:.3g} of the best product, allowed {least:.3g}")


def low_rank_case(name: str, r: int, device: torch.device) -> Case:
    """Raises: WrongResultError."""
    pair = _factors(name, r, device)
    functions = {
        "QR and SVD, module by module": one_by_one,
        "SVD of the dense product": dense,
        "adaptlora, low_rank_svd": low_rank_svd,
    }
    products = [B.double() @ A.double() for A, B in zip(*pair, strict=True)]
    for title, function in functions.items():
        assert_triplets(title, function(*pair), products, r, off=1e-5, least=1e-10)
    counted = reduce(add, (work.low_rank_svd(K, N, r) for K, N in MODELS[name].block))
    return Case(
        f"{MODELS[name].title}, one block: SVD of B A, r = {r}",
        {title: lambda f=function: f(*pair) for title, function in functions.items()},
        "QR and SVD, module by module",
        rounds=21,
        facts={"modules": len(products), "R": r},
        work=counted,
    )


def svd_lowrank(W: torch.Tensor, columns: int, n_iter: int) -> tuple:
    """torch's, with Vh in the place of V."""
    U, S, V = torch.svd_lowrank(W, columns, niter=n_iter)
    return U, S, V.mT


def decaying(N: int, K: int, device: torch.device) -> torch.Tensor:
    """A weight whose leading singular values fall as a trained one's do: U diag(S) Vh with S_i = 1 / √i, and noise."""
    generator = torch.Generator().manual_seed(N * K)
    n = min(N, K)
    U, V = (torch.linalg.qr(torch.randn(size, n, generator=generator))[0] for size in (N, K))
    return ((U / torch.arange(1, n + 1).sqrt()) @ V.mT).to(device)


def dense_case(name: str, rank: int, device: torch.device) -> Case:
    """Raises: WrongResultError."""
    weights = [decaying(N, K, device) for K, N in MODELS[name].block]
    functions = {
        "torch.linalg.svd": lambda W: [torch.linalg.svd(w, full_matrices=False) for w in W],
        "torch.svd_lowrank": lambda W: [svd_lowrank(w, rank + OVERSAMPLE, N_ITER) for w in W],
        "adaptlora, randomized_svd": lambda W: randomized_svd(W, rank, oversample=OVERSAMPLE, n_iter=N_ITER),
    }
    for title, function in functions.items():
        assert_triplets(title, function(weights), weights, rank, off=1e-2, least=5e-3)
    counted = reduce(add, (work.randomized_svd(K, N, rank + OVERSAMPLE) for K, N in MODELS[name].block))
    return Case(
        f"{MODELS[name].title}, one block: {rank} leading triplets of the weights",
        {title: lambda f=function: f(weights) for title, function in functions.items()},
        "torch.linalg.svd",
        rounds=7,
        warmup=1,
        facts={"weights": len(weights), "rank": rank},
        work=counted,
    )


def cases(options: Options) -> Iterator[Case]:
    name = "tiny" if options.quick else "smollm2"
    for r in (4,) if options.quick else (8, 64):
        yield low_rank_case(name, r, options.device)
    yield dense_case(name, 4 if options.quick else 64, options.device)
