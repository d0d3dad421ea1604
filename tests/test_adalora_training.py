"""AdaLoRA in a training: files, exact resumption, changes that fail, GradScaler, Trainer, and configurations that do not fit."""

import copy

import pytest
import torch
from models import Net, batch, randomise, task_loss, tiny_bert
from torch import nn
from training_loops import STEPS, run_raw, run_trainer

import adaptlora
from adaptlora.methods import NonFiniteError

FIELDS = {"init_r": 6, "target_r": 2, "total_step": 16, "tinit": 2, "tfinal": 4, "deltaT": 2, "lora_alpha": 9}
FIELDS["target_modules"] = ["first", "second"]


def make(dtype=torch.float64, **fields):
    adapter = adaptlora.attach(Net(dtype), adaptlora.AdaLoRAConfig(**FIELDS | fields))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    adapter.track(optimizer)
    return adapter, optimizer


def train_step(adapter, optimizer, seed):
    loss = task_loss(adapter.model, dtype=torch.float64, seed=seed)
    (loss + adapter.penalty()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return adapter.step(loss)


def run(adapter, optimizer, steps):
    return [train_step(adapter, optimizer, seed) for seed in steps]


def whole_state(adapter, optimizer):
    """Tensors and numbers of all that training depends on, by path."""
    found = {}

    def walk(path, value):
        if isinstance(value, dict):
            for key, part in value.items():
                walk((*path, key), part)
        elif isinstance(value, list):
            walk(path, dict(enumerate(value)))
        else:
            found[path] = value.clone() if isinstance(value, torch.Tensor) else value

    walk((), {"adapter": adapter.state_dict(), "optimizer": optimizer.state_dict()})
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        same = torch.equal(found[path], value) if isinstance(value, torch.Tensor) else found[path] == value
        assert same, path


# Resumption


@pytest.mark.parametrize("removal", ["final", "update"])
@pytest.mark.parametrize("by", ["checkpoint", "state_dict"])
def test_the_run_that_goes_on_is_the_run_that_never_stopped(by, removal, tmp_path):
    whole = make(removal=removal)
    run(*whole, range(16))
    assert sum(whole[0].ranks().values()) == 4
    for stop in (1, 9, 11, 13):
        first, second = make(removal=removal), make(removal=removal)
        run(*first, range(stop))
        run(*second, range(90, 93))
        if by == "checkpoint":
            path = adaptlora.save_checkpoint(tmp_path / str(stop), *first, step=stop)
            adaptlora.load_checkpoint(path, *second)
        else:
            second[0].load_state_dict(copy.deepcopy(first[0].state_dict()))
            second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
        assert_same(whole_state(*second), whole_state(*first))
        run(*second, range(stop, 16))
        assert_same(whole_state(*second), whole_state(*whole))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["method"].update(final=1), "method's final must be true or false, got 1"),
        (lambda s: s["method"].update(start=[6]), r"method's start must be a list of 2 ranks, got \[6\]"),
        (lambda s: s["method"].update(changes=[[1, 2]]), r"changes must be \[step, module, rank\] each, got \[1, 2\]"),
        (lambda s: s["factors"]["first"].pop("lora_E"), "first: factors must be lora_A, lora_B, lora_E, got"),
        (
            lambda s: s["factors"]["first"].update(lora_E=torch.zeros(6)),
            r"first: lora_E must have shape \(6, 1\), got \(6,\)",
        ),
        (lambda s: s["statistics"]["second"].pop("lora_A.mean"), "second: statistics: keys must be mean and"),
        (lambda s: s.pop("scalings"), r"state must hold biases, factors, .*difference in \['scalings'\]"),
        (lambda s: s.update(statisticz=s.pop("statistics")), r"state must hold .*difference in \['statisticz'\]"),
        (lambda s: s["statistics"].pop("second"), r"statistics must have the adapter's entries, .*\['second'\]"),
    ],
)
def test_states_that_do_not_fit(change, message):
    adapter, optimizer = make()
    run(adapter, optimizer, range(3))
    before, state = whole_state(adapter, optimizer), copy.deepcopy(adapter.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        adapter.load_state_dict(state)
    assert_same(whole_state(adapter, optimizer), before)


# Changes that fail


@pytest.mark.parametrize("removal", ["final", "update"])
def test_a_change_that_fails_leaves_no_trace_and_is_made_by_the_next_call(removal, monkeypatch):
    adapter, optimizer = make(removal=removal)
    other = make(removal=removal)
    steps = 0
    while steps + 1 != {"final": 12, "update": 6}[removal]:
        run(adapter, optimizer, [steps])
        steps += 1
    task_loss(adapter.model, dtype=torch.float64, seed=steps).backward()
    optimizer.step()
    before = whole_state(adapter, optimizer)
    with monkeypatch.context() as patched:
        patched.setattr("adaptlora.ranks.gather_rows", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
        with pytest.raises(MemoryError, match="full"):
            adapter.step()
    assert_same(whole_state(adapter, optimizer), before)
    assert adapter.method.step_state() == {"t": steps, "final": False, "_orders": {}, "_masked": []}
    found = adapter.step()
    run(*other, range(steps))
    task_loss(other[0].model, dtype=torch.float64, seed=steps).backward()
    other[1].step()
    assert other[0].step() == found and found.step == steps + 1
    assert_same(whole_state(adapter, optimizer), whole_state(*other))


def test_scores_that_are_not_finite_are_refused():
    adapter, optimizer = make()
    run(adapter, optimizer, range(3))
    pair = adapter.layers["second"].pair
    pair.sensitivity.of(pair.lora_A)["mean"][1, 2] = torch.inf
    task_loss(adapter.model, dtype=torch.float64).backward()
    with pytest.raises(NonFiniteError, match="second: importance of the triplets must be finite"):
        adapter.step()
    assert adapter.method.t == 3 and adapter.ranks() == {"first": 6, "second": 6}


def test_gradients_must_have_been_read():
    adapter, optimizer = make()
    for _ in range(3):
        optimizer.step()
        assert adapter.step() is None
    with pytest.raises(
        ValueError, match="gradients must have been read before triplets are chosen at step 4, and none"
    ):
        adapter.step()
    assert adapter.method.t == 3


# Gradients as they are


def scaled_run(adapter, optimizer, scaler, poisoned=()):
    """In the steps `poisoned` one gradient overflows, of another parameter than the factors."""
    for seed in range(5):
        scaler.scale(task_loss(adapter.model, seed=seed)).backward()
        if seed in poisoned:
            adapter.saved["classifier"].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield {name: layer.pair.statistics() for name, layer in adapter.layers.items()}


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_changes_nothing_that_is_read(fused):
    runs = []
    for enabled in (False, True):
        adapter = adaptlora.attach(Net(), adaptlora.AdaLoRAConfig(**FIELDS))
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02, fused=fused)
        adapter.track(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        runs.append(list(scaled_run(adapter, optimizer, scaler))[-1])
    for name, expected in runs[0].items():
        for key, rows in runs[1][name].items():
            torch.testing.assert_close(rows, expected[key], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_leaves_no_trace(fused):
    adapter = adaptlora.attach(Net(), adaptlora.AdaLoRAConfig(**FIELDS, modules_to_save=["classifier"]))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02, fused=fused)
    adapter.track(optimizer)
    scaler, before = torch.amp.GradScaler("cpu", init_scale=4.0), None
    for seed, found in enumerate(scaled_run(adapter, optimizer, scaler, poisoned=(0, 3))):
        found = {(name, key): rows.clone() for name, of in found.items() for key, rows in of.items()}
        assert bool(found) == (seed > 0) and all(rows.isfinite().all() for rows in found.values())
        if seed == 3:
            assert all(torch.equal(rows, before[place]) for place, rows in found.items())
        elif before:
            assert not any(torch.equal(rows, before[place]) for place, rows in found.items())
        before = found


def test_gradients_that_are_not_finite_leave_no_trace():
    adapter, optimizer = make()
    run(adapter, optimizer, range(2))
    before = copy.deepcopy({name: layer.pair.statistics() for name, layer in adapter.layers.items()})
    adapter.layers["first"].lora_B.grad = torch.full_like(adapter.layers["first"].lora_B, torch.nan)
    optimizer.step()
    for name, layer in adapter.layers.items():
        assert all(torch.equal(rows, before[name][key]) for key, rows in layer.pair.statistics().items())


def test_two_optimizers_each_read_what_they_step():
    adapter, optimizer = make()
    other = adaptlora.attach(Net(torch.float64), adapter.config)
    factors = other.factors()
    halves = [torch.optim.AdamW(part, lr=0.02) for part in (factors[::2], factors[1::2])]
    for half in halves:
        other.track(half)
    for seed in range(16):
        change = train_step(adapter, optimizer, seed)
        loss = task_loss(other.model, dtype=torch.float64, seed=seed)
        (loss + other.penalty()).backward()
        for half in halves:
            half.step()
            half.zero_grad()
        assert other.step(loss) == change
    assert sum(other.ranks().values()) == 4
    assert all(map(torch.equal, adapter.factors(), other.factors()))


# Files


@pytest.mark.parametrize("removal", ["final", "update"])
def test_stock_peft_computes_what_was_trained(removal, tmp_path):
    import peft

    adapter, optimizer = make(removal=removal, target_r=1.5, alpha_pattern={"second": 5})
    x, _ = batch(dtype=torch.float64)
    for steps in (range(6), range(6, 16)):
        run(adapter, optimizer, steps)
        adapter.save(tmp_path)
        found = peft.PeftModel.from_pretrained(Net(torch.float64), tmp_path)
        expected = adapter.model(x)
        torch.testing.assert_close(found(x), expected, rtol=1e-12, atol=1e-12)
        late = adaptlora.load(Net(torch.float64), tmp_path)
        torch.testing.assert_close(late.model(x), expected, rtol=1e-12, atol=1e-12)
        assert late.ranks() == {name: rank for name, rank in adapter.ranks().items() if rank}
    assert (tmp_path / "rank_history.json").exists() == (removal == "update")


def test_a_file_into_an_adapter_begins_anew(tmp_path):
    adapter, optimizer = make()
    run(adapter, optimizer, range(16))
    ranks, x = adapter.ranks(), batch(dtype=torch.float64)[0]
    expected = adapter.model(x)
    adapter.save(tmp_path)
    into, other = make(target_r=1)
    run(into, other, range(4))
    into.load(tmp_path)
    torch.testing.assert_close(into.model(x), expected, rtol=1e-12, atol=1e-12)
    assert into.ranks() == ranks and into.method.start == list(ranks.values())
    assert not any(layer.pair.statistics() for layer in into.layers.values())
    with pytest.raises(
        ValueError, match="target_r must leave at most the 4 triplets that there are, got 3 for each of 2"
    ):
        make(target_r=3)[0].load(tmp_path)


def test_a_module_of_rank_0_is_left_out_and_trains_no_more(tmp_path):
    adapter, optimizer = make(target_r=0.5, removal="update")
    run(adapter, optimizer, range(16))
    assert sorted(adapter.ranks().values()) == [0, 1]
    adapter.save(tmp_path)
    assert list(adaptlora.load(Net(torch.float64), tmp_path).ranks().values()) == [1]


def test_shearing_takes_the_update_as_it_is():
    adapter, optimizer = make()
    run(adapter, optimizer, range(16))
    x, _ = batch(dtype=torch.float64)
    expected = adapter.model(x)
    adaptlora.shear(adapter, adaptlora.SVDConfig(energy=1.0))
    torch.testing.assert_close(adapter.model(x), expected, rtol=1e-6, atol=1e-6)


# Trainer


def make_bert(**fields):
    base = {"init_r": 6, "target_r": 2, "target_modules": "all-linear", "total_step": STEPS, "tinit": 1, "tfinal": 1}
    return adaptlora.attach(tiny_bert().double(), adaptlora.AdaLoRAConfig(**base | fields))


@pytest.mark.parametrize("removal", ["final", "update"])
def test_trainer_equals_the_raw_loop_and_resumes_exactly(removal, tmp_path):
    by_trainer, by_hand, resumed = (make_bert(removal=removal) for _ in range(3))
    run_trainer(by_trainer, tmp_path, 2, save_strategy="steps", save_steps=1)
    run_raw(by_hand, 2)
    assert by_trainer.ranks() == by_hand.ranks() and sum(by_hand.ranks().values()) == 2 * 13
    for mine, expected in zip(by_trainer.factors(), by_hand.factors(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
    run_trainer(resumed, tmp_path / "again", 2, resume=tmp_path / "checkpoint-3")
    assert resumed.ranks() == by_trainer.ranks()
    assert resumed.method.state_dict() == by_trainer.method.state_dict()
    for mine, expected in zip(resumed.factors(), by_trainer.factors(), strict=True):
        assert torch.equal(mine, expected)


def test_trainer_with_peft_s_defaults_ends_at_the_final_ranks(tmp_path):
    adapter = make_bert(tinit=0, tfinal=0)
    run_trainer(adapter, tmp_path, logging_steps=1)
    assert adapter.method.phase == "final" and sum(adapter.ranks().values()) == 2 * 13
    assert adaptlora.log_values(adapter)["adapter/budget"] == 2 * 13


# Configurations


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total_step": None}, "total_step must be an integer > tinit \\+ tfinal = 6, .*, got None"),
        ({"total_step": 6}, "total_step must be an integer > tinit \\+ tfinal = 6, .*, got 6"),
        (
            {"total_step": 1, "tinit": 0, "tfinal": 0},
            "total_step must be an integer ≥ tfinal \\+ 2 = 2, so that grad.*, got 1",
        ),
        ({"r": 8}, "r must be None or init_r=6, which takes its place, got 8"),
        ({"init_r": 0}, "init_r must be an integer > 0, got 0"),
        ({"target_r": 0}, "target_r must be a number > 0, got 0"),
        ({"tinit": -1}, "tinit must be an integer ≥ 0, got -1"),
        ({"tfinal": 1.5}, "tfinal must be an integer ≥ 0, got 1.5"),
        ({"deltaT": 0}, "deltaT must be an integer > 0, got 0"),
        ({"beta1": 1.0}, r"beta1 must be in \(0, 1\), got 1.0"),
        ({"beta2": 0}, r"beta2 must be in \(0, 1\), got 0"),
        ({"orth_reg_weight": -0.5}, "orth_reg_weight must be a number ≥ 0, got -0.5"),
        ({"removal": "never"}, 'removal must be "final" or "update", got \'never\''),
        ({"use_rslora": True}, "use_rslora must be False: AdaLoRA scales by lora_alpha / init_r, got True"),
    ],
)
def test_configurations_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=f"AdaLoRAConfig: {message}"):
        adaptlora.AdaLoRAConfig(**FIELDS | fields)


def test_peft_s_defaults():
    peft = pytest.importorskip("peft")
    theirs, mine = peft.AdaLoraConfig(total_step=10), adaptlora.AdaLoRAConfig(total_step=10, target_modules=["first"])
    for field in ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "lora_alpha"):
        assert getattr(mine, field) == getattr(theirs, field)
    assert mine.r == mine.init_r and adaptlora.AdaLoRAConfig(**vars(mine)) == mine


def test_more_at_the_end_than_at_first_is_refused():
    model = Net()
    flags = [p.requires_grad for p in model.parameters()]
    config = adaptlora.AdaLoRAConfig(**FIELDS | {"target_r": 5, "rank_pattern": {"first": 3}})
    with pytest.raises(
        ValueError, match="target_r must leave at most the 9 triplets that there are, got 5 .* 10 in all"
    ):
        adaptlora.attach(model, config)
    assert [p.requires_grad for p in model.parameters()] == flags and type(model.first) is nn.Linear


def test_optimizers_whose_state_cannot_follow_are_refused_at_once():
    adapter = adaptlora.attach(Net(), adaptlora.AdaLoRAConfig(**FIELDS))
    randomise(adapter)
    with pytest.raises(TypeError, match="must be resizable, got LBFGS"):
        adapter.track(torch.optim.LBFGS(adapter.parameters()))
