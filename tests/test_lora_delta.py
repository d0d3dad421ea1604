"""lora_delta_ against its definition in float64, for y and every gradient, on every backend; and how it changes y in place."""

import dataclasses

import pytest
import test_lora_linear
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_accurate, assert_all_accurate, laid_out
from test_lora_linear import BF16, FP16, FP32, FP64, SCALING, SEED, Case, assert_same
from torch.utils.checkpoint import checkpoint

from adaptlora.ops import lora_delta_, lora_delta_ref

OPERANDS = ("y", "x", "lora_A", "lora_B")
DIFFERENTIABLE = (*OPERANDS, "rank_scale")


@dataclasses.dataclass(frozen=True)
class DeltaCase(Case):
    """A case of lora_linear whose y has a memory layout of its own."""

    y: str = "contiguous"
    __str__ = Case.__str__

    def sample(self) -> dict[str, torch.Tensor | None]:
        sample = super().sample()
        y = torch.randn(*self.batch, self.N).to(self.dtype)
        return {name: sample[name] for name in ("x", "lora_A", "lora_B", "rank_scale", "dy")} | {"y": y}


CASES = [
    DeltaCase(),
    DeltaCase(p=0.3),
    DeltaCase(rank_scale=False, p=0.3),
    # ranks
    *(DeltaCase(R=R, p=0.3) for R in (0, 1, 33, 128)),
    DeltaCase(R=256, K=20, N=300),
    DeltaCase(R=300, K=20, N=30, p=0.3),  # more than the kernels hold: the reference runs
    # sizes
    DeltaCase(batch=(1,), K=1, N=1, R=2),
    DeltaCase(batch=(130,), K=500, N=257, R=8, p=0.3),
    DeltaCase(batch=(), p=0.3),
    DeltaCase(batch=(2, 3, 5), p=0.3),
    DeltaCase(batch=(0,), p=0.3),
    DeltaCase(batch=(4, 0, 3)),
    DeltaCase(K=0),
    DeltaCase(N=0, p=0.3),
    # dtypes
    DeltaCase(dtype=FP64, p=0.3),
    *(DeltaCase(dtype=dtype, p=0.3) for dtype in (BF16, FP16)),
    *(DeltaCase(dtype=dtype, dtype_A=FP32, dtype_B=FP32) for dtype in (BF16, FP16)),
    DeltaCase(dtype=BF16, dtype_A=BF16, dtype_B=FP32, p=0.3),
    # memory
    *(DeltaCase(y=layout, p=0.3, N=64) for layout in ("padded", "strided", "transposed")),
    *(DeltaCase(y=layout, batch=(3, 5), dtype=BF16) for layout in ("padded", "strided", "transposed")),
    *(DeltaCase(x=layout, dy=layout, p=0.3) for layout in ("padded", "strided", "transposed")),
    *(DeltaCase(lora_A=layout, lora_B=layout) for layout in ("contiguous", "padded", "strided", "transposed")),
]


def eager(y, x, lora_A, lora_B, *, scaling=SCALING, **options):
    """y plus what PEFT's layer adds to a base of zeros; in float64 it is the exact result."""
    nothing = x.new_zeros(y.shape[-1], x.shape[-1])
    return y + test_lora_linear.eager(x, nothing, None, lora_A, lora_B, scaling=scaling, **options)


def leaves(case: DeltaCase) -> dict[str, torch.Tensor | None]:
    sample = case.sample()
    return {name: t.requires_grad_() if t is not None and name in DIFFERENTIABLE else t for name, t in sample.items()}


def call(sample: dict, function=lora_delta_, layout="contiguous", **options) -> torch.Tensor:
    """The new y, from a y that a base layer could have returned."""
    y = laid_out(sample["y"] * 1, layout)
    options = {"scaling": SCALING, "rank_scale": sample["rank_scale"]} | options
    out = function(y, *(sample[name] for name in OPERANDS[1:]), **options)
    assert function is not lora_delta_ or out is y
    return out


def results(function, case: DeltaCase, sample: dict, *, double=False, **options) -> dict[str, torch.Tensor]:
    """y and the gradient of everything differentiable, for the upstream gradient dy; `double`: computed in float64."""
    sample = {name: t if t is None else t.detach().to(FP64 if double else t.dtype) for name, t in sample.items()}
    wanted = {name: sample[name].requires_grad_() for name in DIFFERENTIABLE if sample[name] is not None}
    y = call(sample, function, case.y, dropout_p=case.p, seed=SEED, **options)
    grads = torch.autograd.grad(y, list(wanted.values()), sample["dy"])
    return {"new y": y.detach()} | {f"gradient of {name}": g for name, g in zip(wanted, grads, strict=True)}


