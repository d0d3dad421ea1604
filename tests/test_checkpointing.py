"""Activation checkpointing: what runs a second time in the backward pass drops what it dropped the first time."""

import copy

import pytest
import torch
import transformers
from models import bert_batch, tiny_bert
from torch import nn
from torch.utils.checkpoint import checkpoint

import adaptlora
from adaptlora.nn import LoraGroup, LoraLinear, NoRALinear, Outer

K = 12


def lora():
    return LoraLinear(nn.Linear(K, K), 4, scaling=2.0, dropout_p=0.3, capacity=8)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [LoraLinear(nn.Linear(K, K), rank, dropout_p=0.3, capacity=8) for rank in (4, 3)]
        self.group = LoraGroup(layers)

    def forward(self, x):
        first, second = self.group(x)
        return first * second.tanh()


def nora():
    base = nn.Linear(K, K)
    outer = Outer(*torch.linalg.svd(base.weight.detach()))
    layer = NoRALinear(base, 4, outer, scaling=2.0, dropout_p=0.3)
    layer.apply_residual()
    return layer


def quantised():
    torchao = pytest.importorskip("torchao.quantization")
    base = nn.Sequential(nn.Linear(K, K))
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    return LoraLinear(base[0], 4, scaling=2.0, dropout_p=0.3, capacity=8)


BLOCKS = [lora, Grouped, nora, quantised]


def stack(block) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(block() for _ in range(3)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) / 4)
    return model


def step(model, x, wrap) -> list[torch.Tensor]:
    """y, dx and the gradients of one forward and backward pass through `wrap(block, x)` of every block."""
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    y = x
    for block in model:
        y = wrap(block, y)
    y.tanh().square().mean().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    return [y.detach(), x.grad, *grads]


def change_ranks(model, rank: int) -> None:
    for i, layer in enumerate(module for module in model.modules() if isinstance(module, LoraLinear)):
        layer.pair.plan(max(1, rank - i)).commit()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_are_those_without(block, use_reentrant):
    """Bit for bit, while ranks change between the steps; the optimizer moves what NoRA keeps composed."""
    model, x = stack(block), torch.randn(5, K)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (model, twin)]
    for rank in (4, 7, 2, 5):
        results = []
        for m, wrap in ((model, lambda f, y: checkpoint(f, y, use_reentrant=use_reentrant)), (twin, lambda f, y: f(y))):
            if block is not nora:
                change_ranks(m, rank)
            results.append(step(m, x, wrap))
        torch.testing.assert_close(*results, atol=0, rtol=0)
        for optimizer, (_, _, *grads) in zip(optimizers, results, strict=True):
            parameters = optimizer.param_groups[0]["params"]
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_nora_recomputes_while_others_use_the_same_factors(use_reentrant):
    """The cache of composed factors changes hands between the first pass and the second: evaluation, another batch."""
    model, x = stack(nora), torch.randn(5, K)
    expected = step(copy.deepcopy(model), x, lambda f, y: f(y))

    def disturbed(f, y):
        y = checkpoint(f, y, use_reentrant=use_reentrant)
        state = torch.get_rng_state()
        with torch.no_grad():
            f(y)
        f.forget_composed()
        f(y.detach())
        torch.set_rng_state(state)
        return y

    torch.testing.assert_close(step(model, x, disturbed), expected, atol=0, rtol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_model_with_gradient_checkpointing_enabled(use_reentrant):
    grads = []
    for enabled in (False, True):
        model = tiny_bert().train()
        adapter = adaptlora.attach(
            model, adaptlora.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules="all-linear")
        )
        if enabled:
            # With reentrant checkpoints nothing trains where no input of a block needs a gradient.
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        model(**bert_batch()).loss.backward()
        grads.append([factor.grad for factor in adapter.factors()])
    torch.testing.assert_close(*grads, atol=0, rtol=0)


@pytest.mark.parametrize("config", ["NormAL", "La-LoRA", "NoRA"])
def test_trainer(config, tmp_path):
    """Through a clip, or ranks that change in most steps: the same losses, ranks and factors."""
    shared = {"lora_alpha": 8, "lora_dropout": 0.2, "target_modules": "all-linear"}
    results = []
    for enabled in (False, True):
        model, batch = tiny_bert(), bert_batch(size=8)
        method = {
            "NormAL": adaptlora.NormALConfig(r=6, target_r=3, t_p=2, t_c=4, **shared),
            "La-LoRA": adaptlora.LaLoRAConfig(r=6, gamma=2.0, **shared),
            "NoRA": adaptlora.NoRAConfig(r=4, r_out=8, **shared),
        }[config]
        adapter = adaptlora.attach(model, method)
        rows = [{key: value[i] for key, value in batch.items()} for i in range(8)]
        arguments = transformers.TrainingArguments(
            tmp_path, max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, use_cpu=True,
            report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, gradient_checkpointing=enabled,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[adapter.callback()])
        trainer.train()
        assert model.is_gradient_checkpointing == enabled
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((losses, adapter.ranks(), [factor.detach() for factor in adapter.factors()]))
    (losses, ranks, factors), (expected_losses, expected_ranks, expected) = results
    assert losses == expected_losses and ranks == expected_ranks
    assert config == "NoRA" or len(set(ranks.values())) > 1
    torch.testing.assert_close(factors, expected, atol=0, rtol=0)


@pytest.mark.parametrize("block", [lora, Grouped, nora], ids=lambda block: block.__name__)
def test_compiled(block):
    """Checkpointed blocks under torch.compile, ranks changing: the gradients without either."""
    torch._dynamo.reset()
    model, x = stack(block), torch.randn(5, K)

    def blockwise(y):
        for part in model:
            y = checkpoint(part, y, use_reentrant=False)
        return y

    compiled = torch.compile(blockwise, fullgraph=True, backend="aot_eager")
    with adaptlora.dynamic_ranks(model):
        for rank in (4, 6, 1):
            if block is not nora:
                change_ranks(model, rank)
            torch.manual_seed(5)
            compiled(x).tanh().square().mean().backward()
            grads = [p.grad for p in model.parameters() if p.requires_grad]
            model.zero_grad()
            _, _, *expected = step(model, x, lambda f, y: f(y))
            torch.testing.assert_close(grads, expected)
    torch._dynamo.reset()
