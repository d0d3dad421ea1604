"""
One LoRA layer, forward and backward (dx, dA, dB), and three that share x: float32 on the CPU, bf16 with float32 factors on a
CUDA GPU and on a CPU that has instructions for it. What is counted and what each provider moves: adaptlora/benchmarks/layer.py and work.py.

At K = N = 384 and R = 8 the adapter's FLOPs are 6 % of the frozen layer's, at 2048 1 %: whatever a provider takes beyond it is passes
over memory and calls.
"""

import pytest
import torch

from adaptlora.benchmarks.layer import Point, R, group_case, layer_case
from adaptlora.benchmarks.roofline import bf16_unusable
from adaptlora.benchmarks.timing import default_device

DEVICE = default_device()
GPU = DEVICE.type == "cuda"
HAS_BF16 = bf16_unusable(DEVICE) is None
DTYPES = [torch.bfloat16] if GPU else [torch.float32] + [torch.bfloat16] * HAS_BF16
TOKENS = 8192 if GPU else 512
SIZES = [(2048, 2048), (4096, 4096), (4096, 14336)] if GPU else [(384, 384), (576, 1536), (2048, 2048)]  # (K, N)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize(("K", "N"), SIZES, ids=[f"{K}x{N}" for K, N in SIZES])
def test_layer(measure, quick, K, N, p, dtype):
    if quick and SIZES[0] != (K, N):
        pytest.skip("--quick runs the smallest size")
    point = Point(64 if quick else TOKENS, K, N, R, p, dtype)
    measure(layer_case(point, DEVICE, name=f"{K}×{N}, dropout {p}", compiled=not quick))


@pytest.mark.parametrize("p", [0.0, 0.05])
def test_group(measure, quick, p):
    """q, k and v of MiniLM's width on the CPU."""
    measure(group_case(Point(64 if quick else TOKENS, *SIZES[0], R, p, DTYPES[0]), DEVICE))
