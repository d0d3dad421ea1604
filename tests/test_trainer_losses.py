"""The penalty reaches the gradient once a step whatever the loss is, and however its gradient is scaled."""

import warnings

import pytest
import torch
from models import tiny_bert
from torch import nn
from training_loops import STEPS, make_trainer, run_raw, run_trainer
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother

import adaptlora


def make(dtype=torch.float64, **fields):
    base = {"r": 4, "target_r": 2, "lora_alpha": 8, "target_modules": "all-linear", "modules_to_save": ["classifier"]}
    if "schedule" not in fields:
        base |= {"t_p": 3, "t_c": 4}
    return adaptlora.attach(tiny_bert().to(dtype), adaptlora.NormALConfig(eta_p=0.02, **base | fields))


def focal(logits, labels):
    surprise = nn.functional.cross_entropy(logits, labels, reduction="none")
    return ((1 - (-surprise).exp()) * surprise).mean()


class FocalTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = focal(outputs.logits, labels) / self.args.gradient_accumulation_steps
        # Trainer divides only losses of models that do not take num_items_in_batch; BERT's takes it.
        return (loss, outputs) if return_outputs else loss


def focal_loss(model, inputs):
    return focal(model(**{k: v for k, v in inputs.items() if k != "labels"}).logits, inputs["labels"])


def smoothed_loss(model, inputs):
    return LabelSmoother(epsilon=0.1)(model(**inputs), inputs["labels"])


def mean_of(task_loss, accumulation):
    return lambda model, inputs: task_loss(model, inputs) / accumulation


# What is given to Trainer, and the loss of a micro-batch that it differentiates
LOSSES = {
    "compute_loss": ({"kind": FocalTrainer}, focal_loss),
    "compute_loss_func": (
        {"options": {"compute_loss_func": lambda outputs, labels, num_items_in_batch: focal(outputs.logits, labels)}},
        focal_loss,
    ),
    "label smoothing": ({"label_smoothing_factor": 0.1}, smoothed_loss),
}


def assert_equal_runs(by_trainer, by_hand, **tolerances):
    assert by_trainer.ranks() == by_hand.ranks() and set(by_hand.ranks().values()) != {4}
    mine, expected = by_trainer.method.state_dict(), by_hand.method.state_dict()
    for field in ("change", "last_loss"):
        found, wanted = mine.pop(field), expected.pop(field)
        assert found == wanted or found == pytest.approx(wanted, rel=1e-9)
    assert mine == expected
    for mine, expected in zip(by_trainer.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, **tolerances)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("schedule", ["fixed", "adaptive"])
@pytest.mark.parametrize("name", LOSSES)
def test_any_loss(name, schedule, accumulation, tmp_path):
    adaptive = {"schedule": "adaptive", "min_steps": 2, "lambda_p": 10.0, "lambda_c": 10.0}
    fields = adaptive if schedule == "adaptive" else {}
    by_trainer, by_hand = make(**fields), make(**fields)
    arguments, task_loss = LOSSES[name]
    trainer = run_trainer(by_trainer, tmp_path, accumulation, max_grad_norm=0.05, **arguments)
    # compute_loss divides by itself and label smoothing by the texts of the whole step; a compute_loss_func that ignores their number sums.
    if name != "compute_loss_func":
        task_loss = mean_of(task_loss, accumulation)
    run_raw(by_hand, accumulation, max_grad_norm=0.05, task_loss=task_loss)
    assert_equal_runs(by_trainer, by_hand, rtol=1e-9, atol=1e-12)
    assert "training_step" not in vars(trainer)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_autocast(max_grad_norm, tmp_path):
    by_trainer, by_hand = make(torch.float32), make(torch.float32)
    run_trainer(by_trainer, tmp_path, bf16=True, max_grad_norm=max_grad_norm, optim="adamw_torch")
    run_raw(by_hand, max_grad_norm=max_grad_norm, context=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in by_trainer.parameters())
    # One micro-batch: two gradients are added, and their order does not change the bits.
    assert_equal_runs(by_trainer, by_hand, rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_grad_scaler(max_grad_norm, fused, tmp_path, monkeypatch):
    """Half precision: steps whose gradients overflow are left out, by the scaler or by a fused optimizer itself, and not counted."""
    by_trainer, by_hand = make(torch.float32, t_p=1, t_c=2), make(torch.float32, t_p=1, t_c=2)
    optim = "adamw_torch_fused" if fused else "adamw_torch"
    trainer = make_trainer(by_trainer, tmp_path, max_grad_norm=max_grad_norm, optim=optim)
    # accelerate refuses fp16 without a GPU; torch does not.
    monkeypatch.setitem(trainer.accelerator.state._shared_state, "_mixed_precision", "fp16")
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = scaler()
    trainer.train()
    run_raw(
        by_hand,
        max_grad_norm=max_grad_norm,
        context=lambda: torch.autocast("cpu", dtype=torch.float16),
        scaler=scaler(),
        fused=fused,
    )
    assert 2 < by_trainer.method.t < STEPS
    assert_equal_runs(by_trainer, by_hand, rtol=0, atol=0)


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**28, backoff_factor=2.0**-8)


