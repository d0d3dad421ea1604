"""Measures base GEMMs on a GPU: torch's with `lora_expand_` after it against every fused tile, for the user's table (gemm_table.py)."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import triton

from .gemm_table import GEMMS, Entry, Tile, name_of
from .kernels import gemm_choice
from .kernels.lora_expand import lora_expand_
from .kernels.lora_gemm import lora_gemm_dx, lora_gemm_expand

_HIDDEN, _TOKENS = (768, 1024, 2048, 4096, 8192), (2048, 8192)
# (M, N, K) of a transformer: its attention's projections, and a feed-forward layer four times as wide.
SHAPES = [(M, N, K) for M in _TOKENS for h in _HIDDEN for N, K in ((h, h), (4 * h, h), (h, 4 * h))]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PAIR = 2  # modules of gemm_dx_group: a gated feed-forward layer's


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The fastest of a product, and what ran for it before: its tile (None: torch's GEMM) and seconds."""

    entry: Entry
    old: Tile | None
    old_seconds: float

    @property
    def ratio(self) -> float:
        """Time of the fastest over that of what ran before, at most 1."""
        return self.entry.seconds / self.old_seconds


def seconds(call: Callable) -> float:
    """Median of triton's do_bench, which empties the cache before each run."""
    return triton.testing.do_bench(call, return_mode="median") / 1000


def measure(
    shapes, dtype: torch.dtype, rank: int, device: torch.device, clock: Callable = seconds
) -> Iterator[Measurement]:
    """
    For each shape the forward's product, dx of one module and dx of two that share their input; without dropout.

    Args:
        shapes: list of (M, N, K), N and K multiples of 16.   dtype: bf16 / fp16.   clock: the seconds of a function.
    Raises: ValueError (shapes, rank, GPU) when called, RuntimeError (a fused product that is not torch's) on the way.
    What ran before is what the present table or the prediction chooses, ADAPTLORA_GEMM aside.
    """
    for shape in shapes:
        if len(shape) != 3 or min(shape) < 1 or shape[1] % 16 or shape[2] % 16:
            raise ValueError(f"tune: shape must be M,N,K > 0, N and K multiples of 16, got {','.join(map(str, shape))}")
    if rank < 1:
        raise ValueError(f"tune: rank must be an integer > 0, got {rank}")
    capability, _ = gemm_choice.device_of(device)
    if not gemm_choice.fused_tiles(GEMMS[0], capability):
        raise ValueError(f"tune: the GPU must have a compute capability of at least 8.0, got {capability / 10}")
    return (_measurement(gemm, *shape, dtype, rank, device, clock) for shape in shapes for gemm in GEMMS)


def _measurement(gemm, M, N, K, dtype, rank, device, clock) -> Measurement:
    if gemm == "gemm_expand":
        columns, depth = N, K
        plain, fused = _forward(M, N, K, rank, dtype, device)
    else:
        modules = 1 if gemm == "gemm_dx" else _PAIR
        columns, depth = K, modules * N
        plain, fused = _backward(M, N, K, modules, rank, dtype, device)
    capability, name = gemm_choice.device_of(device)
    expected, times = plain(), {None: clock(plain)}
    for tile in gemm_choice.fused_tiles(gemm, capability):
        _check_same(f"{gemm} (M={M}, N={N}, K={K}) with {tile}", fused(tile), expected)
        times[tuple(tile)] = clock(functools.partial(fused, tile))
    old = gemm_choice.choice(gemm, capability, name, dtype, M, columns, depth)
    old = old and tuple(old)
    best = min(times, key=times.get)
    entry = Entry(gemm, name_of(dtype), M, columns, depth, rank, best, times[best], times[None])
    return Measurement(entry, old, times[old])


def _forward(M, N, K, rank, dtype, device) -> tuple[Callable, Callable]:
    """y = x Wᵀ + S Bᵀ of torch, and as a function of a fused tile."""
    x, weight = _random(M, K, dtype, device), _random(N, K, dtype, device, K)
    s, Bt = _random(M, rank, torch.float32, device), _random(rank, N, dtype, device, rank)

    def plain():
        y = F.linear(x, weight)
        lora_expand_(y, s, [Bt])
        return y

    return plain, lambda tile: lora_gemm_expand(x, weight, None, s, Bt.t(), tile)


def _backward(M, N, K, modules, rank, dtype, device) -> tuple[Callable, Callable]:
    """dx = Σ_i (dy_i W_i + dS_i A_i) of torch, and as a function of a fused tile."""
    dys = [_random(M, N, dtype, device) for _ in range(modules)]
    weights = [_random(N, K, dtype, device, N) for _ in dys]
    ds, As = _random(M, modules * rank, dtype, device), [_random(rank, K, dtype, device, rank) for _ in dys]

    def plain():
        dx = dys[0] @ weights[0]
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx.addmm_(dy, weight)
        lora_expand_(dx, ds, As)
        return dx

    return plain, lambda tile: lora_gemm_dx(dys, weights, ds, As, tile)


def _random(rows, columns, dtype, device, variance=1) -> torch.Tensor:
    """Normal numbers of variance 1 / `variance`, so that sums of so many products have one of about 1."""
    return torch.randn(rows, columns, dtype=dtype, device=device).mul_(variance**-0.5)


def _check_same(what: str, out: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises: RuntimeError where two results differ by more than their roundings: torch's has two, the fused one's one."""
    eps = torch.finfo(out.dtype).eps
    for p, allowed in ((2, eps), (float("inf"), 4 * eps)):
        difference, norm = (torch.linalg.vector_norm(t, p, dtype=torch.float32) for t in (out - expected, expected))
        error = (difference / norm).item()
        if not error <= allowed:
            raise RuntimeError(f"tune: {what} must equal torch's product, got an error of {error:.3g} in the {p}-norm")
