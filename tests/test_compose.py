"""
compose and its gradients against float64 on every backend; to the bit, on every way a call can take.

Other instruction sets: test_cpu_kernels.py.
"""

import contextlib
import itertools

import pytest
import torch
from cpu_reference import thread_count_restored  # noqa: F401
from numerics import assert_all_accurate, laid_out
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import adaptlora.ops.flops  # noqa: F401
from adaptlora.nn.composed import ComposedFactors
from adaptlora.ops import _backend, compose, compose_ref

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAMES = ("lora_A", "lora_B", "outer_A", "outer_B")
LAYOUTS = ("contiguous", "transposed", "padded", "strided")


def sample(r=13, r_out=70, K=383, N=200, dtype=FP32, layout="contiguous", positive=False):
    """A', B', outer_A, outer_B and the upstream gradients of A_eff and B_eff."""
    shapes = [(r, r_out), (r_out, r), (r_out, K), (r_out, N), (r, K), (N, r)]
    values = [torch.rand(shape) if positive else torch.randn(shape) for shape in shapes]
    # B' and the gradient of B_eff are rank-major where they come from.
    values[1], values[5] = (values[i].t().contiguous().t() if layout == "contiguous" else values[i] for i in (1, 5))
    return [t.to(dtype) if layout == "contiguous" else laid_out(t.to(dtype), layout) for t in values]


def definition(lora_A, lora_B, outer_A, outer_B):
    """In the accumulation dtype, as eager users would."""
    acc = FP64 if lora_A.dtype == FP64 else FP32
    A, B, oA, oB = (t.to(acc) for t in (lora_A, lora_B, outer_A, outer_B))
    return (A @ oA).to(lora_A.dtype), (oB.t() @ B).to(lora_A.dtype)


def results(function, operands, dtype=None, trained=(True, True)) -> dict[str, torch.Tensor]:
    """The products, and the gradients of what is trained."""
    *given, dA_eff, dB_eff = (t.detach().to(dtype or t.dtype) for t in operands)
    inner = [t.requires_grad_(wanted) for t, wanted in zip(given, trained, strict=False)]
    factors = function(*inner, *given[2:])
    found = {"A_eff": factors[0].detach(), "B_eff": factors[1].detach()}
    pairs = [
        (name, t, eff, d)
        for name, t, eff, d in zip(("dA", "dB"), inner, factors, (dA_eff, dB_eff), strict=True)
        if t.requires_grad
    ]
    if pairs:
        grads = torch.autograd.grad([p[2] for p in pairs], [p[1] for p in pairs], [p[3] for p in pairs])
        found |= {p[0]: grad for p, grad in zip(pairs, grads, strict=True)}
    return found


