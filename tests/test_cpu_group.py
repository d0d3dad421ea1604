"""lora_group and lora_group_backward of adaptlora._C against their modules' equations in float64."""

from itertools import product

import pytest
import torch
from cpu_reference import (
    FLOAT_DTYPES,
    SCALING,
    SEED,
    inputs,
    references,
    thread_count_restored,  # noqa: F401
    threshold_of,
)
from numerics import assert_all_accurate, laid_out

_C = pytest.importorskip("adaptlora._C", reason="the C++ extension is not built")

X, WEIGHT, BIAS, A, B, E, P, MODULE_SEED, DY = range(9)  # of one module's arguments


def group_inputs(M, K, modules, dtype=torch.float32, factor_dtype=None, p=0.0):
    """The arguments of each module, `modules` being (N, R), with one x, and seeds, biases and rank scales that differ."""
    members = [inputs(M, K, N, R, dtype, factor_dtype, p, i != 1, i != 2) for i, (N, R) in enumerate(modules)]
    return [(members[0][X], *args[WEIGHT:MODULE_SEED], SEED + i, args[DY]) for i, args in enumerate(members)]


def column(members, argument):
    return [args[argument] for args in members]


def options(members):
    p = members[0][P]
    seeds = [torch.tensor(seed) for seed in column(members, MODULE_SEED)] if p > 0 else None
    return column(members, E), [SCALING] * len(members), p, threshold_of(p), seeds


def run(members, used=None, need_dx=True, needs=None):
    """
    What the kernels return, named as in `expected`, without the gradients that are not needed.

    used: whether each module has a dy.   needs: (dA, dB, dE) of each module; None for whatever there can be.
    """
    used = [True] * len(members) if used is None else used
    needs = [(True, True, True)] * len(members) if needs is None else needs
    needs = [(*need[:2], need[2] and args[E] is not None) for need, args in zip(needs, members, strict=True)]
    x, weights, As, Bs = members[0][X], *(column(members, argument) for argument in (WEIGHT, A, B))
    ys, S = _C.lora_group(x, weights, column(members, BIAS), As, Bs, *options(members))
    dys = [dy if kept else None for dy, kept in zip(column(members, DY), used, strict=True)]
    need_lists = [list(need) for need in zip(*needs, strict=True)]
    dx, *lists = _C.lora_group_backward(dys, x, weights, S, As, Bs, *options(members), need_dx, *need_lists)
    assert (dx is not None) == (need_dx and any(used))

    out = {f"y{i}": y for i, y in enumerate(ys)}
    out |= {f"S{i}": columns for i, columns in enumerate(S.split([len(A) for A in As], 1))}
    if dx is not None:
        out["dx"] = dx
    for i, grads in enumerate(zip(*lists, strict=True)):
        assert [grad is not None for grad in grads] == [bool(needed and used[i]) for needed in needs[i]]
        out |= {f"{name}{i}": grad for name, grad in zip(("dA", "dB", "dE"), grads, strict=True) if grad is not None}
    return out


def expected(members, used):
    """(exact, eager) of `references` with the names of `run`; dx is summed over the modules that have a dy."""
    exact, eager = {}, {}
    for i, (args, kept) in enumerate(zip(members, used, strict=True)):
        for results, total in zip(references(*args), (exact, eager), strict=True):
            dx = results.pop("dx")
            if kept:
                total["dx"] = total["dx"] + dx if "dx" in total else dx
            total |= {f"{name}{i}": value for name, value in results.items()}
    return exact, eager


def check(members, threads=1, used=None):
    torch.set_num_threads(threads)
    out = run(members, used)
    exact, eager = expected(members, [True] * len(members) if used is None else used)
    assert_all_accurate(out, {name: exact[name] for name in out}, {name: eager[name] for name in out})
    for name, value in out.items():
        assert name[:2] != "dA" or value.is_contiguous()
        assert name[:2] != "dB" or value.t().is_contiguous()
    return out


