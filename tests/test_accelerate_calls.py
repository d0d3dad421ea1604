"""Which calls of an accelerated layer the ops take, and which are left to PEFT's forward, with its results and its errors."""

import copy

import peft
import pytest
import torch
from accelerated_layers import (
    Calls,
    K,
    M,
    N,
    assert_as_peft,
    layer_of,
    linear_model,
    quantised_model,
    results,
    with_lora,
)
from test_quantised_bases import bitsandbytes_nf4, torchao_int8
from torch import nn

import adaptlora

TWO = ("first", "second")


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def accelerated(model=None, **options):
    model = with_lora(linear_model() if model is None else model, **options)
    adaptlora.accelerate(model)
    return model


def peft_s(model):
    """The same model without acceleration."""
    model = copy.deepcopy(model)
    adaptlora.restore(model)
    return model


def test_mixed_batches(calls):
    model, x = accelerated(adapters=TWO).eval(), torch.randn(3, K)
    model.set_adapter("first")
    names = ["first", "__base__", "second"]
    assert torch.equal(model(x, adapter_names=names), peft_s(model)(x, adapter_names=names))
    assert not calls.take()
    model(x)
    assert calls.take() == ["lora_linear"]
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layer_of(model)(x, adapter_names=names[:2])


def add_hook(module):
    module.register_forward_hook(lambda module, args, y: 2 * y)


def add_pre_hook(module):
    module.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def add_backward_hook(module):
    module.register_full_backward_hook(lambda module, dx, dy: tuple(2 * d for d in dx))


def add_backward_pre_hook(module):
    module.register_full_backward_pre_hook(lambda module, dy: tuple(2 * d for d in dy))


def replace_forward(module):
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


CHANGES = [add_hook, add_pre_hook, add_backward_hook, add_backward_pre_hook, replace_forward]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_dropout"])
def test_hooks_of_an_adapter_run(calls, part, change):
    """In PEFT's forward; another adapter's calls are not touched by them."""
    model, x, dy = accelerated(adapters=TWO, lora_dropout=0.1).eval(), torch.randn(M, K), torch.randn(M, N)
    theirs = peft_s(model)
    for changed in (model, theirs):
        change(getattr(layer_of(changed), part)["first"])
    for active, made in (("first", 0), ("second", 1)):
        model.set_adapter(active)
        theirs.set_adapter(active)
        ours, expected = results(model, x, dy), results(theirs, x, dy)
        assert len(calls.take()) == made
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, msg=name)
    what = "has hooks, or a forward of its own"
    assert adaptlora.accelerate(model).kept == {"linear": f"{part} of adapter 'first' {what}"}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("make", [linear_model, lambda: quantised_model(bitsandbytes_nf4)], ids=["plain", "nf4"])
def test_hooks_of_the_base_run(calls, make, change):
    model, x, dy = accelerated(make()), torch.randn(M, K), torch.randn(M, N)
    theirs = peft_s(model)
    for changed in (model, theirs):
        change(layer_of(changed).base_layer)
    ours, expected = results(model, x, dy), results(theirs, x, dy)
    assert calls.take() == ["lora_delta_"]
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_what_a_hook_of_the_base_keeps_is_not_written_to(calls):
    model, x, kept = accelerated(), torch.randn(M, K), []
    base = layer_of(model).base_layer
    base.register_forward_hook(lambda module, args, y: kept.append(y))
    model(x)
    assert calls.take() == ["lora_delta_"]
    assert torch.equal(kept[0], nn.functional.linear(x, base.weight, base.bias))


