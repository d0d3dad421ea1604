"""lora_linear against its definition in float64, for y and every gradient, on every backend; and how it lives in torch."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_all_accurate, laid_out
from torch.utils.checkpoint import checkpoint

from adaptlora.ops import lora_linear, lora_linear_ref
from adaptlora.ops._dropout import dropout_keep_ref

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DIFFERENTIABLE = {"x": "dx", "lora_A": "dA", "lora_B": "dB", "rank_scale": "dE"}
SCALING, SEED = 0.75, 1234


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, dtypes and memory layouts of one call; `batch` is the shape of x without K."""

    batch: tuple[int, ...] = (37,)
    K: int = 63
    N: int = 50
    R: int = 13
    dtype: torch.dtype = FP32
    dtype_A: torch.dtype | None = None
    dtype_B: torch.dtype | None = None
    bias: bool = True
    rank_scale: bool = True
    p: float = 0.0
    x: str = "contiguous"
    weight: str = "contiguous"
    lora_A: str = "contiguous"
    lora_B: str = "transposed"
    dy: str = "contiguous"

    def __str__(self):
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return ",".join(f"{f.name}={getattr(self, f.name)}".replace("torch.", "") for f in changed) or "default"

    def sample(self) -> dict[str, torch.Tensor | None]:
        def normal(*shape, dtype=None, layout="contiguous"):
            return laid_out(torch.randn(shape).to(dtype or self.dtype), layout)

        return {
            "x": normal(*self.batch, self.K, layout=self.x),
            "weight": normal(self.N, self.K, layout=self.weight),
            "bias": normal(self.N) if self.bias else None,
            "lora_A": normal(self.R, self.K, dtype=self.dtype_A, layout=self.lora_A),
            "lora_B": normal(self.N, self.R, dtype=self.dtype_B, layout=self.lora_B),
            "rank_scale": normal(self.R, dtype=self.dtype_A) if self.rank_scale else None,
            "dy": normal(*self.batch, self.N, layout=self.dy),
        }


CASES = [
    Case(),
    Case(p=0.3),
    Case(bias=False, rank_scale=False, p=0.3),
    # ranks
    *(Case(R=R, p=p, rank_scale=p == 0) for R in (0, 1, 33, 128) for p in (0.0, 0.3)),
    Case(R=256, K=20, N=300),
    Case(R=300, K=20, N=30, p=0.3),  # more than the kernels hold: the reference runs
    # sizes
    Case(batch=(1,), K=1, N=1, R=1),
    Case(batch=(130,), K=500, N=257, R=8, p=0.3),
    Case(batch=(3,), K=4, N=1, R=16),
    Case(batch=(), p=0.3),
    Case(batch=(2, 3, 5), p=0.3),
    Case(batch=(0,), p=0.3),
    Case(batch=(4, 0, 3)),
    Case(K=0),
    Case(N=0, p=0.3),
    # dtypes
    Case(dtype=FP64, p=0.3),
    *(Case(dtype=dtype, p=p) for dtype in (BF16, FP16) for p in (0.0, 0.3)),
    *(Case(dtype=dtype, dtype_A=FP32, dtype_B=FP32, p=p) for dtype in (BF16, FP16) for p in (0.0, 0.3)),
    Case(dtype=BF16, dtype_A=BF16, dtype_B=FP32),
    Case(dtype=FP16, dtype_A=FP32, dtype_B=FP16, batch=(2, 30), R=33, p=0.3),
    # memory
    *(Case(x=layout, p=0.3, K=64) for layout in ("padded", "strided", "transposed")),
    *(Case(x=layout, batch=(5, 7), dtype=BF16, dtype_A=FP32, dtype_B=FP32) for layout in ("padded", "transposed")),
    *(Case(weight=layout) for layout in ("padded", "strided", "transposed")),
    *(Case(dy=layout, p=0.3, N=64) for layout in ("padded", "strided", "transposed")),
    *(Case(lora_A=layout, lora_B=layout, p=0.3) for layout in ("contiguous", "padded", "strided", "transposed")),
    Case(dtype=BF16, weight="transposed", x="transposed", dy="transposed", lora_A="transposed", lora_B="contiguous"),
]