MODULES = [(50, 13), (7, 0), (130, 33), (41, 4)]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    "modules", [MODULES, [(50, 5)], [(7, 0)], [(9, 0), (20, 0)], [(7, 0), (48, 8)], [(300, 256), (20, 3)]], ids=str
)
@pytest.mark.parametrize(("M", "K"), [(1, 13), (63, 64), (98, 385)])
def test_sizes(M, K, modules, p):
    check(group_inputs(M, K, modules, p=p), threads=1 + M // 98)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("K", [768, 1024, 1100])
def test_wider_than_a_tile(K, p):
    check(group_inputs(40, K, [(384, 8), (1024, 3), (1100, 17)], p=p), threads=2)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("factors", ["same", "float32"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_dtypes(dtype, factors, p):
    factor_dtype = torch.float32 if factors == "float32" else dtype
    check(group_inputs(63, 385, MODULES, dtype, factor_dtype, p), threads=2)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_ends_of_blocks(p):
    """
    Rows 1 to 17, and widths and ranks on both sides of vectors, register blocks and tiles, differing within the group.

    The base's weights are zero: the rounding of torch's GEMMs, which add to the low-rank terms, is not what is tested.
    """
    widths, rows = [1, 16, 47, 48, 49, 96, 97, 383, 384, 385], [1, 2, 3, 4, 5, 15, 16, 17]
    for (i, K), (j, M) in product(enumerate(widths), enumerate(rows)):
        modules = [(widths[(i + 3 * j + n) % len(widths)], 3 + (i + j + 2 * n) % 7) for n in range(3)]
        members = group_inputs(M, K, modules, FLOAT_DTYPES[(i + j) % 3], torch.float32, p)
        check([(x, torch.zeros_like(weight), *others) for x, weight, *others in members])


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("layout", ["transposed", "padded", "strided"])
def test_strides(layout, dtype, p):
    members = group_inputs(50, 63, MODULES, dtype, p=p)
    x = laid_out(members[0][X], layout)
    moved = [
        (x, *(laid_out(t, layout) if torch.is_tensor(t) and t.dim() == 2 else t for t in args[1:])) for args in members
    ]
    out, contiguous = check(moved, threads=2), run(members)
    # Without a base GEMM: the same arithmetic to the last bit, whatever the strides.
    for name in out:
        assert name[0] == "y" or name == "dx" or torch.equal(out[name], contiguous[name]), name


def test_columns_of_s_need_not_lie_side_by_side():
    members = group_inputs(50, 63, MODULES)
    x, weights, As, Bs = members[0][X], *(column(members, argument) for argument in (WEIGHT, A, B))
    _, S = _C.lora_group(x, weights, column(members, BIAS), As, Bs, *options(members))
    calls = [
        _C.lora_group_backward(
            column(members, DY), x, weights, columns, As, Bs, *options(members), True, *[[True] * 4] * 2, [False] * 4
        )
        for columns in (S, laid_out(S, "strided"))
    ]
    (dx, dAs, dBs, _), (other_dx, other_dAs, other_dBs, _) = calls
    assert torch.equal(dx, other_dx)
    assert all(map(torch.equal, dAs + dBs, other_dAs + other_dBs))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_group_computes_what_its_modules_would_alone(dtype, p, threads):
    """Bit for bit, but for dx, which is summed in another order. Large enough that each alone has work for two threads."""
    torch.set_num_threads(threads)
    members = group_inputs(200, 96, [(50, 13), (130, 33), (64, 8)], dtype, p=p)
    out = run(members)
    for i, (x, weight, bias, A, B, E, p, seed, dy) in enumerate(members):
        adapter = (E, SCALING, p, threshold_of(p), torch.tensor(seed) if p > 0 else None)
        y, S = _C.lora_linear(x, weight, bias, A, B, *adapter)
        _, dA, dB, dE = _C.lora_linear_backward(dy, x, weight, S, A, B, *adapter, True, True, True, E is not None)
        alone = {f"y{i}": y, f"S{i}": S, f"dA{i}": dA, f"dB{i}": dB} | ({} if E is None else {f"dE{i}": dE})
        for name, value in alone.items():
            assert torch.equal(out[name], value), name


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("used", list(product([True, False], repeat=3)), ids=str)
def test_modules_without_dy(used, p):
    check(group_inputs(63, 64, [(50, 13), (7, 0), (41, 4)], p=p), threads=2, used=used)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("need_dx", [True, False])
def test_backward_computes_what_is_asked(need_dx, p):
    """Every choice for one module beside every choice for the next, and a third without rank."""
    members = group_inputs(40, 63, [(50, 13), (41, 4), (7, 0)], p=p)
    full = run(members)
    for first, second in product(product([False, True], repeat=3), repeat=2):
        for name, value in run(members, None, need_dx, [first, second, second]).items():
            assert torch.equal(value, full[name]), (name, first, second)


def test_seeds_are_the_modules_own():
    """Equal operands but for the seed: other masks. Equal seeds: the same."""
    one, two = group_inputs(20, 64, [(16, 8)] * 2, p=0.3)
    equal = [one, (*one[:MODULE_SEED], two[MODULE_SEED], one[DY]), one]
    out = run(equal)
    assert torch.equal(out["S0"], out["S2"]) and torch.equal(out["dA0"], out["dA2"])
    assert not torch.equal(out["S0"], out["S1"]) and not torch.equal(out["dA0"], out["dA1"])


@pytest.mark.parametrize("threads", [1, 2])
def test_deterministic(threads):
    torch.set_num_threads(threads)
    members = group_inputs(300, 385, MODULES, p=0.3)
    first = run(members)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first.values(), run(members).values(), strict=True))


def test_keeps_its_inputs():
    members = group_inputs(63, 64, MODULES, p=0.3)
    before = [[t.clone() if torch.is_tensor(t) else t for t in args] for args in members]
    run(members)
    for args, kept in zip(members, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(args, kept, strict=True) if torch.is_tensor(a))


def valid():
    return {
        "x": torch.zeros(3, 8),
        "weights": [torch.zeros(6, 8), torch.zeros(5, 8)],
        "biases": [None, torch.zeros(5)],
        "As": [torch.zeros(4, 8), torch.zeros(2, 8)],
        "Bs": [torch.zeros(6, 4), torch.zeros(5, 2)],
        "rank_scales": [torch.ones(4), None],
        "scalings": [1.0, 2.0],
        "dropout_p": 0.0,
        "threshold": 0,
        "seeds": None,
    }


SEEDS = [torch.tensor(1), torch.tensor(2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [torch.zeros(6, 8), torch.zeros(5, 7)]}, "module 1: weight must have shape .* K=8 .*, got .5, 7."),
        (
            {"weights": [torch.zeros(6, 8), torch.zeros(5, 8).half()]},
            "module 1: weight must have the dtype of x, Float",
        ),
        (
            {"biases": [None, torch.zeros(6)]},
            r"module 1: bias must be Float of shape \(N,\) = \(5,\).* got Float \[6\]",
        ),
        (
            {"As": [torch.zeros(4, 7), torch.zeros(2, 8)]},
            r"module 0: A must have shape \(R, K\) with 0 <= R <= 256 and K=8",
        ),
        ({"As": [torch.zeros(4, 8), torch.zeros(257, 8)]}, r"module 1: A must have shape .*, got \[257, 8\]"),
        ({"Bs": [torch.zeros(6, 4), torch.zeros(6, 2)]}, r"module 1: B must have shape .* = \(5, 2\), got \[6, 2\]"),
        ({"Bs": [torch.zeros(6, 4), torch.zeros(5, 2).double()]}, "module 1: B must be a dense float32, .* got Double"),
        (
            {"rank_scales": [None, torch.ones(3)]},
            r"module 1: rank_scale must be .* of shape .*\(2,\).* got Float \[3\]",
        ),
        ({"x": torch.zeros(0, 8)}, r"module 0: x must have shape \(M, K\), M, K >= 1, got \[0, 8\]"),
        ({"x": torch.zeros(3, 8).double()}, "module 0: x must be a dense float32, bfloat16 or float16 CPU tensor"),
        ({"biases": [None]}, "biases must be as long as weights, 2, got 1"),
        (
            {name: [] for name in ("weights", "biases", "As", "Bs", "rank_scales", "scalings")},
            "weights must hold at least one",
        ),
        ({"As": []}, "As must be as long as weights, 2, got 0"),
        ({"Bs": [torch.zeros(6, 4)] * 3}, "Bs must be as long as weights, 2, got 3"),
        ({"rank_scales": [None]}, "rank_scales must be as long as weights, 2, got 1"),
        ({"scalings": [1.0]}, "scalings must be as long as weights, 2, got 1"),
        ({"seeds": SEEDS[:1]}, "seeds must be as long as weights, 2, got 1"),
        ({"dropout_p": 1.0, "seeds": SEEDS}, r"dropout_p must be in \[0, 1\), got 1"),
        ({"dropout_p": 0.5, "threshold": 2**25, "seeds": SEEDS}, "threshold must be in"),
        ({"dropout_p": 0.5}, "module 0: seed must be given when dropout_p > 0, got None"),
        (
            {"dropout_p": 0.5, "seeds": [torch.tensor(1), torch.tensor(1.0)]},
            "seed must be one int64 on the CPU, got Float",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refuses(change, message):
    _C.lora_group(**valid())
    with pytest.raises(RuntimeError, match="^lora_group: " + message):
        _C.lora_group(**(valid() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"dys": [torch.zeros(3, 6)]},
            r"dys, need_dA, need_dB and need_dE must be as long as weights, 2, got 1, 2, 2 and 2",
        ),
        ({"need_dA": [True] * 3}, r"dys, need_dA, .* must be as long as weights, 2, got 2, 3, 2 and 2"),
        ({"As": [torch.zeros(4, 8)]}, "As must be as long as weights, 2, got 1"),
        (
            {"dys": [None, torch.zeros(4, 5)]},
            r"module 1: dy must be Float of shape \(M, N\) with M=3 .* got Float \[4, 5\]",
        ),
        ({"dys": [None, torch.zeros(3, 5).bfloat16()]}, r"module 1: dy must be Float of shape \(M, N\).* got BFloat16"),
        ({"dys": [None, torch.zeros(3, 6)]}, r"module 1: B must have shape \(N, R\) = \(6, 2\), got \[5, 2\]"),
        ({"S": torch.zeros(3, 4)}, r"S must be float32 of shape \(M, R\) = \(3, 6\) on the CPU, got Float \[3, 4\]"),
        ({"need_dE": [False, True]}, "module 1: rank_scale must be given when need_dE, got None"),
        ({"dropout_p": 0.5}, "module 0: seed must be given when dropout_p > 0, got None"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_backward_refuses(change, message):
    given = valid() | {"dys": [torch.zeros(3, 6), torch.zeros(3, 5)], "S": torch.zeros(3, 6), "need_dx": True}
    given |= {"need_dA": [True] * 2, "need_dB": [True] * 2, "need_dE": [True, False]}
    del given["biases"]
    _C.lora_group_backward(**given)
    with pytest.raises(RuntimeError, match="^lora_group_backward: " + message):
        _C.lora_group_backward(**(given | change))


def test_backward_without_any_dy():
    """Nothing depends on the ys: no gradients."""
    members = group_inputs(5, 8, [(4, 2), (6, 3)])
    assert {name for name in run(members, used=[False, False]) if name[0] == "d"} == set()
