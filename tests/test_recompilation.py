"""torch.compile and ranks that change: one compilation in all, whatever the number of changes."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import adaptlora
from adaptlora.nn import LoraGroup, LoraLinear
from adaptlora.ops import lora_delta_, lora_group, lora_linear

K, N = 24, 20
# Ten changes, to rank 1 and back among them, down to 0 and up beyond the first.
RANKS = [8, 7, 5, 1, 2, 6, 1, 3, 13, 4, 0]


def linear(x, weight, A, B, *_):
    return lora_linear(x, weight, None, A, B, scaling=2.0, dropout_p=0.1)


def group(x, weight, A, B, A2, B2):
    return sum(lora_group(x, [weight] * 2, [None] * 2, [A, A2], [B, B2], scalings=[1.0, 2.0], dropout_p=0.1))


def delta(x, weight, A, B, *_):
    return lora_delta_(x @ weight.t(), x, A, B, scaling=2.0, dropout_p=0.1)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def factors(R: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank-major, as RankedPair's."""
    store_A, store_B = torch.randn(16, K), torch.randn(16, N)
    A, B = store_A[:R].detach().requires_grad_(), store_B[:R].t().detach().requires_grad_()
    torch._dynamo.maybe_mark_dynamic(A, 0)
    torch._dynamo.maybe_mark_dynamic(B, 1)
    return A, B


def compilations(op) -> int:
    """How often torch.compile compiles `op` over RANKS; results and gradients are compared with the uncompiled op's."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op, fullgraph=True, backend=counter)
    x, weight = torch.randn(12, K, requires_grad=True), torch.randn(N, K)
    with adaptlora.dynamic_ranks():
        for R in RANKS:
            operands = [*factors(R), *factors((R + 5) % 14)]
            leaves = [x, *operands[: 4 if op is group else 2]]
            torch.manual_seed(R)
            y = compiled(x, weight, *operands)
            grads = torch.autograd.grad(y.square().sum(), leaves)
            torch.manual_seed(R)
            expected = op(x, weight, *operands)
            torch.testing.assert_close(y, expected)
            for ours, theirs in zip(grads, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
                torch.testing.assert_close(ours, theirs)
    return counter.frame_count


@pytest.mark.parametrize("op", [linear, group, delta], ids=lambda op: op.__name__)
def test_ops_compile_once_for_any_number_of_ranks(op):
    assert compilations(op) == 1


@pytest.mark.parametrize("grouped", [False, True])
def test_layers_compile_once_while_their_ranks_change(grouped):
    """Views of a store that narrow and grow: the parameters stay the same objects."""
    layers = [LoraLinear(nn.Linear(K, N), 13, scaling=2.0, dropout_p=0.1) for _ in range(2)]
    module = LoraGroup(layers) if grouped else nn.ModuleList(layers)
    parameters = [parameter for layer in layers for parameter in layer.pair.parameters()]

    def run(x):
        return sum(module(x)) if grouped else layers[0](x) + layers[1](x)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    x = torch.randn(12, K)
    with adaptlora.dynamic_ranks(module):
        for R in RANKS:
            for layer, rank in zip(layers, (R, (R + 5) % 14), strict=True):
                layer.pair.plan(rank).commit()
            torch.manual_seed(R)
            compiled(x).sum().backward()
            grads = [parameter.grad for parameter in parameters]
            module.zero_grad()
            torch.manual_seed(R)
            run(x).sum().backward()
            for ours, parameter in zip(grads, parameters, strict=True):
                torch.testing.assert_close(ours, parameter.grad)
            module.zero_grad()
    assert counter.frame_count == 1


@pytest.mark.parametrize("grouped", [False, True])
def test_scalings_that_change_compile(grouped):
    """From the second value on scaling is traced as a symbol; results and gradients are the uncompiled layers'."""
    layers = [LoraLinear(nn.Linear(K, N), 4, scaling=1.0, dropout_p=0.0) for _ in range(2)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    module = LoraGroup(layers) if grouped else nn.ModuleList(layers[:1])

    def run(x):
        return sum(module(x)) if grouped else module[0](x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(12, K)
    for scaling in (1.0, 2.0, -0.5):
        layers[0].scaling = scaling
        y, expected = compiled(x), run(x)
        torch.testing.assert_close(y, expected)
        factors = layers[0].lora_A, layers[0].lora_B
        ours, theirs = (torch.autograd.grad(out.square().sum(), factors) for out in (y, expected))
        torch.testing.assert_close(ours, theirs)


def test_blocks_of_other_scalings_compile():
    """Three blocks, each compiled whole by itself, whose code is one: alpha_pattern gives each another scaling."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(K, K)) for _ in range(3)))
    patterns = {"0.0": 4, "1.0": 8, "2.0": 16}
    adapter = adaptlora.attach(model, adaptlora.LoraConfig(r=4, target_modules="all-linear", alpha_pattern=patterns))
    for layer in adapter.layers.values():
        nn.init.normal_(layer.lora_B)
    x = torch.randn(3, K)
    expected = model(x)
    for block in model:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("scaling", [torch.inf, -torch.inf, torch.nan])
def test_scalings_that_are_not_finite_are_refused_while_compiling(scaling):
    layer = LoraLinear(nn.Linear(K, N), 4, scaling=1.0, dropout_p=0.0)
    compiled, x = torch.compile(layer, fullgraph=True, backend="eager"), torch.randn(2, K)
    for layer.scaling in (1.0, 2.0):
        compiled(x)
    layer.scaling = scaling
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"scaling must be a finite number, got {scaling}"):
        compiled(x)


def test_settings_are_restored():
    from torch.fx.experimental import _config as shapes

    def settings():
        return torch._dynamo.config.force_parameter_static_shapes, shapes.use_duck_shape, shapes.backed_size_oblivious

    before = settings()
    with pytest.raises(ZeroDivisionError), adaptlora.dynamic_ranks():
        assert settings() == (False, False, True)
        1 / 0  # noqa: B018
    assert settings() == before
