"""Trainer on models that are not transformers': running statistics, several epochs, uneven last batches, other schedulers."""

import json

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import adaptlora


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.2)
        self.second = nn.Linear(16, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x, labels=None):
        logits = self.head(self.second(self.dropout(self.norm(self.first(x)).relu())))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


FIELDS = {"lora_alpha": 4, "target_modules": ["first", "second"], "lora_dropout": 0.1}
CONFIGS = {
    "NormAL": adaptlora.NormALConfig(r=4, target_r=2, t_p=3, t_c=5, modules_to_save=["head"], **FIELDS),
    "La-LoRA": adaptlora.LaLoRAConfig(r=4, gamma=8.0, modules_to_save=["head"], **FIELDS),
    "NoRA": adaptlora.NoRAConfig(r=2, r_out=4, **FIELDS),
}


def train(config, folder, resume=None, **arguments):
    generator = torch.Generator().manual_seed(1)
    texts = [{"x": torch.randn(8, generator=generator), "labels": torch.tensor(i % 2)} for i in range(22)]
    model = Model()
    adapter = adaptlora.attach(model, config)
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,  # 11 batches an epoch: the last step of each has 3
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **options | arguments),
        train_dataset=texts,
        eval_dataset=texts,
        callbacks=[adapter.callback()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, adapter


@pytest.mark.parametrize("plateau", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_resuming_in_an_epoch_and_between_two(name, plateau, tmp_path):
    arguments = {}
    if plateau:
        arguments = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    trainer, whole = train(CONFIGS[name], tmp_path / "whole", **arguments)
    assert trainer.state.global_step == 9
    for step in (3, 4, 6):
        _, resumed = train(CONFIGS[name], tmp_path / f"{step}", tmp_path / f"whole/checkpoint-{step}", **arguments)
        assert resumed.ranks() == whole.ranks()
        mine, expected = resumed.model.state_dict(), whole.model.state_dict()
        assert mine.keys() == expected.keys() and all(torch.equal(mine[key], expected[key]) for key in mine)


def test_saving_the_model_after_the_training(tmp_path):
    trainer, adapter = train(CONFIGS["NormAL"], tmp_path)
    trainer.save_model(tmp_path / "final")
    assert (tmp_path / "final" / "model.safetensors").exists()
    state = adapter.model.state_dict(keep_vars=True)
    assert state["first.pair.lora_B"] is adapter.layers["first"].lora_B


def test_a_checkpoint_from_before_there_was_a_callback_is_refused(tmp_path):
    train(CONFIGS["NoRA"], tmp_path)
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    del state["stateful_callbacks"]["AdapterCallback"]
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="the checkpoint must hold the state of AdapterCallback"):
        train(CONFIGS["NoRA"], tmp_path / "other", tmp_path / "checkpoint-2")
