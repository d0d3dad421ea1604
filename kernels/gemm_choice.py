"""Which base GEMM runs: torch's, with `lora_expand_` after it, or the one with the rank in its accumulator. The one place that decides.

`ADAPTLORA_GEMM=torch|fused` decides for all (fused where it is possible); without it the user's measurements do
(`adaptlora tune`), for the shapes near them; without those a prediction.
"""

import functools
import math

import torch

from .. import gemm_table
from . import devices, tiles
from .launch import MAX_GROUP, capability, is_aligned
from .tiles import GemmTile

# With several modules dx has tiles of its own, so that it is a product of its own here and in the user's table.
TILES = {"gemm_expand": tiles.GEMM_EXPAND, "gemm_dx": tiles.GEMM_DX, "gemm_dx_group": tiles.GEMM_DX_GROUP}


def choose(gemm: str, streamed: torch.Tensor, weights: list, dys: list | None = None) -> GemmTile | None:
    """
    Tile of the fused GEMM, or None for torch's and `lora_expand_`.

    Args:
        gemm: "gemm_expand": y = x Wᵀ + …, streamed = x (M, K), weights = [W (N, K)];
            "gemm_dx": dx = Σ_i dy_i W_i + …, streamed = dys[0], weights = W_i (N_i, K), dys = dy_i (M, N_i).
    Raises: ValueError (ADAPTLORA_GEMM).
    """
    override = gemm_table.forced()
    if override == "torch" or not is_possible([streamed] if dys is None else dys, weights):
        return None
    rows, K = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    columns, depth = (rows, K) if dys is None else (K, rows)
    product = f"{gemm}_group" if len(weights) > 1 else gemm
    level, name = device_of(streamed.device)
    if override == "fused":
        return fused_tile(product, level, streamed.shape[0], columns)
    return choice(product, level, name, streamed.dtype, streamed.shape[0], columns, depth)


def is_possible(streamed: list, weights: list) -> bool:
    """Whether operands are laid out as those the fused kernels are compiled and checked for: 16-bit, in whole 16-byte vectors."""
    return (
        streamed[0].dtype in (torch.bfloat16, torch.float16)
        and len(weights) <= MAX_GROUP
        and all(map(is_aligned, streamed))
        and all(weight.shape[0] % 16 == weight.shape[1] % 16 == 0 for weight in weights)
        and all(is_aligned(weight) or is_aligned(weight.t()) for weight in weights)
    )


@functools.cache
def device_of(device: torch.device) -> tuple[int, str | None]:
    """(compute capability, name); no name in the interpreter, where nothing was measured."""
    return capability(device), torch.cuda.get_device_name(device) if device.type == "cuda" else None


@functools.lru_cache(maxsize=4096)
def choice(gemm, capability, name, dtype, M: int, columns: int, depth: int) -> GemmTile | None:
    """What runs for a possible product of this shape if nothing is forced."""
    table = None if name is None else gemm_table.in_use(name)
    entry = table and table.nearest(gemm, dtype, M, columns, depth, fused_tiles(gemm, capability))
    if entry:
        return entry.tile and GemmTile(*entry.tile)
    return fused_tile(gemm, capability, M, columns) if is_predicted(capability, dtype, M, columns, depth) else None


def is_predicted(capability: int, dtype: torch.dtype, M: int, columns: int, depth: int) -> bool:
    """
    Whether the fused GEMM should be the faster one:

        2 · itemsize · M · columns / bandwidth  >  slowdown · GEMM,
        GEMM = max(2 · M · columns · depth / flops, itemsize · (M · depth + columns · depth + M · columns) / bandwidth)

    Left: what the separate pass reads and writes. Right: what a Triton GEMM loses to torch's, whose own time is that of its
    FLOPs or its bytes. A prediction: `slowdown` is assumed and no GPU has confirmed it. Where FLOPs bound the GEMM, M and the
    columns cancel: fused up to a depth of 3058 on an A100 and of 2361 on an H100.
    """
    device = devices.device(capability)
    separate = 2 * dtype.itemsize * M * columns / device.bandwidth
    moved = dtype.itemsize * (M * depth + columns * depth + M * columns)
    return separate > device.slowdown * max(2 * M * columns * depth / device.flops, moved / device.bandwidth)


def fused_tiles(gemm: str, capability: int) -> tuple[GemmTile, ...]:
    """The tiles that are shipped for an architecture, none for one before sm_80."""
    return tiles.gemm_tiles(TILES[gemm], devices.generation(capability)) if capability >= 80 else ()


def fused_tile(gemm: str, capability: int, M: int, columns: int) -> GemmTile | None:
    """The first tile of which there are enough to fill the device, else the last; None where there is none."""
    known = fused_tiles(gemm, capability)
    wanted = devices.device(capability).multiprocessors
    enough = (t for t in known if math.ceil(M / t.rows) * math.ceil(columns / t.columns) >= wanted)
    return next(enough, known[-1] if known else None)
