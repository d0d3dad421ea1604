"""Every Triton kernel, as its launcher launches it, really compiled for sm_80 and sm_90: no GPU is needed for that.

A sample of what `make gpu-check` compiles: all configurations, and sm_100 too.
"""

import importlib
import pkgutil
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
from gpu_configurations import (
    BF16,
    FP32,
    NEVER_SPLIT,
    Case,
    cases,
    layer_launches,
    needs,
    other_launches,
)
from triton.runtime.jit import JITFunction
from triton_targets import SHARED, Compiled, compile_launch, faults, recorded_launches

import adaptlora.kernels
from adaptlora.kernels import launch, lora_group, tiles

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 leaves nothing to compile")

SAMPLE = [
    (80, Case(BF16, 8)),
    (80, Case(BF16, 128, factors=BF16)),
    (80, Case(BF16, 33, peft=True, scale=True)),
    (80, Case(BF16, 16, modules=3)),
    (80, Case(BF16, 16, layout="padded")),
    (80, Case(FP32, 32)),
    (90, Case(BF16, 8)),
    (90, Case(BF16, 16, modules=3)),
    (90, Case(FP32, 32, dropout=False, tf32=True)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "case"), SAMPLE, ids=str)
def test_layer_kernels_are_sound(capability, case):
    """No spill, no more shared memory than there is; matrix instructions and asynchronous copies where they belong."""
    for launched in layer_launches(case, capability, (NEVER_SPLIT,)):
        found = faults(launched.name, compile_launch(launched, capability), **needs(case, launched))
        assert not found, f"{launched.name} on sm_{capability}: {', '.join(found)}"


def test_other_kernels_are_sound():
    for launched in other_launches(80):
        compiled = compile_launch(launched, 80)
        matrix = launched.name == "_gram_kernel"  # in float64
        found = faults(launched.name, compiled, matrix=matrix, asynchronous=False)
        assert not found, f"{launched.name}: {', '.join(found)}"
        vector = launched.args.get("VECTOR") or launched.args.get("IN_VECTOR")
        if vector or launched.name == "_rank_gather_kernel":
            assert re.search(r"\bLDG\.E\.128", compiled.sass), f"{launched.name}: no 16-byte reads"


def test_faults_are_found():
    launched = layer_launches(Case(BF16, 16), 90, (NEVER_SPLIT,))[0]
    sound = Compiled(90, 8, 100, 0, 1024, "HGMMA.64x16 LDGSTS.E ")
    gemm = next(found for found in layer_launches(Case(BF16, 16), 90) if "gemm" in found.name)
    everything = {"matrix": True, "asynchronous": True}
    assert faults(launched.name, sound, **everything) == []
    for broken, text in (
        (Compiled(90, 8, 255, 16, 1024, sound.sass), "spills (16 bytes of stack)"),
        (Compiled(90, 8, 255, 0, 1024, sound.sass + "STL [R1] "), "spills (0 bytes of stack)"),
        (Compiled(90, 8, 255, 0, 228 * 1024, sound.sass), "233472 bytes of shared memory, more than 232448"),
        (Compiled(90, 8, 255, 0, 1024, "LDGSTS.E FFMA "), "no matrix instructions"),
        (Compiled(90, 8, 255, 0, 1024, "HMMA.16816 LDG.E "), "no asynchronous copies"),
    ):
        assert faults(launched.name, broken, **everything) == [text]
    assert faults(gemm.name, Compiled(90, 8, 100, 0, 1024, "HMMA.16816 LDGSTS.E "), **everything) == ["no HGMMA"]


def test_occupancy():
    """Worked from the limits: 64 warps, 65,536 registers and 164 KiB of shared memory a multiprocessor of sm_80."""
    assert Compiled(80, 8, 64, 0, 0, "").occupancy == 4
    assert Compiled(80, 8, 255, 0, 0, "").occupancy == 1
    assert Compiled(80, 4, 128, 0, 40 * 1024, "").occupancy == 4
    assert Compiled(80, 4, 32, 0, 163 * 1024, "").occupancy == 1


