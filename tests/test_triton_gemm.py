"""The base GEMMs with the rank in their accumulator against the equations in float64, alone and as the layers run them."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from numerics import assert_accurate, laid_out
from test_lora_group import group, name_of, samples_of
from test_triton_group import assert_right, triton_backend  # noqa: F401 - a fixture
from test_triton_kernels import DEVICE, INTERPRETED, SEED, compare, inputs, mask, run

from adaptlora import tuning
from adaptlora.kernels import gemm_choice, lora_gemm, lora_group, tiles

pytestmark = pytest.mark.usefixtures("poisoned") if INTERPRETED else pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (M, K, N, R): K and N multiples of 16, M ragged, below, at and above the sizes of the tiles.
SIZES = [(1, 16, 32, 1), (33, 144, 48, 13), (128, 64, 272, 40), (150, 272, 144, 200)]
BOTH = ["lora_gemm_expand", "lora_gemm_dx"]
LAYOUTS = ("contiguous", "contiguous", "contiguous", "transposed", "contiguous")
QKV = ({"N": 144, "R": 13}, {"N": 48, "R": 40, "bias": False}, {"N": 16, "R": 1, "rank_scale": False})


@pytest.fixture
def fused(monkeypatch):
    """Every product that can be is fused; the names of those that were."""
    monkeypatch.setenv("ADAPTLORA_GEMM", "fused")
    launched = []

    def watch(name):
        launcher = getattr(lora_gemm, name)
        monkeypatch.setattr(
            lora_group, name, lambda *args, **options: (launched.append(name), launcher(*args, **options))[1]
        )

    for name in BOTH:
        watch(name)
    return launched


def wide(values: torch.Tensor) -> torch.Tensor:
    """The same numbers as columns of a wider matrix, whose rows stay on 16-byte boundaries; what is beside them is NaN."""
    made = values.new_full((*values.shape[:-1], values.shape[-1] + 32), float("nan"))[..., 16:-16]
    return made.copy_(values)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_lora_linear(fused, sizes, dtype, p):
    keep, seed = mask(*sizes[:2], p)
    made = inputs(sizes, dtype, dtype, LAYOUTS)
    compare(run(made, p, seed), made, keep, p)
    assert fused == BOTH


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("case", ["transposed weight", "wide", "fp32 factors", "no scale", "no bias"])
def test_lora_linear_in_other_layouts(fused, case, dtype):
    sizes = (70, 144, 80, 13)
    keep, seed = mask(*sizes[:2], 0.3)
    made = inputs(sizes, dtype, FP32 if case == "fp32 factors" else dtype, LAYOUTS)
    if case == "transposed weight":
        made["weight"] = laid_out(made["weight"], "transposed")
    if case == "wide":
        made |= {name: wide(made[name]) for name in ("x", "weight", "dy")}
    given, need = dict(made), (True,) * 4
    if case == "no scale":
        made["E"], given["E"], need = torch.ones_like(made["E"]), None, (True, True, True, False)
    if case == "no bias":
        made["bias"], given["bias"] = torch.zeros_like(made["bias"]), None
    out = run(given, 0.3, seed, need)
    if case == "no scale":
        out["dE"] = run(made, 0.3, seed)["dE"]
    compare(out, made, keep, 0.3)
    assert set(fused) == set(BOTH)


@pytest.mark.parametrize(
    ("layouts", "launched"),
    [
        (("padded", *LAYOUTS[1:]), ["lora_gemm_dx"]),
        ((*LAYOUTS[:4], "padded"), ["lora_gemm_expand"]),
        (("contiguous", "padded", *LAYOUTS[2:]), []),
        ((*LAYOUTS[:3], "contiguous", "contiguous"), ["lora_gemm_dx"]),
    ],
    ids=["x", "dy", "weight", "B"],
)
def test_what_cannot_be_fused_takes_the_other_way(fused, layouts, launched):
    sizes = (33, 64, 48, 13)
    keep, seed = mask(*sizes[:2], 0.3)
    made = inputs(sizes, BF16, BF16, layouts)
    compare(run(made, 0.3, seed), made, keep, 0.3)
    assert fused == launched


GROUPS = [
    *(group(*QKV, batch=(70,), K=144, dtype=dtype, p=p) for dtype in (BF16, FP16) for p in (0.0, 0.3)),
    *(group(*QKV[:2], batch=(2, 33), K=64, dtype=BF16, dtype_A=FP32, dtype_B=FP32, p=p) for p in (0.0, 0.3)),
]
LARGE = group({"R": 200, "N": 272}, {"R": 2, "N": 16, "weight": "transposed"}, batch=(130,), K=272, dtype=BF16, p=0.3)


@pytest.mark.parametrize(
    ("case", "strided"),
    [*itertools.product(GROUPS, (False, True)), (LARGE, True)],  # which takes the interpreter eight seconds
    ids=lambda value: ("wide dy" if value else "") if isinstance(value, bool) else name_of(value),
)
def test_groups(fused, case, strided):
    samples = samples_of(case)
    if strided:
        samples = [sample | {"dy": wide(sample["dy"])} for sample in samples]
    assert_right(case, samples)
    assert fused == ["lora_gemm_expand"] * len(case) + ["lora_gemm_dx"]


def test_groups_too_large_or_with_a_member_of_rank_0_take_dx_from_torch(fused):
    for members in (QKV + QKV[:1], (*QKV[:2], {"N": 48, "R": 0})):
        assert_right(group(*members, batch=(33,), K=64, dtype=BF16))
    assert fused == ["lora_gemm_expand"] * 6


def shipped(gemm: str) -> list:
    """Tiles of every architecture; on a GPU those of its own."""
    if not INTERPRETED:
        return list(gemm_choice.fused_tiles(gemm, gemm_choice.device_of(torch.device(DEVICE))[0]))
    return sorted({tile for table in gemm_choice.TILES[gemm].values() for tile in table})


@pytest.mark.parametrize(
    ("gemm", "tile"),
    [(gemm, tile) for gemm in gemm_choice.TILES for tile in shipped(gemm)],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
def test_every_tile(gemm, tile):
    """More rows of tiles than are walked together, the last of them ragged, as are the columns and the depth."""
    M, K, N, R = 9 * tile.rows + 5, 80, 272, 13
    x, dy, weight = (torch.randn(shape, device=DEVICE).to(BF16) for shape in ((M, K), (M, N), (N, K)))
    A, B, s = (torch.randn(shape, device=DEVICE).to(BF16) for shape in ((R, K), (R, N), (M, R)))
    B = B.t()

    modules = 3 if gemm == "gemm_dx_group" else 1
    if gemm == "gemm_expand":
        out = lora_gemm.lora_gemm_expand(x, weight, None, s.float(), B, tile)
    else:
        out = lora_gemm.lora_gemm_dx([dy] * modules, [weight] * modules, s.repeat(1, modules), [A] * modules, tile)

    def equation(dtype):
        left, W, S, F = (
            t.to(dtype) for t in ((x, weight.t(), s, B.t()) if gemm == "gemm_expand" else (dy, weight, s, A))
        )
        return modules * (left @ W + S @ F)

    exact, eager = equation(torch.float64), equation(BF16)
    assert_accurate(gemm, out, exact, eager)


def test_a_wrong_element_is_noticed(fused):
    keep, seed = mask(33, 64, 0.3)
    made = inputs((33, 64, 48, 13), BF16, BF16, LAYOUTS)
    out = run(made, 0.3, seed)
    for name in ("y", "dx"):
        wrong = out[name].clone()
        wrong[-1, -1] += 0.1 * wrong.abs().max()
        with pytest.raises(AssertionError, match=name):
            compare(out | {name: wrong}, made, keep, 0.3)
    with pytest.raises(AssertionError):
        compare(run(made, 0.3, torch.tensor(SEED + 1, device=DEVICE)), made, keep, 0.3)


def test_tuning_compares_torch_with_every_tile():
    """The products that are timed are the real ones, and a fused one that left something out would not pass as the same."""
    device, times = torch.device(DEVICE), iter(range(1, 1000))
    timed = []

    def clock(call):
        timed.append(call())
        return float(next(times))

    found = list(tuning.measure([(33, 48, 64)], BF16, 13, device, clock))
    assert [(m.entry.gemm, m.entry.columns, m.entry.depth) for m in found] == [
        ("gemm_expand", 48, 64), ("gemm_dx", 64, 48), ("gemm_dx_group", 64, 96),
    ]  # fmt: skip
    assert all(m.entry.tile is None and (m.entry.M, m.entry.rank) == (33, 13) for m in found)
    capability, _ = gemm_choice.device_of(device)
    assert len(timed) == 3 + sum(len(gemm_choice.fused_tiles(gemm, capability)) for gemm in gemm_choice.TILES)

    for made in (tuning._forward(70, 144, 80, 13, BF16, device), tuning._backward(70, 144, 80, 2, 13, FP16, device)):
        plain, fused = made
        tile = tiles.GemmTile(64, 128, 64, 4, 3) if plain().shape[1] == 144 else tiles.GemmTile(128, 64, 64, 8, 3)
        tuning._check_same("the same", fused(tile), plain())
        wrong = fused(tile)
        wrong[-1, -1] += 0.1 * wrong.abs().max()
        with pytest.raises(RuntimeError, match="tune: it must equal torch's product, got an error of"):
            tuning._check_same("it", wrong, plain())
