"""The traffic of the layer's kernels, counted in triton's interpreter at M = 2048, K = N = 1024: what design claims, measured."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from adaptlora.ops import _backend

if not _backend.interpreting():
    pytest.skip("test_triton_interpret.py runs these in the interpreter", allow_module_level=True)

from layer_traffic import Layer, adapter_bytes, requested, skinny, whole

LAYER = Layer(2048, 1024, 1024, 8)


@pytest.fixture(scope="module")
def counts():
    torch.manual_seed(0)
    return whole(LAYER)


def test_the_layer_asks_for_little_beyond_its_base_products(counts):
    for least, kernels in zip(LAYER.extra(), counts, strict=True):
        extra = sum(adapter_bytes(name, traffic, rereads=False) for name, traffic in kernels.items())
        assert least < extra <= 1.15 * least


def test_the_mask_costs_no_bytes(counts):
    """With dropout every kernel asks for what it asks for without, but for the 8 bytes of the seed a program."""
    forward, backward = counts
    for name, plain in skinny(Layer(2048, 1024, 1024, 8, p=0.0)).items():
        if name == "_rank_norms_kernel" or name == "_sum_partials_kernel":
            continue
        dropped = (forward | backward)[name]
        assert dropped.programs == plain.programs
        assert requested(dropped) - dropped.loaded["seed_ptrs[0]"] == requested(plain)
        assert dropped.loaded["seed_ptrs[0]"] in (0, 8 * dropped.programs)


def test_kernels_are_near_their_ideal_bytes(counts):
    forward, backward = counts
    kernels = forward | backward | {"_rank_norms_kernel": skinny(LAYER)["_rank_norms_kernel"]}
    for name, ideal in LAYER.ideal().items():
        assert ideal <= requested(kernels[name]) <= 1.10 * ideal, name


def test_launches(counts):
    """Five kernels, and the sums over the parts of G and of dA; S and dS are in one part at this size."""
    launched = [{name.strip("_"): traffic.launches for name, traffic in kernels.items()} for kernels in counts]
    assert launched == [
        {"lora_shrink_kernel": 1, "lora_gemm_expand_kernel": 1},
        {"lora_ds_db_kernel": 1, "sum_partials_kernel": 2, "lora_gemm_dx_kernel": 1, "lora_da_kernel": 1},
    ]
