"""One adapter's life on every architecture: attached, trained, pruned, saved, read by stock PEFT, merged and taken off."""

import json

import peft
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, made, mixtral, outputs
from safetensors.torch import load_file

import adaptlora

CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0}
EXACT = {"atol": 1e-10, "rtol": 1e-10}


def trained(model, batch) -> adaptlora.Adapter:
    """NormAL's adapter after two steps: one with the penalty, and one after which it has clipped."""
    adapter = adaptlora.attach(model, adaptlora.NormALConfig(**CONFIG, target_r=2, t_p=1, t_c=2, eta_p=1e-2))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=2e-2)
    adapter.track(optimizer)
    for _ in range(2):
        loss = sum(tensor.sin().square().mean() for tensor in outputs(model, batch))
        (loss + adapter.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        change = adapter.step(loss)
    assert change is not None and change.step == 2
    return adapter


def through_peft(model, folder) -> torch.nn.Module:
    """The adapter of `folder` on a plain model, by stock PEFT; a model of diffusers is no PreTrainedModel."""
    if isinstance(model, transformers.PreTrainedModel):
        return peft.PeftModel.from_pretrained(model, folder).eval()
    config = peft.LoraConfig(**json.loads((folder / "adapter_config.json").read_text()))
    tensors = load_file(folder / "adapter_model.safetensors")
    peft.inject_adapter_in_model(config, model)
    result = peft.set_peft_model_state_dict(
        model, {key.removeprefix("base_model.model."): t for key, t in tensors.items()}
    )
    assert not result.unexpected_keys
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("build", ARCHITECTURES, ids=lambda build: build.__name__)
@pytest.mark.filterwarnings("ignore:attach. .* not adapted")
def test_one_life(build, tmp_path):
    model, batch = made(build)
    plain, weights = outputs(model, batch), {key: value.clone() for key, value in model.state_dict().items()}
    with torch.enable_grad():
        adapter = trained(model, batch)
    ranks = adapter.ranks()
    assert len(set(ranks.values())) > 1 and sum(ranks.values()) == 2 * len(ranks)
    expected = outputs(model, batch)
    assert len(expected) == len(plain)
    assert not any(torch.allclose(a, b, **EXACT) for a, b in zip(expected, plain, strict=True))

    adapter.save(tmp_path)
    torch.testing.assert_close(outputs(through_peft(made(build)[0], tmp_path), batch), expected, **EXACT)
    again = adaptlora.load(made(build)[0], tmp_path)
    assert again.ranks() == ranks
    torch.testing.assert_close(outputs(again.model, batch), expected, **EXACT)

    torch.testing.assert_close(outputs(adapter.merge(), batch), expected, **EXACT)
    adapter.unmerge()
    torch.testing.assert_close(outputs(model, batch), expected, atol=0, rtol=0)
    adapter.detach()
    torch.testing.assert_close(outputs(model, batch), plain, atol=0, rtol=0)
    torch.testing.assert_close(dict(model.state_dict()), weights, atol=0, rtol=0)


def test_stacked_experts_are_reported():
    """A mixture's experts are parameters of three dimensions, and nothing that names linear layers can mean them."""
    model, _ = made(mixtral)
    stacked = r'"all-linear" means linear layers, and 4 stacked weights of experts \(.*gate_up_proj \(4, 96, 32\), …\) are not adapted'
    with pytest.warns(UserWarning, match=stacked) as told:
        adapter = adaptlora.attach(model, adaptlora.LoraConfig(**CONFIG))
    assert [warning.filename for warning in told] == [__file__]
    projections = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"]
    assert list(adapter.layers) == projections
    adapter.detach()
    with pytest.raises(
        ValueError, match=r"target_modules must name modules of the model, got 'gate_up_proj' \(a parameter\)"
    ):
        adaptlora.attach(model, adaptlora.LoraConfig(**CONFIG | {"target_modules": ["q_proj", "gate_up_proj"]}))
