"""
rank_norms: ‖a_r‖ and ‖b_r‖ of every vector of every module of a model, float32, r = 8, without gradients: what La-LoRA asks for each step.

Bytes: E elements read, 2 r numbers a module written: 4 (E + 2 Σ r). FLOPs: 2 E. MiniLM: 1.3 MB, SmolLM2-135M: 9.8 MB.

Peers: the loop over modules, over B as PEFT has it (N, r) and as adaptlora has it (r, N in memory); `torch._foreach_norm` over all vectors.
"""

import pytest
import torch

from adaptlora.benchmarks.accuracy import assert_accurate
from adaptlora.benchmarks.models import MODELS, R
from adaptlora.benchmarks.penalty import elements, factors
from adaptlora.benchmarks.timing import default_device
from adaptlora.benchmarks.work import Work
from adaptlora.ops import rank_norms, rank_norms_ref


def loop(lora_As, lora_Bs):
    return (
        [torch.linalg.vector_norm(A, dim=1) for A in lora_As],
        [torch.linalg.vector_norm(B, dim=0) for B in lora_Bs],
    )


def foreach(lora_As, lora_Bs):
    vectors = [row for A in lora_As for row in A.unbind(0)] + [column for B in lora_Bs for column in B.unbind(1)]
    norms = torch.stack(torch._foreach_norm(vectors))
    return norms[: R * len(lora_As)].split(R), norms[R * len(lora_As) :].split(R)


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_norms(compare, quick, model):
    if quick != (model == "tiny"):
        pytest.skip("the tiny model is --quick's")
    ours, theirs = (factors(model, default_device(), rank_major=rank_major) for rank_major in (True, False))
    operands = {
        "adaptlora": (rank_norms, *ours),
        "per-module loop": (loop, *theirs),
        "per-module loop, rank-major": (loop, *ours),
        "torch._foreach_norm": (foreach, *ours),
    }
    exact, eager = (rank_norms_ref(*[[f.to(d) for f in side] for side in ours]) for d in (torch.float64, torch.float32))
    for name, (norms, *pair) in operands.items():
        for found, right, plain in zip(norms(*pair), exact, eager, strict=True):
            assert_accurate(name, torch.cat(list(found)), torch.cat(right), torch.cat(plain))
    E, modules = elements(model), len(ours[0])
    compare(
        f"{MODELS[model].title}: norms",
        {name: lambda norms=norms, pair=pair: norms(*pair) for name, (norms, *pair) in operands.items()},
        floor="adaptlora",
        graphs=True,
        rounds=201,
        facts={"modules": modules, "R": R},
        work=Work(4 * (E + 2 * R * modules), 2 * E),
    )
