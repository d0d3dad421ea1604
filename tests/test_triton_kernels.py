"""The Triton kernels against the equations in float64: on a CUDA GPU, or on the CPU under TRITON_INTERPRET=1."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from numerics import assert_accurate, assert_all_accurate, laid_out
from test_rank_gather import assert_gathered, sample

from adaptlora import ops
from adaptlora.kernels import (
    dropout,
    lora_delta,
    lora_expand,
    lora_linear,
    lora_shrink,
    rank_gather,
    rank_norms,
    rank_scale,
    rank_table,
)
from adaptlora.ops import _backend
from adaptlora.ops._dropout import threshold
from adaptlora.ops.lora_linear import lora_linear_ref
from adaptlora.ops.rank_penalty import rank_penalty_ref

INTERPRETED = _backend.interpreting()
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    pytestmark = pytest.mark.usefixtures("poisoned")
elif torch.cuda.is_available():
    pytestmark = pytest.mark.gpu
else:
    pytest.skip("needs a CUDA GPU; test_triton_interpret.py runs these in the interpreter", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = -0x123456789ABCDEF
SCALING = 0.75
# (M, K, N, R): below, at and above the widths of the tiles; 200 ranks take several rank blocks.
SIZES = [(1, 13, 7, 1), (33, 63, 65, 13), (70, 130, 65, 33), (33, 130, 7, 128), (70, 63, 65, 200), (150, 13, 260, 8)]
LAYOUTS = ["contiguous", "transposed", "padded", "strided"]


def philox_keep(seed: int, M: int, K: int, least: int) -> np.ndarray:
    """The mask, from Philox4x32-10 as its paper prints it: scalar counters, Python integers, no code of ours."""
    return np.array([[philox_word(seed, m, k) >= least for k in range(K)] for m in range(M)])


def philox_word(seed: int, m: int, k: int) -> int:
    """The 24 bits that decide on element (m, k)."""
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    return philox_4x32_10((k >> 2, m, 0, 0), key)[k & 3] >> 8


def philox_4x32_10(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [product1 >> 32 ^ c[1] ^ k[0], product1 & 0xFFFFFFFF, product0 >> 32 ^ c[3] ^ k[1], product0 & 0xFFFFFFFF]
        k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return c


def test_philox_gives_the_published_words():
    """The known-answer vectors of Random123."""
    ones, pi = (0xFFFFFFFF,) * 6, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    for words, expected in (
        ((0,) * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (ones, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ):
        assert philox_4x32_10(words[:4], words[4:]) == expected


@pytest.mark.parametrize("seed", [0, SEED, 2**63 - 1])
def test_dropout_mask_is_exact(seed):
    for M, K, p in ((1, 1, 0.5), (33, 130, 0.3), (5, 259, 0.999)):
        keep = dropout.dropout_keep(torch.tensor(seed, device=DEVICE), M, K, threshold(p))
        assert keep.dtype == torch.bool
        assert np.array_equal(keep.cpu().numpy(), philox_keep(seed, M, K, threshold(p)))


@pytest.mark.parametrize("lane", range(4))
def test_a_word_at_the_threshold_is_kept(lane):
    word = philox_word(SEED, 2, 8 + lane)
    for least, kept in ((word, True), (word + 1, False)):
        assert dropout.dropout_keep(torch.tensor(SEED, device=DEVICE), 3, 13, least)[2, 8 + lane] == kept


def equations(x, weight, bias, A, B, E, dy, keep, p, dtype) -> dict:
    """All results of the layer in plain torch operations of `dtype`."""
    x, weight, bias, A, B, E, dy = (t.to(dtype) for t in (x, weight, bias, A, B, E, dy))
    mask = keep.to(dtype) / (1 - p)
    e = SCALING * E
    dropped = x * mask
    s = dropped @ A.t()
    ds = (dy @ B) * e
    G = dy.t() @ s
    return {
        "y": x @ weight.t() + bias + (s * e) @ B.t(),
        "S": s,
        "dx": dy @ weight + mask * (ds @ A),
        "dA": ds.t() @ dropped,
        "dB": G * e,
        "dE": SCALING * (G * B).sum(0),
    }


def inputs(sizes, dtype, factor_dtype, layouts) -> dict:
    """Random operands; `layouts` of x, weight, A, B and dy. What lies between strided elements is NaN."""
    M, K, N, R = sizes
    shapes = {"x": (M, K), "weight": (N, K), "A": (R, K), "B": (N, R), "dy": (M, N)}
    made = {}
    for (name, shape), layout in zip(shapes.items(), layouts, strict=True):
        values = torch.randn(shape, device=DEVICE).to(factor_dtype if name in "AB" else dtype)
        made[name] = laid_out(values, layout)
    made["bias"] = torch.randn(N, device=DEVICE).to(dtype)
    made["E"] = (torch.rand(R, device=DEVICE) + 0.5).to(factor_dtype)
    return made


GRADIENTS = ("dx", "dA", "dB", "dE")


def run(made: dict, p: float, seed, need=(True,) * 4) -> dict:
    """The same results from the kernels."""
    x, weight, bias, A, B, E, dy = (made[name] for name in ("x", "weight", "bias", "A", "B", "E", "dy"))
    options = (E, SCALING, p, threshold(p), seed)
    y, s = lora_linear.lora_linear(x, weight, bias, A, B, *options)
    grads = lora_linear.lora_linear_backward(dy, x, weight, s, A, B, *options, *need)
    return {"y": y, "S": s, **dict(zip(GRADIENTS, grads, strict=True))}


def compare(out: dict, made: dict, keep, p: float) -> None:
    dtype = made["x"].dtype
    exact = equations(**made, keep=keep, p=p, dtype=torch.float64)
    eager = equations(**made, keep=keep, p=p, dtype=dtype)
    # S and the gradients of fp32 factors are of operands in the dtype of x: they are held to the error of eager in that dtype.
    eager = {name: value.to(out[name].dtype) for name, value in eager.items()}
    assert_all_accurate(out, exact, eager, precision=dtype)


def mask(M, K, p):
    """(keep, seed) for the kernels: no seed without dropout."""
    if p == 0:
        return torch.ones(M, K, dtype=torch.bool, device=DEVICE), None
    return torch.from_numpy(philox_keep(SEED, M, K, threshold(p))).to(DEVICE), torch.tensor(SEED, device=DEVICE)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_lora_linear(sizes, dtype, p):
    keep, seed = mask(*sizes[:2], p)
    made = inputs(sizes, dtype, dtype, ("contiguous", "contiguous", "contiguous", "transposed", "contiguous"))
    out = run(made, p, seed)
    compare(out, made, keep, p)
    assert out["y"].dtype == out["dx"].dtype == dtype
    assert out["dA"].dtype == out["dB"].dtype == out["dE"].dtype == dtype
    assert out["S"].dtype == torch.float32
    assert out["S"].is_contiguous() and out["dA"].is_contiguous()
    assert out["dB"].t().is_contiguous()


def test_lora_linear_without_rank_scale():
    _, seed = mask(1, 1, 0.3)
    made = inputs((33, 63, 65, 13), torch.float32, torch.float32, ("contiguous",) * 5)
    out = run(made | {"E": None}, 0.3, seed, (True, True, True, False))
    assert out.pop("dE") is None
    ones = run(made | {"E": torch.ones(13, device=DEVICE)}, 0.3, seed, (True, True, True, False))
    assert all(torch.equal(value, ones[name]) for name, value in out.items())


def run_delta(made: dict, p: float, seed, need=(True,) * 4) -> dict:
    """The results on a y in the place of the bias, which is changed; the weight has to be zero."""
    x, y, A, B, E, dy = (made[name] for name in ("x", "bias", "A", "B", "E", "dy"))
    options = (E, SCALING, p, threshold(p), seed)
    s = lora_delta.lora_delta_(y, x, A, B, *options)
    grads = lora_delta.lora_delta_backward(dy, x, s, A, B, *options, *need)
    return {"y": y, "S": s, **dict(zip(GRADIENTS, grads, strict=True))}


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_backward_without_x_or_S(p):
    """What no wanted gradient is made of may be missing, and changes nothing."""
    _, seed = mask(1, 1, p)
    made = inputs((33, 63, 65, 13), torch.float32, torch.float32, ("contiguous",) * 5)
    x, weight, A, B, E, dy = (made[name] for name in ("x", "weight", "A", "B", "E", "dy"))
    S, options = torch.randn(33, 13, device=DEVICE), (A, B, E, SCALING, p, threshold(p), seed)
    for backward, of in ((lora_linear.lora_linear_backward, (weight,)), (lora_delta.lora_delta_backward, ())):
        for kept, need in (
            ((None, S), (True, False, True, True)),
            ((x, None), (True, True, False, False)),
            ((None, None), (True, False, False, False)),
        ):
            found = backward(dy, kept[0], *of, kept[1], *options, *need)
            for mine, whole, needed in zip(found, backward(dy, x, *of, S, *options, *need), need, strict=True):
                assert torch.equal(mine, whole) if needed else mine is None


def delta_inputs(sizes, dtype, factor_dtype, layout) -> dict:
    made = inputs(sizes, dtype, factor_dtype, (layout,) * 5)
    y = torch.randn(sizes[0], sizes[2], device=DEVICE).to(dtype)
    return made | {"weight": torch.zeros_like(made["weight"]), "bias": laid_out(y, layout)}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES[1:4], ids=lambda sizes: "x".join(map(str, sizes)))
def test_lora_delta(sizes, dtype, p):
    keep, seed = mask(*sizes[:2], p)
    made = delta_inputs(sizes, dtype, dtype, "contiguous")
    out = run_delta(made | {"bias": made["bias"].clone()}, p, seed)
    compare(out, made, keep, p)
    assert out["dA"].is_contiguous() and out["dB"].t().is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_delta_takes_any_strides_and_fp32_factors(layout):
    keep, seed = mask(70, 130, 0.3)
    made = delta_inputs((70, 130, 65, 13), torch.bfloat16, torch.float32, layout)
    compare(run_delta(made | {"bias": laid_out(made["bias"].clone(), layout)}, 0.3, seed), made, keep, 0.3)


def test_lora_delta_computes_only_what_is_needed():
    _, seed = mask(1, 1, 0.3)
    made = delta_inputs((33, 63, 65, 13), torch.float32, torch.float32, "contiguous")
    everything = run_delta(made, 0.3, seed)
    for name in GRADIENTS:
        out = run_delta(made, 0.3, seed, tuple(other == name for other in GRADIENTS))
        assert_accurate(name, out[name], everything[name].double(), everything[name])
        assert all(out[other] is None for other in GRADIENTS if other != name)


@pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_linear_takes_any_strides_and_fp32_factors(layout, factor_dtype):
    sizes = (70, 130, 65, 13)
    keep, seed = mask(70, 130, 0.3)
    made = inputs(sizes, torch.bfloat16, factor_dtype, (layout,) * 5)
    compare(run(made, 0.3, seed), made, keep, 0.3)


def test_lora_linear_takes_expanded_gradients():
    keep, seed = mask(33, 63, 0.0)
    made = inputs((33, 63, 65, 13), torch.float32, torch.float32, ("contiguous",) * 5)
    made["dy"] = torch.ones((), device=DEVICE).expand(33, 65)
    compare(run(made, 0.0, seed), made, keep, 0.0)


@pytest.mark.parametrize("R", [13, 40])
def test_only_what_is_needed_is_computed_and_alike(R):
    _, seed = mask(1, 1, 0.3)
    made = inputs((33, 63, 65, R), torch.float32, torch.float32, ("contiguous",) * 5)
    everything = run(made, 0.3, seed)
    for name in GRADIENTS:
        out = run(made, 0.3, seed, tuple(other == name for other in GRADIENTS))
        for other in GRADIENTS:
            if other == name:
                assert_accurate(name, out[name], everything[name].double(), everything[name])
            else:
                assert out[other] is None


def test_results_repeat_bit_for_bit_and_inputs_stay():
    _, seed = mask(1, 1, 0.3)
    made = inputs((150, 63, 65, 13), torch.bfloat16, torch.float32, ("contiguous",) * 5)
    before = {name: value.clone() for name, value in made.items()}
    first, second = run(made, 0.3, seed), run(made, 0.3, seed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(made[name], before[name]) for name in made)


def test_expand_writes_its_elements_and_no_others():
    out = laid_out(torch.randn(33, 65, device=DEVICE), "strided")
    storage = torch.as_strided(out, (33, 131), (131, 1), 0)
    between = torch.ones_like(storage, dtype=torch.bool)
    between[:, 1:131:2] = False
    s, factor = torch.randn(33, 13, device=DEVICE), torch.randn(13, 65, device=DEVICE)
    exact, eager = out.double() + s.double() @ factor.double(), out + s @ factor
    lora_expand.lora_expand_(out, s, [factor])
    assert_accurate("out", out, exact, eager)
    assert storage[between].isnan().all()


def test_a_wrong_element_or_a_missing_gradient_is_noticed():
    for dtype in (torch.float32, torch.bfloat16):
        keep, seed = mask(70, 63, 0.3)
        made = inputs((70, 63, 65, 13), dtype, dtype, ("contiguous",) * 5)
        out = run(made, 0.3, seed)
        for name, value in out.items():
            wrong = value.clone()
            wrong[(-1,) * value.dim()] += 0.1 * value.abs().max()
            nan = value.clone()
            nan[(-1,) * value.dim()] = math.nan
            for changed in (wrong, nan, torch.zeros_like(value)):
                with pytest.raises(AssertionError, match=name):
                    compare(out | {name: changed}, made, keep, 0.3)


def test_a_shifted_mask_is_noticed():
    keep, seed = mask(33, 63, 0.3)
    made = inputs((33, 63, 65, 13), torch.float32, torch.float32, ("contiguous",) * 5)
    with pytest.raises(AssertionError):
        compare(run(made, 0.3, seed + 1), made, keep, 0.3)


def test_shrink_scales_ranks():
    x, A, e = (torch.randn(shape, device=DEVICE) for shape in ((33, 63), (13, 63), (13,)))
    s = lora_shrink.lora_shrink(x, [A], scaling=2.0, rank_scale=e)
    assert_accurate("S", s, 2 * (x.double() @ A.double().t()) * e.double(), 2 * (x @ A.t()) * e)


def rank_pairs(layout) -> tuple[list, list]:
    """Modules of all dtypes with zero vectors, a rank-0 module and a vector longer than a block."""
    shapes = [(3, 17, 9), (1, 2100, 48), (0, 5, 7), (33, 64, 130), (8, 128, 16)]
    dtypes = [*DTYPES, torch.float32, torch.bfloat16]
    As = [laid_out(torch.randn(R, K, device=DEVICE).to(d), layout) for (R, K, _), d in zip(shapes, dtypes, strict=True)]
    Bs = [
        laid_out(torch.randn(N, R, device=DEVICE).to(d), layout)
        for (R, _, N), d in zip(shapes, reversed(dtypes), strict=True)
    ]
    As[0][1], Bs[3][:, 5] = 0, 0
    return As, Bs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_norms(layout):
    As, Bs = rank_pairs(layout)
    for pairs in ((As, Bs), (As[-1:], Bs[-1:])):
        exact = [torch.cat([v.double().norm(dim=d) for v in vectors]) for vectors, d in zip(pairs, (1, 0), strict=True)]
        eager = [torch.cat([v.float().norm(dim=d) for v in vectors]) for vectors, d in zip(pairs, (1, 0), strict=True)]
        for name, *three in zip("AB", rank_norms.rank_norms(*pairs), exact, eager, strict=True):
            assert_accurate(f"norms of {name}", *three)
    assert rank_norms.rank_norms(As, Bs)[0][1] == 0


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_scale(layout, in_place):
    As, Bs = rank_pairs(layout)
    ranks = [A.shape[0] for A in As]
    factors = [torch.randn(sum(ranks), device=DEVICE) for _ in range(2)]
    split = [f.split(ranks) for f in factors]
    # One rounding of an fp32 product: exactly what torch does.
    expected_As = [(A.float() * f[:, None]).to(A.dtype) for A, f in zip(As, split[0], strict=True)]
    expected_Bs = [(B.float() * f[None, :]).to(B.dtype) for B, f in zip(Bs, split[1], strict=True)]
    if in_place:
        rank_scale.rank_scale_(As, Bs, *factors)
        out_As, out_Bs = As, Bs
    else:
        out_As, out_Bs = rank_scale.rank_scale(As, Bs, *factors)
        assert all(A.is_contiguous() for A in out_As) and all(B.t().is_contiguous() for B in out_Bs)
    for out, expected in zip([*out_As, *out_Bs], [*expected_As, *expected_Bs], strict=True):
        assert out.dtype == expected.dtype and torch.equal(out, expected)


def test_rank_scale_keeps_its_table_wherever_its_results_lie():
    As, Bs = rank_pairs("contiguous")
    factors = [torch.randn(sum(A.shape[0] for A in As), device=DEVICE) for _ in range(2)]
    first = rank_scale.rank_scale(As, Bs, *factors)
    built = rank_table._table.cache_info().misses
    second = rank_scale.rank_scale(As, Bs, *factors)
    assert rank_table._table.cache_info().misses == built
    for old, new in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(old, new)
        assert old.data_ptr() != new.data_ptr() or not old.numel()


def test_rank_gather():
    sources, rows = sample(DEVICE)
    flat, counts = torch.tensor([index for chosen in rows for index in chosen]), [len(chosen) for chosen in rows]
    outs = rank_gather.rank_gather(sources, flat, counts)
    assert_gathered(outs, sources, rows)
    assert all(out.untyped_storage().nbytes() == out.nbytes for out in outs)
    # So few rows that several programs share each.
    assert_gathered(rank_gather.rank_gather(sources[-2:-1], torch.tensor([1]), [1]), sources[-2:-1], [[1]])
    assert rank_gather.rank_gather(sources[:1], torch.empty(0, dtype=torch.int64), [0])[0].shape == (0, 33)


def test_rank_gather_moves_the_widest_words_that_addresses_steps_and_lengths_permit():
    wide = torch.zeros(4, 48, device=DEVICE)
    # Code 4 is 16 bytes, and so on down to one.
    assert rank_gather._words(wide) == (1, 12, 4)
    assert [rank_gather._words(wide[:, start : start + 16])[2] for start in (4, 2, 1)] == [4, 3, 2]
    assert [rank_gather._words(wide[:, :length])[2] for length in (20, 10, 9)] == [4, 3, 2]
    assert [rank_gather._words(torch.zeros(4, step, device=DEVICE)[:, :16])[2] for step in (20, 18, 17)] == [4, 3, 2]
    assert rank_gather._words(wide.bfloat16()[:, 1:17]) == (1, 16, 1)
    assert rank_gather._words(wide.to(torch.int8)[:, 1:17]) == (1, 16, 0)
    assert rank_gather._words(wide.double()[:, ::3]) == (3, 16, 3)


def test_the_table_follows_a_factor_to_new_memory():
    A, B = torch.randn(3, 17, device=DEVICE), torch.randn(9, 3, device=DEVICE)
    rank_norms.rank_norms([A], [B])
    kept = A.clone()
    A.data = torch.cat([A, A])[1:3]
    B.data = B[:, 1:].clone()
    assert_accurate("norms", rank_norms.rank_norms([A], [B])[0], kept[1:].double().norm(dim=1), kept[1:].norm(dim=1))


def test_no_modules_have_no_norms():
    As, Bs = [torch.ones(0, 5, device=DEVICE)], [torch.ones(7, 0, device=DEVICE)]
    assert [norms.shape for norms in rank_norms.rank_norms(As, Bs)] == [(0,), (0,)]
    out_As, out_Bs = rank_scale.rank_scale(As, Bs, torch.ones(0, device=DEVICE), torch.ones(0, device=DEVICE))
    assert (out_As[0].shape, out_Bs[0].shape) == ((0, 5), (7, 0))


def test_the_ops_run_on_these_kernels(monkeypatch):
    monkeypatch.setenv("ADAPTLORA_BACKEND", "triton")
    made = inputs((33, 63, 65, 13), torch.float32, torch.float32, ("contiguous",) * 5)
    leaves = {name: made[name].requires_grad_() for name in ("x", "A", "B", "E")}

    def gradients(layer, norms_penalty, dtype):
        x, weight, bias, A, B, E, dy = (made[name].to(dtype) for name in ("x", "weight", "bias", "A", "B", "E", "dy"))
        y = layer(x, weight, bias, A, B, scaling=2.0, rank_scale=E, dropout_p=0.3, seed=SEED)
        loss = (y * dy).sum() + norms_penalty([A], [B])
        return {"y": y, **dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))}

    out = gradients(ops.lora_linear, ops.rank_penalty, torch.float32)
    monkeypatch.setenv("ADAPTLORA_BACKEND", "reference")
    exact, eager = (gradients(lora_linear_ref, rank_penalty_ref, d) for d in (torch.float64, torch.float32))
    exact = {name: value.double() for name, value in exact.items()}
    assert_all_accurate(out, exact, eager)
