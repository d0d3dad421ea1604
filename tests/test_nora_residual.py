"""NoRALinear's residual: what becomes of the base weight, and how it comes back."""

import copy

import pytest
import torch
from test_lora_linear import BF16, FP32, FP64, SCALING
from test_nora_linear import R_OUT, K, N, R, leading, nested, outer_of, plain
from torch import nn

from adaptlora.nn import NoRALinear, Outer


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("keep", [True, False])
def test_residual_and_restore(kind, keep):
    base, x = plain(kind=kind), torch.randn(4, K, dtype=FP64)
    original, values, y = base.weight, base.weight.detach().clone(), base(x)
    layer = nested(base, keep_original=keep)
    torch.testing.assert_close(layer(x), y + SCALING * x @ leading(base).t())
    assert base.weight is original, "the constructor writes nothing"
    layer.apply_residual()
    layer.apply_residual()
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(layer.merged_weight(), values)
    assert torch.equal(original, values) and not base.weight.requires_grad
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"pair.lora_A", "pair.lora_B"}
    assert "_original" not in "".join(layer.state_dict())
    layer.restore_base()
    layer.restore_base()
    assert (base.weight is original) is keep
    torch.testing.assert_close(base.weight, values, rtol=0, atol=0 if keep else 1e-14)
    layer.apply_residual()
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16], ids=str)
def test_output_at_the_start_is_the_bases(backend, dtype):
    base, x = plain(dtype), torch.randn(50, K).to(dtype)
    weight, leading_part = base.weight.detach().double(), leading(base)
    exact = x.double() @ weight.t() + base.bias.double()
    layer = nested(base)
    layer.apply_residual()
    # Rounded once: to the dtype's half unit of every element, on top of the float32 factors' own.
    residual = weight - SCALING * leading_part
    unit = torch.finfo(dtype).eps / 2
    assert ((base.weight.double() - residual).abs() <= unit * residual.abs() + 2e-6).all()
    rounding = (base.weight.double() - residual).norm() / weight.norm()
    assert layer.rounding_error == pytest.approx(rounding.item() if dtype != FP32 else 0.0, rel=1e-3)
    allowed = layer.rounding_error * weight.norm() * x.double().norm() + (unit + 1e-6) * exact.norm()
    assert (layer(x).double() - exact).norm() <= allowed


def test_ties_are_left_alone_and_come_back():
    model = nn.ModuleDict({"embedding": nn.Embedding(N, K), "head": nn.Linear(K, N, bias=False)})
    tied = model["head"].weight = model["embedding"].weight
    values = tied.detach().clone()
    layer = model["head"] = nested(model["head"])
    layer.apply_residual()
    assert model["embedding"].weight is tied and torch.equal(tied, values) and layer.weight is not tied
    copied = copy.deepcopy(model)
    for module in (model, copied):
        module["head"].restore_base()
        assert module["head"].weight is module["embedding"].weight
        assert torch.equal(module["head"].weight, values)


@pytest.mark.parametrize("target", [FP32, "meta"], ids=str)
def test_the_original_follows_a_move(target):
    base = plain()
    original, values = base.weight, base.weight.detach().clone()
    layer = nested(base)
    layer.apply_residual()
    layer.to(target)
    layer.restore_base()
    assert (base.weight.dtype, base.weight.device) == (base.bias.dtype, base.bias.device)
    # torch itself gives a parameter that goes to "meta" another identity.
    assert target == "meta" or (base.weight is original and torch.equal(original, values.to(target)))


def test_outer_factors_need_not_be_orthonormal():
    """Of W diag(d) with d undone: U diag(S) Vh still approximates W, and the residual is exact."""
    base, x = plain(), torch.randn(4, K, dtype=FP64)
    d = torch.rand(K, dtype=FP64) + 0.1
    U, S, Vh = torch.linalg.svd(base.weight.detach() * d, full_matrices=False)
    outer, y = Outer(U[:, :R_OUT], S[:R_OUT], Vh[:R_OUT] / d), base(x)
    layer = NoRALinear(base, R, outer, scaling=SCALING)
    assert all(map(torch.equal, layer.outer, outer)) and layer.outer_A.is_contiguous() and layer.outer_B.is_contiguous()
    layer.apply_residual()
    torch.testing.assert_close(layer(x), y)


def test_an_overflow_changes_nothing():
    base = plain(torch.float16)
    outer = Outer(*(t.clone() for t in outer_of(base)))
    outer.S[0] = 1e9
    layer, held = NoRALinear(base, R, outer), base.weight
    with pytest.raises(
        ValueError, match="^NoRALinear: W − ΔW_0 must be finite in torch.float16, got an overflow or NaN"
    ):
        layer.apply_residual()
    assert base.weight is held and layer.rounding_error == 0
    layer.restore_base()
    assert base.weight is held


def test_a_zero_weight():
    base = plain()
    nn.init.zeros_(base.weight)
    layer = nested(base)
    layer.apply_residual()
    assert layer.rounding_error == 0 and not base.weight.any()


@pytest.mark.parametrize("keep", [True, False])
def test_taking_other_outer_factors(keep):
    base, x = plain(), torch.randn(4, K, dtype=FP64)
    values, first = base.weight.detach().clone(), outer_of(base)
    layer = nested(base, keep_original=keep).eval()
    layer.apply_residual()
    layer(x)
    held = base.weight
    layer.take_outer(first)
    assert base.weight is held, "the same ones"
    with pytest.raises(ValueError, match=r"^NoRALinear: outer.S must have shape \(7,\), got \(6,\)"):
        layer.take_outer(outer_of(plain(), R_OUT - 1))
    assert base.weight is held
    other = Outer(first.U, first.S * 2, first.Vh.flip(0))
    layer.take_outer(other)
    assert all(map(torch.equal, layer.outer, other))
    A_0, B_0 = layer.residual_factors()
    torch.testing.assert_close(base.weight, values - SCALING * B_0 @ A_0)
    A_eff, B_eff = layer.effective_factors()
    torch.testing.assert_close(layer(x), base(x) + SCALING * x @ A_eff.t() @ B_eff.t())
    layer.restore_base()
    torch.testing.assert_close(base.weight, values, rtol=0, atol=0 if keep else 1e-14)
