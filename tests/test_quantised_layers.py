"""Layers over real quantised linears, on the CPU: against float64 with the weight that `dequantised_weight` gives."""

import copy

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_all_accurate
from test_lora_linear import BF16, FP32, SCALING
from test_quantised_bases import K, M, N, R, bitsandbytes_int8, bitsandbytes_nf4, torchao_int4, torchao_int8
from torch import nn

import adaptlora
from adaptlora.nn import LoraGroup, LoraLinear, NoRALinear, Outer, dequantised_weight, is_linear, is_quantised
from adaptlora.ops._dropout import dropout_keep_ref

QUANTISERS = [bitsandbytes_nf4, bitsandbytes_int8, torchao_int8, torchao_int4]


@pytest.fixture(params=QUANTISERS, ids=lambda quantise: quantise.__name__)
def quantise(request):
    return request.param


def adapted(quantise, dtype=FP32, r=R, **options) -> LoraLinear:
    layer = LoraLinear(quantise(nn.Linear(K, N).to(dtype))[0], r, scaling=SCALING, **options)
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def eager(layer, x, *, double=False, p=0.0, seed=None):
    """The base and PEFT's adapter written out; `double`: with the dequantised weight, in float64 the exact result."""
    factors = layer.lora_A, layer.lora_B
    if double:
        factors = tuple(factor.double() for factor in factors)
        y = F.linear(x, dequantised_weight(layer.base_layer).double(), layer.bias.double())
    else:
        y = layer.base_layer(x)
    dropped = x.to(factors[0].dtype)
    if p:
        keep = dropout_keep_ref(torch.tensor(seed), x.shape[:-1].numel(), K, p).reshape(x.shape)
        dropped = torch.where(keep, dropped / (1 - p), 0)
    return (y + SCALING * (dropped @ factors[0].t() @ factors[1].t())).to(y.dtype)


def results(layer, function, x, dy) -> dict[str, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    y = function(x)
    wanted = {"dx": x, "dA": layer.lora_A, "dB": layer.lora_B}
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy), strict=True))}


def assert_right(layer, x, p=0.0) -> None:
    dy = torch.randn(*x.shape[:-1], N).to(x.dtype)
    seed = None
    if p:
        with torch.random.fork_rng():
            seed = torch.randint(2**63 - 1, ()).item()
    ours = results(layer, layer, x, dy)
    exact = results(layer, lambda x: eager(layer, x, double=True, p=p, seed=seed), x.double(), dy.double())
    # The factors are float32: so are their gradients.
    exact = {name: result.double() for name, result in exact.items()}
    assert_all_accurate(ours, exact, results(layer, lambda x: eager(layer, x, p=p, seed=seed), x, dy))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(M,), (3, 9), ()], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_y_and_gradients(backend, quantise, dtype, shape, p):
    assert_right(adapted(quantise, dtype, dropout_p=p), torch.randn(*shape, K).to(dtype), p)


@pytest.mark.parametrize(
    "quantise", [q for q in QUANTISERS if q is not bitsandbytes_int8], ids=lambda quantise: quantise.__name__
)
def test_no_tokens(backend, quantise):
    """bitsandbytes' int8 takes none itself."""
    assert_right(adapted(quantise), torch.randn(2, 0, K))


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_rank_changes(backend, quantise, rank):
    layer = adapted(quantise)
    assert_right(layer, torch.randn(4, 5, K))
    layer.pair.narrow(rank)
    assert_right(layer, torch.randn(4, 5, K))
    if rank == 0:
        x = torch.randn(M, K)
        assert torch.equal(layer(x), layer.base_layer(x))


def test_autocast(backend, quantise):
    """x is cast to what the base returns, as PEFT's result takes the dtype of the base's."""
    layer, x = adapted(quantise), torch.randn(2, 7, K).to(BF16)
    with torch.autocast("cpu", BF16):
        base, y = layer.base_layer(x), layer(x)
        theirs = base + SCALING * F.linear(F.linear(x, layer.lora_A), layer.lora_B)
    assert y.dtype == theirs.dtype == base.dtype
    torch.testing.assert_close(y, theirs, rtol=2**-6, atol=2**-6)


def test_compile(quantise):
    layer = adapted(quantise)
    x, dy = torch.randn(3, 9, K), torch.randn(3, 9, N)
    expected = results(layer, layer, x, dy)
    found = results(layer, torch.compile(layer, backend="aot_eager", fullgraph=True), x, dy)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_shapes_dtypes_and_the_frozen_base(quantise):
    layer = adapted(quantise, BF16)
    assert is_linear(layer.base_layer) and is_quantised(layer.base_layer)
    assert (layer.in_features, layer.out_features) == (K, N)
    assert layer.lora_A.dtype == layer.lora_B.dtype == FP32
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"pair.lora_A", "pair.lora_B"}
    weight = dequantised_weight(layer.base_layer)
    assert weight.shape == (N, K) and weight.dtype == FP32 and not weight.requires_grad


def test_dequantised_weight_approximates_what_was_quantised(quantise):
    linear = nn.Linear(K, N)
    weight = linear.weight.detach().clone()
    base, _ = quantise(linear)
    for _ in range(2):  # bitsandbytes' int8 keeps its scales elsewhere once it has run
        error = (dequantised_weight(base) - weight).norm() / weight.norm()
        assert 1e-4 < error < 0.15
        base(torch.randn(2, K))


