"""DyLoRA: the drawn prefixes of training against a float64 loop of its own, and what is evaluated, saved and resumed."""

import collections
import copy
import math
import random

import pytest
import torch
from models import Net, batch, bert_batch, randomise, task_loss, tiny_bert
from test_lora_linear import FP64
from torch._dynamo.testing import CompileCounterWithBackend

import adaptlora
from adaptlora.methods.dylora import drawn_rank

R, ALPHA, LR, DECAY = 5, 7.0, 1e-2, 0.1
TARGETS = ["first", "second"]


def attached(model=None, **options):
    options = {"r": R, "lora_alpha": ALPHA, "target_modules": TARGETS} | options
    return adaptlora.attach(Net(FP64) if model is None else model, adaptlora.DyLoRAConfig(**options))


def optimizer_for(adapter, **options):
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=LR, weight_decay=DECAY, **options)
    adapter.track(optimizer)
    return optimizer


def train(adapter, optimizer, steps):
    dtype = adapter.model.classifier.weight.dtype
    for _ in range(steps):
        task_loss(adapter.model, dtype=dtype, seed=adapter.method.t).backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()


def outputs(model):
    with torch.no_grad():
        return model.eval()(batch(dtype=model.classifier.weight.dtype)[0])


class Reference:
    """Net with whole A (r, K) and B (N, r): prefixes by slicing, AdamW written out over the vectors that train."""

    def __init__(self, adapter, scale):
        self.net, self.scale, self.step = Net(FP64), scale, 0
        self.factors = {
            name: [factor.clone() for factor in layer.pair.whole()] for name, layer in adapter.layers.items()
        }
        self.moments = {
            name: [[torch.zeros_like(f), torch.zeros_like(f)] for f in both] for name, both in self.factors.items()
        }

    def forward(self, x, b, factors):
        def layer(name, x):
            base, (A, B) = self.net.get_submodule(name), factors[name]
            return base(x) + self.scale(b) * (x @ A[:b].t() @ B[:, :b].t())

        return self.net.classifier(torch.relu(layer("second", torch.relu(layer("first", x)))))

    def train(self, x, labels, b, frozen=False):
        leaves = {name: [f.clone().requires_grad_() for f in both] for name, both in self.factors.items()}
        loss = torch.nn.functional.cross_entropy(self.forward(x, b, leaves), labels)
        loss.backward()
        self.step += 1
        trained = slice(b - 1 if frozen else 0, b)
        for name, both in self.factors.items():
            for factor, leaf, moments in zip(both, leaves[name], self.moments[name], strict=True):
                rows = factor if factor is both[0] else factor.t()
                grad = leaf.grad if factor is both[0] else leaf.grad.t()
                first, second = moments if factor is both[0] else [m.t() for m in moments]
                # Moments of frozen vectors, where there are such, see gradients of zero.
                seen = slice(0, b)
                grad = torch.where((torch.arange(len(rows)) >= trained.start)[:, None], grad, 0)[seen]
                first[seen] = 0.9 * first[seen] + 0.1 * grad
                second[seen] = 0.999 * second[seen] + 0.001 * grad.square()
                rows[trained] *= 1 - LR * DECAY
                denominator = (second[trained] / (1 - 0.999**self.step)).sqrt() + 1e-8
                rows[trained] -= LR * first[trained] / (1 - 0.9**self.step) / denominator
        return loss.detach()


SCALES = {
    "alpha / b": ({}, lambda b: ALPHA / b),
    "alpha / r": ({"rescale": False}, lambda b: ALPHA / R),
    "alpha / root b": ({"use_rslora": True}, lambda b: ALPHA / math.sqrt(b)),
    "frozen": ({"frozen": True}, lambda b: ALPHA / b),
}


