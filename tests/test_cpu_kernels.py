"""The functions of adaptlora._C against float64 torch and an independent Philox; lora_group: test_cpu_group.py."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_reference import (
    FLOAT_DTYPES,
    SCALING,
    SEED,
    inputs,
    keep_mask,
    philox4x32_10,
    references,
    thread_count_restored,  # noqa: F401
    threshold_of,
)
from numerics import assert_accurate, assert_all_accurate, laid_out

_C = pytest.importorskip("adaptlora._C")

# ---- running and comparing


def run(x, weight, bias, A, B, E, p, seed, dy, need=(True,) * 4):
    """What the kernels return, without the gradients that are not needed."""
    options = (E, SCALING, p, threshold_of(p), torch.tensor(seed) if p > 0 else None)
    y, S = _C.lora_linear(x, weight, bias, A, B, *options)
    need = (*need[:3], need[3] and E is not None)
    grads = _C.lora_linear_backward(dy, x, weight, S, A, B, *options, *need)
    assert [grad is not None for grad in grads] == [bool(needed) for needed in need]
    named = zip(("dx", "dA", "dB", "dE"), grads, strict=True)
    return {"y": y, "S": S} | {name: grad for name, grad in named if grad is not None}


def check(args, thread_count=1, run=run):
    torch.set_num_threads(thread_count)
    out = run(*args)
    exact, eager = references(*args)
    assert_all_accurate(out, {name: exact[name] for name in out}, {name: eager[name] for name in out})
    assert out["dA"].is_contiguous() and out["dB"].t().is_contiguous()
    return out


# ---- dropout

KNOWN_PHILOX = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "bits"), KNOWN_PHILOX)
def test_reference_philox_known_answers(counter, key, bits):
    out = philox4x32_10(tuple(np.array([c], dtype=np.uint64) for c in counter), key)
    assert tuple(int(o[0]) for o in out) == bits


def test_dropout_keep_known_answer():
    for lane, bits in enumerate(KNOWN_PHILOX[0][2]):
        at, above = (_C.dropout_keep(torch.tensor(0), 1, 4, t)[0, lane].item() for t in (bits >> 8, (bits >> 8) + 1))
        assert at and not above


@pytest.mark.parametrize("seed", [0, 1, -1, SEED, -SEED, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize(("M", "K"), [(1, 1), (17, 13), (63, 385), (5, 1030)])
def test_dropout_keep(seed, M, K):
    for threshold in (0, 1, threshold_of(0.3), 2**24 - 1, 2**24):
        keep = _C.dropout_keep(torch.tensor(seed), M, K, threshold)
        assert keep.dtype == torch.bool and keep.shape == (M, K)
        assert torch.equal(keep, keep_mask(seed, M, K, threshold))


def test_dropout_keep_rate():
    keep = _C.dropout_keep(torch.tensor(7), 500, 2000, threshold_of(0.3))
    assert abs(keep.float().mean().item() - 0.7) < 2e-3  # 4 standard deviations


# ---- lora_linear


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("R", [1, 2, 3, 13, 33, 128, 256])
@pytest.mark.parametrize("N", [7, 500])
@pytest.mark.parametrize("K", [13, 63, 385])
@pytest.mark.parametrize("M", [1, 63, 500])
def test_lora_linear_grid(M, K, N, R, p):
    # Of a single rank dE is one sum that may cancel to any degree: no scale to hold its error to.
    check(inputs(M, K, N, R, p=p, bias=R % 2 == 1, rank_scale=R > 1), thread_count=1 + R % 2)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("factors", ["same", "float32"])
@pytest.mark.parametrize(("M", "K", "N", "R"), [(1, 13, 7, 1), (63, 385, 500, 6), (98, 63, 130, 35)])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_lora_linear_dtypes(dtype, M, K, N, R, factors, p):
    factor_dtype = torch.float32 if factors == "float32" else dtype
    check(inputs(M, K, N, R, dtype, factor_dtype, p), thread_count=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_linear_low_precision_factors(dtype):
    check(inputs(63, 385, 130, 8, torch.float32, dtype, 0.3))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_lora_linear_without_rank_scale(dtype):
    check(inputs(63, 385, 130, 8, dtype, p=0.3, rank_scale=False))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_lora_linear_wider_than_a_tile(p):
    check(inputs(70, 1100, 1500, 5, p=p), thread_count=2)
    check(inputs(40, 1024, 2048, 8, p=p), thread_count=2)


# Around whole vectors (16), register blocks (48, 64) and tiles (384), and more than one tile.
WIDTHS = [1, 15, 16, 17, 47, 48, 49, 63, 65, 95, 96, 97, 383, 384, 385, 400, 768]
# Around blocks of rows, which are 4 and 2, and a tile of 16.
ROWS = [1, 2, 3, 4, 5, 15, 16, 17]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("R", range(1, 10))
def test_lora_linear_ends_of_blocks(R, p):
    """
    The low-rank terms alone: the base's weights are zero, since the rounding of torch's GEMMs is not what is tested. Operands
    are positive, so that no sum cancels and a result of few numbers has a scale too.
    """
    # Each width is K once for each number of rows, with another N each time.
    for (i, K), (j, M) in product(enumerate(WIDTHS), enumerate(ROWS)):
        N = WIDTHS[(5 * i + 3 * j + R) % len(WIDTHS)]
        dtype = FLOAT_DTYPES[(i + j + R) % 3]
        x, weight, *others = inputs(M, K, N, R, dtype, torch.float32, p, bias=(i + j) % 2 == 0)
        check([t.abs() if torch.is_tensor(t) else t for t in (x, torch.zeros_like(weight), *others)])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("layout", ["transposed", "padded", "strided"])
def test_lora_linear_strides(layout, dtype):
    args = inputs(50, 63, 41, 13, dtype, p=0.3)
    moved = [laid_out(t, layout) if torch.is_tensor(t) and t.dim() == 2 else t for t in args]
    for i in (2, 5):  # bias and E
        moved[i] = laid_out(args[i].unsqueeze(0), "strided").squeeze(0)
    out = check(moved, thread_count=2)
    expected = run(*args)
    # Without a base GEMM: the same arithmetic to the last bit, whatever the strides.
    for name in ("S", "dA", "dB", "dE"):
        assert torch.equal(out[name], expected[name])


def test_lora_linear_broadcast_dy():
    *operands, _ = inputs(50, 63, 41, 13, p=0.3)
    check((*operands, torch.ones(1, 1).expand(50, 41)))


@pytest.mark.parametrize("threads", [1, 2])
def test_lora_linear_is_deterministic(threads):
    torch.set_num_threads(threads)
    args = inputs(500, 385, 500, 13, p=0.3)
    first = run(*args)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first.values(), run(*args).values(), strict=True))


@pytest.mark.parametrize("needs", [(a, b, c, d) for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)])
def test_lora_linear_backward_computes_what_is_asked(needs):
    args = inputs(63, 63, 41, 13, p=0.3)
    full = run(*args)
    for name, value in run(*args, need=needs).items():
        assert torch.equal(value, full[name]), name


def test_lora_linear_under_autocast_and_autograd():
    args = inputs(63, 63, 41, 13)
    expected = run(*args)
    leaves = [t.clone().requires_grad_() if torch.is_tensor(t) and t.dim() == 2 else t for t in args]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(*leaves)
    for name, value in out.items():
        assert torch.equal(value, expected[name]) and not value.requires_grad


def test_lora_linear_keeps_its_inputs():
    args = inputs(63, 64, 48, 13, p=0.3)
    before = [t.clone() if torch.is_tensor(t) else t for t in args]
    run(*args)
    assert all(torch.equal(a, b) for a, b in zip(before, args, strict=True) if torch.is_tensor(a))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.zeros(4, 5)}, r"lora_linear: A must have shape \(R, K\).*K=8, got \[4, 5\]"),
        ({"A": torch.zeros(257, 8)}, "R <= 256"),
        ({"B": torch.zeros(6, 3)}, r"B must have shape \(N, R\) = \(6, 4\), got \[6, 3\]"),
        ({"weight": torch.zeros(6, 7)}, "weight must have shape"),
        ({"weight": torch.zeros(6, 8, dtype=torch.bfloat16)}, "weight must have the dtype of x"),
        ({"x": torch.zeros(3, 8, dtype=torch.float64)}, "x must be a dense float32"),
        ({"x": torch.zeros(0, 8)}, "x must have shape"),
        ({"bias": torch.zeros(5)}, r"bias must be .* \(6,\).* \[5\]"),
        ({"rank_scale": torch.zeros(3)}, r"rank_scale must be float32, .* of shape \(R,\) = \(4,\).* got Float \[3\]"),
        ({"rank_scale": torch.zeros(4).double()}, r"rank_scale must be float32, bfloat16 or float16 .* got Double"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1"),
        ({"dropout_p": 0.5, "threshold": 2**25}, "threshold must be in"),
        ({"dropout_p": 0.5, "seed": None}, "seed must be given"),
        ({"dropout_p": 0.5, "seed": torch.tensor(1.0)}, "seed must be one int64"),
    ],
)
def test_lora_linear_refuses(change, message):
    good = {
        "x": torch.zeros(3, 8),
        "weight": torch.zeros(6, 8),
        "bias": None,
        "A": torch.zeros(4, 8),
        "B": torch.zeros(6, 4),
        "rank_scale": torch.ones(4),
        "scaling": 1.0,
        "dropout_p": 0.0,
        "threshold": 0,
        "seed": torch.tensor(1),
    }
    _C.lora_linear(**good)
    with pytest.raises(RuntimeError, match=message):
        _C.lora_linear(**(good | change))


def test_lora_linear_backward_refuses_the_gradient_of_no_rank_scale():
    x, weight, _, A, B, _, p, _, dy = inputs(3, 8, 6, 4)
    arguments = (dy, x, weight, torch.zeros(3, 4), A, B, None, 1.0, p, 0, None, False, False, False, True)
    with pytest.raises(RuntimeError, match="lora_linear_backward: rank_scale must be given when need_dE, got None"):
        _C.lora_linear_backward(*arguments)


# ---- lora_delta_


def run_delta(x, weight, y, A, B, E, p, seed, dy, need=(True,) * 4):
    """As `run` for a base that left y: a y (M, N) in the place of the bias, and a weight of zeros."""
    options = (E, SCALING, p, threshold_of(p), torch.tensor(seed) if p > 0 else None)
    y = y.clone() if y.is_contiguous() else laid_out(y, "padded" if y.stride(1) == 1 else "strided")
    S = _C.lora_delta_(y, x, A, B, *options)
    grads = _C.lora_delta_backward(dy, x, S, A, B, *options, *need)
    assert [grad is not None for grad in grads] == [bool(needed) for needed in need]
    named = zip(("dx", "dA", "dB", "dE"), grads, strict=True)
    return {"y": y, "S": S} | {name: grad for name, grad in named if grad is not None}


def delta_inputs(M, K, N, R, dtype=torch.float32, factor_dtype=None, p=0.0, layout="contiguous"):
    x, weight, _, *others = inputs(M, K, N, R, dtype, factor_dtype, p)
    y = torch.randn(M, N, generator=torch.Generator().manual_seed(3)).to(dtype)
    return x, torch.zeros_like(weight), laid_out(y, layout), *others


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("R", [2, 13, 33, 256])
@pytest.mark.parametrize(("M", "K", "N"), [(1, 13, 7), (63, 385, 500), (98, 63, 130), (70, 1100, 1500)])
def test_lora_delta_sizes(M, K, N, R, p):
    check(delta_inputs(M, K, N, R, p=p), thread_count=1 + R % 2, run=run_delta)


@pytest.mark.parametrize("layout", ["contiguous", "padded", "strided"])
@pytest.mark.parametrize("factors", ["same", "float32"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_lora_delta_dtypes_and_strides_of_y(dtype, factors, layout):
    factor_dtype = torch.float32 if factors == "float32" else dtype
    check(delta_inputs(50, 63, 41, 13, dtype, factor_dtype, 0.3, layout), thread_count=2, run=run_delta)


@pytest.mark.parametrize("needs", [(a, b, c, d) for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)])
def test_lora_delta_backward_computes_what_is_asked(needs):
    args = delta_inputs(63, 63, 41, 13, p=0.3)
    full = run_delta(*args)
    for name, value in run_delta(*args, need=needs).items():
        assert torch.equal(value, full[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(3, 6, dtype=torch.bfloat16)}, r"y must be Float of shape \(M, N\).* got BFloat16 \[3, 6\]"),
        ({"y": torch.zeros(4, 6)}, r"y must be .* with the M of x, \[3, 8\], .* got Float \[4, 6\]"),
        ({"y": torch.zeros(3, 1).expand(3, 6)}, r"y must not have elements that share memory, got strides \[1, 0\]"),
        ({"B": torch.zeros(5, 4)}, r"B must have shape \(N, R\) = \(6, 4\), got \[5, 4\]"),
        ({"A": torch.zeros(4, 5)}, r"A must have shape \(R, K\).*K=8, got \[4, 5\]"),
        ({"dropout_p": 0.5, "seed": None}, "seed must be given"),
    ],
)
def test_lora_delta_refuses(change, message):
    good = {"x": torch.zeros(3, 8), "A": torch.zeros(4, 8), "B": torch.zeros(6, 4), "rank_scale": None}
    good |= {"y": torch.zeros(3, 6), "scaling": 1.0, "dropout_p": 0.0, "threshold": 0, "seed": None}
    _C.lora_delta_(**good)
    with pytest.raises(RuntimeError, match="lora_delta_: " + message):
        _C.lora_delta_(**(good | change))


# ---- rank_norms, rank_scale, rank_scale_


def modules(dtype, layout):
    """Factors of several modules, rank 0 and odd sizes among them."""
    g = torch.Generator().manual_seed(5)
    As, Bs = [], []
    for R, K, N in [(8, 384, 384), (0, 10, 20), (1, 13, 7), (13, 63, 500), (5, 1100, 33)]:
        A = torch.randn(R, K, generator=g).to(dtype)
        B = torch.randn(R, N, generator=g).to(dtype).t()
        if layout == "borrowed":
            A, B = A.t().contiguous().t(), B.contiguous()
        As.append(A)
        Bs.append(B)
    return As, Bs


LAYOUTS = ["rank-major", "borrowed"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_rank_norms(dtype, layout, threads):
    torch.set_num_threads(threads)
    As, Bs = modules(dtype, layout)
    norms_A, norms_B = _C.rank_norms(As, Bs)
    for out, factors, dim in ((norms_A, As, 1), (norms_B, Bs, 0)):
        ref = torch.cat([f.double().norm(dim=dim) for f in factors])
        eager = torch.cat([f.float().norm(dim=dim) for f in factors])
        assert_accurate("norms", out, ref, eager)


def test_rank_norms_of_zeros_and_of_nothing():
    norms = _C.rank_norms([torch.zeros(3, 5)], [torch.zeros(7, 3)])
    assert all(torch.equal(n, torch.zeros(3)) for n in norms)
    assert all(n.shape == (0,) for n in _C.rank_norms([], []))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_rank_scale(dtype, layout, threads):
    torch.set_num_threads(threads)
    As, Bs = modules(dtype, layout)
    ranks = [A.shape[0] for A in As]
    g = torch.Generator().manual_seed(6)
    fA, fB = (torch.randn(sum(ranks), generator=g) for _ in range(2))
    expected_As = [(A.float() * f[:, None]).to(dtype) for A, f in zip(As, fA.split(ranks), strict=True)]
    expected_Bs = [(B.float() * f).to(dtype) for B, f in zip(Bs, fB.split(ranks), strict=True)]

    out_As, out_Bs = _C.rank_scale(As, Bs, fA, fB)
    for out, expected in zip(out_As + out_Bs, expected_As + expected_Bs, strict=True):
        assert out.dtype == dtype and torch.equal(out, expected)
    assert all(A.is_contiguous() for A in out_As) and all(B.t().is_contiguous() for B in out_Bs)

    assert _C.rank_scale_(As, Bs, fA, fB) is None
    for out, expected in zip(As + Bs, expected_As + expected_Bs, strict=True):
        assert torch.equal(out, expected)


def test_rank_scale_in_place_leaves_the_rest_of_the_buffer():
    buffer = torch.ones(8, 20)
    A, B = buffer[:3, 1:18], torch.ones(7, 3)
    _C.rank_scale_([A], [B], torch.tensor([2.0, 3.0, 4.0]), torch.zeros(3))
    expected = torch.ones(8, 20)
    expected[:3, 1:18] = torch.tensor([[2.0], [3.0], [4.0]])
    assert torch.equal(buffer, expected) and torch.equal(B, torch.zeros(7, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_low_precision_is_torchs(dtype):
    """Ties, subnormals, overflow, infinities and NaN: every conversion agrees with torch's."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[~values.isnan()]
    A, B = values[None, :], torch.zeros(1, 1, dtype=dtype)
    for factor in (1.0, 1 / 3, 1.0009765625, 2.0**-9, 300.0):
        (out,), _ = _C.rank_scale([A], [B], torch.tensor([factor]), torch.ones(1))
        expected = (A.float() * factor).to(dtype)
        assert torch.equal(out.view(torch.int16), expected.view(torch.int16))
    special = torch.tensor([[float("nan"), -float("nan"), float("inf"), -float("inf")] * 8], dtype=dtype)
    (out,), _ = _C.rank_scale([special], [B], torch.ones(1), torch.ones(1))
    assert torch.equal(out.isnan(), special.isnan()) and torch.equal(out[:, 2::4], special[:, 2::4])