# Losses and gradients that are not finite


class PoisonedTrainer(Trainer):
    """Adds a constant that is not finite to the loss of the fourth step: the gradient is what it was."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        return loss + float("inf") if self.state.global_step == 3 else loss


class DivergingTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        return loss * float("nan") if self.state.global_step == 1 else loss


def test_a_step_with_an_infinite_loss_is_refused_and_the_next_one_counts(tmp_path):
    adapter = make(schedule="adaptive", min_steps=2, lambda_p=10.0, lambda_c=1e-9, max_steps=4)
    with pytest.warns(
        UserWarning, match="Trainer: step 4: step: loss must be finite, got inf. Ranks are left as they are"
    ):
        trainer = run_trainer(adapter, tmp_path, kind=PoisonedTrainer, logging_steps=1)
    assert adapter.method.t == STEPS - 1 and adapter.method.t_c == 4 and adapter.method.phase == "clipped"
    assert all(p.isfinite().all() for p in adapter.parameters())
    averages = [row["rank/average"] for row in trainer.state.log_history if "loss" in row]
    assert averages == [4, 4, 4, 4, 2, 2]  # at the fifth step instead of the fourth


def test_a_clip_of_weights_that_are_nan_is_refused_and_training_goes_on(tmp_path):
    adapter = make()
    with pytest.warns(UserWarning) as warned:
        trainer = run_trainer(adapter, tmp_path, kind=DivergingTrainer, logging_steps=1)
    refusals = [w for w in warned if "norms of the rank vectors must be finite" in str(w.message)]
    assert len(refusals) == 1 and "lower learning rate" in str(refusals[0].message)
    assert trainer.state.global_step == STEPS and adapter.method.t == 3 and set(adapter.ranks().values()) == {4}
    assert [row.get("rank/refused", 0) for row in trainer.state.log_history if "loss" in row] == [0, 0, 0, 1, 2, 3]


def test_a_refused_clip_is_made_up_for_once_the_weights_are_finite():
    """A raw loop: the user puts back what they had, and goes on."""
    adapter = make()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.track(optimizer)
    for _ in range(3):
        adapter.step()
    good = adapter.factors()[3].detach().clone()
    state = adapter.method.state_dict()
    with torch.no_grad():
        adapter.factors()[3].fill_(float("nan"))
    with pytest.raises(adaptlora.NonFiniteError, match="norms of the rank vectors must be finite"):
        adapter.step()
    assert adapter.method.state_dict() == state and set(adapter.ranks().values()) == {4}
    with torch.no_grad():
        adapter.factors()[3].copy_(good)
    assert adapter.step().step == 4


def test_all_b_are_zero_at_the_clip():
    """B starts at zero: a clip before it has moved goes by ‖a‖ alone."""
    adapter = make(torch.float32, t_p=1, t_c=1, penalty="none")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.track(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        change = adapter.step()
    assert sum(change.after.values()) == 2 * len(change.after) and min(change.after.values()) >= 1
    assert all(
        layer.lora_B.shape[1] == rank
        for layer, rank in zip(adapter.layers.values(), change.after.values(), strict=True)
    )
