"""NoRALinear against its serial form, and the composed factors that it keeps from call to call."""

import copy
import pickle

import pytest
import torch
from numerics import assert_all_accurate
from test_lora_linear import BF16, FP32, FP64, SCALING
from torch import nn
from torch.utils.checkpoint import checkpoint

from adaptlora.nn import LoraLinear, NoRALinear, Outer, composed, nora_serial_ref

K, N, R, R_OUT = 31, 23, 3, 7
SERIAL = ("y", "dx", "dA", "dB")


class Conv1D(nn.Module):  # as in transformers, known by its name
    def __init__(self):
        super().__init__()
        self.nf, self.weight, self.bias = N, nn.Parameter(torch.randn(K, N) / 5), nn.Parameter(torch.randn(N))

    def forward(self, x):
        return x @ self.weight + self.bias


def plain(dtype=FP64, kind="linear") -> nn.Module:
    base = Conv1D() if kind == "conv1d" else nn.Linear(K, N, bias=kind != "no bias")
    return base.to(dtype)


def oriented(base) -> torch.Tensor:
    """(N, K) weight of a base or of a layer."""
    return base.weight.t() if base.weight.shape == (K, N) else base.weight


def outer_of(base, r_out=R_OUT) -> Outer:
    U, S, Vh = torch.linalg.svd(oriented(base).detach().double(), full_matrices=False)
    return Outer(U[:, :r_out], S[:r_out], Vh[:r_out])


def nested(base=None, r=R, trained=False, **options) -> NoRALinear:
    base = plain() if base is None else base
    layer = NoRALinear(base, r, outer_of(base), scaling=SCALING, **options)
    if trained:
        for factor in layer.pair.parameters():
            nn.init.normal_(factor)
    return layer


def follow(layer, optimizer=None):
    """As an adapter does: the optimizer, which the layer holds weakly, is tracked, and its steps end what was composed."""
    optimizer = optimizer or torch.optim.SGD(layer.pair.parameters())
    layer.pair.track(optimizer)
    optimizer.register_step_post_hook(lambda *_: layer.forget_composed())
    return optimizer


def serial(layer, x, dtype=None):
    operands = (oriented(layer), layer.bias, layer.lora_A, layer.lora_B, layer.outer_A, layer.outer_B.t())
    if dtype is not None:
        operands = [t if t is None else t.to(dtype) for t in operands]
    return nora_serial_ref(x, *operands, layer.scaling)


