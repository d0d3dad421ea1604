"""lora_group against its definition in float64, for every y and gradient, on every backend."""

import dataclasses
import types
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_all_accurate
from test_lora_linear import BF16, FP16, FP32, FP64, Case, assert_same, eager
from torch.utils.checkpoint import checkpoint

from adaptlora.ops import _backend, lora_group, lora_group_ref, lora_linear
from adaptlora.ops._dropout import new_seed

TRAINABLE = {"lora_A": "dA", "lora_B": "dB", "rank_scale": "dE"}
OPERANDS = {
    "weight": "weights",
    "bias": "biases",
    "lora_A": "lora_As",
    "lora_B": "lora_Bs",
    "rank_scale": "rank_scales",
}
SEEDS, SCALINGS = (1234, -5, 2**62, 77), (0.75, -1.25, 0.0, 2.0)
QKV = ({"N": 50, "R": 13}, {"N": 20, "R": 33, "bias": False}, {"N": 31, "R": 1, "rank_scale": False})
Group = tuple[Case, ...]


def group(*members: dict, **common) -> Group:
    """A case for each member; what they share, x and its layout among it, comes from `common`."""
    return tuple(Case(**(common | member)) for member in members)


def group_cases() -> list[Group]:
    """Groups of different ranks, sizes, dtypes and memory layouts; `p` and x are those of the first member."""
    bf16_factors = {"dtype_A": FP32, "dtype_B": FP32}
    return [
        *(group(*QKV, p=p) for p in (0.0, 0.3)),
        *(group(*QKV, {"N": 7, "R": 0}, p=p) for p in (0.0, 0.3)),
        # ranks
        group({"R": 13}),
        group({"R": 0}, {"R": 0, "N": 9, "bias": False}, p=0.3),
        group({"R": 0}, {"R": 8}, p=0.3),
        group({"R": 128}, {"R": 7, "N": 64}, p=0.3),
        group({"R": 256, "N": 300}, {"R": 2}, K=20),
        group({"R": 300}, {"R": 2}, {"R": 0}, K=20, p=0.3),  # more than the kernels hold
        # sizes
        *(group(*QKV, batch=batch, p=0.3) for batch in ((1,), (), (2, 3, 5), (0,), (4, 0, 3))),
        group({"N": 1, "R": 1}, {"N": 1, "R": 2}, batch=(1,), K=1),
        group({"N": 257, "R": 8}, {"N": 65, "R": 40}, batch=(130,), K=300, p=0.3),
        group(*QKV, K=0),
        group({"N": 0}, {"N": 5}, p=0.3),
        group({"N": 0, "R": 0}, {"N": 5}),
        # dtypes
        group(*QKV, dtype=FP64, p=0.3),
        *(group(*QKV, dtype=dtype, p=0.3) for dtype in (BF16, FP16)),
        *(group(*QKV, dtype=dtype, **bf16_factors) for dtype in (BF16, FP16)),
        group({"R": 5, **bf16_factors}, {"R": 9}, {"R": 4, "dtype_B": FP32}, dtype=BF16, p=0.3),
        # memory
        *(group(*QKV, x=layout, K=64, p=0.3) for layout in ("padded", "strided", "transposed")),
        group(*QKV, x="transposed", batch=(5, 7)),
        group({"weight": "transposed"}, {"weight": "padded"}, {"weight": "strided"}, R=5),
        group({"dy": "transposed"}, {"dy": "padded"}, {"dy": "strided"}, R=5, N=64, p=0.3),
        group({"lora_A": "transposed"}, {"lora_A": "padded", "lora_B": "strided"}, {"lora_B": "contiguous"}, p=0.3),
    ]


def name_of(cases: Group) -> str:
    return "|".join(map(str, cases))


def samples_of(cases: Group) -> list[dict]:
    """The operands and dy of every member, with one x."""
    samples = [case.sample() for case in cases]
    return [{**sample, "x": samples[0]["x"]} for sample in samples]


def call(samples: list[dict], function=lora_group, **options) -> list[torch.Tensor]:
    lists = {plural: [sample[name] for sample in samples] for name, plural in OPERANDS.items()}
    return function(samples[0]["x"], **lists, scalings=list(SCALINGS[: len(samples)]), **options)


