"""Tile sizes of the LoRA layer's kernels, in one place: what `make gpu-check` compiles is what is written here.

Each was chosen by compiling for sm_80, sm_90 and sm_100: the largest that neither spills nor passes the shared memory; not
one has been timed on a GPU. The kernels that stream a large operand past a few ranks are bound by memory, so a tile is wide
enough for whole cache lines and tall enough that re-reading the factors costs little.
"""

from typing import NamedTuple

import torch

from .launch import is_aligned


class Tile(NamedTuple):
    rows: int
    columns: int
    warps: int
    stages: int


class GemmTile(NamedTuple):
    """Rows and columns of the product that a program owns, and the depth of one step of the reduction."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def kind(streamed: torch.Tensor, factor: torch.Tensor | None = None) -> str:
    """What the tables go by: "half" is 16-bit rows on 16-byte boundaries and a rank-major factor, "ragged" other 16-bit layouts."""
    if streamed.dtype == torch.float32:
        return "single"
    return "half" if is_aligned(streamed) and (factor is None or factor.stride(1) == 1) else "ragged"


# Left alone, ptxas spills a few registers where that lets one more program run; 255 lets it take what it needs.
ALL_REGISTERS = 255
REGISTERS = {"half": None, "ragged": ALL_REGISTERS, "single": ALL_REGISTERS}


def rank_block(R: int, limit: int) -> int:
    """Ranks that a program holds at once: R padded to 16, 32, 64 or 128 in registers; larger ranks take several blocks."""
    return next((block for block in (16, 32, 64) if R <= block <= limit), limit)


# Most ranks at once, by kind and number of modules.
SHRINK_RANKS = {"half": (128, 32, 16), "ragged": (64, 32, 16), "single": (32, 16, 16)}
DA_RANKS = {"half": (128, 32, 16), "ragged": (64, 32, 16), "single": (32, 16, 16)}

# Rows of x × columns of x, by kind and rank block.
SHRINK = {
    ("half", 16): Tile(128, 64, 8, 3),
    ("half", 32): Tile(128, 64, 8, 3),
    ("half", 64): Tile(128, 64, 8, 3),
    ("half", 128): Tile(64, 64, 8, 3),
    ("ragged", 16): Tile(64, 32, 8, 2),
    ("ragged", 32): Tile(64, 32, 8, 2),
    ("ragged", 64): Tile(64, 32, 8, 2),
    ("single", 16): Tile(64, 16, 8, 3),
    ("single", 32): Tile(64, 16, 8, 3),
}
DA = {
    ("half", 16): Tile(32, 256, 8, 3),
    ("half", 32): Tile(64, 128, 8, 3),
    ("half", 64): Tile(64, 128, 8, 3),
    ("half", 128): Tile(64, 64, 8, 3),
    ("ragged", 16): Tile(32, 128, 8, 2),
    ("ragged", 32): Tile(32, 128, 8, 2),
    ("ragged", 64): Tile(32, 64, 8, 2),
    ("single", 16): Tile(32, 64, 8, 3),
    ("single", 32): Tile(32, 64, 8, 3),
}

# One pass over dy writes and reads a partial G for every block of rows: 8 R / rows bytes next to the 2 of a bf16 element. From
# this rank on that is no less than a second pass, and two sets of ranks no longer fit beside each other in registers.
DS_DB_RANKS = {"half": 32, "ragged": 8, "single": 16}
DS_DB = {  # rows of dy × columns of dy
    ("half", 16): Tile(256, 32, 8, 3),
    ("half", 32): Tile(256, 32, 8, 3),
    ("ragged", 16): Tile(64, 32, 4, 2),
    ("single", 16): Tile(32, 32, 4, 2),
}

EXPAND_RANKS = {"half": 32, "ragged": 32, "single": 16}
EXPAND = {  # rows × columns of the output
    "half": Tile(64, 128, 8, 2),
    "ragged": Tile(32, 64, 4, 2),
    "single": Tile(32, 32, 4, 2),
}

# The fused products are for 16-bit operands on 16-byte boundaries only; the first tile is the one to take unmeasured.
GEMM_EXPAND_RANKS = 32
GEMM_DX_RANKS = (32, 32, 16)  # by number of modules
GEMM_EXPAND = {
    80: (GemmTile(128, 128, 64, 8, 3), GemmTile(64, 128, 64, 4, 3)),
    90: (GemmTile(128, 256, 64, 8, 3), GemmTile(128, 128, 64, 8, 4), GemmTile(64, 128, 64, 4, 4)),
    100: (GemmTile(128, 256, 64, 8, 3), GemmTile(64, 128, 64, 4, 4)),
}
GEMM_DX = {
    80: (GemmTile(128, 128, 64, 8, 3),),
    90: (GemmTile(128, 128, 64, 8, 4),),
}
# Several modules with dropout hold two accumulators while they put on their masks.
GEMM_DX_GROUP = {
    80: (GemmTile(128, 64, 64, 8, 3),),
    90: (GemmTile(128, 64, 64, 8, 4),),
    100: (GemmTile(128, 64, 64, 8, 3),),
}


def gemm_tiles(table: dict, capability: int) -> tuple[GemmTile, ...]:
    """The entry of the nearest architecture that is not newer."""
    return table[max(known for known in table if known <= capability)]
