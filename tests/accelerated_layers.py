"""One linear layer under PEFT's LoRA, accelerated or not, and its results beside those of PEFT's own layer in float64."""

import copy
import warnings

import peft
import torch
from numerics import assert_all_accurate
from test_quantised_bases import bitsandbytes_int8, bitsandbytes_nf4, torchao_int4, torchao_int8
from torch import nn

import adaptlora
from adaptlora.integrations import peft_layers
from adaptlora.nn import dequantised_weight

M, K, N, R = 37, 128, 72, 5  # test_quantised_bases' K and N
QUANTISERS = [bitsandbytes_nf4, bitsandbytes_int8, torchao_int8, torchao_int4]


class Holder(nn.Module):
    """A model of one linear layer."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


def linear_model(dtype=torch.float32, bias=True) -> Holder:
    return Holder(nn.Linear(K, N, bias=bias, dtype=dtype))


def conv1d_model(dtype=torch.float32) -> Holder:
    from transformers.pytorch_utils import Conv1D

    return Holder(Conv1D(N, K).to(dtype))


def quantised_model(quantise, dtype=torch.float32) -> Holder:
    model = Holder(quantise(nn.Linear(K, N).to(dtype))[0])
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = quantise is bitsandbytes_nf4, quantise is bitsandbytes_int8
    return model


def with_lora(model: nn.Module, *, adapters=("default",), autocast_adapter_dtype=True, **options):
    """A PeftModel of which all `adapters` are active, with ranks R, R + 1, … and scalings that differ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says of torchao's layers and of bias="all"
        for i, name in enumerate(adapters):
            given = {"r": R + i, "lora_alpha": 7 + i, "init_lora_weights": False, **options}
            config = peft.LoraConfig(target_modules=["linear"], **given)
            if i == 0:
                how = {"adapter_name": name, "autocast_adapter_dtype": autocast_adapter_dtype}
                model = peft.get_peft_model(model, config, **how)
            else:
                model.add_adapter(name, config, autocast_adapter_dtype=autocast_adapter_dtype)
        if len(adapters) > 1:
            model.base_model.set_adapter(list(adapters))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # a bias starts at zero
                parameter.copy_(torch.randn_like(parameter) / 4)
    return model


def layer_of(model):
    return model.get_base_model().linear


def exact_copy(model):
    """PEFT's own layer in float64, over the values that a quantised base has."""
    model = copy.deepcopy(model)
    adaptlora.restore(model)
    layer = layer_of(model)
    base = layer.base_layer
    if adaptlora.nn.is_quantised(base):
        plain = nn.Linear(K, N, dtype=torch.float64).requires_grad_(False)
        with torch.no_grad():
            plain.weight.copy_(dequantised_weight(base))
            plain.bias.copy_(base.bias)
        layer.base_layer = plain
    return model.double()


def results(model, x, dy, autocast=None) -> dict[str, torch.Tensor]:
    """y, dx and the gradient of every parameter that has one."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x)
    y.backward(dy.to(y.dtype))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **grads}


def assert_as_peft(model, x, *, precision=None, autocast=None) -> None:
    """An accelerated model's results are no less accurate than those of PEFT's own layer."""
    dy = torch.randn(*x.shape[:-1], N).to(x.dtype)
    theirs = copy.deepcopy(model)
    adaptlora.restore(theirs)
    exact = results(exact_copy(model), x.double(), dy.double())
    ours, eager = results(model, x, dy, autocast), results(theirs, x, dy, autocast)
    assert_all_accurate(ours, exact, eager, precision=precision)


class Calls:
    """Counts the ops that accelerated layers call."""

    def __init__(self, monkeypatch):
        self.made = []
        for name in ("lora_linear", "lora_delta_"):
            monkeypatch.setattr(peft_layers, name, self._counted(name, getattr(peft_layers, name)))

    def _counted(self, name, op):
        def counted(*args, **kwargs):
            self.made.append(name)
            return op(*args, **kwargs)

        return counted

    def take(self) -> list[str]:
        """Names of the ops called since the last time."""
        made, self.made = self.made, []
        return made