def eager_group(x, weights, biases, lora_As, lora_Bs, *, scalings, rank_scales, dropout_p=0.0, seeds=None) -> list:
    """PEFT's layers, one after the other."""
    seeds = [None] * len(weights) if seeds is None else seeds
    members = zip(weights, biases, lora_As, lora_Bs, scalings, rank_scales, seeds, strict=True)
    return [
        eager(x, W, bias, A, B, scaling=scaling, rank_scale=E, dropout_p=dropout_p, seed=seed)
        for W, bias, A, B, scaling, E, seed in members
    ]


def leaves(samples: list[dict], double=False, trained=("x", *TRAINABLE)) -> list[dict]:
    """Copies whose x and `trained` operands collect gradients."""
    x = samples[0]["x"].detach().to(FP64 if double else samples[0]["x"].dtype).requires_grad_("x" in trained)
    made = [
        {
            name: t if t is None else t.detach().to(FP64 if double else t.dtype).requires_grad_(name in trained)
            for name, t in sample.items()
        }
        for sample in samples
    ]
    for sample in made:
        sample["x"] = x
        if sample["dy"] is not None:
            sample["dy"].requires_grad_(False)
    return made


def take_grads(samples: list[dict]) -> dict[str, torch.Tensor]:
    """The gradients that arrived."""
    grads = {"dx": samples[0]["x"].grad}
    for i, sample in enumerate(samples):
        grads |= {f"{d}{i}": sample[name].grad for name, d in TRAINABLE.items() if sample[name] is not None}
    return {name: grad for name, grad in grads.items() if grad is not None}


def backward(ys: list[torch.Tensor], samples: list[dict]) -> None:
    """From the outputs that have a dy."""
    used = [(y, sample["dy"]) for y, sample in zip(ys, samples, strict=True) if sample["dy"] is not None]
    torch.autograd.backward(*map(list, zip(*used, strict=True)))


def results(function, samples: list[dict], *, double=False, trained=("x", *TRAINABLE), **options) -> dict:
    """Every y and the gradients that arrive for the dy's; `double`: computed in float64."""
    samples = leaves(samples, double, trained)
    ys = call(samples, function, **options)
    backward(ys, samples)
    return {f"y{i}": y.detach() for i, y in enumerate(ys)} | take_grads(samples)


def dropout(p: float, samples: list, seeds=SEEDS) -> dict:
    return {"dropout_p": p, "seeds": list(seeds[: len(samples)])} if p else {}


def assert_right(samples: list[dict], p: float, function=lora_group, *, precision=None) -> None:
    options = dropout(p, samples)
    exact, theirs = (results(eager_group, samples, double=double, **options) for double in (True, False))
    assert_all_accurate(results(function, samples, **options), exact, theirs, precision=precision)


@pytest.fixture
def fused(monkeypatch):
    """A backend with group kernels: the contract between op and kernels, computed by the reference of each member."""
    calls = []

    def rows(x2d, members, S=None):
        """Checks what a kernel may rely on."""
        calls.append([A.shape[0] for _, A, *_ in members])
        assert x2d.dim() == 2 and x2d.numel() and not torch.is_autocast_enabled("cpu")
        assert all(W.shape[0] for W, *_ in members) and 0 < max(calls[-1]) <= 256
        if S is not None:
            assert S.is_contiguous() and S.shape == (x2d.shape[0], sum(calls[-1]))
            return S.split(calls[-1], 1)

    def forward(x2d, weights, biases, As, Bs, rank_scales, scalings, dropout_p, threshold, seeds):
        assert (seeds is None) == (dropout_p == 0) == (threshold == 0)
        members = list(zip(weights, As, Bs, rank_scales, seeds or [None] * len(As), scalings, strict=True))
        rows(x2d, members)
        pairs = [
            torch.ops.adaptlora.lora_linear(x2d, W, bias, *rest, dropout_p)
            for (W, *rest), bias in zip(members, biases, strict=True)
        ]
        ys, columns = zip(*pairs, strict=True)
        return list(ys), torch.cat(columns, 1)

    def backward(
        dys, x2d, weights, S, As, Bs, rank_scales, scalings, dropout_p, threshold, seeds, need_dx, need_dA, need_dB, need_dE
    ):  # fmt: skip
        members = list(zip(weights, As, Bs, rank_scales, seeds or [None] * len(As), scalings, strict=True))
        assert any(dy is not None for dy in dys)
        assert (x2d is not None or not any(need_dA)) and (S is not None or not any(need_dB + need_dE))
        like = next(dy for dy in dys if dy is not None)
        columns = rows(like if x2d is None else x2d, members, S) or [None] * len(As)
        dx, grads = like.new_zeros(like.shape[0], As[0].shape[1]) if need_dx else None, []
        needs = zip(need_dA, need_dB, need_dE, strict=True)
        for dy, (W, *rest), s, need in zip(dys, members, columns, needs, strict=True):
            if dy is None:
                assert not any(need)
                grads.append((None,) * 3)
                continue
            assert dy.dim() == 2
            dx_i, *mine = torch.ops.adaptlora.lora_linear_backward(dy, x2d, W, s, *rest, dropout_p, [need_dx, *need])
            grads.append([grad if needed else None for grad, needed in zip(mine, need, strict=True)])
            if need_dx:
                dx += dx_i
        return dx, *map(list, zip(*grads, strict=True))

    kernels = types.SimpleNamespace(lora_group=forward, lora_group_backward=backward)
    monkeypatch.setenv("ADAPTLORA_BACKEND", "reference")
    monkeypatch.setattr(_backend, "kernels", lambda tensor, op: kernels if op == "lora_group" else None)
    return calls


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cases", group_cases(), ids=name_of)
def test_y_and_gradients(backend, cases):
    assert_right(samples_of(cases), cases[0].p)


