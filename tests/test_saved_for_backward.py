"""What the layers keep for their backward pass: x for dA alone, S for dB and dE alone, and the gradients without the other."""

import gc
import weakref

import pytest
import test_lora_delta
import test_lora_linear
import torch
import torch.utils.flop_counter
from numerics import assert_all_accurate
from test_lora_delta import DeltaCase
from test_lora_group import QKV, eager_group, group, samples_of
from test_lora_group import call as call_group
from test_lora_linear import BF16, FP32, FP64, SCALING, SEED, Case
from torch.utils.checkpoint import checkpoint

import adaptlora.ops.flops  # noqa: F401
from adaptlora.ops import _backend, lora_delta_, lora_group, lora_linear

ROUTES = ("direct", "dispatched", "reference")
SEEDS = [SEED, 2, 3]


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    """The way that eager calls take: to C++ at once, through the registered op to C++, or through it to the reference."""
    if request.param != "reference" and _backend.extension() is None:
        pytest.skip("the C++ extension adaptlora._C is not built")
    monkeypatch.setenv("ADAPTLORA_BACKEND", "reference" if request.param == "reference" else "cpp")
    if request.param == "dispatched":
        monkeypatch.setattr(_backend, "direct", lambda tensor: None)
    return request.param


def linear(samples, function=lora_linear, p=0.0):
    return test_lora_linear.eager(**_alone(samples, p)) if function == "eager" else lora_linear(**_alone(samples, p))


def _alone(samples, p):
    names = ("x", "weight", "bias", "lora_A", "lora_B", "rank_scale")
    return {name: samples[0][name] for name in names} | {"scaling": SCALING, "dropout_p": p, "seed": SEED}


def delta(samples, function=lora_delta_, p=0.0):
    (sample,) = samples
    y = torch.zeros_like(sample["dy"])
    names = ("x", "lora_A", "lora_B", "rank_scale")
    options = {name: sample[name] for name in names} | {"scaling": SCALING, "dropout_p": p, "seed": SEED}
    return test_lora_delta.eager(y, **options) if function == "eager" else lora_delta_(y, **options)


def several(samples, function=lora_group, p=0.0):
    options = {"dropout_p": p, "seeds": SEEDS} if p else {}
    return torch.cat(call_group(samples, eager_group if function == "eager" else lora_group, **options), -1)


OPS = {
    "lora_linear": (linear, lambda **fields: [Case(**fields).sample()]),
    "lora_delta_": (delta, lambda **fields: [DeltaCase(**fields).sample()]),
    "lora_group": (several, lambda **fields: samples_of(group(*QKV, **fields))),
}


def made(op: str, trained=("lora_B", "rank_scale"), **fields) -> list[dict]:
    """The operands of each module, of which `trained` require gradients; x, which all share, is a leaf that does."""
    samples = OPS[op][1](**fields)
    x = samples[0]["x"].requires_grad_()
    return [
        {
            name: t if t is None else x if name == "x" else t.requires_grad_(name in trained)
            for name, t in sample.items()
        }
        for sample in samples
    ]


def run(op: str, samples: list[dict], p: float, function=None, dtype=None, x=None):
    """(y, {operand: the gradient}) for the dy's of the samples; in float64 with `dtype`."""
    if dtype is not None:
        leaf = samples[0]["x"].detach().to(dtype).requires_grad_()
        samples = [
            {
                name: t if t is None else leaf if name == "x" else t.detach().to(dtype).requires_grad_(t.requires_grad)
                for name, t in sample.items()
            }
            for sample in samples
        ]
    leaf = samples[0]["x"]
    given = samples if x is None else [{**sample, "x": x(leaf)} for sample in samples]
    y = OPS[op][0](given, function, p)
    leaves = {"x": leaf}
    for i, sample in enumerate(samples):
        leaves |= {f"{name} {i}": t for name, t in sample.items() if t is not None and t.requires_grad and name != "x"}
    grads = torch.autograd.grad(y, list(leaves.values()), torch.cat([sample["dy"] for sample in samples], -1))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


class Kept:
    """Within it, the storages of tensors that autograd saves, and their shapes."""

    def __init__(self):
        self.storages, self.shapes = set(), []

    def pack(self, tensor):
        self.storages.add(tensor.untyped_storage().data_ptr())
        self.shapes.append(tuple(tensor.shape))
        return tensor

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