@pytest.mark.parametrize(
    ("As", "Bs", "message"),
    [
        ([torch.zeros(2, 3)], [], "As and Bs must have the same length, got 1 and 0"),
        ([torch.zeros(2, 3)], [torch.zeros(4, 3)], r"As\[0\] \(R, K\) and Bs\[0\] \(N, R\) must have the same R"),
        ([torch.zeros(2, 3).double()], [torch.zeros(4, 2)], r"As\[0\] must be a 2-d float32"),
        ([torch.zeros(3)], [torch.zeros(4, 2)], r"As\[0\] must be a 2-d"),
    ],
)
def test_rank_functions_refuse(As, Bs, message):
    f = torch.ones(2)
    with pytest.raises(RuntimeError, match="rank_norms: " + message):
        _C.rank_norms(As, Bs)
    with pytest.raises(RuntimeError, match="rank_scale: " + message):
        _C.rank_scale(As, Bs, f, f)
    with pytest.raises(RuntimeError, match="rank_scale_: " + message):
        _C.rank_scale_(As, Bs, f, f)


def test_rank_scale_refuses_wrong_factors():
    with pytest.raises(RuntimeError, match=r"rank_scale: fB must be float32 of shape .* = \(2,\)"):
        _C.rank_scale([torch.zeros(2, 3)], [torch.zeros(4, 2)], torch.ones(2), torch.ones(3))


