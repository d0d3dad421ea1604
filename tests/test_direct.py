"""Plain eager calls that go to C++ without the dispatcher: which calls those are, and that they change nothing but the way."""

import contextlib
import dataclasses
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
import torch.utils.flop_counter
from test_lora_group import BAD_INPUT as BAD_GROUP_INPUT
from test_lora_group import MEMBER, QKV, group, samples_of
from test_lora_group import call as call_group
from test_lora_group import results as group_results
from test_lora_group import valid as valid_group
from test_lora_linear import BAD_INPUT, BF16, FP16, FP32, SEED, Case, assert_same, call, leaves, take_grads, valid
from test_rank_norms import BAD_FACTORS
from test_rank_norms import sample as factors_of
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import adaptlora.ops.flops  # noqa: F401
from adaptlora.ops import _backend, lora_group, lora_linear, rank_norms, rank_penalty

_C = pytest.importorskip("adaptlora._C", reason="the C++ extension is not built: no direct calls")

ALL = ("x", "lora_A", "lora_B", "rank_scale")


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("ADAPTLORA_BACKEND", raising=False)


# ---- which way a call takes


class Recorder:
    """The extension; `took` says of each call of a `*_direct` function whether it was taken."""

    def __init__(self):
        self.took = []

    def __getattr__(self, name):
        def function(*arguments):
            self.took.append(True)  # also where a hook raises
            out = getattr(_C, name)(*arguments)
            self.took[-1] = out is not None
            return out

        return function


@contextlib.contextmanager
def watched():
    """Yields the list of what direct functions answer."""
    recorder, direct = Recorder(), _backend.direct
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "direct", lambda tensor: direct(tensor) and recorder)
        yield recorder.took