def test_no_kernel_is_left_out():
    kernels = set()
    for info in pkgutil.iter_modules(adaptlora.kernels.__path__):
        if info.name == "interpreter":  # patches triton's interpreter, which is not in use here
            continue
        module = importlib.import_module(f"adaptlora.kernels.{info.name}")
        functions = {name for name, value in vars(module).items() if isinstance(value, JITFunction)}
        kernels |= {name for name in functions if name.endswith("_kernel")}
    compiled = {launched.name for launched in layer_launches(Case(BF16, 16), 80)}
    assert kernels == compiled | {launched.name for launched in other_launches(80)}


def test_every_tile_is_compiled():
    """The cases of `make gpu-check` reach every entry of the tables."""
    seen = {80: set(), 90: set(), 100: set()}
    for capability, found in seen.items():
        for case in cases():
            for launched in layer_launches(case, capability, (NEVER_SPLIT,)):
                blocks = {name: value for name, value in launched.args.items() if name.startswith("BLOCK_")}
                found.add((launched.name, *blocks.values(), launched.options.get("num_warps")))
    for (_, R), tile in tiles.SHRINK.items():
        assert ("_lora_shrink_kernel", tile.rows, tile.columns, R, tile.warps) in seen[80]
    for (_, R), tile in tiles.DA.items():
        assert ("_lora_da_kernel", tile.rows, tile.columns, R, tile.warps) in seen[80]
    for (_, R), tile in tiles.DS_DB.items():
        assert ("_lora_ds_db_kernel", tile.rows, tile.columns, R, tile.warps) in seen[80]
    for kind, tile in tiles.EXPAND.items():
        R = tiles.EXPAND_RANKS[kind]
        assert ("_lora_expand_kernel", tile.rows, tile.columns, R, tile.warps) in seen[80]
    for capability, table in tiles.GEMM_EXPAND.items():
        for t in table:
            assert ("_lora_gemm_expand_kernel", t.rows, t.columns, t.depth, 32, t.warps) in seen[capability]
    for table in (tiles.GEMM_DX, tiles.GEMM_DX_GROUP):
        for capability, entries in table.items():
            for t in entries:
                assert ("_lora_gemm_dx_kernel", t.rows, t.depth, t.columns, 16, t.warps) in seen[capability]
    assert seen.keys() == tiles.GEMM_EXPAND.keys() == SHARED.keys()


@pytest.mark.parametrize("tf32", [False, True])
def test_fp32_enters_the_matrix_units_only_as_torch_allows(tf32):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        assert launch.input_precision(FP32) == ("tf32" if tf32 else "ieee")
        assert launch.uses_tensor_cores(FP32) is tf32
        assert launch.uses_tensor_cores(BF16)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("modules", [1, 3])
def test_a_new_rank_compiles_nothing_new(modules):
    """Ranks of one block width differ in no compiled-in value and no alignment, so pruning does not stop to compile."""

    def compiled_in(rank):
        return [launched.signature() for launched in layer_launches(Case(BF16, rank, modules=modules), 80)]

    assert compiled_in(1) == compiled_in(3) == compiled_in(5) == compiled_in(8) == compiled_in(16)


@pytest.mark.parametrize("gemm", ["fused", "torch"])
def test_a_rank_that_changes_in_a_group_compiles_nothing_new(gemm, monkeypatch):
    """The columns of S and dS then begin elsewhere, on another alignment."""
    monkeypatch.setenv("ADAPTLORA_GEMM", gemm)
    M, K, N = 64, 128, 192
    x, dy, W = (torch.zeros(shape, dtype=BF16) for shape in ((M, K), (M, N), (N, K)))

    def compiled_in(*ranks):
        As, Bs = [torch.zeros(r, K) for r in ranks], [torch.zeros(r + 1, N)[:-1].t() for r in ranks]
        options = ([None] * 3, [1.0] * 3, 0.1, 1 << 20, [torch.tensor(i) for i in range(3)])
        with recorded_launches() as launches:
            _, s = lora_group.lora_group(x, [W] * 3, [None] * 3, As, Bs, *options)
            need = (True, [True] * 3, [True] * 3, [False] * 3)
            lora_group.lora_group_backward([dy] * 3, x, [W] * 3, s, As, Bs, *options, *need)
        return {launched.signature() for launched in launches}

    assert compiled_in(8, 8, 8) == compiled_in(7, 8, 5) == compiled_in(2, 1, 3)


def test_importing_the_package_does_not_import_triton():
    check = "import sys, adaptlora, adaptlora.kernels, adaptlora.ops; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