@pytest.mark.parametrize("cases", group_cases(), ids=name_of)
def test_y_and_gradients_of_fused_members(fused, cases):
    assert_right(samples_of(cases), cases[0].p)
    ranks = [case.R for case in cases]
    launches = samples_of(cases)[0]["x"].numel() and all(case.N for case in cases) and 0 < max(ranks) <= 256
    assert fused == ([ranks] * 2 if launches else [])


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    members=st.lists(
        st.fixed_dictionaries(
            {"N": st.integers(0, 40), "R": st.integers(0, 40), "bias": st.booleans(), "rank_scale": st.booleans()}
        ),
        min_size=1,
        max_size=4,
    ),
    batch=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    K=st.integers(0, 50),
    dtype=st.sampled_from([FP32, BF16]),
    p=st.sampled_from([0.0, 0.3]),
)
def test_any_shape(backend, members, batch, K, dtype, p):
    torch.manual_seed(0)
    assert_right(samples_of(group(*members, batch=batch, K=K, dtype=dtype)), p)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_reference_is_the_definition(p):
    """`lora_group_ref` in float64, differentiated by autograd, equals the formula written out here."""
    samples = samples_of(group(*QKV, {"R": 0}))
    options = dropout(p, samples)
    exact = results(eager_group, samples, double=True, **options)
    assert_all_accurate(results(lora_group_ref, samples, double=True, **options), exact, exact)


def test_gradcheck():
    cases = group({"N": 3, "R": 2}, {"N": 2, "R": 1, "rank_scale": False}, batch=(5,), K=4)
    samples = leaves(samples_of(cases), double=True)
    names = [(i, name) for i, sample in enumerate(samples) for name in TRAINABLE if sample[name] is not None]

    def function(x, *values):
        given = [{**sample, "x": x} for sample in samples]
        for (i, name), value in zip(names, values, strict=True):
            given[i][name] = value
        return tuple(call(given, **dropout(0.3, samples)))

    assert torch.autograd.gradcheck(function, (samples[0]["x"], *(samples[i][name] for i, name in names)))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("used", [u for u in product([True, False], repeat=3) if any(u)], ids=str)
@pytest.mark.parametrize("kind", ["each alone", "fused"])
def test_unused_outputs(request, kind, used, p):
    """An output that is not in the loss adds nothing to dx, and its factors get no gradient."""
    if kind == "fused":
        request.getfixturevalue("fused")
    samples = samples_of(group({"R": 5}, {"R": 0, "N": 9}, {"R": 3, "N": 20}))
    for sample, kept in zip(samples, used, strict=True):
        sample["dy"] = sample["dy"] if kept else None
    assert_right(samples, p)
    names = results(lora_group, samples, **dropout(p, samples)).keys()
    assert {f"dA{i}" in names for i in range(3) if used[i]} == {True}
    assert not any(f"{d}{i}" in names for d in TRAINABLE.values() for i in range(3) if not used[i])