@contextlib.contextmanager
def dispatched():
    """Every call goes through the dispatcher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "direct", lambda tensor: None)
        yield


def layouts(results: dict) -> dict:
    return {name: (t.shape, t.stride(), t.dtype, type(t), t.is_inference()) for name, t in results.items()}


def assert_same_both_ways(function, calls=1) -> dict:
    """What `function` returns, a dict of tensors, is the same bit for bit without and with the dispatcher; so is the generator."""
    torch.manual_seed(7)
    with watched() as took:
        out = function()
    state = torch.get_rng_state()
    assert took == [True] * calls, "the call was to go directly"
    torch.manual_seed(7)
    with dispatched():
        expected = function()
    assert_same(out, expected)
    assert layouts(out) == layouts(expected)
    assert torch.equal(torch.get_rng_state(), state)
    return out


def assert_dispatched(function) -> dict:
    """The call is one for the dispatcher, and gives what it gives there."""
    with watched() as took:
        out = function()
    assert True not in took
    with dispatched():
        assert_same(out, function())
    return out


def gradients(sample: dict, trained=ALL, **options) -> dict:
    """y and the gradients of what is trained; nothing else gets one."""
    given = {name: t if t is None else t.detach().requires_grad_(name in trained) for name, t in sample.items()}
    y = call(given, **options)
    wanted = [name for name in trained if given[name] is not None]
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.backward(sample["dy"])
    assert all(t is None or t.grad is None for name, t in given.items() if name not in wanted)
    return {"y": y.detach()} | {name: given[name].grad for name in wanted}


CASES = [
    Case(),
    Case(bias=False, rank_scale=False),
    Case(batch=()),
    Case(batch=(1,), K=1, N=1, R=1),
    Case(batch=(2, 3, 5)),
    Case(batch=(130,), K=400, N=768, R=256),
    *(Case(batch=(4, 9), K=64, N=48, x=layout, dy=layout) for layout in ("transposed", "padded", "strided")),
    *(
        Case(weight=layout, lora_A=layout, lora_B=layout)
        for layout in ("contiguous", "transposed", "padded", "strided")
    ),
    *(Case(dtype=dtype, bias=bias) for dtype in (BF16, FP16) for bias in (True, False)),
    *(Case(batch=(2, 20), dtype=dtype, dtype_A=FP32, dtype_B=FP32) for dtype in (BF16, FP16)),
    Case(dtype=BF16, dtype_A=BF16, dtype_B=FP32, x="transposed", weight="transposed"),
]
DROPOUTS = [
    {},
    {"dropout_p": 0.3, "seed": SEED},
    {"dropout_p": 0.3, "seed": torch.tensor(-5)},
    {"dropout_p": 0.3},
]


@pytest.mark.parametrize("options", DROPOUTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lora_linear(case, options):
    sample = case.sample()
    assert_same_both_ways(lambda: gradients(sample, **options))


@pytest.mark.parametrize(
    "trained",
    [(), ("x",), ("lora_A",), ("lora_B",), ("rank_scale",), ("lora_A", "lora_B"), ("x", "rank_scale")],
    ids=str,
)
@pytest.mark.parametrize("options", DROPOUTS[::3], ids=str)
def test_lora_linear_with_some_gradients(trained, options):
    sample = Case(batch=(3, 9)).sample()
    assert_same_both_ways(lambda: gradients(sample, trained, **options))


def group_dropouts(samples: list[dict]) -> list[dict]:
    seeds = [SEED, torch.tensor(-5), None, 2**63 - 1]
    return [{}, {"dropout_p": 0.3}, {"dropout_p": 0.3, "seeds": tuple(seeds[: len(samples)])}]


@pytest.mark.parametrize(
    "cases",
    [
        group({"R": 13}),
        group(*QKV),
        group(*QKV, batch=(2, 3, 5)),
        group(*QKV, batch=()),
        group(*QKV, x="transposed", K=64, batch=(4, 9)),
        group({"weight": "transposed", "dy": "padded"}, {"lora_A": "strided", "lora_B": "padded", "dy": "strided"}),
        *(group(*QKV, {"R": 4}, dtype=dtype, dtype_A=FP32, dtype_B=FP32) for dtype in (BF16, FP16)),
        group(*QKV, dtype=BF16),
    ],
    ids=lambda cases: "|".join(map(str, cases)),
)
def test_lora_group(cases):
    samples = samples_of(cases)
    for options in group_dropouts(samples):
        assert_same_both_ways(lambda: group_results(lora_group, samples, **options))  # noqa: B023


@pytest.mark.parametrize(
    "trained", [{"x"}, {"lora_A"}, {"lora_B", "rank_scale"}], ids=lambda names: "+".join(sorted(names))
)
def test_lora_group_with_some_gradients(trained):
    samples = samples_of(group(*QKV))
    assert_same_both_ways(lambda: group_results(lora_group, samples, trained=trained, dropout_p=0.3))


@pytest.mark.parametrize("unused", [[0], [2], [0, 1]], ids=str)
def test_lora_group_with_unused_outputs(unused):
    samples = samples_of(group(*QKV))
    for i in unused:
        samples[i]["dy"] = None
    out = assert_same_both_ways(lambda: group_results(lora_group, samples, dropout_p=0.3))
    assert not any(f"{d}{i}" in out for d in ("dA", "dB", "dE") for i in unused)


def test_modules_of_a_group_may_share_their_factors():
    (sample,) = samples_of(group({"R": 5}))
    assert_same_both_ways(lambda: sharing(sample))


def sharing(sample: dict) -> dict:
    given = {name: t.detach().requires_grad_(name in ALL) for name, t in sample.items()}
    ys = call_group([given, given, given], dropout_p=0.3)
    sum(ys).backward(sample["dy"])
    return {f"y{i}": y.detach() for i, y in enumerate(ys)} | take_grads(given)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    sample, samples = leaves(Case(batch=(2, 9))), samples_of(group(*QKV))
    sample["weight"].requires_grad_()  # a base need not be frozen where nothing is differentiated

    def run():
        with mode():
            ys = [
                call(sample, dropout_p=0.3),
                *call_group(samples, dropout_p=0.3),
                *itertools.chain(*rank_norms([sample["lora_A"]], [sample["lora_B"]])),
            ]
        assert not any(y.requires_grad for y in ys)
        return {str(i): y for i, y in enumerate(ys)}

    assert_same_both_ways(run, calls=3)


def norms(function, factors: tuple, outputs=(0, 1)) -> dict:
    """Norms, or a penalty, and the gradients of the factors from some of the outputs."""
    lora_As, lora_Bs, upstream = factors
    lora_As, lora_Bs = ([f.detach().requires_grad_() for f in given] for given in (lora_As, lora_Bs))
    out = function(lora_As, lora_Bs)
    if isinstance(out, torch.Tensor):
        flat, dflat = [out], [torch.tensor(1.5)]
    else:
        halves = upstream[: len(lora_As)], upstream[len(lora_As) :]
        flat, dflat = ([t for side in outputs for t in given[side]] for given in (out, halves))
    torch.autograd.backward(flat, dflat)
    grads = {f"dA{i}": A.grad for i, A in enumerate(lora_As)} | {f"dB{i}": B.grad for i, B in enumerate(lora_Bs)}
    assert all(grad is not None for grad in grads.values())
    return {f"out{i}": t.detach() for i, t in enumerate(flat)} | grads


@pytest.mark.parametrize("function", [rank_norms, rank_penalty])
@pytest.mark.parametrize(
    "options",
    [{}, {"layout_A": "strided", "layout_B": "padded"}, {"dtype": BF16}, {"dtype": FP16, "dtype_B": FP32}],
    ids=str,
)
def test_rank_norms(function, options):
    factors = factors_of(**options)
    assert_same_both_ways(lambda: norms(function, factors))


@pytest.mark.parametrize("output", [0, 1])
def test_one_of_the_norms_unused(output):
    factors = factors_of()
    out = assert_same_both_ways(lambda: norms(rank_norms, factors, outputs=(output,)))
    unused = "dB" if output == 0 else "dA"
    assert not any(grad.any() for name, grad in out.items() if name.startswith(unused))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_gradient_of_the_norm_at_zero(dtype):
    lora_As, lora_Bs, upstream = factors_of([(3, 7, 5)], dtype=dtype)
    lora_As[0][1] = lora_Bs[0][:, 2] = 0
    out = assert_same_both_ways(lambda: norms(rank_norms, (lora_As, lora_Bs, upstream)))
    assert not out["dA0"][1].any() and not out["dB0"][:, 2].any()
    assert all(grad.isfinite().all() and grad.any() for grad in (out["dA0"], out["dB0"]))


# ---- calls for the dispatcher


def name_only(value):
    return value if isinstance(value, str) else ""


def direct_call(function, arguments: dict):
    """What `lora_linear_direct` or `lora_group_direct` says to the arguments of the public function."""
    names = list(
        inspect.signature({_C.lora_linear_direct: lora_linear, _C.lora_group_direct: lora_group}[function]).parameters
    )
    order = [
        *names[:5],
        *(
            name
            for name in ("rank_scale", "rank_scales", "scaling", "scalings", "dropout_p", "seed", "seeds")
            if name in names
        ),
    ]
    return function(*(arguments[name] for name in order))


def test_valid_calls_of_the_tests_below_are_direct():
    assert direct_call(_C.lora_linear_direct, valid()).shape == (4, 5)
    assert [y.shape for y in direct_call(_C.lora_group_direct, valid_group())] == [(4, 5), (4, 4)]


@pytest.mark.parametrize(("name", "value"), [bad[:2] for bad in BAD_INPUT], ids=name_only)
def test_wrong_arguments(name, value):
    arguments, state = valid() | {name: value}, torch.get_rng_state()
    assert direct_call(_C.lora_linear_direct, arguments) is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("name", "value", "_", "message"), BAD_GROUP_INPUT, ids=name_only)
def test_wrong_arguments_of_a_group(name, value, _, message):
    arguments, state = valid_group(), torch.get_rng_state()
    arguments[name] = [arguments[name][0], *value] if message.startswith(MEMBER) else value
    assert direct_call(_C.lora_group_direct, arguments) is None
    assert torch.equal(torch.get_rng_state(), state), "module 0 would draw a seed, were module 1 right"


@pytest.mark.parametrize(("lora_As", "lora_Bs"), [bad[:2] for bad in BAD_FACTORS])
def test_wrong_factors(lora_As, lora_Bs):
    assert _C.rank_norms_direct(lora_As, lora_Bs) is None


def test_messages_are_the_ops_own():
    x, weight, lora_A, lora_B = torch.ones(3, 8), torch.ones(6, 8), torch.ones(2, 8), torch.ones(6, 2)
    with pytest.raises(ValueError, match=r"^lora_linear: lora_A must have shape \(R, K\) with K=8 .*, got \(2, 7\)$"):
        lora_linear(x, weight, None, lora_A[:, :7], lora_B)
    with pytest.raises(
        ValueError, match=r"^lora_group: module 1: lora_B must have shape \(N, R\) with R=2 .*, got \(6, 1\)$"
    ):
        lora_group(x, [weight] * 2, [None] * 2, [lora_A] * 2, [lora_B, lora_B[:, :1]], scalings=[1, 1])


class Subclass(torch.Tensor):
    """Behaves like torch's own."""


