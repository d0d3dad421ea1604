"""rank_gather: chosen rows of tensors of any dtype and layout, bit for bit, on every backend."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import laid_out

from adaptlora.ops import rank_gather, rank_gather_ref

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGERS = [torch.uint8, torch.int8, torch.int64]
LAYOUTS = ["contiguous", "transposed", "padded", "strided"]


def random_bits(R, L, dtype=torch.float32, layout="contiguous", device="cpu"):
    """Every bit pattern may occur, NaNs of any payload among them."""
    values = torch.randint(0, 256, (R * L * dtype.itemsize,), dtype=torch.uint8, device=device).view(dtype)
    return laid_out(values.view(R, L), layout)


def sample(device="cpu"):
    """(sources, rows): every dtype and layout, odd lengths, no rows, no columns, rows repeated, left out and of zeros."""
    kinds = [(dtype, layout) for dtype in FLOATS for layout in LAYOUTS]
    kinds += [(dtype, layout) for dtype in INTEGERS for layout in ("contiguous", "transposed")]
    sources = [random_bits(R, L, *kind, device) for kind in kinds for R, L in ((5, 33), (6, 64), (1, 1))]
    rows = [[4, -1, 0, 0], range(3, 6), [0]] * len(kinds)
    wide = random_bits(9, 2100, torch.bfloat16, device=device)
    # Rows that begin off 16, 8 and 4 bytes, one row for all, elements that coincide; then a row of many blocks.
    views = [wide[:, start:] for start in (1, 2, 4, 8)] + [wide[:1].expand(7, 2100), wide[:, :1].expand(9, 40)]
    edges = [wide[:0], wide[:, :0], random_bits(2, 20_001, torch.float32, device=device), wide]
    return [*sources, *views, *edges], [*rows, *([6, 2, -1] for _ in views), [-1], [8, -1], (1, 0), []]


def bits(tensor):
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def assert_gathered(outs, sources, rows) -> None:
    assert len(outs) == len(sources) == len(rows)
    for out, source, chosen in zip(outs, sources, rows, strict=True):
        assert out.dtype == source.dtype and out.device == source.device and out.is_contiguous()
        assert out.shape == (len(chosen), source.shape[1])
        for row, index in zip(out, chosen, strict=True):
            assert torch.equal(bits(row), bits(source[index] if index >= 0 else torch.zeros_like(row)))


@pytest.mark.usefixtures("poisoned")
def test_rows_bit_for_bit(backend):
    sources, rows = sample()
    before = [bits(source).clone() for source in sources]
    assert_gathered(rank_gather(sources, rows), sources, rows)
    assert all(torch.equal(bits(source), old) for source, old in zip(sources, before, strict=True))


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_every_dtype_alone(backend, dtype):
    source = random_bits(4, 13, dtype)
    assert_gathered(rank_gather([source], [[2, 0]]), [source], [[2, 0]])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_share_the_rows(threads):
    from adaptlora.ops import _backend

    if _backend.extension() is None:
        pytest.skip("the C++ extension adaptlora._C is not built")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    sources, order = [random_bits(64, 4096, layout=layout) for layout in LAYOUTS], torch.randperm(64)
    try:
        assert_gathered(rank_gather(sources, [order] * 4), sources, [order.tolist()] * 4)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 70), st.lists(st.integers(-1, 11), max_size=15)), max_size=6)
)
def test_any_shapes_and_rows(backend, shapes):
    sources = [random_bits(R, L) for R, L, _ in shapes]
    rows = [[index for index in chosen if index < R] for R, _, chosen in shapes]
    assert_gathered(rank_gather(sources, rows), sources, rows)


def test_each_output_owns_its_memory(backend):
    source = random_bits(6, 40)
    outs = rank_gather([source, source, source], [[0, 1, 2], range(6), [5]])
    assert [out.untyped_storage().nbytes() for out in outs] == [out.nbytes for out in outs]
    assert len({out.data_ptr() for out in [source, *outs]}) == 4


def test_rows_may_be_tensors_ranges_and_shared(backend):
    sources, shared = [random_bits(6, L) for L in (3, 64, 7)], [5, 0, 2]
    expected = rank_gather(sources, [list(shared) for _ in sources])
    for rows in ([shared] * 3, [torch.tensor(shared, dtype=torch.int32), torch.tensor(shared), tuple(shared)]):
        for out, right in zip(rank_gather(iter(sources), iter(rows)), expected, strict=True):
            assert torch.equal(bits(out), bits(right))


def test_nothing_to_gather(backend):
    assert rank_gather([], []) == rank_gather_ref([], []) == []
    (out,) = rank_gather([torch.ones(0, 4)], [[]])
    assert out.shape == (0, 4)


def test_worked_by_hand(backend):
    (out,) = rank_gather([torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])], [[2, -1, 0]])
    assert out.tolist() == [[5.0, 6.0], [0.0, 0.0], [1.0, 2.0]]


def test_reference():
    sources, rows = sample()
    assert_gathered(rank_gather_ref(sources, rows), sources, rows)


def test_a_wrong_row_is_noticed():
    sources, rows = sample()
    outs = rank_gather_ref(sources, rows)
    for out in outs[:48]:
        wrong = out.clone()
        wrong.view(-1).view(torch.uint8)[-1] ^= 1
        with pytest.raises(AssertionError):
            assert_gathered([wrong if o is out else o for o in outs], sources, rows)


def test_differentiating_is_an_error(backend):
    source = torch.ones(3, 4, requires_grad=True)
    (out,) = rank_gather([source], [[1]])
    with pytest.raises(RuntimeError, match="adaptlora::rank_gather: not differentiable"):
        out.sum().backward()
    with torch.no_grad():
        assert not rank_gather([source], [[1]])[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8], ids=str)
def test_opcheck(backend, dtype):
    sources = [random_bits(4, 5, dtype), random_bits(3, 2, dtype).t(), random_bits(1, 0, dtype)]
    arguments = sources, torch.tensor([3, -1, 0, 1]), [2, 2, 0]
    torch.library.opcheck(torch.ops.adaptlora.rank_gather.default, arguments)


ONE = torch.ones(3, 6)
BAD = [
    ([ONE], [], ValueError, "rows must be as long as sources, 1, got 0"),
    ([ONE, None], [[0], [0]], TypeError, r"sources\[1\] must be a tensor, got NoneType"),
    ([ONE.cfloat()], [[0]], TypeError, r"sources\[0\] must be real and strided, got torch.complex64"),
    ([ONE.to_sparse()], [[0]], TypeError, r"sources\[0\] must be real and strided, got torch.float32, torch.sparse_coo"),
    ([ONE[0]], [[0]], ValueError, r"sources\[0\] must have 2 dimensions, got shape \(6,\)"),
    ([ONE, ONE.to("meta")], [[0], [0]], ValueError, r"sources\[1\] must be on the device of sources\[0\], cpu, got meta"),
    ([ONE], [torch.zeros(1, 1, dtype=torch.int64)], TypeError, r"rows\[0\] must be a list.*got torch.int64 of shape \(1, 1\)"),
    ([ONE], [torch.zeros(1)], TypeError, r"rows\[0\] must be a list.*got torch.float32 of shape \(1,\)"),
    ([ONE], [[0.5]], TypeError, r"rows\[0\] must be a list, a range or .* of integers, got torch.float32 of shape"),
    ([ONE], [None], TypeError, r"rows\[0\] must be a list, a range or .* of integers, got None"),
    ([ONE], ["ab"], TypeError, r"rows\[0\] must be a list, a range or .* of integers, got 'ab'"),
    ([ONE, ONE], [[0, 1], [1, 3]], ValueError, r"rows\[1\] must hold indices from -1 to 2 \(sources\[1\].*\), got 3"),
    ([ONE], [[-2]], ValueError, r"rows\[0\] must hold indices from -1 to 2 .*, got -2"),
    ([ONE, ONE[:0]], [[], [0]], ValueError, r"rows\[1\] must hold indices from -1 to -1 .*, got 0"),
]  # fmt: skip


@pytest.mark.parametrize("function", [rank_gather, rank_gather_ref])
@pytest.mark.parametrize(("sources", "rows", "exception", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_input(backend, function, sources, rows, exception, message):
    with pytest.raises(exception, match=f"^rank_gather: {message}"):
        function(sources, rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([ONE], torch.tensor([3]), [1]), r"rows of sources\[0\] must be from -1 to 2, got 3"),
        (([ONE], torch.tensor([-2]), [1]), r"rows of sources\[0\] must be from -1 to 2, got -2"),
        (([ONE], torch.tensor([0]), []), "counts must be as long as sources, 1, got 0"),
        (([ONE], torch.tensor([0]), [2]), r"rows must have sum\(counts\) = 2 elements, got 1"),
        (([ONE], torch.tensor([0]), [-1]), r"counts\[0\] must be at least 0, got -1"),
        (([ONE], torch.tensor([0.0]), [1]), "rows must be 1-d int64 on the CPU, got Float"),
        (([ONE[0]], torch.tensor([0]), [1]), r"sources\[0\] must be a 2-d real strided CPU tensor"),
    ],
)
def test_the_extension_refuses(arguments, message):
    _C = pytest.importorskip("adaptlora._C", reason="the C++ extension adaptlora._C is not built")
    with pytest.raises(RuntimeError, match=f"rank_gather: {message}"):
        _C.rank_gather(*arguments)