@pytest.mark.parametrize("kind", ["each alone", "fused"])
@pytest.mark.parametrize(
    "trained",
    [{"x"}, {"lora_A"}, {"lora_B"}, {"rank_scale"}, {"x", "rank_scale"}],
    ids=lambda names: "+".join(sorted(names)),
)
def test_subsets_of_gradients(request, kind, trained):
    """Whatever needs no gradient gets none, and the others are what they are when all are asked for."""
    if kind == "fused":
        request.getfixturevalue("fused")
    samples = samples_of(group(*QKV))
    options = dropout(0.3, samples)
    everything = results(lora_group, samples, **options)
    wanted = {{"x": "dx", **TRAINABLE}[name] for name in trained}
    some = results(lora_group, samples, trained=trained, **options)
    assert_same(some, {name: t for name, t in everything.items() if name[0] == "y" or name.rstrip("0123") in wanted})


def test_one_trained_member(backend):
    samples = samples_of(group(*QKV))
    everything = results(lora_group, samples)
    samples[1]["lora_A"].requires_grad_()
    call(samples)[1].backward(samples[1]["dy"])
    assert torch.equal(samples[1]["lora_A"].grad, everything["dA1"])
    assert take_grads(samples).keys() == {"dA1"}


def test_frozen_everything_makes_no_graph(backend):
    assert not any(y.requires_grad for y in call(samples_of(group(*QKV))))


def test_expanded_upstream_gradient(backend):
    """y.sum().backward() hands over a dy whose strides are all zero."""
    samples = leaves(samples_of(group(*QKV, batch=(3, 7))))
    sum(y.sum() for y in call(samples)).backward()
    summed = take_grads(samples)
    for sample in samples:
        sample["dy"] = torch.ones_like(sample["dy"])
    for name, grad in results(lora_group, samples).items():
        if name[0] == "d":
            torch.testing.assert_close(summed[name], grad, msg=name)


def test_gradients_are_rank_major(backend):
    samples = leaves(samples_of(group({"N": 31, "R": 5}, {"N": 20, "R": 7})))
    factors = [sample[name] for sample in samples for name in ("lora_A", "lora_B")]
    grads = torch.autograd.grad(call(samples), factors, [sample["dy"] for sample in samples])
    assert [grad.stride() for grad in grads] == [(63, 1), (1, 31), (63, 1), (1, 20)]


def test_deterministic(backend):
    samples = samples_of(group(*QKV, batch=(130,), K=200))
    assert_same(*(results(lora_group, samples, **dropout(0.3, samples)) for _ in range(2)))


def test_inputs_are_not_written(backend):
    samples = samples_of(group(*QKV))
    before = [{name: None if t is None else t.clone() for name, t in sample.items()} for sample in samples]
    results(lora_group, samples, **dropout(0.3, samples))
    for sample, kept in zip(samples, before, strict=True):
        assert_same(*({name: t for name, t in s.items() if t is not None} for s in (sample, kept)))


def extra_bytes(samples: list[dict], **options) -> int:
    """Size of what the graph holds beyond the operands."""
    inputs = {t.untyped_storage().data_ptr() for sample in samples for t in sample.values() if t is not None}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        call(samples, **options)
    return sum(t.numel() * t.element_size() for t in saved if t.untyped_storage().data_ptr() not in inputs)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_saves_no_mask(backend, p):
    """Beyond its inputs the graph holds S (M, ΣR) in float32 and 8-byte seeds: nothing of size M × K."""
    samples = leaves(samples_of(group({"R": 4}, {"R": 3, "N": 9}, {"R": 0}, batch=(40,))))
    assert extra_bytes(samples, dropout_p=p) == 40 * 7 * 4 + (3 * 8 if p else 0)


def test_dropout_draws_what_its_members_would_draw(backend):
    samples, state = samples_of(group(*QKV)), torch.get_rng_state()
    seeds = [new_seed(torch.device("cpu")).item() for _ in samples]
    moved = torch.get_rng_state()
    expected = call(samples, dropout_p=0.3, seeds=seeds)
    assert torch.equal(torch.get_rng_state(), moved), "given seeds must leave the generator alone"
    for unset in (None, [None] * 3):
        torch.set_rng_state(state)
        assert all(map(torch.equal, call(samples, dropout_p=0.3, seeds=unset), expected))
        assert torch.equal(torch.get_rng_state(), moved)
    torch.set_rng_state(state)
    call(samples)
    assert torch.equal(torch.get_rng_state(), state), "without dropout nothing is drawn"


