"""Trainer among several processes, started by accelerate launch and torchrun, trains as Trainer alone."""

import pytest
import torch
from models import tiny_bert
from processes import run
from training_loops import STEPS, examples
from transformers import Trainer, TrainingArguments

import adaptlora

CONFIGS = {
    "clip": lambda **fields: adaptlora.NormALConfig(r=4, target_r=2, t_p=3, t_c=4, eta_p=0.02, **fields),
    "adaptive": lambda **fields: adaptlora.NormALConfig(
        r=4, target_r=2, min_steps=2, lambda_p=10.0, lambda_c=10.0, **fields
    ),
    "lalora": lambda **fields: adaptlora.LaLoRAConfig(r=4, gamma=30.0, **fields),
}


def _trainer(kind, size, folder, accumulation=2, **arguments):
    fields = {"target_modules": "all-linear", "modules_to_save": ["classifier"]}
    adapter = adaptlora.attach(tiny_bert().double(), CONFIGS[kind](**fields))
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4 // accumulation // size,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.05,
        # BERT's loss takes num_items_in_batch and ignores it: Trainer then multiplies it by the number of processes.
        average_tokens_across_devices=False,
        train_sampling_strategy="sequential",
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        **{"save_strategy": "no"} | arguments,
    )
    return adapter, Trainer(adapter.model, arguments, train_dataset=examples(4 * STEPS), callbacks=[adapter.callback()])


def _state(adapter):
    return adapter.ranks(), [p.detach().clone() for p in adapter.parameters()], adapter.method.state_dict()


def _train(kinds, size, folder):
    found = {}
    for kind in kinds:
        adapter, trainer = _trainer(kind, size, folder)
        assert trainer.args.world_size == size
        trainer.train()
        assert adapter.processes.size == size
        found[kind] = _state(adapter)
    return found


def assert_trained_alike(found, expected):
    assert found[0] == expected[0]
    for mine, tensor in zip(found[1], expected[1], strict=True):
        assert (mine - tensor).norm() <= 1e-10 * tensor.norm()


@pytest.mark.slow
def test_trainer_equals_one_process_with_the_same_global_batch(tmp_path):
    expected = _train(CONFIGS, 1, tmp_path)
    first, second = run(2, _train, [*CONFIGS], 2, tmp_path, seconds=300)
    for kind in CONFIGS:
        assert set(expected[kind][0].values()) != {1 if kind == "lalora" else 4}
        assert_trained_alike(first[kind], expected[kind])
        assert second[kind][0] == first[kind][0]
        assert all(torch.equal(mine, other) for mine, other in zip(first[kind][1], second[kind][1], strict=True))
    assert first["adaptive"][2]["t_c"] == expected["adaptive"][2]["t_c"]
