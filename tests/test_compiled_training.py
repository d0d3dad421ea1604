"""Whole transformers models under torch.compile while their ranks change: one compilation, whatever the ranks become."""

import contextlib
import copy
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from models import Net, bert_batch, task_loss, tiny_bert
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import adaptlora


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def bert():
    model = tiny_bert()
    # The model finds this out in its first call, and dynamo compiles its second one anew.
    model.config.problem_type = "single_label_classification"
    return model, bert_batch()


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=50
    )
    ids = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(0))
    return transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


# Inductor's programs come out of aot_eager's, so that one of them for each model is enough.
BUILDS = [
    pytest.param(bert, "aot_eager", id="bert-aot_eager"),
    pytest.param(llama, "inductor", id="llama-inductor"),
]
SHARED = {"lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1}
METHODS = {
    # r as the hidden size, so that ranks and features are equal at first.
    "NormAL": adaptlora.NormALConfig(r=16, target_r=4, t_p=2, t_c=4, **SHARED),
    "La-LoRA": adaptlora.LaLoRAConfig(r=8, gamma=2.0, temperature=0.2, group_by="module", **SHARED),
    "NoRA": adaptlora.NoRAConfig(r=4, r_out=8, **SHARED),
}


def train(build, config, *, counter=None, settings=True, accumulate=1, evaluate=False, steps=8):
    """Losses, the ranks after each step, and the factors at the end; with a `counter`, of the compiled model."""
    model, batch = build()
    adapter = adaptlora.attach(model, config)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=2e-2)
    adapter.track(optimizer)
    run = model if counter is None else torch.compile(model, fullgraph=True, backend=counter)
    context = adaptlora.dynamic_ranks(adapter) if settings else contextlib.nullcontext()
    losses, ranks = [], [tuple(adapter.ranks().values())]
    torch.manual_seed(1)
    with context:
        for step in range(steps):
            model.train()
            # Strong decay makes norms, and La-LoRA's budget with them, fall again.
            optimizer.param_groups[0]["weight_decay"] = 0.0 if step < steps // 2 else 20.0
            for _ in range(accumulate):
                loss = run(**batch).loss / accumulate
                loss.backward()
                losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            adapter.step(loss)
            ranks.append(tuple(adapter.ranks().values()))
            if evaluate:
                model.eval()
                with torch.no_grad():
                    losses.append(run(**batch).loss)
    return losses, ranks, [factor.detach() for factor in adapter.factors()]


def check_like_eager(build, config, *, compilations: int, backend="aot_eager", **options):
    """Compiled as often as that, and to the rounding of other kernels what the uncompiled model does: returns its ranks."""
    counter = CompileCounterWithBackend(backend)
    # Inductor draws random numbers of its own, other ones than eager's, unless it is told not to.
    with torch._inductor.config.patch(fallback_random=True):
        losses, ranks, factors = train(build, config, counter=counter, **options)
    assert counter.frame_count == compilations
    expected_losses, expected_ranks, expected = train(build, config, **options)
    assert ranks == expected_ranks
    torch.testing.assert_close(losses, expected_losses)
    # AdamW's first steps take the sign of the smallest gradient for a whole step.
    torch.testing.assert_close(factors, expected, atol=1e-4, rtol=1e-3)
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize(("build", "backend"), BUILDS)
def test_a_clip_compiles_nothing_anew(build, backend):
    ranks = check_like_eager(build, METHODS["NormAL"], compilations=1, backend=backend)
    assert ranks[0] != ranks[-1] and 1 in ranks[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("build", "backend"), BUILDS)
def test_ranks_that_change_in_every_step_compile_nothing_anew(build, backend):
    """From rank 1 everywhere: up, apart from each other, down again, and to rank 1."""
    ranks = check_like_eager(build, METHODS["La-LoRA"], compilations=1, backend=backend, steps=10)
    changes = [pair for steps in itertools.pairwise(ranks) for pair in zip(*steps, strict=True)]
    assert set(ranks[0]) == {1} and len(set(ranks)) > 4
    assert any(old == 1 < new for old, new in changes) and any(old > new > 1 for old, new in changes)
    assert any(old > new == 1 for old, new in changes)


def test_composed_factors_compile_once():
    check_like_eager(llama, METHODS["NoRA"], compilations=1, steps=4)


@pytest.mark.parametrize("method", ["NormAL", "La-LoRA"])
def test_accumulation_compiles_nothing_anew(method):
    check_like_eager(llama, METHODS[method], compilations=1, accumulate=3, steps=6)


def test_evaluation_without_gradients_is_compiled_once_more():
    """Gradients on and off, training and evaluation mode are two programs; each is compiled for all ranks."""
    check_like_eager(llama, METHODS["La-LoRA"], compilations=2, evaluate=True)


def test_without_settings_each_new_rank_compiles():
    """What the context is there for: the same training, counted without it."""
    counter = CompileCounterWithBackend("eager")
    train(llama, METHODS["La-LoRA"], counter=counter, settings=False, steps=4)
    assert counter.frame_count > 2