def results(layer, function, x, dy) -> dict[str, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    y = function(x)
    return dict(zip(SERIAL, (y.detach(), *torch.autograd.grad(y, [x, *layer.pair.parameters()], dy)), strict=True))


def assert_close(found, expected) -> None:
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture
def count(monkeypatch):
    """How often factors were composed."""
    calls, compose = [], composed.compose
    monkeypatch.setattr(composed, "compose", lambda *args: calls.append(1) or compose(*args))
    return calls


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("r", [0, 1, R, R_OUT])
@pytest.mark.parametrize("tracked", [True, False])
def test_y_and_gradients_in_float64(kind, r, tracked):
    layer = nested(plain(kind=kind), r, trained=True)
    tracked = tracked and follow(layer)
    x, dy = torch.randn(2, 5, K, dtype=FP64), torch.randn(2, 5, N, dtype=FP64)
    expected = results(layer, lambda x: serial(layer, x), x, dy)
    for _ in range(2):
        assert_close(results(layer, layer, x, dy), expected)
    assert layer.lora_A.shape == (r, R_OUT) and layer.lora_B.shape == (R_OUT, r)
    A_eff, B_eff = layer.effective_factors()
    assert A_eff.is_contiguous() and B_eff.t().is_contiguous() and not A_eff.requires_grad


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_y_and_gradients(backend, dtype):
    layer = nested(plain(dtype), trained=True)
    assert {t.dtype for t in (layer.lora_A, layer.lora_B, layer.outer_A, layer.outer_B)} == {FP32}
    x, dy = torch.randn(37, K).to(dtype), torch.randn(37, N).to(dtype)
    exact = results(layer, lambda x: serial(layer, x, FP64), x.double(), dy.double())
    exact = {name: value.double() for name, value in exact.items()}
    assert_all_accurate(results(layer, layer, x, dy), exact, results(layer, lambda x: serial(layer, x), x, dy))


def test_autocast_changes_no_factor(backend, count):
    layer, x = nested(plain(FP32), trained=True), torch.randn(4, K)
    _tracked = follow(layer)
    with torch.autocast("cpu", BF16):
        y = layer(x)
        expected = torch.autograd.grad(y.sum(), layer.lora_A, retain_graph=True)
    assert y.dtype == BF16
    assert torch.equal(expected[0], torch.autograd.grad(y.sum(), layer.lora_A)[0])
    assert layer._composed._entry.factors[0].dtype == FP32
    layer(x)
    assert len(count) == 1


def writes_data(layer):
    class Writer(torch.optim.SGD):
        def step(self):
            for p in layer.pair.parameters():
                p.data.sub_(0.1 * p.grad)

    return Writer(layer.pair.parameters(), lr=0.1)


OPTIMIZERS = {
    "sgd": lambda layer: torch.optim.SGD(layer.pair.parameters(), lr=0.1),
    "adamw-fused": lambda layer: torch.optim.AdamW(layer.pair.parameters(), lr=0.01, fused=True),
    "through .data": writes_data,
}
RUNS = {
    "plain": lambda layer, x: layer(x),
    "reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=True),
    "not reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
    "used twice": lambda layer, x: layer(x) + layer(x.square()),
}


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_equals_the_serial_form(name, run, tracked, count):
    """Three steps of two micro-batches each."""
    layer = nested(trained=True)
    theirs = copy.deepcopy(layer)
    optimizers = [OPTIMIZERS[name](module) for module in (layer, theirs)]
    if tracked:
        follow(layer, optimizers[0])
    for step in range(3):
        for _ in range(2):
            x = torch.randn(5, K, dtype=FP64, requires_grad=True)
            ys = RUNS[run](layer, x), RUNS[run](lambda x: serial(theirs, x), x)
            assert_close({"y": ys[0]}, {"y": ys[1]})
            for y in ys:
                y.square().sum().backward()
        for factor in ("lora_A", "lora_B"):
            ours, exact = getattr(layer, factor).grad, getattr(theirs, factor).grad
            assert ours.stride() == getattr(layer, factor).stride()
            assert_close({factor: ours}, {factor: exact})
        if tracked:
            assert len(count) == step + 1, "once per step"
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_nobody_need_say_that_the_factors_changed(count):
    """On a CPU their values are compared: neither mode, nor gradients, nor a tracked optimizer decides what is kept."""
    layer, x = nested(trained=True), torch.randn(2, K, dtype=FP64)
    layer.eval()(x)
    layer.train()(x)
    with torch.no_grad():
        layer(x)
    assert len(count) == 1
    for made, write in enumerate(
        (
            lambda: layer.lora_A.data.mul_(2),
            lambda: layer.lora_B.data.numpy().__imul__(2),
            lambda: layer.lora_A.data.copy_(layer.lora_A.data / 2),
        ),
        start=2,
    ):
        write()
        torch.testing.assert_close(layer(x), serial(layer, x))
        layer.eval()(x)
        assert len(count) == made


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_untracked_optimizer_is_followed(fused, mode):
    layer, x = nested(plain().float(), trained=True), torch.randn(2, K)
    getattr(layer, mode)()
    optimizer = torch.optim.AdamW(layer.pair.parameters(), lr=0.1, fused=fused)
    losses = []
    for _ in range(3):
        loss = layer(x).square().sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(set(losses)) == 3


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "outer_A", "outer_B"])
@pytest.mark.parametrize(
    "write",
    [
        lambda layer, name: getattr(layer, name).detach().mul_(2),
        lambda layer, name: setattr(getattr(layer, name), "data", getattr(layer, name).data * 2),
        lambda layer, name: layer.load_state_dict(
            {k: v * 2 for k, v in layer.state_dict().items() if k.endswith(name)}, strict=False
        ),
        lambda layer, name: layer.load_state_dict(
            {k: v * 2 for k, v in layer.state_dict().items() if k.endswith(name)}, strict=False, assign=True
        ),
    ],
    ids=["in place", "data", "load", "load by assignment"],
)
def test_a_write_is_seen(name, write):
    layer, x = nested(trained=True).eval(), torch.randn(2, K, dtype=FP64)
    before = layer(x)
    for _ in range(2):  # the second may get the memory that the first gave back
        write(layer, name)
    torch.testing.assert_close(layer(x), serial(layer, x))
    assert not torch.allclose(layer(x), before)


