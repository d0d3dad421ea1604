"""The counts of traffic.py against counts made by hand, on kernels of a few lines."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl
from traffic import OTHER, counted
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

from adaptlora.kernels import lora_shrink
from adaptlora.ops import _backend

if not _backend.interpreting():
    pytest.skip("counts in triton's interpreter; test_triton_interpret.py runs these there", allow_module_level=True)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


@triton.jit
def _scale_kernel(x_ptr, scale_ptr, y_ptr, BLOCK: tl.constexpr):
    """Without masks; every program reads the one scale, and all of x twice."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs) + tl.load(x_ptr + offs)
    tl.store(y_ptr + tl.program_id(0) * BLOCK + offs, x * tl.load(scale_ptr))


@triton.jit
def _product_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    acc = tl.zeros((M, N), tl.float32)
    for _ in range(3):
        acc = tl.dot(tl.load(a_ptr + m[:, None] * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + n[None, :]), acc)
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc)


@triton.jit
def _histogram_kernel(x_ptr, bins_ptr, lock_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(bins_ptr + tl.load(x_ptr + offs, mask=offs < n), 1, mask=offs < n)
    tl.atomic_cas(lock_ptr, 0, 1)


@triton.jit
def _sum_kernel(xs_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(xs_ptr[0] + offs) + tl.load(xs_ptr[1][0] + offs, mask=offs < 3))


@triton.jit
def _table_kernel(table_ptr, y_ptr, BLOCK: tl.constexpr):
    pid, offs = tl.program_id(0), tl.arange(0, BLOCK)
    source = tl.load(table_ptr + pid).to(tl.pointer_type(tl.float16))
    tl.store(y_ptr + pid * BLOCK + offs, tl.load(source + offs))


@triton.jit
def _fill(ptr, offs):
    tl.store(ptr + offs, 0.0)


@triton.jit
def _nested_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    _fill(x_ptr, tl.arange(0, BLOCK))
    _fill(y_ptr, tl.arange(0, BLOCK))


@triton.jit
def _block_pointer_kernel(x_ptr, y_ptr, M, N, BLOCK: tl.constexpr):
    x = tl.make_block_ptr(x_ptr, (M, N), (N, 1), (tl.program_id(0) * BLOCK, 0), (BLOCK, BLOCK), (1, 0))
    y = tl.make_block_ptr(y_ptr, (M, N), (N, 1), (tl.program_id(0) * BLOCK, 0), (BLOCK, BLOCK), (1, 0))
    tl.store(y, tl.load(x, boundary_check=(0, 1)), boundary_check=(0, 1))


@triton.jit
def _descriptor_kernel(x, y_ptr, M, N, BLOCK: tl.constexpr):
    y = tl.make_tensor_descriptor(y_ptr, (M, N), (N, 1), (BLOCK, BLOCK))
    y.store([tl.program_id(0) * BLOCK, 0], x.load([tl.program_id(0) * BLOCK, 0]))


@triton.jit
def _word_kernel(x_ptr, y_ptr, offset, BLOCK: tl.constexpr):
    """Copies a tensor of bytes as 4-byte words."""
    x, y = (x_ptr + offset).to(tl.pointer_type(tl.int32)), y_ptr.to(tl.pointer_type(tl.int32))
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)))