@pytest.mark.parametrize("base", [nn.Linear(5, 3), nn.Linear(5, 3, dtype=torch.float64)], ids=str)
def test_a_plain_weight_is_itself(base):
    assert not is_quantised(base)
    assert dequantised_weight(base).data_ptr() == base.weight.data_ptr()
    assert dequantised_weight(base).dtype == base.weight.dtype


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_a_weight_not_yet_quantised_is_refused(kind):
    modules = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes is not installed")
    options = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
    with pytest.raises(ValueError, match="^dequantised_weight: module must be quantised, got a torch.float32 weight"):
        dequantised_weight(getattr(modules, kind)(K, N, **options))


def test_merging_is_refused(quantise):
    for layer in (adapted(quantise), nested(quantise)[0]):
        with pytest.raises(ValueError, match=r"^merge: base_layer must not be quantised, got .*: dequantise first$"):
            layer.merged_weight()


def test_a_group_is_refused(quantise):
    with pytest.raises(TypeError, match="^LoraGroup: layer 1 must have a plain base, got a quantised one"):
        LoraGroup([LoraLinear(nn.Linear(K, N), R), adapted(quantise)])


def test_attach_adapts_them(quantise):
    model = nn.Sequential(quantise(nn.Linear(K, N))[0], nn.Linear(N, 3))
    adapter = adaptlora.attach(model, adaptlora.LoraConfig(r=2, target_modules=["0"]))
    model(torch.randn(4, K)).sum().backward()
    assert adapter.layers["0"].lora_B.grad.abs().sum() > 0


@pytest.mark.parametrize("double", [False, True], ids=["", "double"])
def test_a_weight_that_was_packed_for_evaluation_goes_back(double):
    """What bitsandbytes does to a 4-bit base that is evaluated on a CPU with bfloat16 instructions, done by hand."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = bnb.nn.Linear4bit(64, 96, compute_dtype=FP32, quant_type="nf4", compress_statistics=double).to("cpu")
    weight = dequantised_weight(base)
    state = base.weight.quant_state
    base.weight.data, base.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(base.weight.data, state)
    # The scales are kept in bfloat16 when it packs; those that were quantised themselves are quantised anew.
    close = {"rtol": 2**-7, "atol": 2e-3 if double else 0}
    torch.testing.assert_close(dequantised_weight(base), weight, **close)
    assert base.weight.quant_state.packing_format_for_cpu, "reading changes nothing"
    layer = LoraLinear(base, R)
    assert not base.weight.quant_state.packing_format_for_cpu
    torch.testing.assert_close(dequantised_weight(base), weight, **close)
    with torch.no_grad():
        layer.eval()(torch.randn(3, 64))  # an evaluation before training
    x = torch.randn(3, 64, requires_grad=True)
    layer.train()(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1), rtol=2**-6, atol=5e-2)
    assert layer.lora_B.grad.norm() > 0


def nested(quantise, dtype=FP32, **options) -> tuple[NoRALinear, torch.Tensor]:
    """(NoRALinear over a quantised base, the weight that its outer factors are of)."""
    base, weight = quantise(nn.Linear(K, N).to(dtype))
    weight = weight.detach().float()
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return NoRALinear(base, R, Outer(U[:, :24], S[:24], Vh[:24]), scaling=SCALING, **options), weight


def test_nora_starts_as_its_base(backend, quantise):
    layer, weight = nested(quantise)
    layer.eval()  # what was composed before stays, if nothing drops it
    x = torch.randn(4, 6, K)
    y = layer.base_layer(x)
    assert (layer(x) - y).norm() > 0.1 * y.norm()
    held = layer.base_layer.weight
    layer.apply_residual()
    assert layer.base_layer.weight is held and layer.rounding_error == 0
    assert torch.equal(layer.base_layer(x), y)
    # The rank vectors cancel in pairs, to the rounding of one sum of 2 r terms.
    assert (layer(x) - y).norm() < 2**-21 * y.norm()
    A_0, B_0 = layer.residual_factors()
    U, S, Vh = torch.linalg.svd(weight.double())
    best = U[:, :R] @ torch.diag(S[:R]) @ Vh[:R]
    torch.testing.assert_close((B_0 @ A_0).double(), best, rtol=0, atol=1e-5)
    A_eff, _ = layer.effective_factors()
    assert A_eff.shape == (R, K), "without the correction"
    layer.restore_base()
    assert (layer(x) - y).norm() > 0.1 * y.norm()


def test_nora_y_and_gradients(backend, quantise):
    layer, _ = nested(quantise)
    layer.apply_residual()
    A_0, B_0 = (factor.double() for factor in layer.residual_factors())
    for factor in layer.pair.parameters():
        nn.init.normal_(factor, std=0.3)

    def serial(x, dtype, y):
        factors = [t.to(dtype) for t in (layer.outer_A, layer.lora_A, layer.lora_B.t(), layer.outer_B)]
        delta = x @ factors[0].t() @ factors[1].t() @ factors[2] @ factors[3]
        return y + SCALING * (delta - x @ A_0.to(dtype).t() @ B_0.to(dtype).t())

    def exact(x):
        return serial(x, torch.float64, F.linear(x, dequantised_weight(layer.base_layer).double(), layer.bias.double()))

    x, dy = torch.randn(3, 9, K), torch.randn(3, 9, N)
    expected = {name: t.double() for name, t in results(layer, exact, x.double(), dy.double()).items()}
    theirs = results(layer, lambda x: serial(x, FP32, layer.base_layer(x)), x, dy)
    assert_all_accurate(results(layer, layer, x, dy), expected, theirs)
    assert_all_accurate(results(copied := copy.deepcopy(layer), copied, x, dy), expected, theirs)
