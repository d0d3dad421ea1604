"""rank_penalty: hand-worked numbers for every kind, its gradient in float64, zero vectors, bad input."""

import math

import pytest
import torch
from numerics import assert_all_accurate
from test_rank_norms import BAD_FACTORS, SHAPES, definition, sample
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptlora.ops import rank_penalty, rank_penalty_ref
from adaptlora.ops.rank_penalty import PENALTIES

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
WEIGHTS = {
    "sqrt": lambda r: r**0.5,
    "linear": lambda r: r,
    "square": lambda r: r**2,
    "cube": lambda r: r**3,
    "log": lambda r: math.log(r + 1),
    "none": lambda r: 0,
}


def by_hand():
    """Norms (5, 0, 13) and (8, 1, 0) in the first module, 10 and 25 in the second: 13, 1, 13 and 35 for r = 1, 2, 3 and 1."""
    lora_As = [torch.tensor([[3.0, 4.0], [0.0, 0.0], [5.0, 12.0]]), torch.tensor([[6.0, 8.0]])]
    lora_Bs = [torch.tensor([[0.0, 0.6, 0.0], [8.0, 0.8, 0.0]]), torch.tensor([[0.0], [24.0], [7.0]])]
    return lora_As, lora_Bs


def defined(lora_As, lora_Bs, kind):
    norms_A, norms_B = definition(lora_As, lora_Bs)
    return sum(
        WEIGHTS[kind](r) * (norms_A[i][r - 1] + norms_B[i][r - 1])
        for i in range(len(lora_As))
        for r in range(1, len(norms_A[i]) + 1)
    )


def results(function, lora_As, lora_Bs, kind, dtype=None):
    factors = [factor.detach().to(dtype or factor.dtype).requires_grad_() for factor in [*lora_As, *lora_Bs]]
    penalty = function(factors[: len(lora_As)], factors[len(lora_As) :], kind)
    grads = torch.autograd.grad(0.1 * penalty, factors)
    return {"P": penalty.detach()} | {f"gradient {i}": grad for i, grad in enumerate(grads)}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sqrt", 13 + math.sqrt(2) + 13 * math.sqrt(3) + 35),
        ("linear", 13 + 2 + 39 + 35),
        ("square", 13 + 4 + 117 + 35),
        ("cube", 13 + 8 + 351 + 35),
        ("log", 48 * math.log(2) + math.log(3) + 13 * math.log(4)),
        ("none", 0),
    ],
)
def test_worked_by_hand(backend, kind, expected):
    penalty = rank_penalty(*by_hand(), kind)
    assert (penalty.shape, penalty.dtype) == ((), FP32)
    assert penalty.item() == pytest.approx(expected, rel=1e-6)


def test_default_is_sqrt(backend):
    assert rank_penalty(*by_hand()) == rank_penalty(*by_hand(), "sqrt")


def test_every_kind_is_tested():
    assert PENALTIES.keys() == WEIGHTS.keys()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
def test_penalty_and_gradient(backend, kind, dtype):
    lora_As, lora_Bs, _ = sample([*SHAPES[:3], (8, 30, 20)], dtype=dtype)
    exact = results(defined, lora_As, lora_Bs, kind, dtype=FP64)
    eager = results(rank_penalty_ref, lora_As, lora_Bs, kind)
    assert_all_accurate(results(rank_penalty, lora_As, lora_Bs, kind), exact, eager)
    assert_all_accurate(eager, exact, results(defined, lora_As, lora_Bs, kind))


def test_modules_of_rank_zero_add_nothing(backend):
    lora_As, lora_Bs = by_hand()
    padded = rank_penalty(
        [torch.ones(0, 4), *lora_As, torch.ones(0, 9)], [torch.ones(3, 0), *lora_Bs, torch.ones(1, 0)]
    )
    assert padded == rank_penalty(lora_As, lora_Bs)
    only = torch.ones(0, 4, requires_grad=True)
    penalty = rank_penalty([only], [torch.ones(3, 0)])
    penalty.backward()
    assert penalty == 0
    assert only.grad.shape == (0, 4)


def test_gradient_of_zero_vectors_is_zero(backend):
    """B starts at zero, so the first step of every run meets this case."""
    lora_A, lora_B = torch.randn(4, 6, requires_grad=True), torch.zeros(5, 4, requires_grad=True)
    rank_penalty([lora_A], [lora_B]).backward()
    assert torch.equal(lora_B.grad, torch.zeros(5, 4))
    norms = lora_A.grad.norm(dim=1).tolist()
    assert norms == pytest.approx([1, math.sqrt(2), math.sqrt(3), 2])


def test_gradcheck():
    lora_As, lora_Bs, _ = sample([(2, 4, 3), (3, 2, 5)], dtype=FP64)
    factors = tuple(factor.requires_grad_() for factor in [*lora_As, *lora_Bs])
    assert torch.autograd.gradcheck(lambda *f: rank_penalty(f[:2], f[2:], "linear"), factors)


def test_graph_does_not_grow_with_the_modules(backend):
    def nodes(count):
        lora_As, lora_Bs, _ = sample([(4, 6, 5)] * count)
        seen, queue = set(), [rank_penalty([A.requires_grad_() for A in lora_As], lora_Bs).grad_fn]
        while queue:
            node = queue.pop()
            if node is not None and node not in seen and "AccumulateGrad" not in node.name():
                seen.add(node)
                queue.extend(following for following, _ in node.next_functions)
        return len(seen)

    assert nodes(1) == nodes(50)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, FakeTensorMode])
def test_other_modes_leave_later_calls_alone(backend, mode):
    """The weights are cached: a first call in another mode must not leave tensors that a later one cannot use."""
    ranks = {torch.inference_mode: 91, torch.no_grad: 92, FakeTensorMode: 93}[mode]
    with mode():
        rank_penalty([torch.ones(ranks, 2)], [torch.ones(3, ranks)])
    lora_A, lora_B = torch.ones(ranks, 2, requires_grad=True), torch.ones(3, ranks)
    penalty = rank_penalty([lora_A], [lora_B])
    penalty.backward()
    expected = (2**0.5 + 3**0.5) * sum(r**0.5 for r in range(1, ranks + 1))
    assert penalty.item() == pytest.approx(expected, rel=1e-6)
    assert lora_A.grad[3].norm().item() == pytest.approx(2, rel=1e-6)


def test_compile_in_one_graph(backend):
    lora_As, lora_Bs, _ = sample(SHAPES[:2])
    outs = []
    for function in (rank_penalty, torch.compile(rank_penalty, fullgraph=True, backend="aot_eager")):
        outs.append(results(function, lora_As, lora_Bs, "log"))
    assert all(torch.equal(outs[0][name], outs[1][name]) for name in outs[0])


@pytest.mark.parametrize(("lora_As", "lora_Bs", "exception", "message"), BAD_FACTORS, ids=[m for *_, m in BAD_FACTORS])
def test_bad_factors(backend, lora_As, lora_Bs, exception, message):
    if not lora_As:
        exception, message = ValueError, ": lora_As must hold at least one module, got none"
    with pytest.raises(exception, match=f"^rank_penalty{message}"):
        rank_penalty(lora_As, lora_Bs)


@pytest.mark.parametrize("kind", ["cubic", "", None, 2])
def test_bad_kind(backend, kind):
    with pytest.raises(ValueError, match=f"^rank_penalty: kind must be one of sqrt, linear, .*, got {kind!r}"):
        rank_penalty(*by_hand(), kind)