def kept_of(op: str, samples: list[dict], p: float) -> tuple[bool, bool]:
    """Whether x, and whether S, was saved."""
    with Kept() as kept:
        OPS[op][0](samples, None, p)
    x, rank = samples[0]["x"], sum(sample["lora_A"].shape[0] for sample in samples)
    return x.untyped_storage().data_ptr() in kept.storages, (x.shape[:-1].numel(), rank) in kept.shapes


# Of the gradients of an op, x is in dA alone and S in dB and dE.
NEEDS = {
    "A": (("lora_A",), (True, False)),
    "B": (("lora_B",), (False, True)),
    "E": (("rank_scale",), (False, True)),
    "B and E": (("lora_B", "rank_scale"), (False, True)),
    "A and B": (("lora_A", "lora_B"), (True, True)),
    "x": ((), (False, False)),
}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("trained", NEEDS)
@pytest.mark.parametrize("op", OPS)
def test_saves_what_the_gradients_are_made_of(route, op, trained, p):
    names, expected = NEEDS[trained]
    assert kept_of(op, made(op, names, batch=(2, 19)), p) == expected


@pytest.mark.parametrize("op", OPS)
def test_one_module_that_trains_lora_A_keeps_x(route, op):
    samples = made(op)
    samples[-1]["lora_A"].requires_grad_()
    assert kept_of(op, samples, 0.3) == (True, True)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_x_is_freed_before_the_backward_pass(route, op, frozen):
    samples = made(op, ("lora_B",) if frozen else ("lora_A", "lora_B"))
    alive = []

    def activation(leaf):
        x = leaf * 1
        alive.append(weakref.ref(x))
        return x

    x = activation(samples[0]["x"])
    y = OPS[op][0]([{**sample, "x": x} for sample in samples], None, 0.3)
    del x
    gc.collect()
    assert (alive[0]() is None) == frozen
    y.sum().backward()
    assert samples[0]["x"].grad is not None


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("p", "fields"),
    [(0.0, {}), (0.3, {"batch": (3, 7), "dtype": BF16, "dtype_A": FP32, "dtype_B": FP32})],
    ids=["float32", "bfloat16 dropout"],
)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("trained", [("lora_B",), ("rank_scale",), ("lora_A",), ()], ids="+".join)
def test_gradients(route, op, trained, fields, p):
    samples = made(op, trained, **fields)
    exact, theirs = (run(op, samples, p, "eager", dtype) for dtype in (FP64, None))
    assert_all_accurate(run(op, samples, p), exact, theirs)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_checkpoint_of_a_part_of_the_gradients(route, op, reentrant):
    """What is kept depends on what trains, not on which gradients the pass that recomputes it was asked for."""
    samples = made(op, ("lora_B",))
    expected = run(op, samples, 0.3)

    def layers(x):
        return OPS[op][0]([{**sample, "x": x} for sample in samples], None, 0.3)

    y = checkpoint(layers, samples[0]["x"], use_reentrant=reentrant)
    dy = torch.cat([sample["dy"] for sample in samples], -1)
    if reentrant:
        y.backward(dy)
        grad = samples[0]["lora_B"].grad
    else:
        (grad,) = torch.autograd.grad(y, samples[0]["lora_B"], dy)
    assert torch.equal(grad, expected["lora_B 0"])


@pytest.mark.parametrize("op", OPS)
def test_negated_upstream_gradient(route, op):
    """A dy that makes the direct node call the registered op, module after module."""
    samples = made(op)
    expected = run(op, samples, 0.3)
    y = OPS[op][0](samples, None, 0.3)
    negated = torch._neg_view(-torch.cat([sample["dy"] for sample in samples], -1))
    grad, grad_B = torch.autograd.grad(y, [samples[0]["x"], samples[0]["lora_B"]], negated)
    torch.testing.assert_close(grad, expected["x"])
    torch.testing.assert_close(grad_B, expected["lora_B 0"])


@pytest.mark.parametrize("op", OPS)
def test_compiled(op):
    samples = made(op, ("lora_B",))
    expected = run(op, samples, 0.0)
    torch._dynamo.reset()
    layers = torch.compile(
        lambda x: OPS[op][0]([{**s, "x": x} for s in samples], None, 0.0), backend="aot_eager", fullgraph=True
    )
    scaled = samples[0]["x"] * 1
    with Kept() as kept:
        y = layers(scaled)
    assert scaled.untyped_storage().data_ptr() not in kept.storages
    dy = torch.cat([sample["dy"] for sample in samples], -1)
    grads = torch.autograd.grad(y, [samples[0]["x"], samples[0]["lora_B"]], dy)
    assert torch.equal(grads[0], expected["x"]) and torch.equal(grads[1], expected["lora_B 0"])


