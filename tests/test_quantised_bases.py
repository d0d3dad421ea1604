"""lora_delta_ on real quantised linears, on the CPU: against float64 with the weight that the base itself dequantises."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_all_accurate
from test_lora_delta import eager
from test_lora_linear import BF16, FP32, SCALING, SEED

from adaptlora.ops import lora_delta_

M, K, N, R = 37, 128, 72, 5
FACTORS = ("lora_A", "lora_B", "rank_scale")


def bitsandbytes_nf4(linear):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = bitsandbytes.nn.Linear4bit(K, N, compute_dtype=linear.weight.dtype, quant_type="nf4")
    base.load_state_dict(linear.state_dict())
    base = base.to("cpu")  # the move quantises
    assert base.weight.dtype == torch.uint8
    return base, bitsandbytes.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)


def bitsandbytes_int8(linear):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = bitsandbytes.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    base.load_state_dict(linear.state_dict())
    base.bias.data = linear.bias.data
    base = base.to("cpu")  # the move quantises
    assert base.weight.dtype == torch.int8
    return base, bitsandbytes.functional.int8_vectorwise_dequant(base.weight.data, base.weight.SCB)


def torchao(linear, config):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    holder = torch.nn.Sequential(linear)
    quantization.quantize_(holder, config(quantization))
    assert type(holder[0].weight) is not torch.nn.Parameter
    return holder[0], holder[0].weight.dequantize()


def torchao_int8(linear):
    return torchao(linear, lambda quantization: quantization.Int8WeightOnlyConfig())


def torchao_int4(linear):
    """Groups of 32 along K. Of torchao's int4 weights this is the one that runs, and has gradients, on a CPU."""

    def config(quantization):
        return quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=quantization.granularity.PerGroup(32)
        )

    return torchao(linear, config)


@pytest.fixture(params=[bitsandbytes_nf4, torchao_int8, torchao_int4], ids=lambda quantise: quantise.__name__)
def quantise(request):
    return request.param


def quantised(quantise, dtype):
    """(the frozen quantised base, the linear in float64 that it approximates)."""
    linear = torch.nn.Linear(K, N).to(dtype)
    bias = linear.bias.detach().double()
    base, weight = quantise(linear)
    weight = weight.detach().double()
    return base.requires_grad_(False), lambda x: F.linear(x, weight, bias)


def operands(dtype, factor_dtype) -> dict[str, torch.Tensor]:
    shapes = {"lora_A": (R, K), "lora_B": (N, R), "rank_scale": (R,)}
    made = {name: torch.randn(shape).to(factor_dtype) for name, shape in shapes.items()}
    return {"x": torch.randn(M, K).to(dtype), **made, "dy": torch.randn(M, N).to(dtype)}


def results(base, function, made: dict, p: float, *, double=False) -> dict[str, torch.Tensor]:
    made = {name: t.detach().to(torch.float64 if double else t.dtype) for name, t in made.items()}
    wanted = [made[name].requires_grad_() for name in ("x", *FACTORS)]
    x, lora_A, lora_B, rank_scale, dy = made.values()
    y = base(x)
    out = function(y, x, lora_A, lora_B, scaling=SCALING, rank_scale=rank_scale, dropout_p=p, seed=SEED)
    assert function is not lora_delta_ or out is y
    return dict(zip(("y", "dx", "dA", "dB", "dE"), (out.detach(), *torch.autograd.grad(out, wanted, dy)), strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "factor_dtype"), [(FP32, FP32), (BF16, BF16), (BF16, FP32)], ids=str)
def test_y_and_gradients(backend, quantise, dtype, factor_dtype, p):
    """What the base itself errs, forward and backward, is eager's error too."""
    base, exact_base = quantised(quantise, dtype)
    made = operands(dtype, factor_dtype)
    exact, theirs = results(exact_base, eager, made, p, double=True), results(base, eager, made, p)
    assert_all_accurate(results(base, lora_delta_, made, p), exact, theirs)


def test_the_base_is_only_read(backend, quantise):
    base, _ = quantised(quantise, FP32)
    x = torch.randn(M, K)
    before = base(x)
    results(base, lora_delta_, operands(FP32, FP32), 0.3)
    assert torch.equal(base(x), before)


def test_three_dimensions(backend, quantise):
    """bitsandbytes makes such a y a view that torch lets nobody change while it records gradients: refused, and said."""
    base, _ = quantised(quantise, FP32)
    made = operands(FP32, FP32)
    x, lora_A, lora_B, *_ = made.values()
    lora_A.requires_grad_()
    flat = lora_delta_(base(x.clone().requires_grad_()), x, lora_A, lora_B)
    x = x[:36].reshape(4, 9, K).requires_grad_()
    y = base(x)
    if quantise is bitsandbytes_nf4:
        with pytest.raises(
            ValueError, match=r"^lora_delta_: y must not be a view .* IN_CUSTOM_FUNCTION: give y.clone\(\)"
        ):
            lora_delta_(y, x, lora_A, lora_B)
        y = y.clone()
    assert lora_delta_(y, x, lora_A, lora_B) is y
    torch.testing.assert_close(y.flatten(0, 1), flat[:36])
    y.sum().backward()
    assert x.grad.shape == x.shape and lora_A.grad.shape == lora_A.shape
