"""
One LoRA layer, forward and backward (dx, dA, dB), and three that share x: float32 on the CPU, bf16 with float32 factors on a
CUDA GPU and on a CPU that has instructions for it.

FLOPs: the frozen layer has 4·M·N·K (y and dx); rank R adds 6·M·R·(K + N): 2 for S and y, 2 for dS and dx, 2 for dA and dB.
At K = N = 384 and R = 8 that is 6 % more, at 2048 1 %: whatever a provider takes beyond it is passes over memory and calls.

Memory beyond the two base products, in elements of 4 bytes, R small (W is read twice by all):
    frozen      none: x, W → y; dy, W → dx
    PEFT        forward MK (S), 6 MN (the update written, scaled, added to y); dropout 6 MK more (noise drawn, scaled, multiplied)
                backward 4 MN (dy scaled; dB, dS), 5 MK (dA; the update's dx written, then added); dropout 3 MK more
    adaptlora   forward MK (S, with the mask regenerated), 2 MN (y starts as the update and the base product adds to it)
                backward MN (dS and dB in one pass), 3 MK (dA; dx as y); dropout or not
"""

import peft
import pytest
import torch
import torch.nn.functional as F
from numerics import assert_accurate, assert_all_accurate
from torch import nn

from adaptlora.benchmarks.harness import usable
from adaptlora.nn import LoraGroup, LoraLinear
from adaptlora.ops import lora_linear_ref
from adaptlora.ops._dropout import new_seed

R, ALPHA = 8, 16
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HAS_BF16 = GPU or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
DTYPES = [torch.bfloat16] if GPU else [torch.float32] + [torch.bfloat16] * HAS_BF16
TOKENS = 8192 if GPU else 512
SIZES = [(2048, 2048), (4096, 4096), (4096, 14336)] if GPU else [(384, 384), (576, 1536), (2048, 2048)]  # (K, N)


def peft_layer(base: nn.Linear, lora_A, lora_B, p: float) -> nn.Module:
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=p, target_modules=["0"])
    layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(lora_A)
        layer.lora_B["default"].weight.copy_(lora_B)
    return layer


def our_layer(base: nn.Linear, lora_A, lora_B, p: float) -> nn.Module:
    layer = LoraLinear(base, R, scaling=ALPHA / R, dropout_p=p)
    with torch.no_grad():
        layer.lora_A.copy_(lora_A)
        layer.lora_B.copy_(lora_B)
    return layer


def copy_of(base: nn.Linear) -> nn.Linear:
    """A layer around the same weight: the providers share it, as they share the caches it is in."""
    copy = nn.Linear(base.in_features, base.out_features, device="meta")
    copy.weight, copy.bias = base.weight, base.bias
    return copy


def step(layer, x, dy):
    """Forward and backward with gradients that start empty, as after `zero_grad`."""
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None
    y = layer(x)
    y.backward(dy)
    return y


def results(layer, x, dy, names=("lora_A", "lora_B")) -> dict[str, torch.Tensor]:
    y = step(layer, x, dy)
    grads = {n: p.grad for name in names for n, p in layer.named_parameters() if name in n}
    return {"y": y.detach(), "dx": x.grad, **{name: g for name, g in zip(names, grads.values(), strict=True)}}


def exact(base, x, lora_A, lora_B, dy) -> tuple[dict, dict]:
    """The definition in float64, and the same in the dtype of x."""
    outs = []
    for dtype in (torch.float64, x.dtype):
        x_, A_, B_ = (t.detach().to(dtype).requires_grad_() for t in (x, lora_A, lora_B))
        y = F.linear(x_, base.weight.to(dtype), base.bias.to(dtype)) + ALPHA / R * (x_ @ A_.t()) @ B_.t()
        grads = torch.autograd.grad(y, [x_, A_, B_], dy.to(dtype))
        if dtype != torch.float64:  # the factors' gradients have the factors' dtype
            grads = [grad.to(operand.dtype) for grad, operand in zip(grads, (x, lora_A, lora_B), strict=True)]
        outs.append(dict(zip(("y", "dx", "lora_A", "lora_B"), (y.detach(), *grads), strict=True)))
    return outs[0], outs[1]


