"""Layers of PEFT's LoRA computed by this package's ops: y and every gradient against PEFT's own layer in float64."""

import copy

import pytest
import torch
from accelerated_layers import (
    QUANTISERS,
    Calls,
    K,
    M,
    N,
    assert_as_peft,
    conv1d_model,
    exact_copy,
    layer_of,
    linear_model,
    quantised_model,
    results,
    with_lora,
)
from test_quantised_bases import bitsandbytes_int8

import adaptlora

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TWO = ("first", "second")


def accelerated(model, **options):
    model = with_lora(model, **options)
    assert adaptlora.accelerate(model) == adaptlora.Acceleration(("linear",), {})
    return model


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(FP32, (M,)), (FP32, ()), (FP32, (2, 0)), (BF16, (3, 9)), (FP16, (3, 9)), (FP64, (2, 3, 4))],
    ids=str,
)
@pytest.mark.parametrize("make", [linear_model, conv1d_model], ids=lambda make: make.__name__)
def test_plain_bases(backend, calls, make, dtype, shape):
    model = accelerated(make(dtype))
    assert_as_peft(model, torch.randn(*shape, K).to(dtype))
    assert calls.take() == ["lora_linear"]


@pytest.mark.parametrize("options", [{"bias": False}, {"bias": True}], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_factors_of_the_base_s_dtype(backend, calls, dtype, options):
    model = accelerated(linear_model(dtype, **options), autocast_adapter_dtype=False)
    assert layer_of(model).lora_A["default"].weight.dtype == dtype
    assert_as_peft(model, torch.randn(M, K).to(dtype))
    assert calls.take() == ["lora_linear"]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("make", [linear_model, conv1d_model], ids=lambda make: make.__name__)
def test_several_active_adapters(backend, calls, make, dtype):
    model = accelerated(make(dtype), adapters=("first", "second", "third"))
    assert_as_peft(model, torch.randn(2, 9, K).to(dtype))
    assert calls.take() == ["lora_delta_"] * 3


@pytest.mark.parametrize("adapters", [("default",), TWO], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_lora_bias(backend, calls, dtype, adapters):
    model = accelerated(linear_model(dtype), adapters=adapters, lora_bias=True)
    assert_as_peft(model, torch.randn(2, 9, K).to(dtype))
    assert len(calls.take()) == len(adapters)


@pytest.mark.parametrize("adapters", [("default",), TWO], ids=str)
@pytest.mark.parametrize(("dtype", "shape"), [(FP32, (3, 9)), (FP32, ()), (BF16, (M,))], ids=str)
@pytest.mark.parametrize("quantise", QUANTISERS, ids=lambda quantise: quantise.__name__)
def test_quantised_bases(backend, calls, quantise, dtype, shape, adapters):
    model = accelerated(quantised_model(quantise, dtype), adapters=adapters)
    assert_as_peft(model, torch.randn(*shape, K).to(dtype))
    assert calls.take() == ["lora_delta_"] * len(adapters)


@pytest.mark.parametrize("make", [linear_model, conv1d_model], ids=lambda make: make.__name__)
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_base_whose_bias_learns(backend, calls, make, bias):
    model = accelerated(make(), bias=bias)
    assert_as_peft(model, torch.randn(2, 9, K))
    assert calls.take() == ["lora_delta_"]
    with torch.no_grad():
        model(torch.randn(M, K))
    assert calls.take() == ["lora_linear"]


def test_a_base_that_learns(backend, calls):
    model = accelerated(linear_model())
    layer_of(model).base_layer.weight.requires_grad_(True)
    assert_as_peft(model, torch.randn(2, 9, K))
    assert calls.take() == ["lora_delta_"]


@pytest.mark.parametrize("x_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("autocast", [BF16, FP16], ids=str)
@pytest.mark.parametrize("make", [linear_model, conv1d_model], ids=lambda make: make.__name__)
def test_autocast(backend, calls, make, autocast, x_dtype):
    model = accelerated(make())
    assert_as_peft(model, torch.randn(2, 9, K).to(x_dtype), autocast=autocast, precision=autocast)
    assert calls.take() == ["lora_linear"]


@pytest.mark.parametrize("quantise", QUANTISERS, ids=lambda quantise: quantise.__name__)
def test_autocast_of_quantised_bases(calls, quantise):
    model = accelerated(quantised_model(quantise))
    assert_as_peft(model, torch.randn(2, 9, K), autocast=BF16, precision=BF16)
    assert calls.take() == ["lora_delta_"]


@pytest.mark.parametrize(("x_dtype", "y_dtype"), [(FP32, BF16), (BF16, FP32), (BF16, FP16)], ids=str)
def test_a_base_that_returns_another_dtype(calls, x_dtype, y_dtype):
    """y has the dtype of the base's result, and no operand loses digits on the way."""
    model = with_lora(linear_model(x_dtype), autocast_adapter_dtype=False)
    layer_of(model).base_layer.register_forward_hook(lambda module, args, y: y.to(y_dtype))
    adaptlora.accelerate(model)
    exact = exact_copy(model)
    layer_of(exact).base_layer._forward_hooks.clear()
    x, dy = torch.randn(M, K).to(x_dtype), torch.randn(M, N).to(y_dtype)
    theirs = copy.deepcopy(model)
    adaptlora.restore(theirs)
    ours, eager = results(model, x, dy), results(theirs, x, dy)
    assert calls.take() == ["lora_delta_"]
    assert ours["y"].dtype == eager["y"].dtype == y_dtype
    for name, wanted in results(exact, x.double(), dy.double()).items():
        torch.testing.assert_close(ours[name].double(), wanted, rtol=2**-5, atol=2**-5, msg=name)


@pytest.mark.parametrize("scale", [0.0, 0.3, torch.tensor(0.7)], ids=str)
@pytest.mark.parametrize("make", [linear_model, lambda: quantised_model(QUANTISERS[0])], ids=["plain", "quantised"])
def test_scalings(backend, calls, make, scale):
    model = accelerated(make())
    layer_of(model).set_scale("default", scale)
    assert_as_peft(model, torch.randn(M, K))
    assert len(calls.take()) == 1


def test_a_scaling_that_learns(backend, calls):
    model, x, dy = accelerated(linear_model()), torch.randn(M, K), torch.randn(M, N)
    layer = layer_of(model)
    gradients = []
    for layer_of_call in (layer, layer_of(exact_copy(model))):
        scaling = torch.tensor(0.7, dtype=layer_of_call.base_layer.weight.dtype, requires_grad=True)
        layer_of_call.scaling["default"] = scaling
        layer_of_call(x.to(scaling.dtype)).backward(dy.to(scaling.dtype))
        gradients.append(scaling.grad.double())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=0)
    assert calls.take() == ["lora_linear"]


def test_rank_zero(backend, calls):
    model = accelerated(linear_model())
    layer, x = layer_of(model), torch.randn(2, 9, K)
    for part, shape in ((layer.lora_A, (0, K)), (layer.lora_B, (N, 0))):
        part["default"].weight = torch.nn.Parameter(torch.zeros(shape))
    assert torch.equal(model(x), layer.base_layer(x))
    assert calls.take() == ["lora_linear"]


@pytest.mark.parametrize("make", [linear_model, lambda: quantised_model(bitsandbytes_int8)], ids=["plain", "int8"])
def test_inference_mode(calls, make):
    model = accelerated(make(), adapters=TWO)
    x = torch.randn(2, 9, K)
    with torch.no_grad():
        expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    assert len(calls.take()) == 4
    model(x).sum().backward()


@pytest.mark.parametrize("make", [linear_model, lambda: quantised_model(QUANTISERS[0])], ids=["plain", "quantised"])
@pytest.mark.parametrize("adapters", [("default",), TWO], ids=str)
def test_dropout(backend, calls, make, adapters):
    """Elements are kept with probability 1 − p, divided by it, by masks that differ between adapters; evaluation drops none."""
    p, tokens = 0.3, 400
    model = accelerated(make(), adapters=adapters, lora_dropout=p, r=K)
    layer = layer_of(model).train()
    with torch.no_grad():
        for adapter in adapters:  # scaling · A Bᵀ takes column n of x to column n of y
            layer.lora_A[adapter].weight.copy_(torch.eye(K))
            layer.lora_B[adapter].weight.copy_(torch.eye(N, K) / layer.scaling[adapter])
        x = torch.ones(tokens, K)
        # base(x) is around 1: what is subtracted loses few digits.
        seen = layer(x) - layer.base_layer(x)
        again = layer(x) - layer.base_layer(x)
    kept = seen * (1 - p)
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-4)
    count = len(adapters)
    assert kept.round().min() >= 0 and kept.round().max() == count
    shares = torch.bincount(kept.round().long().flatten(), minlength=count + 1) / kept.numel()
    expected = {1: [p, 1 - p], 2: [p**2, 2 * p * (1 - p), (1 - p) ** 2]}[count]
    torch.testing.assert_close(shares, torch.tensor(expected), rtol=0, atol=0.02)
    assert not torch.equal(seen, again)
    assert len(calls.take()) == 2 * count
    layer.eval()
    assert_as_peft(model, torch.randn(2, 9, K))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_follows_torch_s_generator(calls, use_reentrant):
    """The same masks from the same state, so that checkpointing's second forward pass has those of the first."""
    from torch.utils.checkpoint import checkpoint

    model = accelerated(linear_model(), lora_dropout=0.4).train()
    x, dy = torch.randn(M, K), torch.randn(M, N)
    torch.manual_seed(1)
    expected = results(model, x, dy)
    torch.manual_seed(1)
    found = results(model, x, dy)
    torch.manual_seed(1)
    run = copy.copy(model)
    run.forward = lambda x: checkpoint(model, x, use_reentrant=use_reentrant)
    checkpointed = results(run, x, dy)
    for name, value in expected.items():
        assert torch.equal(found[name], value) and torch.equal(checkpointed[name], value), name