@triton.jit
def _failing_kernel(x_ptr, BLOCK: tl.constexpr):
    """Fails after its first store where BLOCK is no power of two."""
    tl.store(x_ptr, 1.0)
    tl.store(x_ptr + tl.arange(0, BLOCK), 1.0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_a_masked_tail_is_not_counted(dtype):
    x = torch.arange(21).to(dtype)
    y = torch.empty_like(x)
    with counted() as counts:
        _copy_kernel[(3,)](x, y, 21, BLOCK=8)
    assert torch.equal(x, y)
    assert list(counts) == ["_copy_kernel"]
    copy = counts["_copy_kernel"]
    assert copy.loaded == copy.distinct_loaded == {"x_ptr": 21 * dtype.itemsize}
    assert copy.stored == copy.distinct_stored == {"y_ptr": 21 * dtype.itemsize}
    assert (copy.flops, copy.launches, copy.programs) == (0, 1, 3)


def test_what_is_read_again_is_requested_again_and_distinct_once():
    y = torch.empty(4, 8)
    with counted() as counts:
        _scale_kernel[(2, 2)](torch.ones(8, dtype=torch.bfloat16), torch.ones(1, dtype=torch.float64), y, BLOCK=8)
    scale = counts["_scale_kernel"]
    assert scale.loaded == {"x_ptr": 4 * 2 * 8 * 2, "scale_ptr": 4 * 8}
    assert scale.distinct_loaded == {"x_ptr": 8 * 2, "scale_ptr": 8}
    # Four programs, two rows: the programs of one program_id(0) write the same one.
    assert scale.stored == {"y_ptr": 4 * 8 * 4}
    assert scale.distinct_stored == {"y_ptr": 2 * 8 * 4}
    assert scale.programs == 4


@pytest.mark.parametrize("start", [0, 2])
def test_arguments_that_share_memory_stay_apart(start):
    memory = torch.arange(8.0)
    with counted() as counts:
        _copy_kernel[(1,)](memory, memory[start:], 6, BLOCK=8)
    assert counts["_copy_kernel"].loaded == {"x_ptr": 24}
    assert counts["_copy_kernel"].stored == {"y_ptr": 24}
    assert torch.equal(memory[start : start + 6], torch.arange(6.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dot_flops_are_those_of_the_tile(dtype):
    a, b, c = torch.randn(16, 32).to(dtype), torch.randn(32, 64).to(dtype), torch.empty(16, 64)
    with counted() as counts:
        _product_kernel[(1,)](a, b, c, M=16, K=32, N=64)
    torch.testing.assert_close(c, 3 * (a.float() @ b.float()))
    product = counts["_product_kernel"]
    assert product.flops == 3 * 2 * 16 * 32 * 64
    assert product.loaded == {"a_ptr": 3 * 16 * 32 * dtype.itemsize, "b_ptr": 3 * 32 * 64 * dtype.itemsize}
    assert product.distinct_loaded == {"a_ptr": 16 * 32 * dtype.itemsize, "b_ptr": 32 * 64 * dtype.itemsize}


def test_atomics_load_and_store():
    x, bins, lock = torch.tensor([1, 1, 0, 3, 1]), torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    with counted() as counts:
        _histogram_kernel[(2,)](x, bins, lock, 5, BLOCK=4)
    assert bins.tolist() == [1, 3, 0, 1]
    histogram = counts["_histogram_kernel"]
    assert histogram.loaded == {"x_ptr": 5 * 8, "bins_ptr": 5 * 4, "lock_ptr": 2 * 8}
    assert histogram.stored == {"bins_ptr": 5 * 4, "lock_ptr": 2 * 8}
    assert histogram.distinct_stored == {"bins_ptr": 3 * 4, "lock_ptr": 8}


def test_elements_of_a_tuple_have_their_index():
    with counted() as counts:
        _sum_kernel[(1,)]((torch.ones(4), (torch.ones(4, dtype=torch.float16),)), torch.empty(4), BLOCK=4)
    assert counts["_sum_kernel"].loaded == {"xs_ptr[0]": 16, "xs_ptr[1][0]": 6}
    assert counts["_sum_kernel"].stored == {"y_ptr": 16}


def test_addresses_from_a_table_are_nobodys():
    sources, y = [torch.full((4,), value, dtype=torch.float16) for value in (1.0, 2.0)], torch.empty(3, 4)
    table = torch.tensor([sources[index].data_ptr() for index in (0, 1, 0)])
    with counted() as counts:
        _table_kernel[(3,)](table, y, BLOCK=4)
    assert y[:, 0].tolist() == [1.0, 2.0, 1.0]
    gather = counts["_table_kernel"]
    assert gather.loaded == {"table_ptr": 3 * 8, OTHER: 3 * 4 * 2}
    assert gather.distinct_loaded == {"table_ptr": 3 * 8, OTHER: 2 * 4 * 2}


def test_device_functions_count_to_their_kernel():
    with counted() as counts:
        _nested_kernel[(1,)](torch.ones(8), torch.ones(8, dtype=torch.bfloat16), BLOCK=8)
    assert list(counts) == ["_nested_kernel"]
    assert counts["_nested_kernel"].stored == {"x_ptr": 32, "y_ptr": 16}


def test_launches_add_up():
    x, y = torch.ones(8), torch.empty(8)
    with counted() as counts:
        _copy_kernel[(1,)](x, y, 5, BLOCK=8)
        _copy_kernel[(2,)](x, y_ptr=y, n=8, BLOCK=4)
        _nested_kernel[(1,)](x, y, BLOCK=8)
    copy = counts["_copy_kernel"]
    assert (copy.launches, copy.programs) == (2, 3)
    # Nothing stays in a cache from one launch to the next.
    assert copy.loaded == copy.distinct_loaded == {"x_ptr": (5 + 8) * 4}
    assert counts["_nested_kernel"].launches == 1
    _copy_kernel[(1,)](x, y, 8, BLOCK=8)
    assert copy.launches == 2


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
def test_block_pointers_are_masked_by_their_bounds():
    x, y = torch.randn(5, 3), torch.zeros(5, 3)
    with counted() as counts:
        _block_pointer_kernel[(2,)](x, y, 5, 3, BLOCK=4)
    assert torch.equal(x, y)
    assert counts["_block_pointer_kernel"].loaded == counts["_block_pointer_kernel"].distinct_loaded == {"x_ptr": 60}
    assert counts["_block_pointer_kernel"].stored == {"y_ptr": 60}


def test_descriptors_from_the_host_and_in_the_kernel_are_masked_by_their_bounds():
    x, y = torch.randn(5, 4), torch.zeros(5, 4)
    with counted() as counts:
        _descriptor_kernel[(2,)](TensorDescriptor.from_tensor(x, [4, 4]), y, 5, 4, BLOCK=4)
    assert torch.equal(x, y)
    assert counts["_descriptor_kernel"].loaded == {"x": 5 * 4 * 4}
    assert counts["_descriptor_kernel"].stored == {"y_ptr": 5 * 4 * 4}


def test_a_tensor_larger_than_a_page_of_flags():
    n = 2**18 + 100
    x, y = torch.ones(n), torch.empty(n)
    with counted() as counts:
        _copy_kernel[(2,)](x, y, n, BLOCK=2**18)
        _scale_kernel[(1,)](x, x, y, BLOCK=2**18)
    assert counts["_copy_kernel"].distinct_loaded == {"x_ptr": 4 * n}
    assert counts["_scale_kernel"].loaded == {"x_ptr": 2 * 4 * 2**18, "scale_ptr": 4}
    assert counts["_scale_kernel"].distinct_loaded == {"x_ptr": 4 * 2**18, "scale_ptr": 4}


def test_words_wider_than_the_elements():
    x, y = torch.arange(20, dtype=torch.int8), torch.zeros(16, dtype=torch.int8)
    with counted() as counts:
        _word_kernel[(2,)](x, y, 4, BLOCK=4)
    assert torch.equal(y, x[4:])
    assert counts["_word_kernel"].loaded == {"x_ptr": 32}
    assert counts["_word_kernel"].distinct_loaded == {"x_ptr": 16}


def test_a_misaligned_address_raises():
    x = torch.zeros(20, dtype=torch.int8)
    with counted(), pytest.raises(InterpreterError, match="x_ptr: addresses must be multiples of 4 bytes, got 0x"):
        _word_kernel[(1,)](x, torch.zeros_like(x), 2, BLOCK=4)


def wrapped_attributes():
    return [*vars(InterpreterBuilder).items(), *vars(GridExecutor).items(), interpreter._implicit_cvt]


def test_a_failed_launch_is_left_out_and_everything_restored():
    before, x, y = wrapped_attributes(), torch.zeros(4), torch.empty(4)
    with pytest.raises(InterpreterError, match="power of 2"), counted() as counts:
        _copy_kernel[(1,)](x, y, 4, BLOCK=4)
        assert wrapped_attributes() != before
        _failing_kernel[(1,)](x, BLOCK=3)
    assert list(counts) == ["_copy_kernel"]
    assert wrapped_attributes() == before
    with counted() as counts:
        _failing_kernel[(1,)](x, BLOCK=4)
    assert counts["_failing_kernel"].stored == {"x_ptr": 4 + 16}


def test_a_caught_failure_does_not_stop_the_counting():
    x, y = torch.zeros(4), torch.empty(4)
    with counted() as counts:
        with pytest.raises(InterpreterError):
            _failing_kernel[(1,)](x, BLOCK=3)
        _copy_kernel[(1,)](x, y, 4, BLOCK=4)
    assert counts["_copy_kernel"].loaded == {"x_ptr": 16} and list(counts) == ["_copy_kernel"]


def test_counting_within_counting_raises():
    with counted(), pytest.raises(RuntimeError, match="counted: must not be entered twice"), counted():
        pass
    with counted():
        pass


def test_without_the_interpreter_nothing_could_be_counted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="counted: kernels must run in triton's interpreter"), counted():
        pass


def test_launchers_first_imported_while_counting_keep_their_repairs():
    code = """if True:
        from traffic import InterpreterBuilder, counted
        with counted():
            import adaptlora.kernels.launch
        print(InterpreterBuilder.create_dot.__module__, InterpreterBuilder.cast_impl.__module__)"""
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["adaptlora.kernels.interpreter"] * 2, done.stdout + done.stderr


def test_lora_shrink_reads_x_once():
    """Several row tiles and a masked K: x once, A once a row tile, and the same bits as uncounted."""
    M, K, R = 130, 70, 13
    x, A = torch.randn(M, K, dtype=torch.bfloat16), torch.randn(R, K)
    plain = lora_shrink.lora_shrink(x, [A])
    with counted() as counts:
        s = lora_shrink.lora_shrink(x, [A])
    assert torch.equal(s, plain)
    assert torch.equal(lora_shrink.lora_shrink(x, [A]), plain)
    shrink = counts["_lora_shrink_kernel"]
    assert shrink.loaded == {"x_ptr": 2 * M * K, "a_ptrs[0]": shrink.programs * 4 * R * K}
    assert shrink.distinct_loaded == {"x_ptr": 2 * M * K, "a_ptrs[0]": 4 * R * K}
    assert shrink.stored == shrink.distinct_stored == {"s_ptr": 4 * M * R}
    assert shrink.flops >= 2 * M * K * R
