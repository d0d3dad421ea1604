"""Every Triton kernel, as its launcher launches it, really compiled for sm_80 and sm_90: no GPU is needed for that."""

import importlib
import pkgutil
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
from triton.runtime.jit import JITFunction
from triton_targets import SHARED_LIMIT, compile_launch, recorded_launches

import adaptlora.kernels
from adaptlora.kernels import dropout, launch, lora_linear, rank_gather, rank_norms, rank_scale

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 leaves nothing to compile")

BF16, FP32 = torch.bfloat16, torch.float32
# name: (dtype of x, dtype of the factors, rank, dropout, TF32 allowed, whether the factors lie as PEFT's)
LORA_LINEAR = {
    "bf16-rank8": (BF16, BF16, 8, 0.1, False, False),
    "bf16-rank128": (BF16, BF16, 128, 0.1, False, False),
    "bf16-peft-fp32-rank33": (BF16, FP32, 33, 0.1, False, True),
    "fp32-rank32": (FP32, FP32, 32, 0.1, False, False),
    "tf32-rank32": (FP32, FP32, 32, 0.0, True, False),
}


@pytest.fixture(autouse=True)
def same_precision_afterwards():
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def allow_tf32(allowed: bool):
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"


def lora_linear_launches(dtype, factor_dtype, R, p, tf32, peft):
    allow_tf32(tf32)
    M, K, N = 256, 128, 192
    x, dy, weight = (torch.zeros(shape, dtype=dtype) for shape in ((M, K), (M, N), (N, K)))
    A = torch.zeros(R, K, dtype=factor_dtype)
    B = torch.zeros(N, R, dtype=factor_dtype) if peft else torch.zeros(R, N, dtype=factor_dtype).t()
    options = (torch.ones(R, dtype=factor_dtype), 2.0, p, 1 << 20, torch.tensor(1) if p else None)
    with recorded_launches() as launches:
        _, s = lora_linear.lora_linear(x, weight, None, A, B, *options)
        lora_linear.lora_linear_backward(dy, x, weight, s, A, B, *options, True, True, True, True)
    return launches


def other_launches():
    As, Bs = [torch.zeros(8, 128, dtype=BF16)], [torch.zeros(8, 192).t()]
    odd_As, odd_Bs = [torch.zeros(8, 13)], [torch.zeros(7, 8)]
    factors = torch.ones(8)
    with recorded_launches() as launches:
        dropout.dropout_keep(torch.tensor(1), 64, 64, 1 << 20)
        for pair in ((As, Bs), (odd_As, odd_Bs)):
            rank_norms.rank_norms(*pair)
            rank_scale.rank_scale(*pair, factors, factors)
            rank_scale.rank_scale_(*pair, factors, factors)
        rank_gather.rank_gather(As, torch.tensor([3, 1]), [2])
    return launches


def assert_sound(launched, capability, matrix: bool):
    compiled = compile_launch(launched, capability)
    what = f"{launched.name} on sm_{capability}"
    assert compiled.stack == 0, f"{what}: {compiled.stack} bytes of stack"
    assert compiled.count("LDL") == compiled.count("STL") == 0, f"{what}: registers spill"
    assert compiled.shared <= SHARED_LIMIT[capability], f"{what}: {compiled.shared} bytes of shared memory"
    if matrix:
        assert compiled.count("HMMA") + compiled.count("HGMMA") > 0, f"{what}: no matrix instructions"
    return compiled


@pytest.mark.parametrize("case", LORA_LINEAR)
@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_lora_linear_kernels(case, capability):
    launches = lora_linear_launches(*LORA_LINEAR[case])
    tensor_cores = launch.uses_tensor_cores(LORA_LINEAR[case][0])
    for launched in launches:
        has_products = launched.name != "_sum_partials_kernel"
        assert_sound(launched, capability, matrix=tensor_cores and has_products)


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_other_kernels(capability):
    for launched in other_launches():
        compiled = assert_sound(launched, capability, matrix=False)
        if launched.args.get("VECTOR") or launched.args.get("IN_VECTOR") or launched.name == "_rank_gather_kernel":
            assert re.search(r"\bLDG\.E\.128", compiled.sass), f"{launched.name}: no 16-byte reads"


def test_no_kernel_is_left_out():
    kernels = set()
    for info in pkgutil.iter_modules(adaptlora.kernels.__path__):
        if info.name == "interpreter":  # patches triton's interpreter, which is not in use here
            continue
        module = importlib.import_module(f"adaptlora.kernels.{info.name}")
        functions = {name for name, value in vars(module).items() if isinstance(value, JITFunction)}
        kernels |= {name for name in functions if name.endswith("_kernel")}
    compiled = {launched.name for case in LORA_LINEAR.values() for launched in lora_linear_launches(*case)}
    compiled |= {launched.name for launched in other_launches()}
    assert kernels == compiled


@pytest.mark.parametrize("tf32", [False, True])
def test_fp32_enters_the_matrix_units_only_as_torch_allows(tf32):
    allow_tf32(tf32)
    assert launch.input_precision(FP32) == ("tf32" if tf32 else "ieee")
    assert launch.uses_tensor_cores(FP32) is tf32
    assert launch.uses_tensor_cores(BF16)


def test_a_new_rank_compiles_nothing_new():
    """Ranks of one block width differ in no compiled-in value and no alignment, so pruning does not stop to compile."""

    def compiled_in(rank):
        launches = lora_linear_launches(BF16, BF16, rank, 0.1, False, False)
        return [(launched.name, launched.specialisation(), launched.options) for launched in launches]

    assert compiled_in(3) == compiled_in(5) == compiled_in(8) == compiled_in(16)


def test_importing_the_package_does_not_import_triton():
    check = "import sys, adaptlora, adaptlora.kernels, adaptlora.ops; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