def test_rank_changes_are_followed():
    layer, x = nested(trained=True).eval(), torch.randn(2, K, dtype=FP64)
    layer(x)
    for rank in (1, 0, R):
        layer.pair.plan(rank).commit()
        assert layer.rank == rank
        torch.testing.assert_close(layer(x), serial(layer, x))


def test_composed_without_gradients_serves_training(count):
    """inference_mode would make tensors that no graph may save."""
    layer, x = nested(trained=True), torch.randn(2, K, dtype=FP64)
    _tracked = follow(layer)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert len(count) == 1 and layer.lora_A.grad is not None


def test_a_layer_made_in_inference_mode():
    """Its tensors count no versions: nothing is kept."""
    with torch.inference_mode():
        layer, x = nested(trained=True).eval(), torch.randn(2, K, dtype=FP64)
        for _ in range(2):
            torch.testing.assert_close(layer(x), serial(layer, x))
            layer.lora_A.mul_(2)


def test_frozen_inner_factors():
    layer, x = nested(trained=True), torch.randn(2, K, dtype=FP64)
    layer.lora_A.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.lora_A.grad is None and layer.lora_B.grad is not None
    layer.lora_B.requires_grad_(False)
    assert not layer(x).requires_grad


def test_composed_factors_second_derivative():
    """Of the composition; the layer's own op refuses one."""
    layer = nested(trained=True)
    operands = layer._operands()

    def eff(lora_A, lora_B):
        return composed.ComposedFactors().get((lora_A, lora_B, *operands[2:]), lambda: None, keep=False)

    assert torch.autograd.gradcheck(eff, operands[:2])
    assert torch.autograd.gradgradcheck(eff, operands[:2])
    x = torch.randn(2, K, dtype=FP64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), layer.lora_A, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_copies_share_nothing_composed(clone):
    layer, x = nested(trained=True).eval(), torch.randn(2, K, dtype=FP64)
    layer.apply_residual()
    y = layer(x)
    copied = clone(layer)
    assert copied._composed._entry is None
    torch.testing.assert_close(copied(x), y)
    with torch.no_grad():
        copied.lora_A.zero_()
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(copied(x), copied.base_layer(x))
    copied.restore_base()
    assert torch.equal(copied.weight, layer._original[0]) and copied.weight is not layer._original[0]


def test_a_move_drops_what_was_composed():
    layer = nested(trained=True).eval()
    layer(torch.randn(2, K, dtype=FP64))
    layer.to(FP32)
    assert layer._composed._entry is None
    assert layer(torch.randn(2, K)).dtype == FP32


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile_in_one_graph(compiler, count):
    layer, x, dy = nested(plain(FP32), trained=True), torch.randn(4, 9, K), torch.randn(4, 9, N)
    _tracked = follow(layer)
    expected = results(layer, layer, x, dy)
    found = results(layer, torch.compile(layer, fullgraph=True, backend=compiler), x, dy)
    for name in SERIAL:
        torch.testing.assert_close(found[name], expected[name], msg=name)
    assert len(count) == 1


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_dropout_is_lora_linears(kind):
    layer = nested(plain(FP32, kind), trained=True, dropout_p=0.4)
    lora = LoraLinear(layer.base_layer, R, scaling=SCALING, dropout_p=0.4)
    with torch.no_grad():
        for factor, eff in zip((lora.lora_A, lora.lora_B), layer.effective_factors(), strict=True):
            factor.copy_(eff)
    x, ys = torch.randn(5, K), []
    for module in (layer, lora):
        torch.manual_seed(3)
        ys.append(module(x))
    assert torch.equal(*ys)
    assert not torch.allclose(ys[0], layer.eval()(x))
    assert all(map(torch.equal, lora.effective_factors(), (lora.lora_A, lora.lora_B)))
    torch.testing.assert_close(layer.merged_weight(), lora.merged_weight())
    merged = copy.deepcopy(layer.base_layer)
    merged.weight.data = layer.merged_weight()
    torch.testing.assert_close(merged(x), layer(x))


def leading(base, r=R) -> torch.Tensor:
    """The best approximation of rank r of the base's weight, (N, K) float64."""
    U, S, Vh = outer_of(base, r)
    return U @ torch.diag(S) @ Vh