def test_seeds_are_ints_or_tensors(backend):
    samples = samples_of(group(*QKV))
    given = [1, 2, 3], (torch.tensor(1), 2, torch.tensor(3))
    first, second = (call(samples, dropout_p=0.3, seeds=seeds) for seeds in given)
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], call(samples, dropout_p=0.3, seeds=[2, 2, 3])[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_reproduces_the_masks(backend, reentrant):
    samples = samples_of(group(*QKV))
    outs = []
    for run in (lambda through, x: through(x), lambda through, x: checkpoint(through, x, use_reentrant=reentrant)):
        made = leaves(samples)
        torch.manual_seed(3)
        ys = run(lambda x: tuple(call([{**s, "x": x} for s in made], dropout_p=0.3)), made[0]["x"])  # noqa: B023
        torch.randn(5)  # moves the generator between forward and backward
        backward(ys, made)
        outs.append({f"y{i}": y.detach() for i, y in enumerate(ys)} | take_grads(made))
    assert_same(*outs)


def under_autocast(function, samples: list[dict], backward_inside: bool) -> dict:
    samples = leaves(samples)
    with torch.autocast("cpu", dtype=BF16):
        ys = call(samples, function)
        for y, sample in zip(ys, samples, strict=True):
            sample["dy"] = sample["dy"].to(y.dtype)
        if backward_inside:
            backward(ys, samples)
    if not backward_inside:
        backward(ys, samples)
    return {f"y{i}": y.detach() for i, y in enumerate(ys)} | take_grads(samples)


@pytest.mark.parametrize("factors", [FP32, BF16], ids=str)
def test_autocast(backend, factors):
    cases = group(*QKV, batch=(4, 9), K=64, dtype_A=factors, dtype_B=factors, rank_scale=False)
    samples = samples_of(tuple(dataclasses.replace(case, rank_scale=False) for case in cases))
    out, theirs = (under_autocast(function, samples, backward_inside=False) for function in (lora_group, eager_group))
    assert all(out[f"y{i}"].dtype == BF16 for i in range(3))
    theirs |= {f"y{i}": theirs[f"y{i}"].to(BF16) for i in range(3)}
    assert_all_accurate(out, results(eager_group, samples, double=True), theirs, precision=BF16)
    assert_same(out, under_autocast(lora_group, samples, backward_inside=True))


def test_kernels_run_outside_of_autocast(fused):
    under_autocast(lora_group, samples_of(group({"R": 3}, {"R": 0}, rank_scale=False)), backward_inside=True)
    assert fused == [[3, 0]] * 2


def test_autocast_leaves_float64_alone(backend):
    samples = leaves(samples_of(group(*QKV)), double=True)
    with torch.autocast("cpu", dtype=BF16):
        ys = call(samples)
    assert all(y.dtype == FP64 for y in ys)
    assert all(map(torch.equal, ys, call(samples)))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients(backend, mode):
    samples = leaves(samples_of(group(*QKV)))
    with mode():
        ys = call(samples, **dropout(0.3, samples))
    assert not any(y.requires_grad for y in ys)
    assert all(map(torch.equal, ys, call(samples, **dropout(0.3, samples))))


def test_only_the_ys_are_differentiable(backend):
    ys, s = torch.ops.adaptlora.lora_group(*op_arguments(group(*QKV)))
    assert all(y.requires_grad for y in ys)
    assert not s.requires_grad


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B"])
def test_changed_factor_is_noticed(backend, name):
    samples = leaves(samples_of(group(*QKV)))
    ys = call(samples)
    with torch.no_grad():
        samples[2][name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys[0].backward(samples[0]["dy"])


@pytest.mark.parametrize("output", [0, 1])
def test_second_derivative_is_refused(backend, output):
    samples = leaves(samples_of(group(*QKV)))
    dy = samples[output]["dy"].requires_grad_()
    grads = torch.autograd.grad(
        call(samples)[output], [samples[output]["x"], samples[output]["lora_B"]], dy, create_graph=True
    )
    for grad in grads:
        with pytest.raises(RuntimeError, match="lora_(group|linear)_backward: second derivative"):
            grad.sum().backward()


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "seeds": [1, 2, 3]}, {"dropout_p": 0.3}], ids=str)
@pytest.mark.parametrize("unused", [None, 1])
def test_compile_in_one_graph(backend, options, unused):
    samples = samples_of(group({"R": 5}, {"R": 3, "N": 9, "bias": False}, {"R": 0, "rank_scale": False}, batch=(4, 9)))
    if unused is not None:
        samples[unused]["dy"] = None
    outs = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(2)
        made = leaves(samples)
        ys = function(made, **options)
        backward(ys, made)
        # A compiled graph hands zeros to what went unused, as it does for any op.
        grads = {name: grad for name, grad in take_grads(made).items() if grad.any()}
        outs.append({f"y{i}": y.detach() for i, y in enumerate(ys)} | grads)
    assert_same(*outs)


