"""One LoRA layer, forward and backward (dx, dA, dB): float32 on the CPU, bf16 with float32 factors on a CUDA GPU.

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
from harness import usable
from numerics import assert_accurate, assert_all_accurate
from torch import nn

from adaptlora.nn import LoraLinear
from adaptlora.ops import lora_linear_ref
from adaptlora.ops._dropout import new_seed

R, ALPHA = 8, 16
GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
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


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize(("K", "N"), SIZES, ids=[f"{K}x{N}" for K, N in SIZES])
def test_layer(compare, quick, K, N, p):
    if quick and SIZES[0] != (K, N):
        pytest.skip("--quick runs the smallest size")
    M = 64 if quick else TOKENS
    base = nn.Linear(K, N, device=DEVICE, dtype=DTYPE).requires_grad_(False)
    x, dy = (torch.randn(M, width, device=DEVICE).to(DTYPE) for width in (K, N))
    x.requires_grad_()
    lora_A, lora_B = torch.randn(R, K, device=DEVICE) / K**0.5, torch.randn(N, R, device=DEVICE) / N**0.5
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
        assert_all_accurate(results(layer, x, dy), truth, eager, precision=DTYPE)
        layer.train()
        step(layer, x, dy)

    providers = {name: lambda layer=layer: step(layer, x, dy) for name, layer in layers.items()}
    providers, unavailable = usable(providers, check)
    assert_mask_right(layers["adaptlora"], x)
    compare(
        f"{K}×{N}, dropout {p}",
        providers,
        floor="frozen linear",
        rounds=101,
        unavailable=unavailable,
        facts={"M": M, "R": R, "dtype": str(DTYPE), "GFLOP of the floor": round(4 * M * N * K / 1e9, 3)},
    )