def test_a_forward_on_the_instance(calls):
    """accelerate's hooks keep the forward that they find: PEFT's before, ours after, and ours goes on as PEFT's after restore."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    x, before, after = torch.randn(M, K), with_lora(linear_model()), accelerated()
    for model in (before, after):
        add_hook_to_module(layer_of(model), ModelHook())
        expected = adaptlora.Acceleration((), {"linear": "its forward was replaced on the instance"})
        assert adaptlora.accelerate(model) == expected
        model(x)
    assert calls.take() == ["lora_linear"]
    assert adaptlora.restore(after) == ("linear",)
    assert torch.equal(after(x), peft_s(after)(x)) and not calls.take()


class Saving(nn.Linear):
    """A linear layer of another class, whose backward pass needs its result."""

    def forward(self, x):
        return super().forward(x).tanh()


def test_a_base_of_another_class(calls):
    model = accelerated()
    layer = layer_of(model)
    layer.base_layer.__class__ = Saving
    assert_as_peft(model, torch.randn(2, 9, K))
    assert calls.take() == ["lora_delta_"]


def test_a_base_that_is_a_layer_of_peft_s(calls):
    model = peft.PeftMixedModel(linear_model(), peft.LoHaConfig(target_modules=["linear"], init_weights=False), "loha")
    model.add_adapter("lora", peft.LoraConfig(target_modules=["linear"], init_lora_weights=False))
    model.set_adapter(["loha", "lora"])
    x = torch.randn(M, K)
    expected = model(x)
    found = adaptlora.accelerate(model)
    torch.testing.assert_close(model(x), expected)
    assert len(found.accelerated) == len(calls.take())


def test_parametrised_factors(calls):
    from torch.nn.utils import parametrize

    model, x = accelerated(), torch.randn(M, K)
    parametrize.register_parametrization(layer_of(model).lora_A["default"], "weight", nn.Tanh())
    found, expected = model(x), peft_s(model)(x)
    assert torch.equal(found, expected) and not calls.take()
    parametrize.register_parametrization(layer_of(model).base_layer, "weight", nn.Tanh())
    assert torch.equal(model(x), peft_s(model)(x)) and not calls.take()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: layer.scaling.update(default=float("inf")), "scaling of adapter 'default' is inf"),
        (lambda layer: layer.scaling.update(default=torch.ones(N)), "scaling of adapter 'default' is tensor"),
        (
            lambda layer: setattr(layer.lora_dropout["default"], "p", 1.0),
            "lora_dropout of adapter 'default' is Dropout",
        ),
        (
            lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.5)}),
            "lora_dropout of adapter 'default' is AlphaDropout, not Dropout",
        ),
        (
            lambda layer: layer.lora_A.update({"default": nn.Linear(K, 5)}),
            "lora_A of adapter 'default' has a bias",
        ),
        (
            lambda layer: layer.lora_A.update({"default": nn.LazyLinear(5, bias=False)}),
            "lora_A of adapter 'default' is LazyLinear, not Linear",
        ),
        (
            lambda layer: layer.lora_B.to(torch.float8_e4m3fn),
            "lora_B of adapter 'default' holds Parameter of torch.float8_e4m3fn",
        ),
    ],
    ids=range(7),
)
def test_what_the_ops_do_not_have(calls, change, reason):
    model, x = accelerated(lora_dropout=0.2), torch.randn(M, K)
    change(layer_of(model))
    found = adaptlora.accelerate(model)
    assert found.accelerated == () and found.kept["linear"].startswith(reason)
    calls.take()
    if "float8" not in reason:
        model(x)
    assert not calls.take()


def test_dtypes_that_peft_casts(calls):
    """x and factors of other dtypes go through PEFT's casts, with its results and its errors."""
    model = accelerated(linear_model(torch.float64))
    layer, x = layer_of(model), torch.randn(M, K, dtype=torch.float64)
    layer.lora_A.to(torch.bfloat16), layer.lora_B.to(torch.bfloat16)
    assert torch.equal(model(x), peft_s(model)(x)) and not calls.take()
    with pytest.raises(RuntimeError, match="same dtype"):
        model(x.float())
    layer.lora_A.float(), layer.lora_B.float()
    model(x)
    assert calls.take() == ["lora_linear"]
    with peft.helpers.disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="same dtype"):
        model(x)
    assert not calls.take()


def test_torch_func_and_forward_mode_derivatives(calls):
    from torch.autograd import forward_ad

    model, x = accelerated(), torch.randn(4, 3, K)
    expected = peft_s(model)(x)
    torch.testing.assert_close(torch.func.vmap(model)(x), expected)
    gradient = torch.func.grad(lambda x: model(x).sum())(x)
    assert gradient.shape == x.shape
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, x))).tangent
    torch.testing.assert_close(tangent, expected - model(torch.zeros(K)), rtol=1e-4, atol=1e-4)
    assert calls.take() == ["lora_linear"]


def test_second_derivatives_are_refused():
    model, x = accelerated(), torch.randn(M, K, requires_grad=True)
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        dx.sum().backward()


def test_global_hooks_see_peft_s_modules(calls):
    seen = []
    model, x = accelerated(), torch.randn(M, K)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
    try:
        model(x)
    finally:
        handle.remove()
    assert seen.count("Linear") == 3 and not calls.take()


@pytest.mark.parametrize(
    "x", [torch.ones(M, K + 1), torch.tensor(1.0), torch.ones(M, K, dtype=torch.int64)], ids=["K", "0-dim", "int64"]
)
@pytest.mark.parametrize("make", [linear_model, lambda: quantised_model(torchao_int8)], ids=["plain", "torchao_int8"])
def test_errors_for_a_wrong_x_are_those_of_peft_s_layer(make, x):
    model = accelerated(make())
    with pytest.raises((RuntimeError, IndexError)) as theirs:
        peft_s(model)(x)
    with pytest.raises(theirs.type) as ours:
        model(x)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_need_no_op_of_ours(strict):
    model, x = accelerated().eval(), torch.randn(M, K)
    program = torch.export.export(model, (x,), strict=strict)
    assert not any("adaptlora" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (linear_model, {"lora_dropout": 0.3}),
        (linear_model, {"lora_dropout": 0.3, "adapters": TWO, "lora_bias": True}),
        (lambda: quantised_model(torchao_int8), {}),
    ],
    ids=["one", "two", "torchao_int8"],
)
def test_compiled_without_graph_breaks(make, options):
    model = accelerated(make(), **options).eval()
    x, dy = torch.randn(3, 9, K), torch.randn(3, 9, N)
    expected = results(model, x, dy)
    torch._dynamo.reset()
    run = copy.copy(model)
    run.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    for name, value in results(run, x, dy).items():
        torch.testing.assert_close(value, expected[name], msg=name)
    torch.compile(model.train(), backend="aot_eager", fullgraph=True)(x).sum().backward()


def test_a_compiled_model_follows_accelerate_and_restore():
    model, x = with_lora(linear_model()).eval(), torch.randn(M, K)
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = compiled(x)
    adaptlora.accelerate(model)
    torch.testing.assert_close(compiled(x), expected)
    adaptlora.restore(model)
    assert torch.equal(compiled(x), expected)
    assert ["adaptlora" in graph for graph in graphs][:2] == [False, True]


def test_threads():
    """Calls share nothing: each thread's results are its own."""
    from concurrent.futures import ThreadPoolExecutor

    model = accelerated()
    xs = [torch.randn(M, K) for _ in range(8)]
    with torch.no_grad():
        expected = [model(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: model(x).detach(), xs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