def op_arguments(cases: Group) -> tuple:
    """Of the registered op, where what is absent is empty."""
    samples = leaves(samples_of(cases))
    lists = [[torch.empty(0) if s[name] is None else s[name] for s in samples] for name in OPERANDS]
    seeds = [torch.tensor(seed) for seed in SEEDS[: len(cases)]] if cases[0].p else []
    return samples[0]["x"], *lists, seeds, list(SCALINGS[: len(cases)]), cases[0].p


OPCHECKED = [
    group(*QKV, batch=(2, 5), p=0.3),
    group(*QKV, {"R": 0}, batch=(4,)),
    group({"R": 0}),
    group({"R": 3}, {"R": 2}, batch=(0,)),
    group({"R": 3}, {"R": 2}, dtype=BF16, dtype_A=FP32, dtype_B=FP32, lora_B="contiguous"),
]


@pytest.mark.parametrize("cases", OPCHECKED, ids=name_of)
def test_opcheck(backend, cases):
    torch.library.opcheck(torch.ops.adaptlora.lora_group.default, op_arguments(cases))


@pytest.mark.parametrize("kind", ["backend", "fused"])
@pytest.mark.parametrize("cases", OPCHECKED, ids=name_of)
@pytest.mark.parametrize("lacking", ["nothing", "dy", "gradients"])
def test_opcheck_backward(request, kind, cases, lacking):
    if kind == "fused":
        request.getfixturevalue("fused")
    x, weights, biases, As, Bs, Es, seeds, *numbers = op_arguments(cases)
    with torch.no_grad():
        ys, s = torch.ops.adaptlora.lora_group(x, weights, biases, As, Bs, Es, seeds, *numbers)
    dys = [torch.ones_like(y) for y in ys]
    need = [[True] * len(cases) for _ in range(2)] + [[case.rank_scale for case in cases]]
    if lacking == "dy" and len(cases) > 1:
        dys[0] = None
        for kind_of in need:
            kind_of[0] = False
    if lacking == "gradients":
        need = [[False] * len(cases), [i > 0 for i in range(len(cases))], [False] * len(cases)]
    detached = [[t.detach() for t in tensors] for tensors in (As, Bs, Es)]
    arguments = (dys, x.detach(), weights, s, *detached, seeds, *numbers, lacking != "gradients", *need)
    torch.library.opcheck(torch.ops.adaptlora.lora_group_backward.default, arguments)


def test_meta_tensors_have_shapes():
    samples = samples_of(group(*QKV))
    samples = [{name: None if t is None else t.to("meta") for name, t in sample.items()} for sample in samples]
    assert [(tuple(y.shape), y.device.type) for y in call(samples)] == [((37, N), "meta") for N in (50, 20, 31)]


def valid() -> dict:
    samples = samples_of(group({"N": 5, "R": 3}, {"N": 4, "R": 2}, batch=(4,), K=6))
    lists = {plural: [sample[name] for sample in samples] for name, plural in OPERANDS.items()}
    return {"x": samples[0]["x"], **lists, "scalings": [1.0, 2.0], "dropout_p": 0.1, "seeds": [None, 1]}


