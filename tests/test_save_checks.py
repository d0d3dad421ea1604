"""What a save refuses to write over a good adapter, and what is believed of a folder that others have saved into."""

import json

import peft
import pytest
import torch
from models import Net, batch
from safetensors.torch import load_file, save_file
from test_save_faults import grown, nested, plain
from test_trainer_losses import DivergingTrainer, make
from training_loops import run_trainer

import adaptlora
from adaptlora.inspection import inspect_adapter


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def saved_by_peft(folder):
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=3, lora_alpha=7, target_modules=["first", "second"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"format": "nora"}], ids=str)
def test_weights_that_are_not_finite_are_not_written(options, value, tmp_path):
    config = adaptlora.NoRAConfig if options else adaptlora.LoraConfig
    adapter = adaptlora.attach(Net(), config(r=2, target_modules=["first"], modules_to_save=["classifier"]))
    adapter.save(tmp_path, **options)
    before = contents(tmp_path)
    places = [("first: lora_B", adapter.layers["first"].lora_B), ("classifier: bias", adapter.saved["classifier"].bias)]
    for where, tensor in places:
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor[(0,) * tensor.dim()] = value
        for folder in (tmp_path, tmp_path / "new"):
            with pytest.raises(adaptlora.NonFiniteError, match=f"save: {where} must be finite.* nothing was written"):
                adapter.save(folder, **options)
        assert contents(tmp_path) == before
        with torch.no_grad():
            tensor.copy_(kept)


def test_trainer_goes_on_without_an_adapter_whose_weights_are_not_finite(tmp_path):
    with pytest.warns(UserWarning) as warned:
        run_trainer(make(), tmp_path, kind=DivergingTrainer, save_strategy="steps", save_steps=1, save_total_limit=None)
    told = [str(w.message) for w in warned if "weights are not finite" in str(w.message)]
    assert len(told) == 1 and "checkpoint-2/adapter was written" in told[0]
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        adaptlora.check_checkpoint(folder)
        assert (folder / "adapter").exists() == (step == 1)


@pytest.mark.parametrize("spoil", ["nan", "float8"])
@pytest.mark.parametrize("kind", [plain, nested])
def test_numbers_and_dtypes_are_told_apart(kind, spoil, tmp_path):
    kind(0).save(tmp_path, **({"format": "nora"} if kind is nested else {}))
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_A" in key)
    tensors[key] = tensors[key] * float("nan") if spoil == "nan" else tensors[key].to(torch.float8_e4m3fn)
    save_file(tensors, file)
    got = {"nan": "NaN or infinity", "float8": "torch.float8_e4m3fn"}[spoil]
    with pytest.raises(ValueError, match=f"{file.name}: .*lora_A.* of 16 bits or more, got {got}"):
        adaptlora.load(Net(), tmp_path)


def test_what_stock_peft_saved_into_a_folder_of_noras_is_what_loads(tmp_path):
    nested(0).save(tmp_path, format="nora")
    theirs, (x, _) = saved_by_peft(tmp_path), batch()
    torch.testing.assert_close(adaptlora.load(Net(), tmp_path).model(x), theirs(x))


def test_a_history_beside_weights_that_do_not_know_it_is_nobodys(tmp_path):
    grown(0).save(tmp_path)
    assert inspect_adapter(tmp_path).history is not None
    saved_by_peft(tmp_path)
    found = inspect_adapter(tmp_path)
    assert found.history is None and [module.rank for module in found.modules] == [3, 3]


def test_alphas_give_the_scalings_back_to_the_bit(tmp_path):
    ranks = [r for r in range(1, 65) if (2.0 / (1.0 / r)) / r != 2.0]
    assert 49 in ranks
    for rank in ranks:
        config = adaptlora.LoraConfig(r=64, lora_alpha=16, target_modules=["0"])
        adapter = adaptlora.attach(torch.nn.Sequential(torch.nn.Linear(64, 64)), config)
        adapter.replace_factors({"0": (torch.randn(rank, 64), torch.randn(64, rank))}, {"0": 2.0})
        adapter.save(tmp_path)
        written = json.loads((tmp_path / "adapter_config.json").read_text())
        assert written["alpha_pattern"] == {"0": 2 * rank}
        again = adaptlora.load(torch.nn.Sequential(torch.nn.Linear(64, 64)), tmp_path)
        assert again.layers["0"].scaling == 2.0