def assert_right(operands, trained=(True, True)) -> dict[str, torch.Tensor]:
    found = results(compose, operands, trained=trained)
    exact, eager = results(definition, operands, FP64, trained), results(definition, operands, None, trained)
    assert_all_accurate(found, exact, eager)
    for name, t in found.items():
        assert (t if name in ("A_eff", "dA") else t.t()).is_contiguous(), f"{name} must be rank-major"
    return found


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@contextlib.contextmanager
def dispatched():
    """Every call goes through the dispatcher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "direct", lambda tensor: None)
        yield


# Around whole vectors (4, 8, 16), register blocks (12, 24, 64), strips of threads (192) and of the backward's columns (384).
WIDTHS = [1, 5, 12, 15, 16, 23, 24, 25, 63, 64, 65, 191, 192, 193, 383, 384, 385, 1537]


@pytest.mark.parametrize("r_out", [1, 7, 256])
@pytest.mark.parametrize("r", [1, 3, 13, 33])
def test_sizes(backend, r, r_out):
    """Operands are positive, so that no sum cancels and a result of few numbers has a scale too."""
    for K, N in [(1, 5), (5, 1), (383, 1537), (1537, 383)]:
        assert_right(sample(r, r_out, K, N, positive=True))


@pytest.mark.parametrize("r", range(1, 10))
def test_ends_of_blocks(backend, r):
    """Rows of the outer factors around blocks of 4 and of 32, each width once for each number of them."""
    for (i, r_out), (j, K) in itertools.product(enumerate((3, 4, 5, 31, 32, 33, 64, 65)), enumerate(WIDTHS)):
        assert_right(sample(r, r_out, K, WIDTHS[(5 * j + i + r) % len(WIDTHS)], positive=True))


@pytest.mark.parametrize(
    "shape", [(16, 256, 384, 1536), (16, 256, 1536, 384), (256, 300, 90, 1000), (300, 310, 40, 50)]
)
def test_signed_values(backend, shape):
    assert_right(sample(*shape))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
def test_dtypes_and_strides(backend, dtype, layout):
    assert_right(sample(dtype=dtype, layout=layout))


@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_strides_change_no_bit(layout, which):
    operands = sample()
    moved = [laid_out(t, layout) if i == which else t for i, t in enumerate(operands)]
    assert_equal(results(compose, moved), results(compose, operands))


def test_broadcast_gradients(backend):
    operands = sample()
    operands[4], operands[5] = torch.ones(1, 1).expand(13, 383), torch.ones(1, 1).expand(200, 13)
    assert_right(operands)


@pytest.mark.parametrize("sizes", [(0, 7, 5, 3), (3, 0, 5, 4), (0, 0, 5, 4), (3, 7, 0, 0), (3, 7, 5, 0)], ids=str)
def test_nothing_to_compose(backend, sizes):
    operands = sample(*sizes)
    found, expected = (results(function, operands) for function in (compose, definition))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_worked_by_hand(backend):
    A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [-1.0]])
    A_eff, B_eff = compose(
        A, B, torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]]), torch.tensor([[4.0, 1.0], [2.0, 2.0]])
    )
    assert A_eff.tolist() == [[2.0, 2.0, 2.0]]
    assert B_eff.tolist() == [[10.0], [1.0]]


@pytest.mark.parametrize("shape", [(16, 256, 384, 1536), (3, 33, 1537, 5), (13, 70, 191, 577)], ids=str)
def test_bits_do_not_depend_on_threads(shape):
    operands, found = sample(*shape), []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        found.append(results(compose, operands))
    for other in found[1:]:
        assert_equal(other, found[0])


# ---- derivatives


@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)], ids=str)
def test_only_what_needs_a_gradient_gets_one(backend, trained):
    operands = sample()
    found, full = assert_right(operands, trained), results(compose, operands)
    assert_equal(found, {name: full[name] for name in found})
    assert ("dA" in found, "dB" in found) == trained


@pytest.mark.parametrize("function", [compose, compose_ref])
def test_gradcheck(function):
    A, B, *outer = sample(2, 3, 4, 5, dtype=FP64)[:4]
    inner = A.requires_grad_(), B.requires_grad_()
    assert torch.autograd.gradcheck(lambda A, B: function(A, B, *outer), inner)
    assert torch.autograd.gradgradcheck(lambda A, B: function(A, B, *outer), inner)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=str)
def test_second_derivatives(backend, used):
    """Of f(A_eff, B_eff) with f nonlinear: the gradient's gradient passes compose_backward, one side or both."""
    found = []
    for function, dtype in ((compose, FP32), (definition, FP64), (definition, FP32)):
        torch.manual_seed(0)
        A, B, *outer = (t.to(dtype) for t in sample(3, 7, 40, 50, positive=True)[:4])
        inner = A.requires_grad_(), B.requires_grad_()
        factors = function(*inner, *outer)
        loss = sum((factors[i] ** 3).sum() for i in used)
        first = torch.autograd.grad(loss, [inner[i] for i in used], create_graph=True)
        grads = torch.autograd.grad(sum((g**2).sum() for g in first), [inner[i] for i in used])
        found.append({str(i): g for i, g in zip(used, grads, strict=True)})
    assert_all_accurate(*found)