def assert_right(case: DeltaCase) -> None:
    sample = case.sample()
    exact, theirs = (results(eager, case, sample, double=double) for double in (True, False))
    assert_all_accurate(results(lora_delta_, case, sample), exact, theirs)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_y_and_gradients(backend, case):
    assert_right(case)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.builds(
        DeltaCase,
        batch=st.lists(st.integers(0, 9), max_size=3).map(tuple),
        K=st.integers(0, 70),
        N=st.integers(0, 70),
        R=st.integers(0, 40),
        dtype=st.sampled_from([FP32, BF16]),
        rank_scale=st.booleans(),
        p=st.sampled_from([0.0, 0.3]),
        y=st.sampled_from(["contiguous", "padded", "strided", "transposed"]),
    ).filter(lambda case: case.y != "transposed" or case.batch)
)
def test_any_shape(backend, case):
    torch.manual_seed(0)
    assert_right(case)


@pytest.mark.parametrize("case", [DeltaCase(p=0.3), DeltaCase(rank_scale=False), DeltaCase(R=0)], ids=str)
def test_reference_is_the_definition(case):
    sample = case.sample()
    exact = results(eager, case, sample, double=True)
    assert_all_accurate(results(lora_delta_ref, case, sample, double=True), exact, exact)


@pytest.mark.parametrize(
    "case", [DeltaCase((5,), 4, 3, 2, p=0.3), DeltaCase((2, 2), 3, 4, 1, rank_scale=False)], ids=str
)
def test_gradcheck(case):
    sample = {name: t if t is None else t.double() for name, t in case.sample().items()}
    inputs = {name: sample[name].requires_grad_() for name in DIFFERENTIABLE if sample[name] is not None}

    def function(*values):
        return call({**sample, **dict(zip(inputs, values, strict=True))}, dropout_p=case.p, seed=SEED)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


# ---- in place


def test_leading_dimensions_that_no_view_flattens(backend):
    sample = DeltaCase(batch=(3, 5)).sample()
    expected = call(sample)
    y = sample["y"].transpose(0, 1).contiguous().transpose(0, 1)
    out = lora_delta_(y, *(sample[name] for name in OPERANDS[1:]), scaling=SCALING, rank_scale=sample["rank_scale"])
    assert out is y and y.stride() == (50, 150, 1)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("layout", ["padded", "strided"])
