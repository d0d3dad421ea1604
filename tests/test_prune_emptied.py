"""What prune and delete_adapter leave of PEFT's layers, and modules whose update is 0."""

import pytest
import torch
from torch import nn

import adaptlora
from adaptlora import DropConfig, SVDConfig

peft = pytest.importorskip("peft")


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()))


def model(targets=("first", "second"), **options):
    torch.manual_seed(0)
    adapted = peft.get_peft_model(Two(), peft.LoraConfig(r=4, target_modules=list(targets), **options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return adapted


X = torch.linspace(-1, 1, 12).view(2, 6)


def test_from_peft_of_layers_that_lost_their_adapter():
    adapted = model(("first",))
    adapted.add_adapter("other", peft.LoraConfig(r=2, target_modules=["second"], modules_to_save=["head"]))
    adapted.delete_adapter("other")
    adapted.set_adapter("default")
    before = adapted(X)
    adapter = adaptlora.from_peft(adapted)
    assert list(adapter.layers) == ["first"]
    assert type(adapter.model.second) is nn.Linear and type(adapter.model.head) is nn.Linear
    torch.testing.assert_close(adapter.model(X), before)


def test_svd_of_a_zero_update_goes_on_training():
    adapted = model()
    layer = adapted.base_model.model.second
    nn.init.zeros_(layer.lora_B["default"].weight)
    first = layer.lora_A["default"].weight.detach()[:1].clone()
    adaptlora.prune(adapted, SVDConfig(rank=2))
    assert torch.equal(layer.lora_A["default"].weight, first) and not layer.lora_B["default"].weight.any()
    adapted(X).sum().backward()
    assert layer.lora_B["default"].weight.grad.any()


def test_a_module_pruned_away_leaves_lists_that_peft_can_join():
    adapted = model(alpha_pattern={"second": 3.0})
    adapted.add_adapter("other", peft.LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
    adapted.set_adapter("other")
    other = adapted(X)
    adapted.set_adapter("default")
    adaptlora.prune(adapted, DropConfig("module", ratio=0.5))
    (left,) = adapted.peft_config["default"].target_modules
    assert left in ("first", "second")
    adapted.set_adapter("other")
    assert torch.equal(adapted(X), other)
    adapted.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="cat")


def test_from_peft_after_a_module_was_pruned_away():
    adapted = model()
    adaptlora.prune(adapted, DropConfig("module", ratio=0.5))
    before = adapted(X)
    adapter = adaptlora.from_peft(adapted)
    assert len(adapter.layers) == 1
    torch.testing.assert_close(adapter.model(X), before)


@pytest.mark.parametrize("scaling", [0.0, -1.0, float("nan")])
def test_scalings_that_no_alpha_gives_are_refused(scaling):
    adapted = model()
    adapted.base_model.model.second.scaling["default"] = scaling
    with pytest.raises(ValueError, match="second must have a finite scaling > 0"):
        adaptlora.prune(adapted, target_r=2)
    assert adapted.base_model.model.first.r["default"] == 4


def test_a_scaling_may_be_a_tensor():
    adapted = model()
    layer = adapted.base_model.model.second
    layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    adaptlora.prune(adapted, target_r=2)
    assert layer.scaling["default"] == 2.0


def test_other_holders_of_adapters_are_refused():
    injected = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["first"]), Two())
    mixed = peft.get_peft_model(Two(), peft.LoraConfig(target_modules=["first"]), mixed=True)
    for other in (injected, mixed):
        with pytest.raises(TypeError, match="must be a PeftModel"):
            adaptlora.prune(other, target_r=2)
        with pytest.raises(TypeError, match="must be a PeftModel"):
            adaptlora.from_peft(other)


def test_a_scale_of_a_moment_is_refused():
    """It would be saved as the adapter's own, or be lost."""
    adapted = model()
    before = [p.clone() for p in adapted.parameters()]
    refused = pytest.raises(ValueError, match=r"first must have the scaling that save_pretrained saves, 2.0, got 1.0")
    with peft.helpers.rescale_adapter_scale(adapted, 0.5), refused:
        adaptlora.prune(adapted, target_r=2)
    assert all(map(torch.equal, adapted.parameters(), before))
    adaptlora.prune(adapted, target_r=2)


def test_what_is_pruned_in_inference_mode_trains_on():
    adapted = model()
    with torch.inference_mode():
        adaptlora.prune(adapted, SVDConfig(rank=2))
    adapted(X).sum().backward()
    assert adapted.base_model.model.first.lora_A["default"].weight.grad.shape == (2, 6)


def test_layers_as_a_range():
    config = peft.LoraConfig(target_modules=["q"], layers_to_transform=range(2))
    assert adaptlora.LoraConfig.from_peft(config).layers_to_transform == [0, 1]