def negated(values: torch.Tensor) -> torch.Tensor:
    """Equal to `values`, with a bit that says that the memory holds their negative."""
    out = torch.complex(torch.zeros_like(values), -values).conj().imag
    assert out.is_neg() and torch.equal(out, values)
    return out


@pytest.mark.parametrize("name", ["x", "weight", "bias", "lora_A", "lora_B", "rank_scale"])
@pytest.mark.parametrize("change", [negated, lambda t: t.detach().as_subclass(Subclass)], ids=["negated", "subclass"])
def test_tensors_that_are_not_plain(name, change):
    sample = Case().sample()
    sample[name] = change(sample[name])
    assert_dispatched(lambda: {"y": call(sample).detach()})
    samples = samples_of(group(*QKV))
    samples[0][name] = change(samples[0][name])
    assert_dispatched(lambda: {str(i): y for i, y in enumerate(call_group(samples, dropout_p=0.3, seeds=[1, 2, 3]))})


def test_factors_that_are_not_plain():
    for change in (negated, lambda t: t.as_subclass(Subclass), torch.Tensor.double):
        (lora_A, *_), (lora_B, *_), _ = factors_of()
        for factors in ((change(lora_A), lora_B), (lora_A, change(lora_B))):
            assert _C.rank_norms_direct(*([factor] for factor in factors)) is None