def test_writes_y_and_nothing_beside_it(backend, layout):
    sample = DeltaCase().sample()
    y = laid_out(sample["y"], layout)
    buffer = torch.as_strided(y, (y.untyped_storage().nbytes() // 4,), (1,), 0)
    before = buffer.isnan()
    lora_delta_(y, sample["x"], sample["lora_A"], sample["lora_B"])
    assert before.any() and torch.equal(buffer.isnan(), before)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_rounds_once(backend, dtype):
    sample = DeltaCase(dtype=dtype, rank_scale=False, R=4).sample()
    y, *operands = (sample[name] for name in OPERANDS)
    delta = lora_delta_(torch.zeros(37, 50), *(t.float() for t in operands))
    expected = (y.float() + delta).to(dtype)
    assert torch.equal(lora_delta_(y, *operands), expected)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    "trained",
    [{"lora_A"}, {"lora_B"}, {"rank_scale"}, {"x"}, {"y"}, {"y", "lora_B"}],
    ids=lambda names: "+".join(sorted(names)),
)
def test_subsets_of_gradients(backend, trained, p):
    case = DeltaCase(p=p)
    sample = case.sample()
    expected = results(lora_delta_, case, sample)
    given = {name: t.detach().requires_grad_(name in trained) for name, t in sample.items()}
    call(given, dropout_p=p, seed=SEED).backward(sample["dy"])
    for name in DIFFERENTIABLE:
        if name in trained:
            assert torch.equal(given[name].grad, expected[f"gradient of {name}"]), name
        else:
            assert given[name].grad is None, name


def test_gradient_of_y_is_handed_on_as_it_is(backend):
    sample = leaves(DeltaCase())
    (dy,) = torch.autograd.grad(call(sample), sample["y"], sample["dy"])
    assert torch.equal(dy, sample["dy"])


def test_gradient_reaches_around_a_changed_view(backend):
    """A slice of a wider y, as of a fused projection: the rest of it keeps its gradient."""
    sample = leaves(DeltaCase())
    wide = torch.randn(37, 90, requires_grad=True)
    y = wide * 2
    lora_delta_(y[:, 10:60], *(sample[name] for name in OPERANDS[1:]))
    upstream = torch.randn(37, 90)
    y.backward(upstream)
    assert torch.equal(wide.grad, 2 * upstream)
    dy, x, B = upstream[:, 10:60], sample["x"].detach(), sample["lora_B"].detach()
    assert_accurate("dA", sample["lora_A"].grad, (dy.double() @ B.double()).t() @ x.double(), (dy @ B).t() @ x)


def test_y_is_not_kept(backend):
    """Neither y nor anything of its size is saved, so it may change again before the backward."""
    sample, saved = leaves(DeltaCase(batch=(40,), R=4)), []
    inputs = {t.untyped_storage().data_ptr() for t in sample.values()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = call(sample, dropout_p=0.3)
    extra = [t for t in saved if t.untyped_storage().data_ptr() not in inputs]
    assert sum(t.numel() * t.element_size() for t in extra) == 40 * 4 * 4 + 8
    y.mul_(2).backward(sample["dy"])


def test_changes_are_noticed(backend):
    for name in ("x", "lora_A", "lora_B"):
        sample = leaves(DeltaCase())
        y = call(sample)
        with torch.no_grad():
            sample[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(sample["dy"])
    sample = leaves(DeltaCase())
    y = sample["y"] * 1
    squared = y**2  # keeps y
    lora_delta_(y, *(sample[name] for name in OPERANDS[1:]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


def refused(y, exception, message, grad=True):
    sample, state, before = leaves(DeltaCase()), torch.get_rng_state(), y.detach().clone()
    with torch.set_grad_enabled(grad), pytest.raises(exception, match=f"^lora_delta_: y must not {message}"):
        lora_delta_(y, *(sample[name] for name in OPERANDS[1:]), dropout_p=0.1)
    assert torch.equal(y, before) and torch.equal(torch.get_rng_state(), state)


def test_a_y_that_must_not_change_is_refused_and_unchanged(backend):
    leaf = torch.randn(37, 50, requires_grad=True)
    refused(leaf, ValueError, "be a leaf that requires grad")
    refused(torch.randn(37, 60, requires_grad=True)[:, :50], ValueError, "be a leaf that requires grad, or a view")
    refused((torch.randn(37, 100, requires_grad=True) * 1).chunk(2, dim=1)[0], ValueError, "be a view .* MULTI_OUTPUT")
    refused(torch.randn(37, 1).expand(37, 50), ValueError, "have elements that share memory", grad=False)
    with torch.inference_mode():
        inference = torch.randn(37, 50)
    refused(inference, ValueError, "be an inference tensor outside", grad=False)
    with torch.no_grad():
        sample = DeltaCase().sample()
        lora_delta_(leaf, *(sample[name] for name in OPERANDS[1:]))
        assert leaf._version > 0


# ---- how it lives in torch


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients(backend, mode):
    sample = leaves(DeltaCase(p=0.3))
    with mode():
        y = call(sample, dropout_p=0.3, seed=SEED)
    assert not y.requires_grad
    assert torch.equal(y, call(sample, dropout_p=0.3, seed=SEED))


def take_grads(sample: dict) -> dict[str, torch.Tensor]:
    grads = {name: sample[name].grad for name in DIFFERENTIABLE if sample[name] is not None}
    for name in grads:
        sample[name].grad = None
    return grads


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_reproduces_the_mask(backend, reentrant):
    sample, outs = leaves(DeltaCase()), []

    def through(x):
        return call({**sample, "x": x}, dropout_p=0.3)

    for run in (lambda: through(sample["x"]), lambda: checkpoint(through, sample["x"], use_reentrant=reentrant)):
        torch.manual_seed(3)
        y = run()
        torch.randn(5)  # moves the generator between forward and backward
        y.backward(sample["dy"])
        outs.append({"new y": y.detach(), **take_grads(sample)})
    assert_same(*outs)


def test_dropout_follows_torch_manual_seed(backend):
    sample = DeltaCase().sample()

    def draw(seed):
        torch.manual_seed(seed)
        return call(sample, dropout_p=0.3)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    state = torch.get_rng_state()
    assert torch.equal(
        call(sample, dropout_p=0.3, seed=5), call(sample, dropout_p=0.3, seed=torch.tensor(5))
    ) and torch.equal(torch.get_rng_state(), state)


def test_deterministic(backend):
    case = DeltaCase(batch=(130,), K=200, N=190, R=33, p=0.3)
    sample = case.sample()
    assert_same(results(lora_delta_, case, sample), results(lora_delta_, case, sample))


@pytest.mark.parametrize("y_dtype", [FP32, BF16], ids=str)
def test_autocast_computes_in_the_dtype_of_y(backend, y_dtype):
    """Whether a base obeys autocast or returns the dtype it was given, x follows it, and the gradient of x is that of x."""
    case = DeltaCase(dtype=FP32, p=0.3)
    sample = case.sample() | {"y": torch.randn(37, 50).to(y_dtype), "dy": torch.randn(37, 50).to(y_dtype)}
    outside = results(lora_delta_, case, sample | {"x": sample["x"].to(y_dtype)})
    with torch.autocast("cpu", dtype=BF16):
        inside = results(lora_delta_, case, sample)
    assert inside["gradient of x"].dtype == FP32
    outside["gradient of x"] = outside["gradient of x"].float()
    assert_same(inside, outside)


def test_second_derivative_is_refused(backend):
    sample = leaves(DeltaCase())
    (dx,) = torch.autograd.grad(call(sample), sample["x"], sample["dy"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()


def base_and_delta(sample, options):
    """y comes to be inside of what is compiled, is changed, and is used under both of its names."""
    y = sample["y"] * 2
    return y * lora_delta_(
        y, *(sample[name] for name in OPERANDS[1:]), scaling=SCALING, rank_scale=sample["rank_scale"], **options
    )


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "seed": SEED}, {"dropout_p": 0.3}], ids=str)
def test_compile_in_one_graph(backend, options):
    sample, outs = leaves(DeltaCase(batch=(4, 9))), []
    for function in (base_and_delta, torch.compile(base_and_delta, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(2)
        y = function(sample, options)
        y.backward(sample["dy"])
        outs.append({"y": y.detach(), **take_grads(sample)})
    assert_same(*outs)


@pytest.mark.parametrize("of_a_view", [False, True])
def test_compiled_it_changes_a_y_from_outside(backend, of_a_view):
    """In its own memory, with its gradients, whether or not the caller uses what is returned."""
    sample, outs = leaves(DeltaCase()), []

    def function(y, x, lora_A, lora_B):
        lora_delta_(y, x, lora_A, lora_B, dropout_p=0.3, seed=SEED)

    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        buffer = torch.ones(37, 60)
        y = buffer[:, :50] if of_a_view else buffer[:, :50].clone()
        pointer = y.data_ptr()
        assert run(y, *(sample[name] for name in OPERANDS[1:])) is None
        assert y.data_ptr() == pointer and y._version > 0
        assert torch.equal(buffer[:, :50], y) == of_a_view and (buffer[:, 50:] == 1).all()
        y.backward(sample["dy"])
        outs.append({"y": y.detach(), **{n: t.grad for n, t in sample.items() if n in ("x", "lora_A", "lora_B")}})
        take_grads(sample)
    assert_same(*outs)


def test_compiled_it_leaves_a_leaf_to_torch(backend):
    sample = leaves(DeltaCase())
    compiled = torch.compile(lora_delta_, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="leaf Variable that requires grad"):
        compiled(*(sample[name] for name in OPERANDS))


OPCHECKED = [
    DeltaCase(batch=(2, 5), p=0.3),
    DeltaCase(rank_scale=False),
    DeltaCase(R=0),
    DeltaCase(batch=(0,)),
    DeltaCase(dtype=BF16, dtype_A=FP32, dtype_B=FP32, lora_B="contiguous"),
]


def op_arguments(case: DeltaCase, sample: dict) -> tuple:
    return (
        *(sample[name] for name in DIFFERENTIABLE), torch.tensor(SEED) if case.p else None, SCALING, case.p,
    )  # fmt: skip


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck(backend, case):
    torch.library.opcheck(torch.ops.adaptlora.lora_delta_.default, op_arguments(case, case.sample()))
    torch.library.opcheck(torch.ops.adaptlora.lora_delta.default, op_arguments(case, leaves(case)))


def test_the_op_itself_refuses_gradients(backend):
    """It mutates outside of any graph: `lora_delta_` is what differentiates."""
    arguments = op_arguments(DeltaCase(), leaves(DeltaCase()))
    before = arguments[0].clone()
    with pytest.raises(
        RuntimeError, match="adaptlora::lora_delta_: not differentiable: call adaptlora.ops.lora_delta_"
    ):
        torch.ops.adaptlora.lora_delta_(*arguments)
    assert torch.equal(arguments[0], before)
    with torch.no_grad():
        torch.ops.adaptlora.lora_delta_(*arguments)
    assert not torch.equal(arguments[0], before)


@pytest.mark.parametrize("need", [[True] * 4, [False, True, False, False], [True, False, False, False]], ids=str)
@pytest.mark.parametrize("case", OPCHECKED[:1] + OPCHECKED[2:], ids=str)
def test_opcheck_backward(backend, case, need):
    y, x, *others = op_arguments(case, case.sample())
    s = torch.ops.adaptlora.lora_delta_(y, x, *others)
    torch.library.opcheck(torch.ops.adaptlora.lora_delta_backward.default, (y, x, s, *others, need))


def test_meta_tensors_have_shapes():
    sample = {name: t.to("meta") for name, t in DeltaCase(batch=(2, 3)).sample().items()}
    y = call(sample)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 50), FP32, "meta")


def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    import adaptlora.ops.flops  # noqa: F401

    sample = leaves(DeltaCase(batch=(2, 5), K=7, N=11, R=3))
    with FlopCounterMode(display=False) as counter:
        y = call(sample)
        assert counter.get_total_flops() == 2 * 10 * 3 * (7 + 11)
        y.backward(sample["dy"])
    assert counter.get_total_flops() == 2 * 10 * 3 * (7 + 11) * 3


# ---- errors

BAD_INPUT = [
    ("y", [1.0], TypeError, r"y must be a floating-point tensor, got list"),
    ("y", torch.ones(4, 5, dtype=torch.int64), TypeError, r"y must be a floating-point tensor, got torch.int64"),
    ("y", torch.ones(()), ValueError, r"y must have shape \(..., N\), got a 0-dim tensor"),
    ("y", torch.ones(3, 5), ValueError, r"y must have the leading dimensions of x, \(4,\), got shape \(3, 5\)"),
    ("y", torch.ones(5), ValueError, r"y must have the leading dimensions of x, \(4,\), got shape \(5,\)"),
    ("y", torch.ones(4, 5, dtype=BF16), TypeError, r"y must have the dtype of x, torch.float32, got torch.bfloat16"),
    ("y", torch.ones(4, 5, device="meta"), ValueError, r"y must be on the device of x, cpu, got meta"),
    ("x", None, TypeError, r"x must be a floating-point tensor, got NoneType"),
    ("x", torch.ones(()), ValueError, r"x must have shape \(..., K\), got a 0-dim"),
    ("x", torch.ones(4, 7), ValueError, r"lora_A must have shape \(R, K\) with K=7 \(x.shape\[-1\]\), got \(3, 6\)"),
    ("lora_A", None, TypeError, r"lora_A must be a tensor, got NoneType"),
    ("lora_A", torch.ones(3, 6, dtype=FP64), TypeError, r"lora_A must have the dtype of x, .*32, or float32, got .*64"),
    ("lora_B", torch.ones(5, 4), ValueError, r"lora_B must have shape \(N, R\) with R=3 .*, got \(5, 4\)"),
    ("lora_B", torch.ones(4, 3), ValueError, r"lora_B must have shape .* N=5 \(y.shape\[-1\]\), got \(4, 3\)"),
    ("rank_scale", 2.0, TypeError, r"rank_scale must be a tensor or None, got float"),
    ("rank_scale", torch.ones(4), ValueError, r"rank_scale must have shape \(R,\) with R=3 .*, got \(4,\)"),
    ("scaling", float("nan"), ValueError, r"scaling must be a finite number, got nan"),
    ("dropout_p", 1.0, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    ("seed", 1.5, TypeError, r"seed must be an int or a 0-dim int64 tensor, got 1.5"),
]


@pytest.mark.parametrize(
    ("name", "value", "exception", "message"), BAD_INPUT, ids=lambda v: v if isinstance(v, str) else ""
)
def test_bad_input(backend, name, value, exception, message):
    sample = DeltaCase(batch=(4,), K=6, N=5, R=3).sample()
    arguments = {n: sample[n] for n in DIFFERENTIABLE} | {"scaling": 1.0, "dropout_p": 0.1, "seed": None}
    lora_delta_(*[arguments[n].clone() for n in OPERANDS], dropout_p=0.1)
    before, state = arguments["y"].clone(), torch.get_rng_state()
    changed = arguments | {name: value}
    positional = [changed.pop(key) for key in OPERANDS]
    with pytest.raises(exception, match=f"^lora_delta_: {message}"):
        lora_delta_(*positional, **changed)
    assert torch.equal(torch.get_rng_state(), state), "a refused call must not consume random numbers"
    assert torch.equal(arguments["y"], before), "a refused call must not change y"
