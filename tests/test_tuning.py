"""Which base GEMM is chosen, the table of measured ones, and `adaptlora tune` with times that are made up."""

import itertools
import json
import warnings

import pytest
import torch
from numerics import laid_out

pytest.importorskip("triton", reason="triton is not installed")

from triton import testing
from typer.testing import CliRunner

from adaptlora import doctor, gemm_table, tuning
from adaptlora.cli import app
from adaptlora.gemm_table import Entry
from adaptlora.kernels import devices, gemm_choice, launch, tiles

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
choose, choice, is_predicted = gemm_choice.choose, gemm_choice.choice, gemm_choice.is_predicted
_device_of = gemm_choice.device_of
A100, H100 = (80, "NVIDIA A100-SXM4-80GB"), (90, "NVIDIA H100 80GB HBM3")


def forget():
    """As in a new process."""
    for cached in (choice, gemm_table.in_use, _device_of):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No override, an empty folder for tables, and nothing remembered, before and after."""
    monkeypatch.delenv("ADAPTLORA_GEMM", raising=False)
    monkeypatch.setenv("ADAPTLORA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    forget()
    yield
    forget()


@pytest.fixture
def on_h100(monkeypatch):
    monkeypatch.setattr(gemm_choice, "device_of", lambda device: H100)


def entry(tile=None, gemm="gemm_expand", M=2048, columns=4096, depth=4096, dtype="bfloat16", **other) -> Entry:
    numbers = {"rank": 16, "seconds": 0.5, "torch_seconds": 0.75} | other
    return Entry(gemm, dtype, M, columns, depth, tile=tile and tuple(tile), **numbers)


def wide(rows, columns, **options) -> torch.Tensor:
    """Columns of a wider matrix, 16 elements from its start: rows stay on 16-byte boundaries."""
    return torch.zeros(rows, columns + 32, **options)[:, 16 : 16 + columns]


def matrix(layout, rows=48, columns=32, dtype=BF16) -> torch.Tensor:
    return (
        wide(rows, columns, dtype=dtype)
        if layout == "wide"
        else laid_out(torch.zeros(rows, columns, dtype=dtype), layout)
    )


# what can be fused

POSSIBLE = [
    ({}, {}),
    ({"dtype": FP16}, {"dtype": FP16}),
    ({"rows": 1}, {}),
    ({"rows": 33}, {"layout": "transposed"}),
    ({"layout": "wide"}, {"layout": "wide"}),
]
IMPOSSIBLE = [
    ({"dtype": FP32}, {"dtype": FP32}),
    ({"layout": "padded"}, {}),
    ({"layout": "strided"}, {}),
    ({"layout": "transposed"}, {}),
    ({"columns": 40}, {"columns": 40}),
    ({}, {"rows": 40}),
    ({}, {"layout": "padded"}),
    ({}, {"layout": "strided"}),
]


@pytest.mark.parametrize(
    ("x", "weight", "possible"), [(*pair, True) for pair in POSSIBLE] + [(*pair, False) for pair in IMPOSSIBLE]
)
def test_layouts_that_are_compiled_can_be_fused_and_no_others(monkeypatch, x, weight, possible):
    monkeypatch.setenv("ADAPTLORA_GEMM", "fused")
    x, weight = (matrix(**{"layout": "contiguous"} | made) for made in (x, weight))
    assert (choose("gemm_expand", x, [weight]) in tiles.GEMM_EXPAND[80]) is possible
    # The same operands as dy (M, N) and W (N, K).
    assert (choose("gemm_dx", x, [weight.t()], [x]) in tiles.GEMM_DX[80]) is possible


def test_pointers_of_two_bytes_alignment_are_not_fused(monkeypatch):
    monkeypatch.setenv("ADAPTLORA_GEMM", "fused")
    moved = torch.zeros(48 * 32 + 1, dtype=BF16)[1:].view(48, 32)
    assert choose("gemm_expand", moved, [matrix("contiguous")]) is None
    assert choose("gemm_expand", matrix("contiguous"), [moved]) is None
    assert choose("gemm_expand", matrix("contiguous"), [moved.view(32, 48).t()]) is None


def test_groups_are_fused_as_far_as_a_launch_goes_and_if_all_members_can_be(monkeypatch):
    monkeypatch.setenv("ADAPTLORA_GEMM", "fused")
    dys, weights = [matrix("contiguous") for _ in range(4)], [matrix("contiguous", 32) for _ in range(4)]
    assert launch.MAX_GROUP == 3
    for modules in (2, 3):
        assert choose("gemm_dx", dys[0], weights[:modules], dys[:modules]) in tiles.GEMM_DX_GROUP[80]
    assert choose("gemm_dx", dys[0], weights, dys) is None
    assert choose("gemm_dx", dys[0], weights[:2], [dys[0], matrix("padded")]) is None
    assert choose("gemm_dx", dys[0], [weights[0], matrix("strided", 32)], dys[:2]) is None


def test_a_group_reduces_over_the_widths_of_all_members(monkeypatch, on_h100):
    asked = []
    monkeypatch.setattr(gemm_choice, "choice", lambda *arguments: asked.append(arguments))
    dys, weights = [matrix("contiguous", 33, N) for N in (32, 64)], [matrix("contiguous", N, 48) for N in (32, 64)]
    choose("gemm_dx", dys[0], weights, dys)
    choose("gemm_dx", dys[1], weights[1:], dys[1:])
    choose("gemm_expand", dys[1], [matrix("contiguous", 80, 64)])
    assert asked == [
        ("gemm_dx_group", *H100, BF16, 33, 48, 96),
        ("gemm_dx", *H100, BF16, 33, 48, 64),
        ("gemm_expand", *H100, BF16, 33, 80, 64),
    ]


# the override


def test_override(monkeypatch, on_h100):
    fast, slow = (matrix("contiguous", 256, depth) for depth in (32, 8192))
    small, large = (matrix("contiguous", 4096, depth) for depth in (32, 8192))
    assert (
        choose("gemm_expand", fast, [small]) in tiles.GEMM_EXPAND[90] and choose("gemm_expand", slow, [large]) is None
    )
    monkeypatch.setenv("ADAPTLORA_GEMM", "torch")
    assert choose("gemm_expand", fast, [small]) is None
    monkeypatch.setenv("ADAPTLORA_GEMM", "fused")
    assert choose("gemm_expand", slow, [large]) in tiles.GEMM_EXPAND[90]
    monkeypatch.setenv("ADAPTLORA_GEMM", "cublas")
    with pytest.raises(ValueError, match=r"^ADAPTLORA_GEMM must be one of torch, fused, got 'cublas'$"):
        choose("gemm_expand", fast, [small])


def test_override_goes_before_the_table_and_the_table_before_the_prediction(monkeypatch, on_h100):
    x, weight = matrix("contiguous", 256, 64), matrix("contiguous", 4096, 64)
    predicted = choose("gemm_expand", x, [weight])
    assert predicted is not None
    gemm_table.update(H100[1], [entry(None, M=256, columns=4096, depth=64)])
    assert choose("gemm_expand", x, [weight]) == predicted  # once a process
    forget()
    assert choose("gemm_expand", x, [weight]) is None
    monkeypatch.setenv("ADAPTLORA_GEMM", "fused")
    assert choose("gemm_expand", x, [weight]) == predicted


# the prediction


@pytest.mark.parametrize(
    ("capability", "M", "columns", "depth", "fused"),
    [
        # Separate pass: 4 · 8192 · 4096 bytes / 2.04 TB/s = 65.8 µs. GEMM at 312 TFLOP/s, 10 % of it:
        (80, 8192, 4096, 3056, True),  # 657 µs → 65.7 µs
        (80, 8192, 4096, 3072, False),  # 661 µs → 66.1 µs
        # 4 · 8192 · 4096 bytes / 3.35 TB/s = 40.1 µs. GEMM at 989 TFLOP/s, 25 % of it:
        (90, 8192, 4096, 2352, True),  # 160 µs → 39.9 µs
        (90, 8192, 4096, 2368, False),  # 161 µs → 40.2 µs
        # One row: 4 · 4096 bytes = 8.0 ns to write it again; 10 % of 2 · (16 + 16 · 4096 + 4096) bytes = 6.8 ns,
        # and of 2 · (32 + 32 · 4096 + 4096) bytes = 13.3 ns to read the weight, whose FLOPs take 0.8 ns.
        (80, 1, 4096, 16, True),
        (80, 1, 4096, 32, False),
        # The nearest architecture below: 86 and 89 as 80, 100 as 90; 120 has the multiprocessors of 8x.
        (89, 8192, 4096, 3056, True),
        (100, 8192, 4096, 3056, False),
        (120, 8192, 4096, 3056, True),
    ],
)
def test_prediction_worked_by_hand(capability, M, columns, depth, fused):
    assert is_predicted(capability, BF16, M, columns, depth) is fused
    assert (choice("gemm_expand", capability, None, BF16, M, columns, depth) is not None) is fused


def test_depths_in_the_docstring():
    for capability, depth in ((80, 3058), (90, 2361)):
        assert str(depth) in is_predicted.__doc__
        assert is_predicted(capability, FP16, 8192, 8192, depth)
        assert not is_predicted(capability, FP16, 8192, 8192, depth + 1)


def test_smaller_tiles_where_larger_ones_do_not_fill_the_device():
    first, second, last = tiles.GEMM_EXPAND[90]
    assert [tile[:2] for tile in (first, second, last)] == [(128, 256), (128, 128), (64, 128)]
    # 132 multiprocessors; blocks of the three tiles:
    assert gemm_choice.fused_tile("gemm_expand", 90, 1536, 2816) == first  # 12 · 11 = 132
    assert gemm_choice.fused_tile("gemm_expand", 90, 1408, 2816) == second  # 121, 242
    assert gemm_choice.fused_tile("gemm_expand", 90, 640, 1408) == last  # 30, 55, 110
    assert gemm_choice.fused_tile("gemm_dx", 90, 1, 16) == tiles.GEMM_DX[90][-1]


def test_no_fused_tile_before_ampere_and_those_of_8x_on_consumer_blackwell():
    assert choice("gemm_expand", 75, None, FP16, 1024, 1024, 16) is None
    for gemm, table in (
        ("gemm_expand", tiles.GEMM_EXPAND),
        ("gemm_dx", tiles.GEMM_DX),
        ("gemm_dx_group", tiles.GEMM_DX_GROUP),
    ):
        assert gemm_choice.fused_tiles(gemm, 75) == ()
        assert gemm_choice.fused_tiles(gemm, 86) == gemm_choice.fused_tiles(gemm, 120) == table[80]
        assert gemm_choice.fused_tiles(gemm, 90) == table[90]
    assert devices.device(75) == devices.device(86) == devices.DEVICES[80]


def test_the_interpreter_stands_for_an_a100():
    assert launch.multiprocessors(torch.device("cpu")) == 108
    assert gemm_choice.device_of(torch.device("cpu")) == (80, None)


# the table


def test_nearest_entry():
    fast, slow = tiles.GEMM_EXPAND[90][0], tiles.GEMM_EXPAND[90][1]
    gemm_table.update(H100[1], [entry(fast, depth=4096), entry(slow, depth=6144), entry(gemm="gemm_dx", depth=4096)])
    for depth, tile in ((2048, fast), (4900, fast), (5100, slow), (12288, slow)):  # √(4096 · 6144) = 5016
        assert choice("gemm_expand", *H100, BF16, 2048, 4096, depth) == tile
    assert choice("gemm_dx", *H100, BF16, 2048, 4096, 2048) is None
    # all three sizes count: two small steps are nearer than one large one
    near, far = entry(fast, M=2048, columns=2896, depth=5792), entry(slow, M=1100)
    table = gemm_table.Table("x", "2025-01-01", (far, near))
    assert table.nearest("gemm_expand", BF16, 2048, 4096, 4096, tiles.GEMM_EXPAND[90]) == near


@pytest.mark.parametrize("size", ["M", "columns", "depth"])
@pytest.mark.parametrize("factor", [2, 0.5])
def test_an_entry_counts_up_to_a_factor_of_two_in_each_size(size, factor):
    table = gemm_table.Table("x", "2025-01-01", (entry(),))
    sizes = {"M": 2048, "columns": 4096, "depth": 4096}
    for scale, found in ((factor, True), (factor * (1.01 if factor > 1 else 0.99), False)):
        asked = sizes | {size: round(sizes[size] * scale)}
        assert (table.nearest("gemm_expand", BF16, **asked, tiles=()) is not None) is found


def test_entries_of_another_dtype_product_or_forgotten_tile_do_not_count():
    table = gemm_table.Table("x", "2025-01-01", (entry((1, 2, 3, 4, 5)), entry(dtype="float16"), entry(gemm="gemm_dx")))
    assert table.nearest("gemm_expand", BF16, 2048, 4096, 4096, tiles.GEMM_EXPAND[90]) is None
    assert table.nearest("gemm_expand", FP16, 2048, 4096, 4096, ()) == table.entries[1]


def test_an_entry_of_torch_is_followed_where_fused_was_predicted_and_the_other_way_round():
    assert choice("gemm_expand", *H100, BF16, 8192, 4096, 1024) is not None
    assert choice("gemm_expand", *H100, BF16, 8192, 4096, 8192) is None
    tile = tiles.GEMM_EXPAND[90][1]
    gemm_table.update(H100[1], [entry(None, M=8192, depth=1024), entry(tile, M=8192, depth=8192)])
    forget()
    assert choice("gemm_expand", *H100, BF16, 8192, 4096, 1024) is None
    assert choice("gemm_expand", *H100, BF16, 8192, 4096, 8192) == tile
    assert choice("gemm_expand", *A100, BF16, 8192, 4096, 1024) is not None  # another device's table


def test_where_the_table_lies(monkeypatch, tmp_path):
    name = "gemm-nvidia-h100-80gb-hbm3.json"
    assert gemm_table.path(H100[1]) == tmp_path / "cache" / name
    monkeypatch.delenv("ADAPTLORA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert gemm_table.path(H100[1]) == tmp_path / "xdg" / "adaptlora" / name
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert gemm_table.path(H100[1]) == tmp_path / ".cache" / "adaptlora" / name


def test_what_is_written_is_read_and_new_entries_replace_those_of_their_product():
    assert gemm_table.read(H100[1]) is None
    first = [entry(tiles.GEMM_EXPAND[90][0]), entry(gemm="gemm_dx")]
    file = gemm_table.update(H100[1], first)
    assert gemm_table.read(H100[1]).entries == tuple(first)
    again = [entry(None, rank=8), entry(dtype="float16")]
    assert gemm_table.update(H100[1], again) == file
    assert gemm_table.read(H100[1]).entries == (again[0], first[1], again[1])
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def broken(content: dict, **changes) -> str:
    return json.dumps(content | changes)


def broken_entry(content: dict, **changes) -> str:
    return broken(content, entries=[content["entries"][0] | changes])


DAMAGE = {
    "cut off": (lambda content: json.dumps(content)[:-9], "must be readable JSON"),
    "no object": (lambda content: "[]", "must hold an object, got list"),
    "version": (lambda content: broken(content, version=2), "version must be 1, got 2"),
    "device": (lambda content: broken(content, device="x"), "device must be 'NVIDIA H100 80GB HBM3', got 'x'"),
    "date": (lambda content: broken(content, date="soon"), "a date and whole entries: ValueError"),
    "no entries": (lambda content: broken(content, entries=None), "a date and whole entries: TypeError"),
    "field": (lambda content: broken_entry(content, colour=1), "unexpected keyword argument 'colour'"),
    "gemm": (lambda content: broken_entry(content, gemm="x"), "gemm must be one of gemm_expand, .* got 'x'"),
    "dtype": (lambda content: broken_entry(content, dtype="float32"), "dtype must be one of bfloat16, float16, got"),
    "size": (lambda content: broken_entry(content, M=0), "M must be an integer > 0, got 0"),
    "bool": (lambda content: broken_entry(content, depth=True), "depth must be an integer > 0, got True"),
    "tile": (lambda content: broken_entry(content, tile=[128, 128]), "tile must be null or five integers > 0"),
    "no tile": (lambda content: broken_entry(content, tile=[]), "tile must be null or five integers > 0"),
    "seconds": (lambda content: broken_entry(content, seconds="fast"), "seconds must be a number > 0, got 'fast'"),
    "nan": (
        lambda content: broken_entry(content, torch_seconds=float("nan")),
        "torch_seconds must be a number > 0, got nan",
    ),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_cannot_be_read_warns_once_and_is_not_lost(damage, reason):
    file = gemm_table.update(H100[1], [entry(M=8192, depth=1024)])
    text = damage(json.loads(file.read_text()))
    file.write_text(text)
    with pytest.raises(ValueError, match=reason):
        gemm_table.read(H100[1])
    with pytest.warns(UserWarning, match=f"(?s){file.name}.*{reason}.*chosen by prediction"):
        assert choice("gemm_expand", *H100, BF16, 8192, 4096, 1024) is not None  # the entry says None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice("gemm_expand", *H100, BF16, 8192, 4096, 1040) is not None
    assert file.read_text() == text
    gemm_table.update(H100[1], [entry()])
    assert gemm_table.read(H100[1]).entries == (entry(),)
    assert file.with_name(f"{file.name}.old").read_text() == text


def test_a_table_that_cannot_be_written_leaves_the_old_one(monkeypatch):
    file = gemm_table.update(H100[1], [entry()])
    before = file.read_text()
    monkeypatch.setattr(json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gemm_table.update(H100[1], [entry(gemm="gemm_dx")])
    assert file.read_text() == before and [path.name for path in file.parent.iterdir()] == [file.name]


# adaptlora tune


@pytest.fixture
def gpu(monkeypatch, on_h100):
    """An H100 whose products are ones; `set(milliseconds)` says how long they take, in the order in which they are timed."""
    answers = {"is_available": True, "current_device": 0, "get_device_name": H100[1], "get_device_capability": (9, 0)}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *a, answer=answer: answer)
    same = (lambda: torch.ones(3, 3, dtype=BF16), lambda tile: torch.ones(3, 3, dtype=BF16))
    monkeypatch.setattr(tuning, "_forward", lambda *a: same)
    monkeypatch.setattr(tuning, "_backward", lambda *a: same)

    def set(milliseconds):
        times = iter(milliseconds)

        def do_bench(call, return_mode):
            assert return_mode == "median"
            call()
            return next(times)

        monkeypatch.setattr(testing, "do_bench", do_bench)

    return set


def tune(*arguments, code=0):
    result = CliRunner().invoke(app, ["tune", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_tune_writes_the_fastest_and_says_what_changed(gpu):
    large, middle, small = tiles.GEMM_EXPAND[90]
    # torch's, then each tile: the forward changes to `middle`, dx stays with torch, the pair's changes to its only tile.
    gpu([8.0, 9.0, 6.0, 7.0, 5.0, 5.5, 4.0, 3.0])
    result = tune("--shape", "8192,4096,8192", "--rank", 8)
    file = gemm_table.path(H100[1])
    assert (
        "3 products measured, 2 run another GEMM than before" in result.output and f"written: {file}" in result.output
    )
    rows = [line.split() for line in result.output.splitlines() if line.lstrip().startswith("gemm_")]
    assert [row[:4] for row in rows] == [
        ["gemm_expand", "8192", "4096", "8192"],
        ["gemm_dx_group", "8192", "8192", "8192"],
    ]
    assert rows[0][4] == "torch" and " ".join(rows[0][5:-3]) == "fused 128×128×64, 8 warps, 4 stages"
    assert rows[0][-3:] == ["8.000", "6.000", "0.75"] and rows[1][-3:] == ["4.000", "3.000", "0.75"]
    common = {"dtype": "bfloat16", "M": 8192, "rank": 8}
    assert gemm_table.read(H100[1]).entries == (
        entry(middle, columns=4096, depth=8192, seconds=0.006, torch_seconds=0.008, **common),
        entry(None, "gemm_dx", columns=8192, depth=4096, seconds=0.005, torch_seconds=0.005, **common),
        entry(tiles.GEMM_DX_GROUP[90][0], "gemm_dx_group", columns=8192, depth=8192, seconds=0.003, torch_seconds=0.004, **common),
    )  # fmt: skip

    # Measured again, with the table in use: the forward goes from `middle` to `small`, the rest is as it was.
    forget()
    gpu([8.0, 9.0, 6.0, 3.0, 5.0, 5.5, 4.0, 3.0])
    result = tune("--shape", "8192,4096,8192", "--rank", 8)
    assert "1 run another GEMM than before" in result.output
    (row,) = (line for line in result.output.splitlines() if line.lstrip().startswith("gemm_"))
    assert "fused 128×128×64, 8 warps, 4 stages" in row and "fused 64×128×64, 4 warps, 4 stages" in row
    assert row.split()[-3:] == ["6.000", "3.000", "0.50"]
    forget()
    assert choice("gemm_expand", *H100, BF16, 8192, 4096, 8192) == small != large


def test_dry_run_writes_nothing(gpu, tmp_path):
    gpu(itertools.repeat(1.0))
    result = tune("--shape", "8192,4096,8192", "--shape", "64,16,32", "--dtype", "fp16", "--dry-run")
    assert "6 products measured" in result.output and "nothing was written" in result.output
    assert list(tmp_path.iterdir()) == []


def test_tune_measures_usual_shapes_if_none_are_given(gpu):
    gpu(itertools.repeat(1.0))
    assert f"{3 * 30} products measured" in tune("--dry-run").output
    assert {(M, N, K) for M, N, K in tuning.SHAPES if K == 4096} == {
        (M, N, K) for M in (2048, 8192) for N, K in ((4096, 4096), (16384, 4096), (1024, 4096))
    }


def test_a_wrong_product_is_an_error_and_nothing_is_written(gpu, monkeypatch, tmp_path):
    gpu(itertools.repeat(1.0))
    for wrong in (1.1, float("nan")):
        changed = torch.ones(3, 3, dtype=BF16).index_put(
            (torch.tensor(2), torch.tensor(2)), torch.tensor(wrong, dtype=BF16)
        )
        monkeypatch.setattr(
            tuning, "_backward", lambda *a, out=changed: (lambda: torch.ones(3, 3, dtype=BF16), lambda tile: out)
        )
        result = tune("--shape", "64,16,32", code=1)
        assert isinstance(result.exception, RuntimeError)
        assert "gemm_dx (M=64, N=16, K=32) with GemmTile(" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


BAD = [
    (["--shape", "64,16"], "shape must be M,N,K > 0, N and K multiples of 16, got 64,16"),
    (["--shape", "64,17,32"], "shape must be M,N,K > 0, N and K multiples of 16, got 64,17,32"),
    (["--shape", "0,16,32"], "shape must be M,N,K > 0, N and K multiples of 16, got 0,16,32"),
    (["--shape", "a,16,32"], "shape must be three integers M,N,K, got 'a,16,32'"),
    (["--dtype", "fp32"], "dtype must be bf16 or fp16, got 'fp32'"),
    (["--rank", "0"], "rank must be an integer > 0, got 0"),
]


def one_red_line(result, message):
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0] == f"error: tune: {message}"


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_one_clear_line(gpu, tmp_path, arguments, message):
    one_red_line(tune(*arguments, code=2), message)
    assert list(tmp_path.iterdir()) == []


def test_old_gpus_have_nothing_to_tune(gpu, monkeypatch):
    monkeypatch.setattr(gemm_choice, "device_of", lambda device: (75, "Tesla T4"))
    one_red_line(tune(code=2), "the GPU must have a compute capability of at least 8.0, got 7.5")


def test_without_a_gpu_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one_red_line(tune(code=2), "a CUDA GPU must be there to measure on, got none")
    assert list(tmp_path.iterdir()) == []


# the doctor


def test_doctor_says_which_table_is_in_use(gpu, monkeypatch):
    def row():
        return doctor._gemm_row()[1:]

    assert row() == ("prediction: no table for this GPU (`adaptlora tune` measures one)", True)
    file = gemm_table.update(H100[1], [entry(), entry(gemm="gemm_dx")])
    date = gemm_table.read(H100[1]).date
    assert row() == (f"{file}: 2 entries, measured {date}", True)
    file.write_text("{}")
    assert row() == (f"{file}: version must be 1, got None", False)
    monkeypatch.setenv("ADAPTLORA_GEMM", "torch")
    assert row() == ("ADAPTLORA_GEMM=torch", True)
    monkeypatch.setenv("ADAPTLORA_GEMM", "x")
    assert row() == ("ADAPTLORA_GEMM must be one of torch, fused, got 'x'", False)
    assert ("decided by", *row()) in doctor.diagnose()["Which base GEMM runs (cuda, 16 bits)"]
