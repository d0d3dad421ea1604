"""
compose: NoRA's effective factors A' outer_A and outer_Bᵀ B' of every module of a model and their gradients, float32, r = 16, r_out = 256.

Bytes of a module, 4 an element: the outer factors r_out (K + N) read, once forward and once backward; A', B' (2 r r_out) read, their
gradients written; effective factors r (K + N) written, their gradients read: 4 (2 r_out (K + N) + 4 r r_out + 2 r (K + N)).
FLOPs: 4 r r_out (K + N), half of them backward. SmolLM2-135M: 7.7 an outer byte read: between memory and arithmetic.

Peer: the two products as one writes them, in autograd, module by module.
"""

import pytest
import torch

from adaptlora.benchmarks.accuracy import assert_accurate
from adaptlora.benchmarks.models import MODELS
from adaptlora.benchmarks.timing import default_device
from adaptlora.benchmarks.work import Work
from adaptlora.ops import compose, compose_ref

R, R_OUT = 16, 256
DEVICE = default_device()


def operands_of(shapes) -> list[tuple[torch.Tensor, ...]]:
    """(A', B', outer_A, outer_B) of each module, in the layouts that NoRA keeps them in."""
    modules = []
    for K, N in shapes:
        inner = [torch.randn(R, R_OUT, device=DEVICE) / R_OUT**0.5 for _ in range(2)]
        outer = [torch.randn(R_OUT, width, device=DEVICE) / R_OUT**0.5 for width in (K, N)]
        modules.append((inner[0].requires_grad_(), inner[1].t().requires_grad_(), *outer))
    return modules


def eager(lora_A, lora_B, outer_A, outer_B):
    return lora_A @ outer_A, (lora_B.t() @ outer_B).t()


def run(composition, modules, upstream):
    """Forward and backward of all; returns factors and gradients, module by module."""
    leaves = [t for lora_A, lora_B, *_ in modules for t in (lora_A, lora_B)]
    outs = [factor for operands in modules for factor in composition(*operands)]
    return outs, torch.autograd.grad(outs, leaves, upstream)


def work(shapes) -> Work:
    sides = sum(K + N for K, N in shapes)
    inner = 4 * R * R_OUT * len(shapes)
    bytes_ = 4 * (2 * R_OUT * sides + inner + 2 * R * sides)
    return Work(bytes_, 4 * R * R_OUT * sides, footprint=bytes_ - 4 * R_OUT * sides)


@pytest.mark.parametrize("model", MODELS)
def test_compose(compare, quick, model):
    if quick != (model == "tiny"):
        pytest.skip("the tiny model is --quick's")
    shapes = MODELS[model].block * MODELS[model].blocks
    modules = operands_of(shapes)
    upstream = [torch.randn(*shape, device=DEVICE) for K, N in shapes for shape in ((R, K), (N, R))]
    doubled = [tuple(t.detach().double().requires_grad_(t.requires_grad) for t in operands) for operands in modules]
    exact = run(compose_ref, doubled, [g.double() for g in upstream])
    plain = run(eager, modules, upstream)
    compositions = {"adaptlora": compose, "torch, product by product": eager}
    for name, composition in compositions.items():
        for parts in zip(run(composition, modules, upstream), exact, plain, strict=True):
            for triple in zip(*parts, strict=True):
                assert_accurate(name, *triple)
    compare(
        f"{MODELS[model].title}: factors and gradients",
        {name: lambda composition=c: run(composition, modules, upstream) for name, c in compositions.items()},
        floor="adaptlora",
        graphs=True,
        rounds=51,
        facts={"modules": len(shapes), "r": R, "r_out": R_OUT},
        work=work(shapes),
    )