@pytest.mark.parametrize(
    "case",
    [
        Case(dtype=torch.float64),
        Case(R=0),
        Case(R=257, K=20),
        Case(batch=(0,)),
        Case(batch=(4, 0, 3)),
        Case(K=0),
        Case(N=0),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_take(case):
    sample = case.sample()
    assert_dispatched(lambda: gradients(sample, dropout_p=0.3, seed=SEED))
    samples = samples_of((case, dataclasses.replace(case, N=9)))
    assert_dispatched(lambda: group_results(lora_group, samples, dropout_p=0.3, seeds=[1, 2]))


@pytest.mark.parametrize(
    "options",
    [
        {"scaling": np.float64(0.75)},
        {"dropout_p": False},
        {"dropout_p": np.float64(0.3), "seed": 3},
        {"dropout_p": 0.3, "seed": True},
    ],
    ids=str,
)
def test_numbers_of_other_types(options):
    sample = Case().sample()
    tensors = [sample[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    assert_dispatched(lambda: {"y": lora_linear(*tensors, **options)})


@pytest.mark.parametrize("scaling", [math.nan, math.inf, -math.inf, True, 10**400, 1j], ids=lambda v: str(v)[:9])
@pytest.mark.parametrize("name", ["scaling", "dropout_p"])
def test_numbers_that_are_none(name, scaling):
    assert direct_call(_C.lora_linear_direct, valid() | {name: scaling}) is None


@pytest.mark.parametrize(
    "seed", [2**63, -(2**63) - 1, 10**30, np.int64(3), torch.tensor(3).int(), torch.tensor([3])], ids=str
)
def test_seeds_that_are_none(seed):
    assert direct_call(_C.lora_linear_direct, valid() | {"seed": seed}) is None


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_seeds_at_the_ends(seed):
    sample = Case().sample()
    assert_same_both_ways(lambda: {"y": call(sample, dropout_p=0.3, seed=seed)})


def test_parameters_are_plain():
    sample = {name: None if t is None else torch.nn.Parameter(t, name in ALL) for name, t in leaves(Case()).items()}
    assert_same_both_ways(lambda: {"y": call(sample, dropout_p=0.3).detach()})


def test_override_is_read_on_every_call(monkeypatch):
    sample = Case().sample()
    for value, direct in {"reference": [], "cpp": [True], "": [True]}.items():
        monkeypatch.setenv("ADAPTLORA_BACKEND", value)
        with watched() as took:
            call(sample)
        assert took == direct, value
    monkeypatch.setenv("ADAPTLORA_BACKEND", "c++")
    with pytest.raises(ValueError, match="ADAPTLORA_BACKEND must be one of"):
        call(sample)


# ---- surroundings


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


class CountedFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Counted, CountedFunctions])
def test_modes_see_the_ops(mode):
    sample, samples = leaves(Case()), samples_of(group(*QKV))

    def run():
        with mode() as seen:
            y, *ys = call(sample), *call_group(samples)
            (norms_A,), _ = rank_norms([sample["lora_A"]], [sample["lora_B"]])
        for op in ("lora_linear", "lora_group", "rank_norms"):
            assert any(f"adaptlora::{op}" in name or f"adaptlora.{op}" in name for name in seen.names), op
        return {str(i): t.detach() for i, t in enumerate([y, *ys, norms_A])}

    assert_dispatched(run)


def test_flops_are_counted():
    def count() -> int:
        sample = leaves(Case(bias=False, rank_scale=False))
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            call(sample, dropout_p=0.3).backward(sample["dy"])
        return counter.get_total_flops()

    flops = count()
    with dispatched():
        assert flops == count() > 2 * 2 * 37 * 63 * 50  # two products with the base's weight, and the adapter's


def test_fake_tensors():
    with FakeTensorMode():
        y = call(leaves(Case(batch=(2, 3))), dropout_p=0.3)
        ys = call_group(samples_of(group(*QKV)), dropout_p=0.3)
        assert [tuple(t.shape) for t in (y, *ys)] == [(2, 3, 50), (37, 50), (37, 20), (37, 31)]
        y.sum().backward()


def test_autocast():
    sample = leaves(Case(dtype_A=FP32, dtype_B=FP32, rank_scale=False))

    def run(enabled=True):
        with torch.autocast("cpu", dtype=BF16, enabled=enabled):
            y = call(sample)
        y.backward(sample["dy"].to(y.dtype))
        return {"y": y.detach(), **{name: t for name, t in take_grads(sample).items() if t is not None}}

    assert assert_dispatched(run)["y"].dtype == BF16
    assert assert_same_both_ways(lambda: run(enabled=False))["y"].dtype == FP32


def test_functorch():
    sample = Case().sample()
    arguments = valid()
    answers = []

    def ask(x):
        answers.append(direct_call(_C.lora_linear_direct, arguments | {"x": x}))
        answers.append(direct_call(_C.lora_linear_direct, arguments))  # a plain call inside of a transform
        answers.append(_C.rank_norms_direct([x], [torch.ones(5, x.shape[0])]))
        return x.sum()

    torch.func.grad(ask)(arguments["x"])
    torch.vmap(ask)(arguments["x"].expand(3, 4, 6))
    torch.func.jvp(ask, (arguments["x"],), (arguments["x"],))
    assert answers == [None] * 9

    xs = torch.randn(3, *sample["x"].shape)
    batched = assert_dispatched(lambda: {"y": torch.vmap(lambda x: call({**sample, "x": x}))(xs)})
    assert torch.equal(batched["y"], torch.stack([call({**sample, "x": x}) for x in xs]))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_trace():
    sample = Case().sample()
    with watched() as took:
        traced = torch.jit.trace(lambda x: call({**sample, "x": x}), sample["x"], check_trace=False)
    assert True not in took
    assert "adaptlora::lora_linear" in str(traced.graph)
    x = torch.randn_like(sample["x"])
    assert torch.equal(traced(x), call({**sample, "x": x}))
