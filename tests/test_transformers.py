"""The callback: Trainer runs the whole method, with the same numbers as the raw loop."""

import pytest
import torch
from models import bert_batch, tiny_bert
from training_loops import STEPS, run_raw, run_trainer

import adaptlora


def make(dtype=torch.float64, **fields):
    # float64, because AdamW's first steps turn rounding noise in tiny gradients into whole steps.
    base = {"r": 4, "target_r": 2, "lora_alpha": 8, "target_modules": "all-linear", "modules_to_save": ["classifier"]}
    if "schedule" not in fields:
        base |= {"t_p": 3, "t_c": 4}
    return adaptlora.attach(tiny_bert().to(dtype), adaptlora.NormALConfig(**base | fields))


@pytest.mark.parametrize("penalty_step", ["gradient", "proximal"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_trainer_equals_the_raw_loop(penalty_step, accumulation, max_grad_norm, tmp_path):
    eta = 0.02 if penalty_step == "gradient" else 1.0
    by_trainer = make(penalty_step=penalty_step, eta_p=eta)
    by_hand = make(penalty_step=penalty_step, eta_p=eta)
    run_trainer(by_trainer, tmp_path, accumulation, max_grad_norm=max_grad_norm)
    run_raw(by_hand, accumulation, max_grad_norm=max_grad_norm)
    assert by_trainer.ranks() == by_hand.ranks() and set(by_hand.ranks().values()) != {4}
    assert by_trainer.method.t == STEPS
    for mine, expected in zip(by_trainer.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


def test_the_penalty_reaches_the_weights(tmp_path):
    with_penalty, without = make(eta_p=0.5), make(penalty="none")
    run_trainer(with_penalty, tmp_path)
    run_trainer(without, tmp_path)

    def size(adapter):
        return sum(layer.lora_A.norm() for layer in adapter.layers.values())

    assert size(with_penalty) < 0.9 * size(without)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_adaptive_schedule_reads_the_loss(accumulation, tmp_path):
    by_trainer = make(schedule="adaptive", min_steps=2, lambda_p=10.0, lambda_c=10.0)
    by_hand = make(schedule="adaptive", min_steps=2, lambda_p=10.0, lambda_c=10.0)
    hooks = set(by_trainer.model._forward_hooks)
    run_trainer(by_trainer, tmp_path, accumulation)
    run_raw(by_hand, accumulation)
    assert (by_trainer.method.t_p, by_trainer.method.t_c) == (by_hand.method.t_p, by_hand.method.t_c) == (2, 3)
    assert by_trainer.method.phase == "clipped" and by_trainer.ranks() == by_hand.ranks()
    assert set(by_trainer.model._forward_hooks) == hooks


def test_checkpoints_hold_a_peft_adapter(tmp_path):
    adapter = make(torch.float32)
    run_trainer(adapter, tmp_path, save_strategy="steps", save_steps=3)
    early = adaptlora.load(tiny_bert(), tmp_path / "checkpoint-3" / "adapter")
    late = adaptlora.load(tiny_bert(), tmp_path / "checkpoint-6" / "adapter")
    assert set(early.ranks().values()) == {4} and late.ranks() == adapter.ranks()
    with torch.no_grad():
        adapter.model.eval()
        expected = adapter.model(**bert_batch()).logits
        torch.testing.assert_close(late.model(**bert_batch()).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop", [2, 5])
@pytest.mark.parametrize("rescale", [False, True])
def test_resuming_from_a_checkpoint_equals_an_uninterrupted_run(stop, rescale, tmp_path):
    """Stopped before the clip (step 4) and after it; the resumed run must neither repeat nor forget it."""
    whole, resumed = make(rescale=rescale), make(rescale=rescale)
    run_trainer(whole, tmp_path, save_strategy="steps", save_steps=1)
    run_trainer(resumed, tmp_path / "again", resume=tmp_path / f"checkpoint-{stop}")
    assert resumed.ranks() == whole.ranks() and resumed.method.state_dict() == whole.method.state_dict()
    for mine, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, expected) and mine.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
    for name, layer in resumed.layers.items():
        assert layer.scaling == whole.layers[name].scaling


def test_the_best_model_is_loaded_across_the_clip(tmp_path):
    adapter = make(rescale=True)
    trainer = run_trainer(
        adapter,
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        evaluate=True,
    )
    best = trainer.state.best_model_checkpoint
    step = int(best.rsplit("-", 1)[1])
    assert adapter.method.t == step and (set(adapter.ranks().values()) == {4}) == (step < 4)
    expected = adaptlora.load(tiny_bert().double(), f"{best}/adapter")
    with torch.no_grad():
        torch.testing.assert_close(
            adapter.model.eval()(**bert_batch()).logits, expected.model(**bert_batch()).logits, rtol=1e-6, atol=1e-9
        )


def test_a_clip_that_the_run_does_not_reach_is_refused(tmp_path):
    adapter = make(t_p=3, t_c=STEPS)
    with pytest.raises(ValueError, match="t_c must be less than the 6 steps that the method will have seen, got 6"):
        run_trainer(adapter, tmp_path)
    assert adapter.method.t == 0


def test_an_adaptive_run_that_never_clips_says_so(tmp_path):
    adapter = make(schedule="adaptive", min_steps=100)
    with pytest.warns(UserWarning, match=r"the ranks were not changed in 6 steps \(phase: penalty\)"):
        run_trainer(adapter, tmp_path)


# La-LoRA: ranks change in every step


def make_lalora(**fields):
    base = {"r": 6, "lora_alpha": 12, "target_modules": "all-linear", "modules_to_save": ["classifier"], "gamma": 8.0}
    return adaptlora.attach(tiny_bert().double(), adaptlora.LaLoRAConfig(**base | fields))


@pytest.mark.parametrize("contribution", ["norm", "fisher"])
def test_lalora_by_trainer_equals_the_raw_loop(contribution, tmp_path):
    by_trainer, by_hand = make_lalora(contribution=contribution), make_lalora(contribution=contribution)
    run_trainer(by_trainer, tmp_path, 2)
    run_raw(by_hand, 2)
    assert by_trainer.ranks() == by_hand.ranks() and set(by_hand.ranks().values()) != {1}
    for mine, expected in zip(by_trainer.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("contribution", ["norm", "fisher"])
@pytest.mark.parametrize("stop", [2, 4])
def test_resuming_lalora_equals_an_uninterrupted_run(stop, contribution, tmp_path):
    """Parked vectors and their optimizer state come back with the model's checkpoint; ranks go up and down after it."""
    fields = {"contribution": contribution, "fidelity": "previous", "temperature": 0.05}
    whole, resumed = make_lalora(**fields), make_lalora(**fields)
    first = run_trainer(whole, tmp_path, save_strategy="steps", save_steps=1)
    assert any(rank < 6 for rank in whole.ranks().values())
    second = run_trainer(resumed, tmp_path / "again", resume=tmp_path / f"checkpoint-{stop}")
    assert resumed.ranks() == whole.ranks() and resumed.method.state_dict() == whole.method.state_dict()
    for mine, expected in zip(resumed.layers.values(), whole.layers.values(), strict=True):
        assert all(map(torch.equal, mine.pair.whole(), expected.pair.whole()))
        # Pairs hold optimizers weakly: these are alive.
        assert mine.pair.optimizers == [second.optimizer.optimizer]
        assert expected.pair.optimizers == [first.optimizer.optimizer]
        theirs = expected.pair.parked()
        assert theirs.keys() == mine.pair.parked().keys()
        assert all(torch.equal(rows, theirs[key]) for key, rows in mine.pair.parked().items())
    for mine, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, expected)


# NoRA: factors composed once a step


def make_nora(**fields):
    base = {"r": 3, "r_out": 9, "lora_alpha": 6, "target_modules": "all-linear", "modules_to_save": ["classifier"]}
    return adaptlora.attach(tiny_bert().double(), adaptlora.NoRAConfig(**base | fields))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_nora_by_trainer_equals_the_raw_loop(accumulation, tmp_path):
    by_trainer, by_hand = make_nora(), make_nora()
    run_trainer(by_trainer, tmp_path, accumulation, max_grad_norm=0.05)
    run_raw(by_hand, accumulation, max_grad_norm=0.05)
    for mine, expected in zip(by_trainer.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


def test_resuming_nora_equals_an_uninterrupted_run(tmp_path):
    whole, resumed = make_nora(), make_nora()
    run_trainer(whole, tmp_path, save_strategy="steps", save_steps=1)
    run_trainer(resumed, tmp_path / "again", resume=tmp_path / "checkpoint-3")
    for mine, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, expected)
    stored = adaptlora.load(tiny_bert().double(), tmp_path / "checkpoint-6" / "adapter")
    with torch.no_grad():
        expected = whole.model.eval()(**bert_batch()).logits
        torch.testing.assert_close(stored.model(**bert_batch()).logits, expected, rtol=1e-6, atol=1e-9)
