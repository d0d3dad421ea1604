"""channels_last models and activations that are permuted: the results and gradients of contiguous ones."""

import copy

import pytest
import torch
from models import randomise
from torch import nn

import adaptlora
from adaptlora.nn import LoraGroup, LoraLinear


class ConvNet(nn.Module):
    """A convolution, a linear layer over each pixel's channels (NHWC, not contiguous), and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.mix = nn.Linear(8, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.mix(torch.relu(self.stem(x)).permute(0, 2, 3, 1))
        return self.head(torch.relu(x).mean((1, 2)))


CONFIGS = {
    "LoRA": adaptlora.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.3, target_modules="all-linear"),
    "La-LoRA": adaptlora.LaLoRAConfig(
        r=4, lora_alpha=6, gamma=4.0, group_by="module", lora_dropout=0.3, target_modules="all-linear"
    ),
    "NoRA": adaptlora.NoRAConfig(r=2, r_out=3, lora_alpha=4, target_modules="all-linear"),
}


def images(channels_last: bool) -> torch.Tensor:
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(1))
    return x.to(memory_format=torch.channels_last) if channels_last else x


def gradients(model, adapter, x) -> list[torch.Tensor]:
    torch.manual_seed(4)
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().mean(), adapter.factors())]


def parked_and_active(adapter) -> list[torch.Tensor]:
    return [side.clone() for layer in adapter.layers.values() for side in layer.pair.whole()]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_channels_last_model(config, backend):
    """model.to(memory_format=…) after attach moves no factor and loses no parked vector; a convolution's sums may be in another order."""
    model = ConvNet()
    adapter = adaptlora.attach(model, config)
    randomise(adapter)
    expected = gradients(model, adapter, images(False))
    before = parked_and_active(adapter)
    assert adapter.method.parks == any(layer.pair.capacity > layer.rank for layer in adapter.layers.values())
    model.to(memory_format=torch.channels_last)
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(parked_and_active(adapter), before, atol=0, rtol=0)
    for channels_last in (True, False):
        torch.testing.assert_close(gradients(model, adapter, images(channels_last)), expected)


def test_training_goes_on_in_channels_last():
    """Ranks change before and after the move, and parked vectors come back as they left: as in the model that was not moved."""
    results = []
    for moved in (False, True):
        model = ConvNet()
        adapter = adaptlora.attach(model, CONFIGS["La-LoRA"])
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        adapter.track(optimizer)
        torch.manual_seed(2)
        ranks = []
        for step in range(8):
            if moved and step == 4:
                model.to(memory_format=torch.channels_last)
            loss = model(images(moved and step >= 4)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            adapter.step(loss)
            ranks.append(adapter.ranks())
        results.append((ranks, parked_and_active(adapter), [layer.pair.parked() for layer in adapter.layers.values()]))
    (ranks, vectors, parked), (moved_ranks, moved_vectors, moved_parked) = results
    assert ranks == moved_ranks and len({str(r) for r in ranks}) > 2
    torch.testing.assert_close(moved_vectors, vectors)
    torch.testing.assert_close(moved_parked, parked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_permuted_activations(grouped, dtype, backend):
    """x (b, h, w, c) of a channels_last or an NCHW tensor: y, dx and the factors' gradients of the contiguous x."""
    torch.manual_seed(0)
    layers = [LoraLinear(nn.Linear(8, 6, dtype=dtype), 3, dropout_p=0.3) for _ in range(2)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    module = LoraGroup(layers) if grouped else layers[0]

    def run(x):
        x = x.detach().requires_grad_()
        torch.manual_seed(3)
        y = sum(module(x.permute(0, 2, 3, 1))) if grouped else module(x.permute(0, 2, 3, 1))
        parameters = [p for p in module.parameters() if p.requires_grad]
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
        return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)]

    nchw = torch.randn(2, 8, 5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain = nchw.permute(0, 2, 3, 1).contiguous()
    expected = run(plain.permute(0, 3, 1, 2))
    assert not nchw.permute(0, 2, 3, 1).is_contiguous()
    for x in (nchw, nchw.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(run(x), expected)


def test_a_copy_in_channels_last_keeps_what_is_parked():
    model = ConvNet()
    adapter = adaptlora.attach(model, CONFIGS["La-LoRA"])
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for name, layer in adapter.layers.items():
        pair = twin.get_submodule(name).pair
        layer.pair.grow(4)
        pair.grow(4)
        torch.testing.assert_close([pair.lora_A, pair.lora_B], [layer.lora_A, layer.lora_B], atol=0, rtol=0)