def assert_mask_right(layer: LoraLinear, x) -> None:
    """While training our layer is its definition with the mask that torch's generator gives."""
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    factors = layer.weight, layer.bias, layer.lora_A, layer.lora_B
    seed = new_seed(x.device)
    exact, eager = (
        lora_linear_ref(
            x.to(d), *(f.to(d) for f in factors), scaling=layer.scaling, dropout_p=layer.dropout_p, seed=seed
        )
        for d in (torch.float64, x.dtype)
    )
    assert_accurate("y", y, exact, eager)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def new_factors(K: int, N: int):
    return normal(R, K) / K**0.5, normal(N, R) / N**0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize(("K", "N"), SIZES, ids=[f"{K}x{N}" for K, N in SIZES])
def test_layer(compare, quick, K, N, p, dtype):
    if quick and SIZES[0] != (K, N):
        pytest.skip("--quick runs the smallest size")
    M = 64 if quick else TOKENS
    base = nn.Linear(K, N, device=DEVICE, dtype=dtype).requires_grad_(False)
    x, dy = normal(M, K, dtype=dtype).requires_grad_(), normal(M, N, dtype=dtype)
    lora_A, lora_B = new_factors(K, N)
    layers = {
        "frozen linear": base,
        "PEFT": peft_layer(copy_of(base), lora_A, lora_B, p),
        "adaptlora": our_layer(copy_of(base), lora_A, lora_B, p),
    }
    if not quick:  # a compilation takes longer than all the rest of a quick run
        compiled = torch.compile(peft_layer(copy_of(base), lora_A, lora_B, p), fullgraph=True)
        layers["PEFT, torch.compile"] = compiled
    truth, eager = exact(base, x, lora_A, lora_B, dy)

    def check(name):
        if name == "frozen linear":
            step(base, x, dy)
            return
        layer = layers[name]
        layer.eval()
        assert_all_accurate(results(layer, x, dy), truth, eager, precision=dtype)
        layer.train()
        step(layer, x, dy)

    providers = {name: lambda layer=layer: step(layer, x, dy) for name, layer in layers.items()}
    providers, unavailable = usable(providers, check)
    assert_mask_right(layers["adaptlora"], x)
    compare(
        f"{K}×{N}, dropout {p}",
        providers,
        floor="frozen linear",
        rounds=101 if K < 2048 else 51,
        unavailable=unavailable,
        facts={"M": M, "R": R, "dtype": str(dtype), "GFLOP of the floor": round(4 * M * N * K / 1e9, 3)},
    )


class Each(nn.Module):
    """Layers called one after the other on the same x; the y's side by side, as LoraGroup's are put here too."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return [layer(x) for layer in self.layers]


@pytest.mark.parametrize("p", [0.0, 0.05])
def test_group(compare, quick, p):
    """q, k and v of MiniLM's width on the CPU."""
    K, N = SIZES[0]
    M = 64 if quick else TOKENS
    bases = [nn.Linear(K, N, device=DEVICE, dtype=DTYPES[0]).requires_grad_(False) for _ in range(3)]
    factors = [new_factors(K, N) for _ in bases]
    x = normal(M, K, dtype=DTYPES[0]).requires_grad_()
    dys = [normal(M, N, dtype=DTYPES[0]) for _ in bases]
    ours = [our_layer(copy_of(base), *pair, p) for base, pair in zip(bases, factors, strict=True)]
    groups = {
        "three frozen linears": Each(bases),
        "PEFT": Each([peft_layer(copy_of(base), *pair, p) for base, pair in zip(bases, factors, strict=True)]),
        "adaptlora, three layers": Each(ours),
        "adaptlora, LoraGroup": LoraGroup(ours),
    }

    def run(group):
        x.grad = None
        for parameter in group.parameters():
            parameter.grad = None
        torch.autograd.backward(group(x), dys)
        return x.grad

    run(groups["adaptlora, LoraGroup"].eval())
    found = [x.grad, *(f.grad for layer in ours for f in (layer.lora_A, layer.lora_B))]
    expected = [exact(base, x, *pair, dy) for base, pair, dy in zip(bases, factors, dys, strict=True)]
    truth = [sum(t["dx"] for t, _ in expected), *(t[name] for t, _ in expected for name in ("lora_A", "lora_B"))]
    eager = [sum(e["dx"] for _, e in expected), *(e[name] for _, e in expected for name in ("lora_A", "lora_B"))]
    for i, triple in enumerate(zip(found, truth, eager, strict=True)):
        assert_accurate(f"gradient {i}", *triple, precision=DTYPES[0])
    for group in groups.values():
        group.train()
    compare(
        f"3 × {K}×{N} of one x, dropout {p}",
        {name: lambda group=group: run(group) for name, group in groups.items()},
        floor="three frozen linears",
        rounds=101,
        facts={"M": M, "R": R, "dtype": str(DTYPES[0])},
    )
