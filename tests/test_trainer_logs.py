"""What Trainer's logs say, in every place they go to; evaluation and early stopping."""

import pytest
import torch
from models import tiny_bert
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_loops import STEPS, make_trainer, run_trainer
from transformers import EarlyStoppingCallback, TrainerCallback

import adaptlora
from adaptlora import ops


def make(**fields):
    base = {"r": 4, "target_r": 2, "lora_alpha": 8, "target_modules": "all-linear", "t_p": 3, "t_c": 4, "eta_p": 0.02}
    return adaptlora.attach(tiny_bert(), adaptlora.NormALConfig(**base | fields))


class Recorder(TrainerCallback):
    """A reporter's place in the order of callbacks: before those that the user adds."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_values_are_the_adapters():
    adapter = make()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.track(optimizer)
    generator = torch.Generator().manual_seed(0)
    for factor in adapter.factors():
        factor.grad = torch.randn(factor.shape, generator=generator)
    optimizer.step()
    values = adaptlora.log_values(adapter, modules=True)
    summary = adapter.summary()
    assert values["adapter/parameters"] == summary["adapter_parameters"]
    assert values["adapter/bytes"] == summary["adapter_bytes"] == 4 * summary["adapter_parameters"]
    assert values["adapter/optimizer_bytes"] == summary["optimizer_bytes"] == 8 * summary["adapter_parameters"]
    assert (values["rank/average"], values["rank/min"], values["rank/max"]) == (4, 4, 4)
    assert {k.removeprefix("rank/module/"): v for k, v in values.items() if "module" in k} == adapter.ranks()
    lora_As = [layer.lora_A.detach() for layer in adapter.layers.values()]
    lora_Bs = [layer.lora_B.detach() for layer in adapter.layers.values()]
    for name, factors in (("norm_A", lora_As), ("norm_B", lora_Bs)):
        expected = sum(factor.double().square().sum() for factor in factors).sqrt()
        assert values[f"adapter/{name}"] == pytest.approx(float(expected), rel=1e-6)
    penalty = 0.02 * ops.rank_penalty_ref([a.double() for a in lora_As], [b.double() for b in lora_Bs], kind="sqrt")
    assert values["adapter/penalty"] == pytest.approx(float(penalty), rel=1e-6)


def test_the_proximal_steps_penalty_is_logged_too_and_la_loras_budget():
    assert adaptlora.log_values(make(penalty_step="proximal"))["adapter/penalty"] > 0
    assert adaptlora.log_values(make(penalty="none"))["adapter/penalty"] == 0
    config = adaptlora.LaLoRAConfig(r=4, target_modules="all-linear")
    adapter = adaptlora.attach(tiny_bert(), config)
    assert adaptlora.log_values(adapter)["adapter/budget"] == adapter.method.budget


def test_every_reporter_and_the_history_get_them(tmp_path):
    adapter = make()
    recorder = Recorder()
    trainer = make_trainer(
        adapter,
        tmp_path,
        report_to=["tensorboard"],
        logging_steps=1,
        evaluate=True,
        eval_strategy="steps",
        eval_steps=2,
    )
    # Where transformers puts the reporters
    trainer.callback_handler.callbacks.insert(1, recorder)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["rank/average"] for row in rows] == [4, 4, 4, 2, 2, 2]
    assert [row["adapter/penalty"] > 0 for row in rows] == [True, True, False, False, False, False]
    sizes = [row["adapter/bytes"] for row in rows]
    assert sizes[3:] == [adapter.summary()["adapter_bytes"]] * 3 and sizes[0] > sizes[3]
    assert [row["adapter/optimizer_bytes"] for row in rows] == [2 * size for size in sizes]
    seen = [logs for logs in recorder.logs if "loss" in logs]
    assert [{**logs, "step": i + 1} for i, logs in enumerate(seen)] == rows
    assert not any("rank/average" in row for row in trainer.state.log_history if "loss" not in row)

    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    board = EventAccumulator(str(events))
    board.Reload()
    for key in ("rank/average", "rank/max", "adapter/penalty", "adapter/norm_B", "adapter/bytes"):
        scalars = board.Scalars(f"train/{key}")
        assert [scalar.step for scalar in scalars] == list(range(1, STEPS + 1))
        assert [scalar.value for scalar in scalars] == pytest.approx([row[key] for row in rows])


def test_module_ranks_on_request(tmp_path):
    adapter = make()
    trainer = make_trainer(adapter, tmp_path, logging_steps=STEPS)
    (callback,) = [c for c in trainer.callback_handler.callbacks if hasattr(c, "log_modules")]
    callback.log_modules = True
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert {
        k.removeprefix("rank/module/"): v for k, v in row.items() if k.startswith("rank/module/")
    } == adapter.ranks()
    assert adapter.callback(log_modules=True).log_modules


def test_early_stopping_after_the_clip(tmp_path):
    adapter = make(t_p=1, t_c=2)
    trainer = run_trainer(
        adapter,
        tmp_path,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        evaluate=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # of a loss that falls the first is the best
    )
    assert trainer.state.global_step == 3 and trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert set(adapter.ranks().values()) == {4} and adapter.method.t == 1 and not adapter.method.clipped


def test_early_stopping_before_the_clip_says_so(tmp_path):
    class StopAtTwo(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 2

    adapter = make()
    with pytest.warns(UserWarning, match=r"the ranks were not changed in 2 steps \(phase: penalty\)"):
        run_trainer(adapter, tmp_path, callbacks=[StopAtTwo()])
    assert set(adapter.ranks().values()) == {4}


def test_a_second_training_goes_on_after_an_error_in_the_first(tmp_path):
    """What the callback set up for the time of a training does not outlive it twice."""

    class Interrupted(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise KeyboardInterrupt

    adapter = make(t_p=None, t_c=None, schedule="adaptive", min_steps=2, lambda_p=10.0, lambda_c=10.0)
    trainer = make_trainer(adapter, tmp_path)
    interrupted = Interrupted()
    trainer.add_callback(interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(interrupted)
    trainer.train()
    assert adapter.method.phase == "clipped" and adapter.method.t == STEPS + 1
    assert "training_step" not in vars(trainer)


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    run_trainer(make(target_modules=["query"]), tmp_path, save_strategy="steps", save_steps=5)
    other = adaptlora.attach(tiny_bert(), adaptlora.LaLoRAConfig(r=4, target_modules=["query"]))
    with pytest.raises(
        ValueError, match="Trainer: the checkpoint must be of this adapter's method .attach with the conf"
    ):
        run_trainer(other, tmp_path / "again", resume=tmp_path / "checkpoint-5")
    others = make(target_modules=["value"])
    with pytest.raises(ValueError, match="Trainer: the checkpoint must be of this adapter's modules"):
        run_trainer(others, tmp_path / "again", resume=tmp_path / "checkpoint-5")