MEMBER = r"module 1: "
BAD_INPUT = [
    ("x", [1.0], TypeError, r"x must be a floating-point tensor, got list"),
    ("x", torch.ones(()), ValueError, r"x must have shape \(..., K\), got a 0-dim tensor"),
    ("weights", torch.ones(2, 5, 6), TypeError, r"weights must be a list or tuple, got Tensor"),
    ("weights", [], ValueError, r"weights must hold at least one tensor, got none"),
    ("biases", None, TypeError, r"biases must be a list or tuple, got NoneType"),
    ("biases", [None], ValueError, r"biases must be as long as weights, 2, got 1"),
    ("lora_As", [torch.ones(3, 6)] * 3, ValueError, r"lora_As must be as long as weights, 2, got 3"),
    ("lora_Bs", torch.ones(2, 5, 3), TypeError, r"lora_Bs must be a list or tuple, got Tensor"),
    ("scalings", 1.0, TypeError, r"scalings must be a list or tuple, got float"),
    ("scalings", [1.0], ValueError, r"scalings must be as long as weights, 2, got 1"),
    ("rank_scales", torch.ones(2, 3), TypeError, r"rank_scales must be a list or tuple, got Tensor"),
    ("rank_scales", [], ValueError, r"rank_scales must be as long as weights, 2, got 0"),
    ("seeds", 3, TypeError, r"seeds must be a list or tuple, got int"),
    ("seeds", [3], ValueError, r"seeds must be as long as weights, 2, got 1"),
    ("dropout_p", 1.0, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    ("dropout_p", "0.1", ValueError, r"dropout_p must be in \[0, 1\), got '0.1'"),
    ("weights", [None], TypeError, MEMBER + r"weight must be a tensor, got NoneType"),
    ("weights", [torch.ones(4, 7)], ValueError, MEMBER + r"weight must have shape \(N, K\) with K=6 .*, got \(4, 7\)"),
    ("weights", [torch.ones(4, 6, dtype=BF16)], TypeError, MEMBER + r"weight must have the dtype of x, .*32, got .*16"),
    (
        "weights",
        [torch.ones(4, 6).requires_grad_()],
        ValueError,
        MEMBER + r"weight must be frozen .*requires_grad=True",
    ),
    ("biases", [torch.ones(5)], ValueError, MEMBER + r"bias must have shape \(N,\) with N=4 .*, got \(5,\)"),
    ("biases", [0], TypeError, MEMBER + r"bias must be a tensor or None, got int"),
    ("lora_As", [torch.ones(2, 7)], ValueError, MEMBER + r"lora_A must have shape \(R, K\) with K=6 .*, got \(2, 7\)"),
    ("lora_As", [torch.ones(2, 6, dtype=FP64)], TypeError, MEMBER + r"lora_A must have the dtype of x, .*, got .*64"),
    ("lora_Bs", [torch.ones(4, 3)], ValueError, MEMBER + r"lora_B must have shape \(N, R\) with R=2 .*, got \(4, 3\)"),
    (
        "lora_Bs",
        [torch.ones(4, 2, device="meta")],
        ValueError,
        MEMBER + r"lora_B must be on the device of lora_A, cpu, .*",
    ),
    ("rank_scales", [torch.ones(3)], ValueError, MEMBER + r"rank_scale must have shape \(R,\) with R=2 .*, got \(3,\)"),
    ("scalings", [float("nan")], ValueError, MEMBER + r"scaling must be a finite number, got nan"),
    ("seeds", [1.5], TypeError, MEMBER + r"seed must be an int or a 0-dim int64 tensor, got 1.5"),
    ("seeds", [2**63], ValueError, MEMBER + r"seed must fit in 64 bits with a sign, got 9223372036854775808"),
]


@pytest.mark.parametrize(
    ("name", "value", "exception", "message"), BAD_INPUT, ids=lambda v: v if isinstance(v, str) else ""
)
def test_bad_input(backend, name, value, exception, message):
    """A message about module 1 gives its operand alone: module 0's stays right."""
    arguments, state = valid(), torch.get_rng_state()
    arguments[name] = [arguments[name][0], *value] if message.startswith(MEMBER) else value
    with pytest.raises(exception, match=f"^lora_group: {message}$"):
        lora_group(**arguments)
    assert torch.equal(torch.get_rng_state(), state), "a refused call must not consume random numbers"


def test_valid_input_of_the_bad_input_tests(backend):
    assert [tuple(y.shape) for y in lora_group(**valid())] == [(4, 5), (4, 4)]


def test_flops_are_those_of_the_members():
    from torch.utils.flop_counter import FlopCounterMode

    import adaptlora.ops.flops  # noqa: F401

    def count(function) -> int:
        made = leaves(samples)
        with FlopCounterMode(display=False) as counter:
            backward(function(made), made)
        return counter.get_total_flops()

    def alone(made):
        names = ("x", "weight", "bias", "lora_A", "lora_B")
        return [lora_linear(*map(sample.get, names), rank_scale=sample["rank_scale"]) for sample in made]

    samples = samples_of(group(*QKV, {"R": 0}))
    assert count(call) == count(alone) > 0
    samples[1]["dy"] = None
    assert count(call) == count(alone) > 0
