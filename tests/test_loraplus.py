"""LoRA+: parameter groups in which B learns faster than A."""

import pytest
import torch
from models import Net, bert_batch, randomise, task_loss, tiny_bert
from test_lora_linear import FP64

import adaptlora

LR, RATIO, DECAY = 1e-3, 16.0, 0.1


def attached(model=None, kind=adaptlora.LoraConfig, **options):
    options = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["first", "second"],
        "modules_to_save": ["classifier"],
    } | options
    return adaptlora.attach(Net(FP64) if model is None else model, kind(**options))


def rates(model, groups) -> dict[str, tuple[float, float]]:
    """{parameter's name: (lr, weight_decay)}"""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_equals_pefts_optimizer():
    """Biases are vectors, weights of modules_to_save are not."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    from peft.optimizers import create_loraplus_optimizer

    modules = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    adapter = attached(tiny_bert(), **modules)
    groups = adapter.parameter_groups(LR, loraplus_lr_ratio=RATIO, weight_decay=DECAY)
    theirs = peft.get_peft_model(tiny_bert(), peft.LoraConfig(**modules))
    options = {"lr": LR, "loraplus_lr_ratio": RATIO, "loraplus_weight_decay": DECAY}
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, **options)
    expected = {}
    for name, value in rates(theirs, optimizer.param_groups).items():
        name = (
            name.removeprefix("base_model.model.")
            .replace("modules_to_save.default.", "")
            .replace(".default.weight", "")
        )
        expected[name.replace("lora_", "pair.lora_")] = value
    assert rates(adapter.model, groups) == expected
    assert expected["classifier.bias"] == (LR * RATIO, 0.0) and expected["classifier.weight"] == (LR, DECAY)
    assert len(groups) == 3 and sum(len(group["params"]) for group in groups) == len(adapter.parameters())


def test_single_numbers_are_not_decayed():
    """A logit_scale beside a head's matrix and bias: as the biases, where PEFT's ndim == 1 takes it for a matrix."""
    model = Net(FP64)
    model.classifier.logit_scale = torch.nn.Parameter(torch.tensor(2.0, dtype=FP64))
    groups = attached(model).parameter_groups(LR, loraplus_lr_ratio=RATIO, weight_decay=DECAY)
    found = rates(model, groups)
    assert found["classifier.logit_scale"] == found["classifier.bias"] == (LR * RATIO, 0.0)
    assert found["classifier.weight"] == (LR, DECAY)


def test_one_learning_rate_without_a_ratio():
    adapter = attached(modules_to_save=None)
    groups = adapter.parameter_groups(LR)
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [(LR, 0.0, 2)] * 2


def test_steps_equal_the_definition():
    """Five steps of SGD with the loss's gradients, against float64 arithmetic on the factors."""
    adapter = attached()
    randomise(adapter)
    optimizer = torch.optim.SGD(adapter.parameter_groups(LR, loraplus_lr_ratio=RATIO))
    adapter.track(optimizer)
    for step in range(5):
        task_loss(adapter.model, dtype=FP64, seed=step).backward()
        head = adapter.model.classifier
        expected = {
            id(head.weight): head.weight - LR * head.weight.grad,
            id(head.bias): head.bias - LR * RATIO * head.bias.grad,
        }
        for layer in adapter.layers.values():
            expected[id(layer.lora_A)] = layer.lora_A - LR * layer.lora_A.grad
            expected[id(layer.lora_B)] = layer.lora_B - LR * RATIO * layer.lora_B.grad
        optimizer.step()
        for parameter in adapter.parameters():
            torch.testing.assert_close(parameter.detach(), expected[id(parameter)].detach(), rtol=1e-14, atol=1e-16)
        optimizer.zero_grad()
        adapter.step()


def test_the_proximal_step_reads_each_factors_rate():
    """v ← v · max(0, 1 − lr · η · w(r) / ‖v‖) with gradients of zero, and a clip that follows."""
    adapter = attached(
        kind=adaptlora.NormALConfig, penalty_step="proximal", eta_p=0.5, t_p=1, t_c=2, target_r=2, modules_to_save=None
    )
    randomise(adapter)
    optimizer = torch.optim.SGD(adapter.parameter_groups(LR, loraplus_lr_ratio=RATIO))
    adapter.track(optimizer)
    before = {name: {k: v.clone() for k, v in layer.pair.factors().items()} for name, layer in adapter.layers.items()}
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    adapter.step()
    weight = torch.arange(1, 5, dtype=FP64).sqrt()
    for name, layer in adapter.layers.items():
        A, B = before[name]["lora_A"], before[name]["lora_B"]
        shrunk_A = A * (1 - LR * 0.5 * weight / A.norm(dim=1)).clamp(min=0)[:, None]
        shrunk_B = B * (1 - LR * RATIO * 0.5 * weight / B.norm(dim=0)).clamp(min=0)
        torch.testing.assert_close(layer.lora_A.detach(), shrunk_A)
        torch.testing.assert_close(layer.lora_B.detach(), shrunk_B)
    adapter.step()
    assert sum(adapter.ranks().values()) == 4
    assert {len(group["params"]) for group in optimizer.param_groups} == {2}


def test_adalora_and_a_checkpoint(tmp_path):
    """lora_E learns at A's rate; groups of another rate come back with their values."""
    adapter = attached(kind=adaptlora.AdaLoRAConfig, r=None, init_r=4, target_r=2, total_step=6, modules_to_save=None)
    groups = adapter.parameter_groups(LR, loraplus_lr_ratio=RATIO)
    found = rates(adapter.model, groups)
    assert {name.rpartition(".")[2]: lr for name, (lr, _) in found.items()} == {
        "lora_A": LR,
        "lora_E": LR,
        "lora_B": LR * RATIO,
    }
    optimizer = torch.optim.AdamW(groups)
    adapter.track(optimizer)
    task_loss(adapter.model, dtype=FP64).backward()
    optimizer.step()
    adapter.step()
    path = adaptlora.save_checkpoint(tmp_path, adapter, optimizer, step=1)
    optimizer.param_groups[1]["lr"] = 0.0
    adaptlora.load_checkpoint(path, adapter, optimizer)
    assert optimizer.param_groups[1]["lr"] == LR * RATIO


def test_trainer_takes_the_optimizer(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny_bert()
    adapter = attached(model, kind=adaptlora.NormALConfig, target_modules=["query"], t_p=1, t_c=2, target_r=2)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(LR, loraplus_lr_ratio=RATIO))
    data = [{key: value[i] for key, value in bert_batch(8).items()} for i in range(8)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        lr_scheduler_type="linear",
    )
    trainer = Trainer(
        model, arguments, train_dataset=data, optimizers=(optimizer, None), callbacks=[adapter.callback()]
    )
    trainer.train()
    assert trainer.optimizer.param_groups[0]["initial_lr"] == LR
    assert [group["initial_lr"] for group in optimizer.param_groups] == [LR, LR * RATIO, LR * RATIO]
    assert sum(adapter.ranks().values()) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "lr must be > 0, got 0"),
        ({"lr": LR, "loraplus_lr_ratio": -1.0}, "loraplus_lr_ratio must be > 0, got -1.0"),
        ({"lr": LR, "weight_decay": -0.1}, "weight_decay must be ≥ 0, got -0.1"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=f"^parameter_groups: {message}"):
        attached().parameter_groups(**options)