def llama_loss(model, length):
    ids = torch.arange(2 * length).view(2, length)
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize(
    ("build", "loss_of", "backend"),
    [
        pytest.param(lambda: llama()[0], llama_loss, "aot_eager", id="aot_eager"),
        # g++ takes two seconds for each of inductor's kernels, of which a transformer has dozens.
        pytest.param(Net, task_loss, "inductor", marks=pytest.mark.slow, id="inductor"),
    ],
)
def test_sequences_of_other_lengths(build, loss_of, backend):
    """Sizes of batches are dynamo's own business: it compiles once more at the second length, for all."""
    model = build()
    adapter = adaptlora.attach(model, METHODS["La-LoRA"])
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with adaptlora.dynamic_ranks(adapter), torch._inductor.config.patch(fallback_random=True):
        for rank, length in enumerate([9, 7, 4, 12, 9, 5]):
            for i, layer in enumerate(adapter.layers.values()):
                layer.pair.plan((rank + i) % 9).commit()
            torch.manual_seed(rank)
            loss = loss_of(compiled, length)
            grads = torch.autograd.grad(loss, adapter.factors())
            torch.manual_seed(rank)
            expected = loss_of(model, length)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(grads, torch.autograd.grad(expected, adapter.factors()))
    assert counter.frame_count == 2


def test_a_factor_that_has_a_gradient_when_it_is_compiled():
    """As after a penalty's own backward pass."""
    layer = adaptlora.nn.LoraLinear(nn.Linear(12, 10), 1)
    layer(torch.randn(3, 12)).sum().backward()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with adaptlora.dynamic_ranks(layer):
        for rank in (1, 5, 0, 2):
            layer.pair.plan(rank).commit()
            compiled(torch.randn(3, 12)).sum().backward()
    assert counter.frame_count == 1


def test_entering_again_and_going_on_outside_compile_nothing_anew():
    layer = adaptlora.nn.LoraLinear(nn.Linear(12, 10), 4, capacity=8)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(3, 12)

    def run(*ranks):
        for rank in ranks:
            layer.pair.plan(rank).commit()
            torch.testing.assert_close(compiled(x), layer(x))

    with adaptlora.dynamic_ranks(layer):
        run(4, 1, 0)
    run(7, 0)
    with adaptlora.dynamic_ranks(layer):
        run(1, 8)
    assert counter.frame_count == 1


class CountGraphs(transformers.TrainerCallback):
    def __init__(self):
        self.graphs = []

    def on_step_end(self, args, state, control, **kwargs):
        self.graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_trainer_with_torch_compile(tmp_path):
    """The callback alone: what is compiled by the second step serves all the others, the clip among them."""

    def run(compiled: bool):
        torch._dynamo.reset()
        model, batch = bert()
        adapter = adaptlora.attach(model, METHODS["NormAL"])
        rows = [{key: value[i] for key, value in batch.items()} for i in range(4)]
        arguments = transformers.TrainingArguments(
            tmp_path, max_steps=6, per_device_train_batch_size=2, use_cpu=True, report_to=[], save_strategy="no",
            logging_steps=1, disable_tqdm=True, torch_compile=compiled, torch_compile_backend="aot_eager" if compiled else None,
        )  # fmt: skip
        count = CountGraphs()
        torch._dynamo.utils.counters.clear()
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[adapter.callback(), count])
        trainer.train()
        assert len(count.graphs) == 6 and len({*count.graphs[1:]}) == 1 and (count.graphs[0] > 0) == compiled
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, adapter.ranks(), [factor.detach() for factor in adapter.factors()]

    losses, ranks, factors = run(compiled=True)
    expected_losses, expected_ranks, expected = run(compiled=False)
    assert ranks == expected_ranks and len(set(ranks.values())) > 1
    torch.testing.assert_close(losses, expected_losses, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(factors, expected, atol=1e-4, rtol=1e-3)


def test_marks_are_taken_back():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    adapter = adaptlora.attach(model, adaptlora.LoraConfig(r=2, target_modules="all-linear"))
    torch._dynamo.maybe_mark_dynamic(adapter.factors()[0], 1)
    torch._dynamo.maybe_mark_dynamic(adapter.factors()[1], [0, 1])
    before = [copy.deepcopy(vars(factor)) for factor in adapter.factors()]
    with pytest.raises(ZeroDivisionError), adaptlora.dynamic_ranks(adapter), adaptlora.dynamic_ranks(model):
        for layer in adapter.layers.values():
            for factor, dimension in ((layer.lora_A, 0), (layer.lora_B, 1)):
                assert dimension in factor._dynamo_weak_dynamic_indices
        1 / 0  # noqa: B018
    assert [vars(factor) for factor in adapter.factors()] == before


def test_what_is_neither_adapter_nor_model():
    rule = "dynamic_ranks: adapted must be an Adapter or an nn.Module, got int"
    with pytest.raises(TypeError, match=rule), adaptlora.dynamic_ranks(3):
        pass


def test_two_threads_that_enter_and_leave_in_turn():
    """Outside, and in a thread that never was within, sizes are compared as torch compares them."""
    from torch.fx.experimental import _config, symbolic_shapes

    from adaptlora.integrations.compile import _compare_sizes

    seen = {}

    def oblivious():
        found = []
        original = symbolic_shapes.guard_or_true
        symbolic_shapes.guard_or_true = lambda expression: found.append(_config.backed_size_oblivious)
        try:
            with _config.patch(backed_size_oblivious=True):
                _compare_sizes(True)
        finally:
            symbolic_shapes.guard_or_true = original
        return found[0]

    first, second = adaptlora.dynamic_ranks(), adaptlora.dynamic_ranks()
    first.__enter__()
    with ThreadPoolExecutor(1) as other:
        seen["other thread, outside"] = other.submit(oblivious).result()
        other.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        seen["this thread, outside"] = oblivious()
        seen["other thread, within"] = other.submit(oblivious).result()
        other.submit(second.__exit__, None, None, None).result()
        seen["other thread, outside again"] = other.submit(oblivious).result()
    assert seen == {
        "other thread, outside": True,
        "this thread, outside": True,
        "other thread, within": False,
        "other thread, outside again": True,
    }