def test_sigma_starts_at_the_leading_part_of_the_weight():
    base = plain()
    expected = SCALING * leading(base)
    state = torch.get_rng_state()
    layer = nested(base)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    A_eff, B_eff = layer.effective_factors()
    torch.testing.assert_close(SCALING * B_eff @ A_eff, expected)
    torch.testing.assert_close(layer.lora_B @ layer.lora_A, torch.diag(outer_of(base).S * (torch.arange(R_OUT) < R)))
    A_0, B_0 = layer.residual_factors()
    assert A_0.shape == (R, K) and B_0.shape == (N, R) and A_0.is_contiguous() and B_0.t().is_contiguous()
    torch.testing.assert_close(SCALING * B_0 @ A_0, expected)
    for factor in layer.pair.parameters():
        nn.init.normal_(factor)
    assert all(map(torch.equal, layer.residual_factors(), (A_0, B_0))), "whatever was trained since"


@pytest.mark.parametrize("inner_init", ["kaiming", "orthogonal"])
def test_inits_that_start_at_zero(inner_init):
    state = torch.get_rng_state()

    def made(seed):
        return nested(base, inner_init=inner_init, generator=torch.Generator().manual_seed(seed))

    torch.manual_seed(1)
    base, x = plain(), torch.randn(4, K, dtype=FP64)
    torch.set_rng_state(state)
    layer, again, other = made(1), made(1), made(2)
    assert torch.equal(torch.get_rng_state(), state), "drawn from the generator alone"
    assert torch.equal(layer.lora_A, again.lora_A) and not torch.equal(layer.lora_A, other.lora_A)
    assert not layer.lora_B.any()
    if inner_init == "orthogonal":
        torch.testing.assert_close(layer.lora_A @ layer.lora_A.t(), torch.eye(R, dtype=FP64))
    else:
        assert 0.5 * R_OUT**-0.5 < layer.lora_A.abs().max() <= R_OUT**-0.5
    held = base.weight
    layer.apply_residual()
    assert layer.residual_factors() is None and base.weight is held
    torch.testing.assert_close(layer(x), base(x))


U, S, Vh = torch.randn(N, R_OUT), torch.rand(R_OUT), torch.randn(R_OUT, K)
BAD_INPUT = [
    ({"base_layer": nn.ReLU()}, TypeError, "base_layer must be nn.Linear, Conv1D or a quantised linear .* got ReLU"),
    ({"outer": (U, S, Vh)}, TypeError, r"outer must be an Outer\(U, S, Vh\), got tuple"),
    ({"outer": Outer(U, S, None)}, TypeError, "outer.Vh must be a tensor, got NoneType"),
    ({"outer": Outer(U, S.int(), Vh)}, TypeError, "outer.S must be float32.* got torch.int32"),
    ({"outer": Outer(U, S[None], Vh)}, ValueError, r"outer.S must have 1 dimension\(s\), got shape \(1, 7\)"),
    ({"outer": Outer(U.t(), S, Vh)}, ValueError, r"outer.U must have shape \(N, r_out\)=\(23, 7\) .* got \(7, 23\)"),
    ({"outer": Outer(U, S, Vh[1:])}, ValueError, r"outer.Vh must have shape \(r_out, K\)=\(7, 31\) .* got \(6, 31\)"),
    ({"outer": Outer(U, S, Vh / 0)}, ValueError, "outer.Vh must be finite, got 217 NaN or infinite values"),
    ({"outer": Outer(U, S - 2, Vh)}, ValueError, "outer.S must be ≥ 0, got -"),
    ({"r": R_OUT + 1}, ValueError, r"r must be in \[0, r_out=7\], got 8"),
    ({"r": -1}, ValueError, r"r must be in \[0, r_out=7\], got -1"),
    ({"inner_init": "zero"}, ValueError, "inner_init must be one of sigma, kaiming, orthogonal, got 'zero'"),
    ({"scaling": float("nan")}, ValueError, "scaling must be a finite number, got nan"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
]


@pytest.mark.parametrize(("change", "exception", "message"), BAD_INPUT)
def test_bad_input(change, exception, message):
    arguments = {"base_layer": plain(FP32), "r": R, "outer": Outer(U, S, Vh)}
    NoRALinear(**arguments | {"base_layer": plain(FP32)})
    with pytest.raises(exception, match=f"^NoRALinear: {message}"):
        NoRALinear(**arguments | change)
    assert all(p.requires_grad for p in arguments["base_layer"].parameters()), "a refused base is as it was"