def backward_arguments(op: str, *, x: bool, s: bool, need: tuple[bool, bool, bool, bool], p=0.3) -> tuple:
    """Of the registered backward op, with None for x and S where they are not given."""
    seed = torch.tensor(SEED) if p else None
    if op == "lora_group":
        samples = samples_of(group(*QKV, batch=(2, 5)))
        lists = [[sample[name] for sample in samples] for name in ("lora_A", "lora_B")]
        lists.append([torch.empty(0) if sample["rank_scale"] is None else sample["rank_scale"] for sample in samples])
        S = torch.randn(10, sum(A.shape[0] for A in lists[0]))
        weights, dys = ([sample[name] for sample in samples] for name in ("weight", "dy"))
        needs = [[needed] * 3 for needed in need[1:3]] + [[need[3], need[3], False]]
        kept = (samples[0]["x"] if x else None, weights, S if s else None)
        return (dys, *kept, *lists, [seed] * 3, [SCALING] * 3, p, need[0], *needs)
    sample = Case(batch=(2, 5)).sample()
    S = torch.randn(10, 13)
    weight = [sample["weight"]] if op == "lora_linear" else []
    kept = (sample["x"] if x else None, *weight, S if s else None)
    factors = (sample["lora_A"], sample["lora_B"], sample["rank_scale"])
    return (sample["dy"], *kept, *factors, seed, SCALING, p, list(need))


RAW = {op: f"{op.removesuffix('_')}_backward" for op in OPS}
WITHOUT = [
    {"x": False, "s": True, "need": (True, False, True, True)},
    {"x": True, "s": False, "need": (True, True, False, False)},
    {"x": False, "s": False, "need": (True, False, False, False)},
]


@pytest.mark.parametrize("given", WITHOUT, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, given):
    torch.library.opcheck(getattr(torch.ops.adaptlora, RAW[op]).default, backward_arguments(op, **given))


@pytest.mark.parametrize("op", OPS)
def test_raw_ops_refuse_what_is_missing(backend, op):
    raw = getattr(torch.ops.adaptlora, RAW[op])
    for given, message in (
        ({"x": False, "s": True, "need": (True, True, True, False)}, "x must be given where dA is needed, got None"),
        (
            {"x": True, "s": False, "need": (True, True, True, False)},
            "s must be given where dB or dE is needed, got None",
        ),
        ({"x": True, "s": False, "need": (False, False, False, True)}, "s must be given where dB or dE is needed"),
    ):
        with pytest.raises(ValueError, match=f"^{RAW[op]}: {message}"):
            raw(*backward_arguments(op, **given))


def test_kernels_refuse_what_is_missing():
    _C = pytest.importorskip("adaptlora._C", reason="the C++ extension is not built")
    dy, x, A, B, S = (torch.ones(shape) for shape in ((3, 5), (3, 8), (2, 8), (5, 2), (3, 2)))
    for kept, need, message in (
        ((None, S), (True, True, True, False), "x must be given when need_dA, got None"),
        ((x, None), (True, True, True, False), "S must be given when need_dB or need_dE, got None"),
        ((None, None), (True, False, False, False), None),
    ):
        arguments = (dy, *kept, A, B, None, SCALING, 0.0, 0, None, *need)
        if message is None:
            torch.testing.assert_close(_C.lora_delta_backward(*arguments)[0], SCALING * dy @ B @ A)
            continue
        with pytest.raises(RuntimeError, match=f"lora_delta_backward: {message}"):
            _C.lora_delta_backward(*arguments)
    with pytest.raises(RuntimeError, match=r"dy must be Float of shape \(M, N\) with M=0 > 0 rows"):
        _C.lora_delta_backward(dy[:0], None, None, A, B, None, SCALING, 0.0, 0, None, True, False, False, False)


@pytest.mark.parametrize("op", OPS)
def test_flops(op):
    """Without dA: 2 M R (N + K + N), and the dx of the base."""
    samples = made(op, ("lora_B",))
    y = OPS[op][0](samples, None, 0.0)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        y.sum().backward()
    sizes = [(sample["lora_A"].shape, sample["dy"].shape[-1]) for sample in samples]
    M, base = samples[0]["x"].shape[:-1].numel(), op != "lora_delta_"
    assert counter.get_total_flops() == sum(2 * M * (R * (2 * N + K) + base * N * K) for (R, K), N in sizes)
