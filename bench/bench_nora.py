"""A training step with NoRA, r_out = 256 and r = 16, beside plain LoRA of r = 16 and NoRA's serial form; float32, AdamW.

MiniLM: 8 texts of 64 tokens, 36 modules. SmolLM2-135M: 4 texts of 64 tokens, 210 modules. The serial form multiplies x by all four
factors: 6·M·r_out Σ (K + N) FLOPs more than the base, 120 G for SmolLM2 with M = 256 beside its 108.7 G. Composed, once for the step:
2 · 2·r·r_out Σ (K + N) = 5.0 G there, and 7.5 G as a LoRA of r = 16 has: predicted 1.05 of that LoRA's step, and 1.9 times faster than
the serial form.
"""

import pytest
import torch
import torch.nn.functional as F
from providers import load
from torch import nn

import adaptlora
from adaptlora.benchmarks.models import LINEARS, Ours, Trained, batch_for, frozen_step, shared_copy
from adaptlora.nn import NoRALinear

R, R_OUT, ALPHA = 16, 256, 16


class Serial(nn.Module):
    """The same factors one after the other, as the method is published."""

    def __init__(self, layer: NoRALinear):
        super().__init__()
        self.base, self.scaling = layer.base_layer, layer.scaling
        self.register_buffer("V", layer.outer.Vh)
        self.register_buffer("U", layer.outer.U.contiguous())
        self.lora_A = nn.Parameter(layer.lora_A.detach().clone())
        self.lora_B = nn.Parameter(layer.lora_B.detach().clone(memory_format=torch.contiguous_format))

    def forward(self, x):
        s = F.linear(F.linear(x, self.V), self.lora_A)
        return self.base(x) + self.scaling * F.linear(F.linear(s, self.lora_B), self.U)


def serial_copy(ours: Ours, model) -> Trained:
    layers = {}
    for name, layer in ours.adapter.layers.items():
        layers[name] = Serial(layer)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[name])
    trained = Trained(model, (p for layer in layers.values() for p in layer.parameters() if p.requires_grad))
    trained.layers = layers
    return trained


def gradients(trained, layers, batch) -> list[torch.Tensor]:
    trained.model.eval()
    trained.model(**batch).loss.backward()
    found = [getattr(layer, factor).grad.clone() for layer in layers.values() for factor in ("lora_A", "lora_B")]
    trained.optimizer.zero_grad()
    trained.model.train()
    return found


@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_step(compare, quick, name):
    if quick and name != "minilm":
        pytest.skip("--quick runs MiniLM alone")
    texts, tokens = {"minilm": (2, 16) if quick else (8, 64), "smollm2": (4, 64)}[name]
    model = load(name)
    batch = batch_for(name, texts, tokens)
    common = {"r": R, "lora_alpha": ALPHA, "target_modules": LINEARS[name]}
    nora = Ours(shared_copy(model), adaptlora.NoRAConfig(**common, r_out=R_OUT))
    plain = Ours(shared_copy(model), adaptlora.LoraConfig(**common))
    serial = serial_copy(nora, shared_copy(model))
    pairs = zip(gradients(nora, nora.adapter.layers, batch), gradients(serial, serial.layers, batch), strict=True)
    assert max((a - b).norm() / b.norm() for a, b in pairs) < 1e-3
    providers = {
        "frozen, forward and dx": frozen_step(model, batch),
        f"adaptlora LoRA, r = {R}": lambda: plain.step(batch),
        f"adaptlora NoRA, r = {R}, r_out = {R_OUT}": lambda: nora.step(batch),
        "NoRA in its serial form": lambda: serial.step(batch),
    }
    facts = {"texts": texts, "tokens": tokens, "modules": len(nora.adapter.layers)}
    compare(name, providers, floor=f"adaptlora LoRA, r = {R}", rounds=15 if name == "minilm" else 7, facts=facts)