@pytest.mark.parametrize("foreach", [False, True], ids=["plain", "foreach"])
@pytest.mark.parametrize("case", SCALES)
def test_training_equals_the_definition(case, foreach):
    options, scale = SCALES[case]
    adapter = attached(seed=3, r_min=2, **options)
    randomise(adapter)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.pair.whole()[1].normal_(generator=torch.Generator().manual_seed(1))
    reference, optimizer = Reference(adapter, scale), optimizer_for(adapter, foreach=foreach)
    seen = set()
    for step in range(8):
        b = drawn_rank(3, step, 2, R)
        seen.add(b)
        assert adapter.ranks() == {"first": b, "second": b}
        x, labels = batch(dtype=FP64, seed=step)
        loss = torch.nn.functional.cross_entropy(adapter.model(x), labels)
        torch.testing.assert_close(loss, reference.train(x, labels, b, adapter.config.frozen))
        loss.backward()
        assert adapter.layers["first"].lora_A.grad.shape == (b, 13)
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
        for name, layer in adapter.layers.items():
            for found, expected in zip(layer.pair.whole(), reference.factors[name], strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert len(seen) > 2
    x = batch(dtype=FP64)[0]
    for b in (None, *range(1, R + 1)):
        adapter.set_rank(b)
        torch.testing.assert_close(outputs(adapter.model), reference.forward(x, b or R, reference.factors))


def test_vectors_behind_the_prefix_take_no_step():
    adapter = attached()
    optimizer = optimizer_for(adapter)
    train(adapter, optimizer, 9)
    pair = adapter.layers["first"].pair
    assert pair.rank == drawn_rank(0, 9, 1, R) == 3
    before = pair.parked()
    task_loss(adapter.model, dtype=FP64).backward()
    optimizer.step()
    assert "lora_A.exp_avg" in before and all(torch.equal(rows, before[key]) for key, rows in pair.parked().items())


def test_frozen_vectors_keep_their_values():
    adapter = attached(frozen=True, seed=1)
    optimizer = optimizer_for(adapter)
    train(adapter, optimizer, 6)
    layer = adapter.layers["first"]
    last = layer.rank - 1
    assert last == drawn_rank(1, 6, 1, R) - 1 == 2
    task_loss(adapter.model, dtype=FP64).backward()
    assert not layer.lora_A.grad[:last].any() and layer.lora_A.grad[last].any()
    before = [factor.clone() for factor in layer.pair.factors().values()]
    optimizer.step()
    assert torch.equal(layer.lora_A[:last], before[0][:last]) and torch.equal(
        layer.lora_B[:, :last], before[1][:, :last]
    )
    assert (layer.lora_A[last] != before[0][last]).all()
    optimizer.zero_grad()
    adapter.compact()
    task_loss(adapter.model, dtype=FP64).backward()
    assert layer.lora_B.grad.any(dim=0).all(), "once its ranks are final all of it trains"


def test_draws():
    found = collections.Counter(drawn_rank(7, step, 2, 5) for step in range(4000))
    assert found.keys() == {2, 3, 4, 5} and all(abs(count - 1000) < 5 * math.sqrt(750) for count in found.values())
    states = random.getstate(), torch.get_rng_state()
    assert [drawn_rank(0, step, 1, 8) for step in range(12)] == [2, 7, 5, 7, 1, 2, 1, 1, 7, 5, 8, 2]
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert [drawn_rank(1, step, 1, 8) for step in range(12)] != [drawn_rank(0, step, 1, 8) for step in range(12)]


def test_modules_of_other_ranks():
    """One b for all, and a module that has fewer vectors trains all of its own, scaled by its own rank."""
    adapter = attached(rank_pattern={"second": 2}, alpha_pattern={"second": 3.0}, seed=1)
    optimizer, seen = optimizer_for(adapter), set()
    for _ in range(8):
        b = drawn_rank(1, adapter.method.t, 1, R)
        assert adapter.ranks() == {"first": b, "second": min(b, 2)}
        assert adapter.layers["second"].running_scaling == pytest.approx(3.0 / min(b, 2))
        seen.add(b)
        train(adapter, optimizer, 1)
    assert max(seen) > 2 and 1 in seen
    adapter.set_rank(3)
    assert adapter.summary()["evaluated_ranks"] == {"first": 3, "second": 2}


def test_saved_and_merged_at_a_chosen_rank(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    adapter = attached()
    train(adapter, optimizer_for(adapter), 6)
    for rank in (None, 3):
        adapter.set_rank(rank)
        expected = outputs(adapter.model)
        adapter.save(tmp_path / str(rank))
        torch.testing.assert_close(outputs(peft.PeftModel.from_pretrained(Net(FP64), tmp_path / str(rank))), expected)
        loaded = adaptlora.load(Net(FP64), tmp_path / str(rank))
        assert set(loaded.ranks().values()) == {rank or R}
        torch.testing.assert_close(outputs(loaded.model), expected)
        torch.testing.assert_close(outputs(adapter.merge()), expected)
        adapter.unmerge()
    other = attached(seed=9)
    with pytest.raises(ValueError, match="^DyLoRA: first must have all of its 5 vectors, got 3"):
        other.load(tmp_path / "3")
    other.load(tmp_path / "None")
    adapter.set_rank(None)
    torch.testing.assert_close(outputs(other.model), outputs(adapter.model), rtol=0, atol=0)
    b = drawn_rank(9, 0, 1, R)
    assert other.ranks() == {"first": b, "second": b} and other.layers["first"].pair.capacity == R
    with torch.no_grad():
        adapter.layers["second"].pair.whole()[0][-1, 0] = torch.nan
    with pytest.raises(adaptlora.NonFiniteError, match="^save: second: lora_A must be finite"):
        adapter.save(tmp_path / "None")


def test_compact_keeps_the_chosen_prefix_for_good():
    adapter = attached()
    optimizer = optimizer_for(adapter)
    train(adapter, optimizer, 6)
    adapter.set_rank(3)
    before, bytes_before = outputs(adapter.model), adapter.summary()["optimizer_bytes"]
    adapter.compact()
    assert adapter.ranks() == {"first": 3, "second": 3} and adapter.method.phase == "final"
    assert torch.equal(outputs(adapter.model), before)
    adapter.model.train()
    torch.testing.assert_close(adapter.model(batch(dtype=FP64)[0]), before)
    summary = adapter.summary()
    assert summary["optimizer_bytes"] < bytes_before and summary["adapter_bytes"] == 8 * 3 * (13 + 17 + 17 + 11)
    train(adapter, optimizer, 4)
    assert adapter.ranks() == {"first": 3, "second": 3}
    with pytest.raises(ValueError, match=r"^set_rank: rank must be None or an integer in \[1, 3\], got 4"):
        adapter.set_rank(4)


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_run_resumes_exactly(frozen, compacted, tmp_path):
    def started():
        adapter = attached(Net(), frozen=frozen)
        return adapter, optimizer_for(adapter)

    through, optimizer = started()
    train(through, optimizer, 4)
    through.set_rank(2)
    if compacted:
        through.compact()
    path = adaptlora.save_checkpoint(tmp_path, through, optimizer, step=4)
    train(through, optimizer, 4)
    resumed, optimizer = started()
    adaptlora.load_checkpoint(path, resumed, optimizer)
    assert resumed.method.evaluated == 2 and resumed.method.final is compacted
    train(resumed, optimizer, 4)
    assert resumed.ranks() == through.ranks() and resumed.method.largest_ranks() == through.method.largest_ranks()
    for name, layer in through.layers.items():
        assert all(map(torch.equal, layer.pair.whole(), resumed.layers[name].pair.whole()))
        assert (layer.scaling, layer.running_scaling) == (
            resumed.layers[name].scaling,
            resumed.layers[name].running_scaling,
        )
    assert torch.equal(outputs(through.model), outputs(resumed.model))


def test_a_copy_and_a_module_state():
    adapter = attached()
    train(adapter, optimizer_for(adapter), 5)
    adapter.set_rank(4)
    copied, fresh = copy.deepcopy(adapter.model), attached()
    fresh.model.load_state_dict(adapter.model.state_dict())
    fresh.set_rank(4)
    for model in (copied, fresh.model):
        assert model.first.running_scaling == ALPHA / model.first.rank
        assert torch.equal(outputs(model), outputs(adapter.model))


def test_a_step_that_fails_is_made_again():
    """The next one that can be made draws what this one would have drawn."""
    adapter = attached()
    optimizer = optimizer_for(adapter)
    train(adapter, optimizer, 2)
    ranks = adapter.ranks()
    adapter.model.eval()
    with pytest.raises(ValueError, match="^step: the model must be in training mode"):
        adapter.step()
    assert adapter.method.t == 2 and adapter.ranks() == ranks
    adapter.model.train()
    adapter.step()
    assert adapter.ranks()["first"] == drawn_rank(0, 3, 1, R)


def test_all_ranks_are_compiled_once():
    """Once for training, and once for evaluation, which runs without gradients."""
    losses = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        adapter, counter = attached(r=8, frozen=True, lora_bias=True), CompileCounterWithBackend("aot_eager")
        optimizer, model = optimizer_for(adapter), adapter.model
        run = torch.compile(model, fullgraph=True, backend=counter) if compiled else model
        losses[compiled] = []
        with adaptlora.dynamic_ranks(adapter):
            for step in range(6):
                x, labels = batch(dtype=FP64, seed=step)
                loss = torch.nn.functional.cross_entropy(run(x), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                adapter.step()
                model.eval()
                with torch.no_grad():
                    losses[compiled] += [loss.detach(), torch.nn.functional.cross_entropy(run(x), labels)]
                model.train()
    assert counter.frame_count == 2
    torch.testing.assert_close(losses[True], losses[False])


def test_chosen_ranks_run_compiled():
    """Each chosen rank has its own scaling, alpha / rank."""
    torch._dynamo.reset()
    adapter = attached(r=8)
    randomise(adapter)
    model = adapter.model.eval()
    x, found = batch(dtype=FP64)[0], []
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rank in (None, 1, 2, None, 5):
        adapter.set_rank(rank)
        found.append(compiled(x).detach())
        torch.testing.assert_close(found[-1], model(x))
    assert torch.equal(found[0], found[3]) and not torch.allclose(found[0], found[1])


def test_trainer_evaluates_all_vectors_and_resumes(tmp_path):
    from transformers import Trainer, TrainingArguments

    data = [{key: value[i] for key, value in bert_batch(8).items()} for i in range(8)]

    def trainer():
        model = tiny_bert()
        adapter = attached(model, target_modules=["query", "value"], seed=5)
        arguments = TrainingArguments(
            tmp_path,
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            learning_rate=1e-2,
        )
        return adapter, Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[adapter.callback()])

    through, running = trainer()
    running.train()
    assert through.ranks()["bert.encoder.layer.0.attention.self.query"] == drawn_rank(5, 6, 1, R)
    loss = running.evaluate()["eval_loss"]
    through.model.eval()
    with torch.no_grad():
        assert loss == pytest.approx(through.model(**bert_batch(8)).loss.item(), rel=1e-5)
    resumed, running = trainer()
    running.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, layer in through.layers.items():
        assert all(map(torch.equal, layer.pair.whole(), resumed.layers[name].pair.whole()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_min": 0}, r"DyLoRAConfig: r_min must be an integer in \[1, r=5\], got 0"),
        ({"r_min": 6}, r"DyLoRAConfig: r_min must be an integer in \[1, r=5\], got 6"),
        ({"frozen": 1}, "DyLoRAConfig: frozen must be True or False, got 1"),
        ({"init_lora_weights": "pissa"}, 'DyLoRAConfig: init_lora_weights must be "kaiming": a prefix'),
        (
            {"r_min": 3, "rank_pattern": {".*": 2}},
            "DyLoRA: r_min must be at most the largest rank of a module, 2, got 3",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        attached(**options)


def test_refusals_of_states_and_of_other_methods():
    adapter = attached()
    state = adapter.state_dict()
    for field, value, message in (
        ("t", 1.5, "method's t, final and evaluated"),
        ("full", {}, "method's full must be of this adapter's modules"),
        ("full", {"first": [5], "second": [5, 1.4]}, r"method's full must be \[rank, scaling\] of first"),
    ):
        with pytest.raises(ValueError, match=f"^load_state_dict: {message}"):
            adapter.load_state_dict(state | {"method": state["method"] | {field: value}})
    for rank in (0, 6, 2.0, True):
        with pytest.raises(ValueError, match="^set_rank: rank must be None or an integer"):
            adapter.set_rank(rank)
    plain = adaptlora.attach(Net(), adaptlora.LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="^set_rank: the adapter must be DyLoRA's, got LoraConfig"):
        plain.set_rank(2)