def test_a_changed_outer_factor_is_noticed(backend):
    A, B, outer_A, outer_B = sample()[:4]
    A_eff, _ = compose(A.requires_grad_(), B, outer_A, outer_B)
    outer_A.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        A_eff.sum().backward()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_autocast_changes_nothing(backend, dtype):
    operands = sample()
    expected = results(compose, operands)
    with torch.autocast("cpu", dtype):
        assert_equal(results(compose, operands), expected)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_opcheck(backend, layout):
    A, B, outer_A, outer_B, dA_eff, dB_eff = sample(3, 7, 5, 4, layout=layout)
    operands = A.requires_grad_(), B.requires_grad_(), outer_A, outer_B
    torch.library.opcheck(torch.ops.adaptlora.compose.default, operands)
    for need in ([True, True], [True, False], [False, True]):
        upstream = (
            d.detach().requires_grad_() if needed else None for d, needed in zip((dA_eff, dB_eff), need, strict=True)
        )
        torch.library.opcheck(torch.ops.adaptlora.compose_backward.default, (*upstream, outer_A, outer_B, need))


# ---- ways


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_the_direct_way_changes_no_bit(trained):
    operands = sample()
    found = results(compose, operands, trained=trained)
    with dispatched():
        assert_equal(found, results(compose, operands, trained=trained))


def from_cache(rest=None):
    """compose by way of products that were made before."""
    kept = ComposedFactors()

    def function(*operands):
        kept.get(operands, lambda: rest, keep=True)
        entry = kept._entry
        found = kept.get(operands, lambda: rest, keep=True)
        assert kept._entry is entry
        assert all(a.data_ptr() == b.data_ptr() for a, b in zip(found, entry.factors, strict=True)), "no copies"
        return found

    return function


RUNS = {
    "once": lambda layer, x: layer(x),
    "twice": lambda layer, x: layer(x) + layer(x.square()),
    "reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=True),
    "not reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
}


@pytest.mark.parametrize("with_rest", [False, True])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)], ids=str)
def test_kept_products(run, trained, with_rest):
    """A layer on kept products: its gradients are the definition's, and the same bits from the node in C++ and that in Python."""
    A, B, outer_A, outer_B, *_ = sample(3, 20, 31, 23)
    x = torch.randn(5, 31)
    rest = (torch.randn(2, 31), torch.randn(2, 23)) if with_rest else None

    def gradients(function, dtype=FP32):
        inner = [t.detach().to(dtype).requires_grad_(wanted) for t, wanted in zip((A, B), trained, strict=True)]

        def layer(x):
            A_eff, B_eff = function(*inner, outer_A.to(dtype), outer_B.to(dtype))
            return x @ A_eff.t() @ B_eff.t()

        y = RUNS[run](layer, x.to(dtype).requires_grad_())
        loss = y.square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        assert [t.grad is not None for t in inner] == list(trained)
        return {"y": y.detach()} | {
            name: t.grad for name, t in zip(("dA", "dB"), inner, strict=True) if t.grad is not None
        }

    def defined(*operands):
        A_eff, B_eff = definition(*operands)
        if rest is None:
            return A_eff, B_eff
        rows_A, rows_B = (t.to(A_eff.dtype) for t in rest)
        return torch.cat([A_eff, rows_A]), torch.cat([B_eff, rows_B.t()], dim=1)

    found = gradients(from_cache(rest))
    assert_all_accurate(found, gradients(defined, FP64), gradients(defined))
    with dispatched():
        assert_equal(gradients(from_cache(rest)), found)


def test_kept_products_have_a_node_in_cpp():
    pytest.importorskip("adaptlora._C", reason="the C++ extension is not built")
    A, B, *outer = sample()[:4]
    A_eff, _ = ComposedFactors().get((A.requires_grad_(), B, *outer), lambda: None, keep=False)
    assert "ComposedFunction" in A_eff.grad_fn.name()
    with FlopCounterMode(display=False):
        A_eff, _ = ComposedFactors().get((A, B, *outer), lambda: None, keep=False)
    assert "_Composed" in A_eff.grad_fn.name()


