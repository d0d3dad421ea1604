"""
lora_delta_: y += s · drop(x) Aᵀ Bᵀ on the y that any base layer left, forward and backward (dx, dA, dB), float32, R = 8.

Bytes, 4 an element: x, A, B and y read, y and S written; dy, x, A, B and S read, dx, dA and dB written:
4 (3 MK + 3 MN + 3 R(K + N) + 2 MR). FLOPs: 6 M R (K + N). At K = N = 384, M = 512: 9.6 MB, 19 MFLOP: passes over memory are the cost.

PEFT's composition is what its layers do: F.linear twice, scaled, added to y. The other peer is what one writes by hand to save passes:
`addmm_` into y. The base layer is left out: it is the same for all, and y is there before the time begins.
"""

import pytest
import torch
import torch.nn.functional as F

from adaptlora.benchmarks.accuracy import assert_all_accurate
from adaptlora.benchmarks.harness import usable
from adaptlora.benchmarks.timing import default_device
from adaptlora.benchmarks.work import Work
from adaptlora.ops import lora_delta_, lora_delta_ref

R, SCALING = 8, 2.0
DEVICE = default_device()
TOKENS = 8192 if DEVICE.type == "cuda" else 512
SIZES = [(384, 384), (576, 1536), (2048, 2048)]  # (K, N)


def composed(y, x, A, B, p):
    return y + F.linear(F.linear(F.dropout(x, p), A), B) * SCALING


def by_addmm(y, x, A, B, p):
    return y.addmm_(F.dropout(x, p) @ A.t(), B.t(), alpha=SCALING)


def ours(y, x, A, B, p):
    return lora_delta_(y, x, A, B, scaling=SCALING, dropout_p=p)


class Run:
    """One provider; `prepare`, which is not timed, gives it a y to write to and empty gradients."""

    def __init__(self, update, operands, dy, p):
        self.update, self.dy, self.p = update, dy, p
        self.y, *self.inputs = operands

    def prepare(self) -> None:
        self.fresh = self.y.clone()
        for tensor in self.inputs:
            tensor.grad = None

    def __call__(self):
        y = self.update(self.fresh, *self.inputs, self.p)
        y.backward(self.dy)
        return y

    def results(self) -> dict[str, torch.Tensor]:
        self.prepare()
        y = self()
        return dict(zip(("y", "dx", "dA", "dB"), (y.detach(), *(t.grad for t in self.inputs)), strict=True))


def definition(operands, dy, dtype, p=0.0, seed=None) -> dict[str, torch.Tensor]:
    y, *inputs = (t.detach().to(dtype) for t in operands)
    for tensor in inputs:
        tensor.requires_grad_()
    out = lora_delta_ref(y, *inputs, scaling=SCALING, dropout_p=p, seed=seed)
    grads = torch.autograd.grad(out, inputs, dy.to(dtype))
    return dict(zip(("y", "dx", "dA", "dB"), (out.detach(), *grads), strict=True))


def work(M: int, K: int, N: int) -> Work:
    moved = 4 * (3 * M * K + 3 * M * N + 3 * R * (K + N) + 2 * M * R)
    held = 4 * (2 * M * K + 2 * M * N + 2 * R * (K + N) + M * R)  # x and dx, y and dy, factors and their gradients, S
    return Work(moved, 6 * M * R * (K + N), footprint=held)


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize(("K", "N"), SIZES, ids=[f"{K}x{N}" for K, N in SIZES])
def test_update(compare, quick, K, N, p):
    if quick and SIZES[0] != (K, N):
        pytest.skip("--quick runs the smallest size")
    M = 64 if quick else TOKENS

    def normal(*shape):
        return torch.randn(*shape, device=DEVICE)

    x, A, B = (t.requires_grad_() for t in (normal(M, K), normal(R, K) / K**0.5, normal(N, R) / N**0.5))
    operands, dy = (normal(M, N), x, A, B), normal(M, N)
    updates = {"PEFT's composition": composed, "torch, addmm_": by_addmm, "adaptlora": ours}
    if not quick:  # a compilation takes longer than all the rest of a quick run
        updates["PEFT's composition, torch.compile"] = torch.compile(composed)
    exact, eager = (definition(operands, dy, dtype) for dtype in (torch.float64, torch.float32))

    def check(name):
        assert_all_accurate(Run(updates[name], operands, dy, 0.0).results(), exact, eager)

    def fixed(y, *inputs):
        return lora_delta_(y, *inputs[:3], scaling=SCALING, dropout_p=p, seed=7)

    masked = [definition(operands, dy, dtype, p, 7) for dtype in (torch.float64, torch.float32)]
    assert_all_accurate(Run(fixed, operands, dy, p).results(), *masked)
    providers, unavailable = usable({name: Run(update, operands, dy, p) for name, update in updates.items()}, check)
    compare(
        f"{K}×{N}, dropout {p}",
        providers,
        floor="adaptlora",
        rounds=101 if K < 2048 else 51,
        unavailable=unavailable,
        facts={"M": M, "R": R},
        work=work(M, K, N),
    )
