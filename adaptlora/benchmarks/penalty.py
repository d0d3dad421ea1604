"""NormAL's penalty over all modules of a model with its gradient, and the proximal step, float32, r = 8: cases of bench_rank_penalty.py.

Counted: work.penalty and work.shrink, 12 bytes an element of the factors. MiniLM: 331,776 elements, 1.3 MB; SmolLM2-135M: 2,442,240,
9.8 MB. The floor moves these bytes over one flat buffer: the norm, then a scaled copy or a scaling in place. The loop is the method's
published form: for each module norms, weights, a sum, added up in Python, and autograd's graph of it.
"""

from collections.abc import Iterator

import torch

from ..ops import rank_penalty, rank_shrink_
from . import work
from .accuracy import WrongResultError
from .case import Case, Options
from .models import ETA, MODELS, R

STEP = 1e-6
FLAT, LOOP, FOREACH, OURS = "one flat buffer", "per-module loop", "torch._foreach_norm", "adaptlora"


def factors(name: str, device: torch.device, *, rank_major: bool, dtype=torch.float32) -> tuple[list, list]:
    """A's and B's, the same values on every call; B is (N, R) in memory as in PEFT, or (R, N) as adaptlora has it."""
    generator = torch.Generator().manual_seed(0)
    dims = MODELS[name]
    lora_As, lora_Bs = [], []
    for K, N in dims.block * dims.blocks:
        lora_As.append(torch.randn(R, K, generator=generator).to(device, dtype).requires_grad_())
        rows = torch.randn(R, N, generator=generator).to(device, dtype)
        lora_Bs.append((rows.t() if rank_major else rows.t().contiguous()).requires_grad_())
    return lora_As, lora_Bs


def elements(name: str) -> int:
    dims = MODELS[name]
    return dims.blocks * sum(R * (K + N) for K, N in dims.block)


def _weights(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(1, R + 1, device=like.device).sqrt().to(like.dtype)


def _vectors(lora_As, lora_Bs) -> list[torch.Tensor]:
    return [row for A in lora_As for row in A.unbind(0)] + [column for B in lora_Bs for column in B.unbind(1)]


def loop_penalty(lora_As, lora_Bs):
    weights = _weights(lora_As[0])
    total = 0.0
    for A, B in zip(lora_As, lora_Bs, strict=True):
        total = total + (weights * (A.norm(dim=1) + B.norm(dim=0))).sum()
    return total


def foreach_penalty(lora_As, lora_Bs):
    """One foreach call over all rank vectors as tensors of their own."""
    norms = torch.stack(torch._foreach_norm(_vectors(lora_As, lora_Bs)))
    return torch.dot(norms, _weights(norms).repeat(2 * len(lora_As)))


@torch.no_grad()
def loop_shrink(lora_As, lora_Bs):
    weights = _weights(lora_As[0])
    for A, B in zip(lora_As, lora_Bs, strict=True):
        for vectors in (A, B.t()):
            vectors.mul_((1 - STEP * weights / vectors.norm(dim=1)).clamp_(min=0)[:, None])


@torch.no_grad()
def foreach_shrink(lora_As, lora_Bs):
    vectors = _vectors(lora_As, lora_Bs)
    norms = torch.stack(torch._foreach_norm(vectors))
    scales = (1 - STEP * _weights(norms).repeat(2 * len(lora_As)) / norms).clamp_(min=0)
    torch._foreach_mul_(vectors, list(scales.unbind(0)))


def our_shrink(lora_As, lora_Bs):
    rank_shrink_(lora_As, lora_Bs, STEP)


def with_gradient(penalty, lora_As, lora_Bs):
    for factor in [*lora_As, *lora_Bs]:
        factor.grad = None
    value = penalty(lora_As, lora_Bs)
    (ETA * value).backward()
    return value


def _close(name: str, found: torch.Tensor, exact: torch.Tensor, rtol: float, atol: float) -> None:
    try:
        torch.testing.assert_close(found.detach().double(), exact.detach(), rtol=rtol, atol=atol)
    except AssertionError as error:
        raise WrongResultError(f"{name}: {error}") from error


def penalty_case(name: str, device: torch.device, penalties: dict | None = None) -> Case:
    """
    Args: penalties: further {provider: function of lora_As, lora_Bs}, with B as in PEFT.
    Raises: WrongResultError.
    """
    functions = {LOOP: loop_penalty, FOREACH: foreach_penalty, **(penalties or {})}
    operands = {OURS: (rank_penalty, *factors(name, device, rank_major=True))}
    operands |= {title: (function, *factors(name, device, rank_major=False)) for title, function in functions.items()}
    doubled = factors(name, device, rank_major=False, dtype=torch.float64)
    expected = with_gradient(loop_penalty, *doubled)
    for title, (penalty, *pair) in operands.items():
        _close(f"{title}: penalty", with_gradient(penalty, *pair), expected, rtol=1e-6, atol=0)
        for side, right in zip(pair, doubled, strict=True):
            for factor, exact in zip(side, right, strict=True):
                _close(f"{title}: gradient", factor.grad, exact.grad, rtol=1e-5, atol=1e-9)
    flat = torch.ones(elements(name), device=device)
    gradient = torch.empty_like(flat)

    def floor():
        flat.norm()
        torch.mul(flat, ETA, out=gradient)

    providers = {title: lambda o=operand: with_gradient(*o) for title, operand in operands.items()}
    return _case(f"{MODELS[name].title}: penalty and gradient", name, floor, providers, work.penalty(elements(name)))


def shrink_case(name: str, device: torch.device) -> Case:
    """Raises: WrongResultError."""
    operands = {OURS: (our_shrink, *factors(name, device, rank_major=True))}
    for title, shrink in ((LOOP, loop_shrink), (FOREACH, foreach_shrink)):
        operands[title] = (shrink, *factors(name, device, rank_major=False))
    exact = factors(name, device, rank_major=False, dtype=torch.float64)
    loop_shrink(*exact)
    for title, (shrink, *pair) in operands.items():
        with torch.no_grad():
            shrink(*pair)
        for side, right in zip(pair, exact, strict=True):
            for factor, expected in zip(side, right, strict=True):
                _close(f"{title}: factors", factor, expected, rtol=1e-6, atol=1e-9)
    flat = torch.ones(elements(name), device=device)

    def floor():
        flat.norm()
        flat.mul_(1.0)

    providers = {
        title: torch.no_grad()(lambda shrink=shrink, pair=pair: shrink(*pair))
        for title, (shrink, *pair) in operands.items()
    }
    return _case(f"{MODELS[name].title}: proximal step", name, floor, providers, work.shrink(elements(name)))


def _case(title: str, name: str, floor, providers: dict, counted: work.Work) -> Case:
    dims = MODELS[name]
    facts = {"modules": dims.blocks * len(dims.block), "R": R, "MB to move": round(counted.bytes / 1e6, 2)}
    return Case(title, {FLAT: floor, **providers}, FLAT, rounds=201, facts=facts, work=counted, graphs=True)


def cases(options: Options) -> Iterator[Case]:
    for name in ("tiny",) if options.quick else ("minilm", "smollm2"):
        yield penalty_case(name, options.device)
        yield shrink_case(name, options.device)
