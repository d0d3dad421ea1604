"""Optimizers by Trainer's names, through rank changes and a resumption."""

import pytest
import torch
from models import tiny_bert
from torch.optim.lr_scheduler import LambdaLR
from training_loops import STEPS, examples, run_trainer
from transformers import Trainer, TrainingArguments

import adaptlora

METHODS = {
    "NormAL": adaptlora.NormALConfig(r=4, target_r=2, target_modules="all-linear", t_p=2, t_c=3, eta_p=0.02),
    "La-LoRA": adaptlora.LaLoRAConfig(r=6, target_modules="all-linear", gamma=1e3, temperature=10.0),
}
# With learning rates at which norms, and so La-LoRA's ranks, change within six steps
OPTIMIZERS = {
    "adamw_torch": 1e-2,
    "adamw_torch_fused": 1e-2,
    "sgd": 5.0,
    "adafactor": 1e-1,
    "adamw_bnb_8bit": 1e-2,
    "adagrad": 1e-1,
    "rmsprop": 1e-1,
}


def make(method, dtype=torch.float32):
    return adaptlora.attach(tiny_bert().to(dtype), METHODS[method])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_resuming_after_rank_changes_equals_an_uninterrupted_run(optim, method, tmp_path):
    whole, resumed = make(method), make(method)
    start = whole.ranks()
    options = {
        "weight_decay": 0.0,
        "optim": optim,
        "learning_rate": OPTIMIZERS[optim],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
    }
    run_trainer(whole, tmp_path, save_strategy="steps", save_steps=4, **options)
    run_trainer(resumed, tmp_path / "again", resume=tmp_path / "checkpoint-4", **options)
    assert resumed.ranks() == whole.ranks()
    assert whole.ranks() != start if method == "NormAL" else whole.method.changes  # they may be back by the end
    assert resumed.method.state_dict() == whole.method.state_dict()
    for mine, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert mine.isfinite().all() and torch.equal(mine, expected)


@pytest.mark.parametrize("method", METHODS)
def test_lora_plus(method, tmp_path):
    """Two learning rates, and a scheduler of one's own: both are as they were after the ranks changed."""
    adapter = make(method)
    groups = [
        {"params": [layer.lora_A for layer in adapter.layers.values()], "lr": 1e-3},
        {"params": [layer.lora_B for layer in adapter.layers.values()], "lr": 16e-3},
    ]
    optimizer = torch.optim.AdamW(groups)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_strategy="no"
    )
    start = adapter.ranks()
    Trainer(
        adapter.model,
        arguments,
        train_dataset=examples(4 * STEPS),
        optimizers=(optimizer, schedule),
        callbacks=[adapter.callback()],
    ).train()
    assert adapter.ranks() != start and schedule.last_epoch == STEPS
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3 / 7, 16e-3 / 7])
    kept = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert kept == {id(p) for p in adapter.factors()}
    for factor in adapter.factors():
        assert optimizer.state[factor]["exp_avg"].shape == factor.shape
