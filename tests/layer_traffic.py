"""What the kernels of one LoRA layer must read and write, and what they ask for: counted in triton's interpreter."""

import dataclasses
import os
from unittest.mock import patch

import torch
from traffic import Traffic, counted

from adaptlora.kernels import lora_da, lora_ds_db, lora_linear, lora_shrink, rank_norms
from adaptlora.ops._dropout import threshold

BF16 = torch.bfloat16
SCALING = 2.0
# The base product's own operands and result: any GEMM reads them tile by tile, with an adapter or without.
BASE = {
    "_lora_gemm_expand_kernel": ("x_ptr", "w_ptr", "y_ptr"),
    "_lora_gemm_dx_kernel": ("dy_ptrs[0]", "w_ptrs[0]", "dx_ptr"),
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of M tokens with dropout probability p; all operands bf16, B rank-major."""

    M: int
    K: int
    N: int
    R: int
    p: float = 0.1

    def ideal(self) -> dict[str, int]:
        """Bytes of each kernel if it read every operand once and wrote every result once; S and norms are fp32, all else bf16."""
        M, K, N, R = self.M, self.K, self.N, self.R
        return {
            "_lora_shrink_kernel": 2 * M * K + 2 * R * K + 4 * M * R,
            "_lora_ds_db_kernel": 2 * M * N + 2 * R * N + 4 * M * R + 2 * M * R + 2 * R * N,
            "_lora_da_kernel": 2 * M * K + 2 * M * R + 2 * R * K,
            "_rank_norms_kernel": 2 * R * (K + N) + 2 * 4 * R,
        }

    def extra(self) -> tuple[int, int]:
        """Bytes beyond the base products that no layer with dropout avoids, forward and backward, terms in R left out."""
        return 2 * self.M * self.K, 2 * self.M * self.K + 2 * self.M * self.N

    def flops(self) -> dict[str, int]:
        """Useful FLOPs of each kernel."""
        M, K, N, R = self.M, self.K, self.N, self.R
        return {
            "_lora_shrink_kernel": 2 * M * K * R,
            "_lora_gemm_expand_kernel": 2 * M * N * (K + R),
            "_lora_ds_db_kernel": 4 * M * N * R,
            "_lora_da_kernel": 2 * M * K * R,
            "_lora_gemm_dx_kernel": 2 * M * K * (N + R),
        }

    def operands(self) -> dict[str, torch.Tensor]:
        M, K, N, R = self.M, self.K, self.N, self.R
        shapes = {"x": (M, K), "dy": (M, N), "A": (R, K), "B": (R, N), "weight": (N, K)}
        made = {name: torch.randn(shape).to(BF16) for name, shape in shapes.items()}
        return made | {"B": made["B"].t(), "seed": torch.tensor(1)}


def requested(traffic: Traffic) -> int:
    return traffic.loaded.total() + traffic.stored.total()


def distinct(traffic: Traffic) -> int:
    return traffic.distinct_loaded.total() + traffic.distinct_stored.total()


def adapter_bytes(name: str, traffic: Traffic, *, rereads: bool) -> int:
    """
    What a kernel asks for on the adapter's behalf: requested bytes, without those of the base product's own operands.

    The products' tiles read the rank operands again and again too; without `rereads` these count once.
    """
    if name not in BASE:
        return requested(traffic)
    loaded, stored = (traffic.loaded, traffic.stored) if rereads else (traffic.distinct_loaded, traffic.distinct_stored)
    return loaded.total() + stored.total() - sum(loaded[arg] + stored[arg] for arg in BASE[name])


def skinny(layer: Layer) -> dict[str, Traffic]:
    """The kernels beside the two base products, and the norms of the factors."""
    x, dy, A, B, _, seed = layer.operands().values()
    masks = (layer.p, threshold(layer.p), [seed] if layer.p else None)
    ds, dA, dB = torch.empty(layer.M, layer.R, dtype=BF16), torch.empty_like(A), torch.empty_like(B.t()).t()
    with counted() as counts:
        s = lora_shrink.lora_shrink(x, [A], *masks)
        lora_ds_db.lora_ds_db(dy, B, s, None, SCALING, ds, dB)
        lora_da.lora_da(x, ds, [dA], *masks)
        rank_norms.rank_norms([A], [B])
    return dict(counts)


def whole(layer: Layer) -> tuple[dict[str, Traffic], dict[str, Traffic]]:
    """All kernels of the forward, and of the backward, with the fused base products."""
    x, dy, A, B, weight, seed = layer.operands().values()
    options = (None, SCALING, layer.p, threshold(layer.p), seed)
    with patch.dict(os.environ, ADAPTLORA_GEMM="fused"):
        with counted() as forward:
            _, s = lora_linear.lora_linear(x, weight, None, A, B, *options)
        with counted() as backward:
            lora_linear.lora_linear_backward(dy, x, weight, s, A, B, *options, True, True, True, False)
    return dict(forward), dict(backward)