# ---- the module


def test_module_says_what_it_is():
    assert torch.__version__.startswith(_C.torch_version)
    assert _C.isa() in ("avx512", "avx2", "default")


def import_with_isa(level):
    code = "import torch; from adaptlora import _C; print(_C.isa())"
    env = os.environ | {"ADAPTLORA_ISA": level}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


@pytest.mark.skipif("ADAPTLORA_ISA" in os.environ, reason="already inside a run with a chosen ISA")
@pytest.mark.slow
@pytest.mark.parametrize("level", ["default", "avx2", "avx512"])
def test_isa_level(level):
    """This file, its size grid apart, the group's and compose's bits and C++ backend again with the kernels of another instruction set."""
    if level == _C.isa():
        pytest.skip("is what this run uses")
    if import_with_isa(level).returncode != 0:
        pytest.skip(f"this machine cannot run {level}")
    others = [Path(__file__).with_name(name) for name in ("test_cpu_group.py", "test_compose.py")]
    # Neither opcheck nor an import that fails has to do with the arithmetic.
    chosen = "(not test_compose or cpp or bit) and not grid and not opcheck and not isa_level and not unknown_isa"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__, *others, "-k", chosen],
        env=os.environ | {"ADAPTLORA_ISA": level},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:]


def test_unknown_isa_is_an_import_error():
    result = import_with_isa("sse9")
    assert result.returncode != 0 and "ADAPTLORA_ISA must be one of" in result.stderr
