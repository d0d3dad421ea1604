"""A checkpoint and an adapter of another configuration: it is refused, or the run goes on as it would have, bit for bit."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from models import Net, batch, tiny_bert
from torch import nn

import adaptlora
from adaptlora.checkpoint_files import LOOP, write_manifest
from adaptlora.config_state import check_config_state, config_state
from adaptlora.methods import Method

MODULES = {"target_modules": ["first", "second"]}
# {method: its configuration, and other values of its own fields}
METHODS = {
    "lora": (adaptlora.LoraConfig(r=4, **MODULES), {}),
    "pissa": (adaptlora.LoraConfig(r=4, init_lora_weights="pissa", **MODULES), {"init_lora_weights": "milora"}),
    "normal": (
        adaptlora.NormALConfig(r=4, t_p=4, t_c=5, target_r=2, eta_p=0.1, **MODULES),
        {
            "penalty": "cube", "penalty_step": "proximal", "eta_p": 0.2, "penalty_mean": True, "t_p": 3, "t_c": 6, "target_r": 3,
            "rescale": True,
        },
    ),
    "adaptive": (
        adaptlora.NormALConfig(r=4, min_steps=4, max_steps=5, threshold=0.9, **MODULES),
        {"min_steps": 5, "max_steps": 6, "lambda_p": 9.0, "lambda_c": 9.0, "ema": 0.1, "threshold": 0.1, "first_below": True},
    ),
    "lalora": (
        adaptlora.LaLoRAConfig(r=6, gamma=60.0, group_by="module", contribution="fisher", ema=0.5, **MODULES),
        {
            "gamma": 1.0, "interval": 2, "group_by": "block", "temperature": 9.0, "fidelity": "previous", "growth": "own",
            "contribution": "norm", "ema": 0.1,
        },
    ),
    "adalora": (
        adaptlora.AdaLoRAConfig(init_r=6, target_r=2, tinit=1, tfinal=1, total_step=8, **MODULES),
        {
            "init_r": 5, "target_r": 3, "tinit": 2, "tfinal": 2, "deltaT": 2, "beta1": 0.5, "beta2": 0.5, "orth_reg_weight": 0.1,
            "removal": "update", "total_step": 9,
        },
    ),
    "dylora": (adaptlora.DyLoRAConfig(r=6, **MODULES), {"r_min": 3, "frozen": True, "rescale": False}),
    "nora": (
        adaptlora.NoRAConfig(r=4, r_out=8, outer="activation", **MODULES),
        {"r_out": 7, "inner_init": "kaiming", "residual": False, "outer": "weight", "activation_power": 2.0},
    ),
}  # fmt: skip
SHARED = {
    "r": 8, "lora_alpha": 3.0, "lora_dropout": 0.5, "target_modules": "first|second", "exclude_modules": ["other"], "modules_to_save": [],
    "rank_pattern": {"first": 5}, "alpha_pattern": {"first": 2.0}, "use_rslora": True, "lora_bias": True, "init_lora_weights": "milora",
    "layers_to_transform": [], "layers_pattern": [], "freeze_A": True, "keep_original": False, "seed": 1,
}  # fmt: skip
SAVED_AT, STEPS = 3, 8


class Loop:
    def __init__(self, config):
        calibration = batch()[0] if getattr(config, "outer", None) == "activation" else None
        self.adapter = adaptlora.attach(Net(), config, calibration=calibration)
        self.optimizer = torch.optim.SGD(self.adapter.model.parameters(), lr=0.1, momentum=0.9)
        self.adapter.track(self.optimizer)

    def run(self, begin, end):
        x, labels = batch()
        for step in range(begin, end):
            loss = nn.functional.cross_entropy(self.adapter.model(x + 0.01 * step), labels)
            (loss + self.adapter.penalty()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.adapter.step(loss)

    def values(self):
        return [p.detach().clone() for p in self.adapter.model.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_another_configuration_is_refused_or_of_no_consequence(method, tmp_path):
    config, own = METHODS[method]
    first = Loop(config)
    torch.manual_seed(0)
    first.run(0, SAVED_AT)
    path = adaptlora.save_checkpoint(tmp_path, first.adapter, first.optimizer, step=SAVED_AT)
    first.run(SAVED_AT, STEPS)
    tried = set()
    for field, value in (SHARED | own).items():
        try:
            other = Loop(dataclasses.replace(config, **{field: value} | ({"r": None} if field == "init_r" else {})))
        except ValueError:  # not a value for this method
            continue
        before = other.values()
        tried.add(field)
        try:
            adaptlora.load_checkpoint(path, other.adapter, other.optimizer)
        except ValueError as error:
            assert str(error).startswith("load_checkpoint: "), field
            if field in own:
                was, now = getattr(config, field), value
                assert f"config must be the one that was saved: {field} must be {was!r}, got {now!r}" in str(error)
            assert all(map(torch.equal, before, other.values())) and other.adapter.method.t == 0, field
        else:
            other.run(SAVED_AT, STEPS)
            assert all(map(torch.equal, first.values(), other.values())), f"{field} is not compared, and matters"
            assert field not in own or field in type(other.adapter.method).start_fields, field
    assert tried >= own.keys() | {"lora_dropout", "lora_alpha", "target_modules", "seed"}


def test_an_older_checkpoint_names_the_class_alone(tmp_path):
    loop = Loop(METHODS["normal"][0])
    path = adaptlora.save_checkpoint(tmp_path, loop.adapter, loop.optimizer, step=1)
    state = json.loads((path / "state.json").read_text())
    state["config"] = state["config"]["class"]
    (path / "state.json").write_text(json.dumps(state))
    write_manifest(path, LOOP, 1, ("state.json", "tensors.safetensors"))
    adaptlora.load_checkpoint(path, loop.adapter, loop.optimizer)
    with pytest.raises(ValueError, match="must be attached with a NormALConfig, got a LaLoRAConfig"):
        other = Loop(METHODS["lalora"][0])
        adaptlora.load_checkpoint(path, other.adapter, other.optimizer)


def test_trainers_callback_compares_too():
    config = adaptlora.NormALConfig(r=4, target_r=2, t_p=2, t_c=3, target_modules="all-linear")
    one, same, other = (
        adaptlora.attach(tiny_bert(), dataclasses.replace(config, **more)).callback()
        for more in ({}, {}, {"target_r": 3})
    )
    one.adapter.method.t = 1
    saved = {"AdapterCallback": json.loads(json.dumps(one.state()))}
    same._restore(saved)
    assert same.adapter.method.t == 1
    with pytest.raises(ValueError, match="Trainer: config must be the one that was saved: target_r must be 2, got 3"):
        other._restore(saved)
    assert other.adapter.method.t == 0
    del saved["AdapterCallback"]["attributes"]["config"]  # as it was before there was one
    other._restore(saved)


def test_fields_of_ones_own_that_json_cannot_hold_and_fields_that_came_later_are_left_out():
    @dataclasses.dataclass
    class OwnConfig(adaptlora.LoraConfig):
        chosen: object = len
        sizes: tuple = (1, 2)

    def adapter(**fields):
        return SimpleNamespace(config=OwnConfig(**MODULES, **fields), method=Method)

    stored = config_state(adapter())
    assert stored == {
        "class": "OwnConfig",
        "fields": {"freeze_A": False, "lora_dropout": 0.0, "sizes": [1, 2], "use_rslora": False},
    }
    check_config_state(adapter(chosen=max, sizes=[1, 2]), stored)
    del stored["fields"]["freeze_A"]
    check_config_state(adapter(freeze_A=True), stored)
    with pytest.raises(ValueError, match=r"sizes must be \[1, 2\], got \[3\]"):
        check_config_state(adapter(sizes=(3,)), stored)
