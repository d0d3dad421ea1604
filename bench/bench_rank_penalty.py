"""NormAL's penalty over all modules of a model with its gradient, and the proximal step, float32, r = 8.

Bytes, with F the factors' (E elements, 4E bytes): the penalty has to read F (norms), read F again and write F (gradient): 12E.
The proximal step has to read F, then read and write it: 12E. FLOPs: 2E for the norms, E for the scaling. MiniLM: E = 331,776,
1.3 MB; SmolLM2-135M: E = 2,442,240, 9.8 MB. There is no base product here: the floor is the fused op itself.

The loop is the method's published form: for each module norms, weights, a sum, added up in Python, and autograd's graph of it.
"""

import pytest
import torch

from adaptlora.ops import rank_penalty, rank_shrink_

R, ETA, STEP = 8, 1e-3, 1e-6
MODELS = {
    # (K, N) of the adapted linears of one block, and the number of blocks.
    "MiniLM": ([(384, 384)] * 4 + [(384, 1536), (1536, 384)], 6),
    "SmolLM2-135M": ([(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)], 30),
}


def factors(model: str, rank_major: bool) -> tuple[list, list]:
    """A's and B's, the same values on every call; B is (N, R) in memory as in PEFT, or (R, N) as adaptlora has it."""
    generator = torch.Generator().manual_seed(0)
    block, blocks = MODELS[model]
    lora_As, lora_Bs = [], []
    for K, N in block * blocks:
        lora_As.append(torch.randn(R, K, generator=generator).requires_grad_())
        rows = torch.randn(R, N, generator=generator)
        lora_Bs.append((rows.t() if rank_major else rows.t().contiguous()).requires_grad_())
    return lora_As, lora_Bs


def elements(lora_As, lora_Bs) -> int:
    return sum(factor.numel() for factor in [*lora_As, *lora_Bs])


WEIGHTS = torch.arange(1, R + 1).sqrt()


def loop_penalty(lora_As, lora_Bs):
    weights = WEIGHTS.to(lora_As[0].dtype)
    total = 0.0
    for A, B in zip(lora_As, lora_Bs, strict=True):
        total = total + (weights * (A.norm(dim=1) + B.norm(dim=0))).sum()
    return total


def foreach_penalty(lora_As, lora_Bs):
    """One foreach call over all rank vectors as tensors of their own."""
    vectors = [row for A in lora_As for row in A.unbind(0)] + [column for B in lora_Bs for column in B.unbind(1)]
    return torch.dot(torch.stack(torch._foreach_norm(vectors)), WEIGHTS.repeat(2 * len(lora_As)))


@torch.no_grad()
def loop_shrink(lora_As, lora_Bs):
    for A, B in zip(lora_As, lora_Bs, strict=True):
        for vectors in (A, B.t()):
            vectors.mul_((1 - STEP * WEIGHTS / vectors.norm(dim=1)).clamp_(min=0)[:, None])


@torch.no_grad()
def foreach_shrink(lora_As, lora_Bs):
    vectors = [row for A in lora_As for row in A.unbind(0)] + [column for B in lora_Bs for column in B.unbind(1)]
    norms = torch.stack(torch._foreach_norm(vectors))
    scales = (1 - STEP * WEIGHTS.repeat(2 * len(lora_As)) / norms).clamp_(min=0)
    torch._foreach_mul_(vectors, list(scales.unbind(0)))


def our_shrink(lora_As, lora_Bs):
    rank_shrink_(lora_As, lora_Bs, STEP)


def with_gradient(penalty, lora_As, lora_Bs):
    for factor in [*lora_As, *lora_Bs]:
        factor.grad = None
    value = penalty(lora_As, lora_Bs)
    (ETA * value).backward()
    return value


@pytest.mark.parametrize("model", MODELS)
def test_penalty(compare, model):
    operands = {
        "adaptlora": (rank_penalty, *factors(model, rank_major=True)),
        "per-module loop": (loop_penalty, *factors(model, rank_major=False)),
        "torch._foreach_norm": (foreach_penalty, *factors(model, rank_major=False)),
    }
    doubled = [[f.detach().double().requires_grad_() for f in side] for side in factors(model, rank_major=False)]
    expected = with_gradient(loop_penalty, *doubled)
    for name, (penalty, *pair) in operands.items():
        value = with_gradient(penalty, *pair)
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0, msg=name)
        for side, right in zip(pair, doubled, strict=True):
            for factor, exact in zip(side, right, strict=True):
                torch.testing.assert_close(factor.grad.double(), exact.grad, rtol=1e-5, atol=1e-9, msg=name)
    E = elements(*doubled)
    compare(
        f"{model}: penalty and gradient",
        {name: lambda o=operand: with_gradient(*o) for name, operand in operands.items()},
        floor="adaptlora",
        rounds=201,
        facts={"modules": len(doubled[0]), "R": R, "MB to move": round(12 * E / 1e6, 2)},
    )


@pytest.mark.parametrize("model", MODELS)
def test_shrink(compare, model):
    operands = {
        "adaptlora": (our_shrink, *factors(model, rank_major=True)),
        "per-module loop": (loop_shrink, *factors(model, rank_major=False)),
        "torch._foreach_norm": (foreach_shrink, *factors(model, rank_major=False)),
    }
    exact = [[f.detach().double() for f in side] for side in factors(model, rank_major=False)]
    loop_shrink(*exact)
    for name, (shrink, *pair) in operands.items():
        shrink(*pair)
        for side, right in zip(pair, exact, strict=True):
            for factor, expected in zip(side, right, strict=True):
                torch.testing.assert_close(factor.double(), expected, rtol=1e-6, atol=1e-9, msg=name)
    E = elements(*exact)
    compare(
        f"{model}: proximal step",
        {name: lambda shrink=shrink, pair=pair: shrink(*pair) for name, (shrink, *pair) in operands.items()},
        floor="adaptlora",
        rounds=201,
        facts={"modules": len(exact[0]), "R": R, "MB to move": round(12 * E / 1e6, 2)},
    )