def test_a_graph_does_not_keep_the_kept_alive(backend):
    A, B, *outer = sample()[:4]
    kept = ComposedFactors()
    A_eff, _ = kept.get((A.requires_grad_(), B, *outer), lambda: None, keep=True)
    assert kept._entry.factors[0].grad_fn is None and A_eff is not kept._entry.factors[0]


def test_flops_are_counted(backend):
    operands = sample(3, 7, 5, 4)
    with FlopCounterMode(display=False) as counter:
        results(compose, operands)
    assert counter.get_total_flops() == 2 * 2 * 3 * 7 * (5 + 4)
    with FlopCounterMode(display=False) as counter:
        results(compose, operands, trained=(True, False))
    assert counter.get_total_flops() == 2 * 3 * 7 * (5 + 4 + 5)


GOOD = dict(zip(NAMES, sample(3, 7, 5, 4)[:4], strict=True))
BAD = [
    ({"lora_A": None}, TypeError, "lora_A must be a tensor, got NoneType"),
    ({"lora_A": GOOD["lora_A"][0]}, ValueError, r"lora_A must have 2 dimension\(s\), got shape \(7,\)"),
    ({"outer_A": GOOD["outer_A"].int()}, TypeError, "outer_A must be float32.* got torch.int32"),
    (
        {"lora_B": GOOD["lora_B"].t()},
        ValueError,
        r"lora_B must have shape \(r_out, r\) with .*=\(3, 7\) .* got \(3, 7\)",
    ),
    ({"outer_A": torch.ones(6, 5)}, ValueError, r"outer_A must have shape \(r_out, K\) with .* got \(6, 5\)"),
    ({"outer_B": torch.ones(4, 4)}, ValueError, r"outer_B must have shape \(r_out, N\) with .* got \(4, 4\)"),
    ({"outer_B": GOOD["outer_B"].to("meta")}, ValueError, "outer_B must be on the device of lora_A, cpu, got meta"),
    ({"lora_B": GOOD["lora_B"].double()}, TypeError, "lora_B must have the dtype of lora_A, .*32, got .*64"),
    (
        {"outer_A": torch.ones(7, 5, requires_grad=True)},
        ValueError,
        r"outer_A must be frozen \(no gradient .*, got req",
    ),
]


@pytest.mark.parametrize(("change", "exception", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_input(backend, change, exception, message):
    compose(**GOOD)
    with pytest.raises(exception, match=f"^compose: {message}"):
        compose(**GOOD | change)


def test_the_extension_refuses():
    extension = pytest.importorskip("adaptlora._C", reason="the C++ extension is not built")
    A, B, outer_A, outer_B = GOOD.values()
    for operands, message in (
        ((A.double(), B, outer_A, outer_B), r"compose: A must be a float32 CPU tensor .*\[3, 7\], got Double"),
        ((A, B.t(), outer_A, outer_B), r"compose: B must be .* rank vectors \[3, 7\], got Float \[7, 3\]"),
        ((A, B, outer_A[1:], outer_B), r"compose: outer_A must be .*\[7, 5\], got Float \[6, 5\]"),
        ((A, B, outer_A, outer_B[0]), r"compose: outer_B must have 2 dimensions, got \[4\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            extension.compose(*operands)
    with pytest.raises(RuntimeError, match=r"compose_backward: dB_eff must be .*\[3, 4\], got Float \[3, 5\]"):
        extension.compose_backward(None, torch.ones(5, 3), outer_A, outer_B)
    with pytest.raises(RuntimeError, match="compose_backward: dA_eff must have 2 dimensions, got"):
        extension.compose_backward(torch.ones(5), None, outer_A, outer_B)
