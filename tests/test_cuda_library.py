"""The CUDA library, built by hand for GPUs that are not there: its functions, its launches, its machine code."""

import ctypes

import pytest

pytest.importorskip("triton", reason="triton, whose wheel has cuobjdump, is not installed")

import cuda_targets
from triton_targets import SHARED

from adaptlora import doctor
from adaptlora.ops import _cuda_library

pytestmark = pytest.mark.skipif(cuda_targets.nvcc() is None, reason="no nvcc in CUDA_HOME or on the PATH")


@pytest.fixture(scope="module")
def library():
    return _cuda_library.load(str(cuda_targets.built()))


def test_functions_and_architectures(library):
    assert _cuda_library.architectures(library) == list(cuda_targets.CAPABILITIES)
    for name in _cuda_library.FUNCTIONS:
        assert ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    with pytest.raises(RuntimeError, match="jacobi_svd: the launch failed: out of memory"):
        _cuda_library.check(library, "jacobi_svd", 2)
    _cuda_library.check(library, "jacobi_svd", 0)


@pytest.mark.parametrize("capability", cuda_targets.CAPABILITIES)
@pytest.mark.parametrize(("kernel", "matrices", "element"), [("jacobi_svd", 2, 4), ("cholesky_inverse", 1, 8)])
def test_plans(library, kernel, matrices, element, capability):
    """Every size has a launch; matrices go to the workspace only where they no longer fit."""
    limit, last = SHARED[capability].program, matrices
    for size in range(1, 257):
        held, threads, shared = _cuda_library.plan(library, kernel, size, limit)
        work = size * element * (3 - matrices)
        assert shared == work + held * size**2 * element <= limit and threads % 32 == 0 and 32 <= threads <= 1024
        assert held == matrices or shared + size**2 * element > limit
        assert 0 <= held <= last
        last = held
    assert last == 0


@pytest.mark.parametrize("capability", cuda_targets.CAPABILITIES)
@pytest.mark.parametrize("kernel", cuda_targets.SIZES)
def test_kernels_do_not_spill(kernel, capability):
    for size in cuda_targets.SIZES[kernel]:
        found = cuda_targets.compiled(kernel, capability, size)
        assert not found.spills and found.occupancy >= 1 and found.shared <= SHARED[capability].program


def test_no_torch_header():
    text = "".join((cuda_targets.ROOT / file).read_text() for file in cuda_targets.SETUP["depends"]("*.cu", "*.cuh"))
    assert "#include <torch" not in text and "#include <ATen" not in text


def test_doctor(library, monkeypatch):
    monkeypatch.setattr(_cuda_library, "library", lambda: None)
    assert doctor._cuda_library_row() == ("adaptlora._cuda", "not built: torch factorizes on CUDA tensors", True)
    monkeypatch.setattr(_cuda_library, "library", lambda: library)
    assert "sm_80, sm_90" in doctor._cuda_library_row()[1]

    def broken():
        raise ImportError("adaptlora: the CUDA library does not load")

    monkeypatch.setattr(_cuda_library, "library", broken)
    assert doctor._cuda_library_row() == ("adaptlora._cuda", "adaptlora: the CUDA library does not load", False)