def eager(x, weight, bias, lora_A, lora_B, *, scaling, rank_scale=None, dropout_p=0.0, seed=None):
    """PEFT's LoRA layer written out, with our mask; in float64 it is the exact result."""
    dropped = x.to(lora_A.dtype)
    if dropout_p:
        keep = dropout_keep_ref(torch.tensor(seed), x.shape[:-1].numel(), x.shape[-1], dropout_p)
        dropped = torch.where(keep.reshape(x.shape), dropped / (1 - dropout_p), 0)
    s = F.linear(dropped, lora_A)
    if rank_scale is not None:
        s = s * rank_scale
    return (F.linear(x, weight, bias) + F.linear(s.to(lora_B.dtype), lora_B) * scaling).to(x.dtype)


def results(function, sample: dict, *, p=0.0, seed=SEED, double=False) -> dict[str, torch.Tensor]:
    """y and the gradient of everything differentiable, for the upstream gradient dy; `double`: computed in float64."""
    sample = {name: t if t is None else t.detach().to(FP64 if double else t.dtype) for name, t in sample.items()}
    wanted = {name: sample[name].requires_grad_() for name in DIFFERENTIABLE if sample[name] is not None}
    tensors = [sample[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    y = function(*tensors, scaling=SCALING, rank_scale=sample["rank_scale"], dropout_p=p, seed=seed)
    grads = torch.autograd.grad(y, list(wanted.values()), sample["dy"])
    return {"y": y.detach(), **dict(zip(map(DIFFERENTIABLE.get, wanted), grads, strict=True))}


def assert_right(sample: dict, p: float) -> None:
    assert_all_accurate(
        results(lora_linear, sample, p=p), results(eager, sample, p=p, double=True), results(eager, sample, p=p)
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_y_and_gradients(backend, case):
    assert_right(case.sample(), case.p)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.builds(
        Case,
        batch=st.lists(st.integers(0, 9), max_size=3).map(tuple),
        K=st.integers(0, 70),
        N=st.integers(0, 70),
        R=st.integers(0, 40),
        dtype=st.sampled_from([FP32, BF16]),
        bias=st.booleans(),
        rank_scale=st.booleans(),
        p=st.sampled_from([0.0, 0.3]),
    )
)
def test_any_shape(backend, case):
    torch.manual_seed(0)
    assert_right(case.sample(), case.p)


@pytest.mark.parametrize("case", [Case(), Case(p=0.3), Case(rank_scale=False, bias=False), Case(R=0)], ids=str)
def test_reference_is_the_definition(case):
    """`lora_linear_ref` in float64, differentiated by autograd, equals the formula written out here."""
    sample = case.sample()
    exact = results(eager, sample, p=case.p, double=True)
    assert_all_accurate(results(lora_linear_ref, sample, p=case.p, double=True), exact, exact)


@pytest.mark.parametrize("case", [Case((5,), 4, 3, 2, p=0.3), Case((2, 2), 3, 4, 1, rank_scale=False)], ids=str)
def test_gradcheck(case):
    sample = {name: t if t is None else t.double() for name, t in case.sample().items()}
    inputs = {name: sample[name].requires_grad_() for name in DIFFERENTIABLE if sample[name] is not None}

    def call(*values):
        given = {**sample, **dict(zip(inputs, values, strict=True))}
        tensors = [given[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
        return lora_linear(*tensors, scaling=SCALING, rank_scale=given["rank_scale"], dropout_p=case.p, seed=SEED)

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    "trained",
    [{"lora_A"}, {"lora_B"}, {"rank_scale"}, {"x"}, {"lora_A", "lora_B"}, {"x", "rank_scale"}],
    ids=lambda names: "+".join(sorted(names)),
)
def test_subsets_of_gradients(backend, trained, p):
    """Whatever needs no gradient gets none, and the others are what they are when all are asked for."""
    sample = Case().sample()
    expected = results(lora_linear, sample, p=p)
    given = {name: t.detach().requires_grad_(name in trained) for name, t in sample.items()}
    tensors = [given[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    lora_linear(*tensors, scaling=SCALING, rank_scale=given["rank_scale"], dropout_p=p, seed=SEED).backward(
        sample["dy"]
    )
    for name in DIFFERENTIABLE:
        if name in trained:
            assert torch.equal(given[name].grad, expected[DIFFERENTIABLE[name]]), name
        else:
            assert given[name].grad is None, name
    assert given["weight"].grad is None
    assert given["bias"].grad is None


def test_frozen_everything_makes_no_graph(backend):
    sample = Case().sample()
    y = lora_linear(*(sample[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")))
    assert not y.requires_grad


def leaves(case: Case) -> dict[str, torch.Tensor]:
    """A sample whose x and factors are leaves that collect gradients."""
    sample = case.sample()
    return {name: t.requires_grad_() if t is not None and name in DIFFERENTIABLE else t for name, t in sample.items()}


def call(sample: dict, **options) -> torch.Tensor:
    tensors = [sample[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    return lora_linear(*tensors, scaling=SCALING, rank_scale=sample["rank_scale"], **options)


def take_grads(sample: dict) -> dict[str, torch.Tensor]:
    grads = {DIFFERENTIABLE[name]: sample[name].grad for name in DIFFERENTIABLE if sample[name] is not None}
    for name in DIFFERENTIABLE:
        if sample[name] is not None:
            sample[name].grad = None
    return grads


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Equal bit for bit."""
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_expanded_upstream_gradient(backend, p):
    """y.sum().backward() hands over a dy whose strides are all zero."""
    sample = leaves(Case(batch=(3, 7)))
    call(sample, dropout_p=p, seed=SEED).sum().backward()
    summed = take_grads(sample)
    call(sample, dropout_p=p, seed=SEED).backward(torch.ones(3, 7, 50))
    for name, grad in take_grads(sample).items():
        torch.testing.assert_close(summed[name], grad, msg=name)


def test_expanded_x(backend):
    """Rows of stride zero: one row seen as many."""
    sample = Case(batch=(1,)).sample()
    row = sample["x"]
    sample["x"], sample["dy"] = row.expand(9, -1), sample["dy"].expand(9, -1)
    assert_right(sample, 0.3)


def test_gradients_are_rank_major(backend):
    sample = leaves(Case(N=31, R=5))
    dA, dB = torch.autograd.grad(call(sample), [sample["lora_A"], sample["lora_B"]], sample["dy"])
    assert dA.stride() == (63, 1)
    assert dB.stride() == (1, 31)


def test_deterministic(backend):
    sample = Case(batch=(130,), K=200, N=190, R=33).sample()
    assert_same(results(lora_linear, sample, p=0.3), results(lora_linear, sample, p=0.3))


def test_inputs_are_not_written(backend):
    sample = Case().sample()
    before = {name: t.clone() for name, t in sample.items()}
    results(lora_linear, sample, p=0.3)
    assert_same(sample, before)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_saves_no_mask(backend, p):
    """Beyond its inputs the graph holds S (M, R) in float32 and the 8-byte seed: nothing of size M × K."""
    sample = leaves(Case(batch=(40,), R=4))
    inputs = {t.untyped_storage().data_ptr() for t in sample.values()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        call(sample, dropout_p=p)
    extra = [t for t in saved if t.untyped_storage().data_ptr() not in inputs]
    assert sum(t.numel() * t.element_size() for t in extra) == 40 * 4 * 4 + (8 if p else 0)


def test_dropout_follows_torch_manual_seed(backend):
    sample = Case().sample()

    def draw(seed):
        torch.manual_seed(seed)
        return call(sample, dropout_p=0.3)

    first = draw(1)
    second_call_of_the_same_seed = call(sample, dropout_p=0.3)
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))
    assert not torch.equal(first, second_call_of_the_same_seed)


def test_explicit_seed_leaves_the_generator_alone(backend):
    sample, state = Case().sample(), torch.get_rng_state()
    as_int = call(sample, dropout_p=0.3, seed=5)
    assert torch.equal(as_int, call(sample, dropout_p=0.3, seed=torch.tensor(5)))
    call(sample)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_reproduces_the_mask(backend, reentrant):
    sample = leaves(Case())
    outs = []
    for run in (lambda: call(sample, dropout_p=0.3), lambda: checkpoint(through, sample["x"], use_reentrant=reentrant)):

        def through(x):
            return call({**sample, "x": x}, dropout_p=0.3)

        torch.manual_seed(3)
        y = run()
        torch.randn(5)  # moves the generator between forward and backward
        y.backward(sample["dy"])
        outs.append({"y": y, **take_grads(sample)})
    assert_same(*outs)


def under_autocast(function, sample, backward_inside):
    with torch.autocast("cpu", dtype=BF16):
        tensors = [sample[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
        y = function(*tensors, scaling=SCALING)
        dy = sample["dy"].to(y.dtype)
        if backward_inside:
            y.backward(dy)
    if not backward_inside:
        y.backward(dy)
    return {"y": y.detach(), **take_grads(sample)}


@pytest.mark.parametrize("factors", [FP32, BF16], ids=str)
def test_autocast(backend, factors):
    sample = leaves(Case(batch=(4, 9), K=64, dtype_A=factors, dtype_B=factors, rank_scale=False))
    out, theirs = (under_autocast(function, sample, backward_inside=False) for function in (lora_linear, eager))
    assert out["y"].dtype == F.linear(sample["x"].bfloat16(), sample["weight"].bfloat16()).dtype
    theirs["y"] = theirs["y"].to(BF16)
    assert_all_accurate(out, results(eager, sample, double=True), theirs, precision=BF16)
    assert_same(out, under_autocast(lora_linear, sample, backward_inside=True))


def test_autocast_leaves_float64_alone(backend):
    """As torch's own linear does."""
    sample = {name: t.double() for name, t in Case().sample().items()}
    with torch.autocast("cpu", dtype=BF16):
        y = call(sample)
    assert F.linear(sample["x"], sample["weight"]).dtype == FP64
    assert torch.equal(y, call(sample))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients(backend, mode):
    sample = leaves(Case())
    with mode():
        y = call(sample, dropout_p=0.3, seed=SEED)
    assert not y.requires_grad
    assert torch.equal(y, call(sample, dropout_p=0.3, seed=SEED))


def test_only_y_is_differentiable(backend):
    """S leaves the registered op for its backward pass alone."""
    y, s = torch.ops.adaptlora.lora_linear(*op_arguments(Case()))
    assert y.requires_grad
    assert not s.requires_grad


def test_changed_operand_is_noticed(backend):
    for name in ("x", "weight", "lora_A", "lora_B", "rank_scale"):
        sample = leaves(Case())
        y = call(sample)
        with torch.no_grad():
            sample[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(sample["dy"])


def test_second_derivative_is_refused(backend):
    sample = leaves(Case())
    (dx,) = torch.autograd.grad(call(sample), sample["x"], sample["dy"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "seed": SEED}, {"dropout_p": 0.3}], ids=str)
def test_compile_in_one_graph(backend, options):
    sample = leaves(Case(batch=(4, 9)))
    outs = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(2)
        y = function(sample, **options)
        y.backward(sample["dy"])
        outs.append({"y": y.detach(), **take_grads(sample)})
    assert_same(*outs)


def op_arguments(case: Case) -> tuple:
    sample = leaves(case)
    tensors = [sample[name] for name in ("x", "weight", "bias", "lora_A", "lora_B", "rank_scale")]
    return (*tensors, torch.tensor(SEED) if case.p else None, SCALING, case.p)


OPCHECKED = [
    Case(batch=(2, 5), p=0.3),
    Case(bias=False, rank_scale=False),
    Case(R=0),
    Case(batch=(0,)),
    Case(dtype=BF16, dtype_A=FP32, dtype_B=FP32, lora_B="contiguous"),
]


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck(backend, case):
    torch.library.opcheck(torch.ops.adaptlora.lora_linear.default, op_arguments(case))


@pytest.mark.parametrize("need", [[True] * 4, [False, True, False, False], [True, False, False, True]], ids=str)
@pytest.mark.parametrize("case", OPCHECKED[:1] + OPCHECKED[2:], ids=str)
def test_opcheck_backward(backend, case, need):
    if not case.rank_scale and need[3]:
        need = [*need[:3], False]
    x, weight, bias, lora_A, lora_B, rank_scale, seed, *numbers = op_arguments(case)
    with torch.no_grad():
        y, s = torch.ops.adaptlora.lora_linear(x, weight, bias, lora_A, lora_B, rank_scale, seed, *numbers)
    detached = [t if t is None else t.detach() for t in (x, weight, s, lora_A, lora_B, rank_scale)]
    arguments = (torch.ones_like(y), *detached, seed, *numbers, need)
    torch.library.opcheck(torch.ops.adaptlora.lora_linear_backward.default, arguments)


def test_meta_tensors_have_shapes():
    sample = {name: t.to("meta") for name, t in Case(batch=(2, 3)).sample().items()}
    y = call(sample)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 50), FP32, "meta")


def valid() -> dict:
    names = ("x", "weight", "bias", "lora_A", "lora_B", "rank_scale")
    sample = Case(batch=(4,), K=6, N=5, R=3).sample()
    return {name: sample[name] for name in names} | {"scaling": 1.0, "dropout_p": 0.1, "seed": None}


BAD_INPUT = [
    ("x", [1.0], TypeError, r"x must be a floating-point tensor, got list"),
    ("x", torch.ones(4, 6, dtype=torch.int64), TypeError, r"x must be a floating-point tensor, got torch.int64"),
    ("x", torch.ones(()), ValueError, r"x must have shape \(..., K\), got a 0-dim"),
    ("x", torch.ones(4, 7), ValueError, r"weight must have shape \(N, K\) with K=7 \(x.shape\[-1\]\), got \(5, 6\)"),
    ("weight", None, TypeError, r"weight must be a tensor, got NoneType"),
    ("weight", torch.ones(5), ValueError, r"weight must have 2 dimension\(s\), got shape \(5,\)"),
    (
        "weight",
        torch.ones(5, 6, dtype=BF16),
        TypeError,
        r"weight must have the dtype of x, torch.float32, got .*bfloat16",
    ),
    ("weight", torch.ones(5, 6, device="meta"), ValueError, r"weight must be on the device of x, cpu, got meta"),
    ("weight", torch.ones(5, 6).requires_grad_(), ValueError, r"weight must be frozen .* got requires_grad=True"),
    ("bias", [0.0] * 5, TypeError, r"bias must be a tensor.* got list"),
    ("bias", torch.ones(4), ValueError, r"bias must have shape \(N,\) with N=5 \(weight.shape\[0\]\), got \(4,\)"),
    ("bias", torch.ones(5, dtype=FP16), TypeError, r"bias must have the dtype of x, torch.float32, got torch.float16"),
    ("bias", torch.ones(5, device="meta"), ValueError, r"bias must be on the device of x, cpu, got meta"),
    ("bias", torch.ones(5).requires_grad_(), ValueError, r"bias must be frozen .* got requires_grad=True"),
    ("lora_A", None, TypeError, r"lora_A must be a tensor, got NoneType"),
    ("lora_A", torch.ones(3, 6, dtype=torch.int8), TypeError, r"lora_A must be float32.* got torch.int8"),
    ("lora_A", torch.ones(6), ValueError, r"lora_A must have 2 dimension\(s\), got shape \(6,\)"),
    (
        "lora_A",
        torch.ones(3, 7),
        ValueError,
        r"lora_A must have shape \(R, K\) with K=6 \(x.shape\[-1\]\), got \(3, 7\)",
    ),
    ("lora_A", torch.ones(3, 6, dtype=FP64), TypeError, r"lora_A must have the dtype of x, .*32, or float32, got .*64"),
    (
        "lora_A",
        torch.ones(3, 6, device="meta"),
        ValueError,
        r"lora_. must be on the device of .*, (cpu, got meta|meta, got cpu)",
    ),
    ("lora_B", torch.ones(5, 4), ValueError, r"lora_B must have shape \(N, R\) with R=3 .*, got \(5, 4\)"),
    ("lora_B", torch.ones(4, 3), ValueError, r"lora_B must have shape \(N, R\) with N=5 .*, got \(4, 3\)"),
    ("lora_B", torch.ones(5, 3, dtype=FP16), TypeError, r"lora_B must have the dtype of x, .*32, or float32, got .*16"),
    ("lora_B", torch.ones(5, 3, device="meta"), ValueError, r"lora_B must be on the device of lora_A, cpu, got meta"),
    ("rank_scale", 2.0, TypeError, r"rank_scale must be a tensor.* got float"),
    ("rank_scale", torch.ones(4), ValueError, r"rank_scale must have shape \(R,\) with R=3 .*, got \(4,\)"),
    ("rank_scale", torch.ones(3, dtype=FP64), TypeError, r"rank_scale must have the dtype of x, .*, got torch.float64"),
    ("rank_scale", torch.ones(3, device="meta"), ValueError, r"rank_scale must be on the device of x, cpu, got meta"),
    ("scaling", float("nan"), ValueError, r"scaling must be a finite number, got nan"),
    ("scaling", float("inf"), ValueError, r"scaling must be a finite number, got inf"),
    ("scaling", "2", ValueError, r"scaling must be a finite number, got '2'"),
    ("dropout_p", 1.0, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    ("dropout_p", -0.1, ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
    ("dropout_p", float("nan"), ValueError, r"dropout_p must be in \[0, 1\), got nan"),
    ("dropout_p", "0.1", ValueError, r"dropout_p must be in \[0, 1\), got '0.1'"),
    ("seed", 1.5, TypeError, r"seed must be an int or a 0-dim int64 tensor, got 1.5"),
    ("seed", 2**63, ValueError, r"seed must .* got 9223372036854775808"),
    ("seed", torch.ones(1, dtype=torch.int64), TypeError, r"seed must be an int or a 0-dim int64 tensor, got tensor"),
    ("seed", torch.tensor(1.0), TypeError, r"seed must be an int or a 0-dim int64 tensor, got tensor"),
    (
        "seed",
        torch.ones((), dtype=torch.int64, device="meta"),
        ValueError,
        r"seed must be on the device of x, cpu, got meta",
    ),
]


@pytest.mark.parametrize(
    ("name", "value", "exception", "message"), BAD_INPUT, ids=lambda v: v if isinstance(v, str) else ""
)
def test_bad_input(backend, name, value, exception, message):
    arguments, state = valid() | {name: value}, torch.get_rng_state()
    positional = [arguments.pop(key) for key in ("x", "weight", "bias", "lora_A", "lora_B")]
    with pytest.raises(exception, match=f"^lora_linear: {message}"):
        lora_linear(*positional, **arguments)
    assert torch.equal(torch.get_rng_state(), state), "a refused call must not consume random numbers"


def test_valid_input_of_the_bad_input_tests(backend):
    arguments = valid()
    positional = [arguments.pop(key) for key in ("x", "weight", "bias", "lora_A", "lora_B")]
    assert lora_linear(*positional, **arguments).shape == (4, 5)


def test_trainable_base_is_allowed_without_gradients(backend):
    sample = Case().sample()
    sample["weight"].requires_grad_()
    with torch.no_grad():
        y = call(sample)
    assert not y.requires_grad and torch.equal(y, call(sample | {"weight": sample["weight"].detach()}).detach())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight": "w"}, "weight must be a tensor, got str"),
        ({"bias": 3}, "bias must be a tensor or None, got int"),
        ({"x": torch.ones(2, 5, dtype=torch.int32)}, "x must be a floating-point tensor, got torch.int32"),
    ],
)
def test_autocast_does_not_hide_bad_input(change, text):
    operands = {"x": torch.ones(2, 5), "weight": torch.ones(4, 5), "bias": None} | change
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=text):
        lora_linear(*operands.values(), torch.ones(3, 5), torch.ones(4, 3))
