"""PiSSA and MiLoRA: factors that start from singular triplets of the weight, and what becomes of the base."""

import copy
import gc
import weakref

import pytest
import torch
from models import Net, batch, randomise, task_loss
from test_lora_linear import BF16, FP32, FP64
from test_nora_linear import Conv1D, K, N, oriented
from test_quantised_bases import bitsandbytes_int8, bitsandbytes_nf4, torchao_int8
from torch import nn

import adaptlora
from adaptlora.nn.residual import ResidualLinear

INITS = ("pissa", "milora")
TARGETS = ["first", "second"]
R, ALPHA = 4, 6.0


def config(init="pissa", kind=adaptlora.LoraConfig, **options):
    options = {"r": R, "lora_alpha": ALPHA, "target_modules": TARGETS} | options
    return kind(init_lora_weights=init, **options)


def normal(init="pissa", **options):
    return config(init, adaptlora.NormALConfig, t_p=1, t_c=2, target_r=2, **options)


def triplets_ref(weight, init, r=R):
    """Σ σ_i u_i v_iᵀ over the r leading or trailing triplets of W (N, K), in float64; and their σ."""
    U, S, Vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    part = slice(None, r) if init == "pissa" else slice(len(S) - r, None)
    return U[:, part] * S[part] @ Vh[part], S[part]


def train(adapter, steps=2, lr=1e-2, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(adapter.parameters(), lr=lr)
    adapter.track(optimizer)
    dtype = next(adapter.model.parameters()).dtype
    for i in range(steps):
        (task_loss(adapter.model, dtype=dtype, seed=i) + adapter.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
    return optimizer


def outputs(model):
    with torch.no_grad():
        return model(batch(dtype=next(model.parameters()).dtype)[0])


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_the_start_is_the_triplets_of_the_weight(init, kind):
    model = nn.Sequential((Conv1D() if kind is Conv1D else nn.Linear(K, N)).double())
    base, x = model[0], torch.randn(5, K, dtype=FP64)
    y, values, held = base(x), oriented(base).detach().clone(), base.weight
    expected, S = triplets_ref(values, init)
    adapter = adaptlora.attach(model, config(init, target_modules=["0"]))
    layer = model[0]
    assert layer.scaling == ALPHA / R
    torch.testing.assert_close(layer.scaling * layer.lora_B @ layer.lora_A, expected)
    for gram in (layer.lora_A @ layer.lora_A.t(), layer.lora_B.t() @ layer.lora_B):
        torch.testing.assert_close(gram, (S / layer.scaling).diag(), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(oriented(base), values - expected)
    torch.testing.assert_close(layer(x), y)
    assert layer.residual == (R, ALPHA / R) and adapter.summary()["residual_error"] == 0
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.pair.lora_A", "0.pair.lora_B"]
    assert adapter.detach()[0] is base and base.weight is held and torch.equal(oriented(base), values)


def test_equals_pefts_pissa():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    ours, theirs = Net(), Net()
    plain = outputs(ours)
    adapter = adaptlora.attach(ours, config(rank_pattern={"second": 2}))
    theirs = peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            r=R, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights="pissa", rank_pattern={"second": 2}
        ),
    )
    for name, layer in adapter.layers.items():
        other = theirs.base_model.model.get_submodule(name)
        torch.testing.assert_close(layer.base_layer.weight, other.base_layer.weight)
        torch.testing.assert_close(layer.scaling * layer.lora_B @ layer.lora_A, other.get_delta_weight("default"))
        torch.testing.assert_close(layer.lora_A.norm(dim=1), other.lora_A["default"].weight.norm(dim=1))
    torch.testing.assert_close(outputs(ours), outputs(theirs))
    torch.testing.assert_close(outputs(ours), plain)


def test_a_flat_spectrum_beyond_the_eigenproblem():
    """A random weight so much larger than the rank that iterations find the triplets."""
    model = nn.Sequential(nn.Linear(160, 120, dtype=FP64))
    values = model[0].weight.detach().clone()
    adaptlora.attach(model, config(r=8, target_modules=["0"]))
    delta = model[0].scaling * model[0].lora_B @ model[0].lora_A
    expected, _ = triplets_ref(values, "pissa", 8)
    assert (delta - expected).norm() <= 1e-4 * expected.norm()
    torch.testing.assert_close(model[0].base_layer.weight, values - delta, atol=1e-14, rtol=0)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16], ids=str)
def test_a_bases_rounding_is_reported(init, dtype):
    model, x = Net(dtype), batch(dtype=dtype)[0]
    weights = {name: model.get_submodule(name).weight.detach().double() for name in TARGETS}
    adapter = adaptlora.attach(model, config(init))
    unit, found = torch.finfo(dtype).eps / 2, []
    for name, layer in adapter.layers.items():
        assert layer.lora_A.dtype == FP32 and layer.weight.dtype == dtype
        exact = weights[name] - layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        assert ((layer.weight.double() - exact).abs() <= unit * exact.abs() + 1e-7).all()
        found.append(((layer.weight.double() - exact).norm() / weights[name].norm()).item())
    if dtype == FP32:
        assert adapter.summary()["residual_error"] == 0
    else:
        assert adapter.summary()["residual_error"] == pytest.approx(max(found), rel=1e-3)
    assert outputs(model).isfinite().all() and x.dtype == dtype


@pytest.mark.parametrize("quantise", [bitsandbytes_nf4, bitsandbytes_int8, torchao_int8], ids=lambda f: f.__name__)
def test_a_quantised_base_is_corrected_beside_it(quantise, tmp_path):
    base, weight = quantise(nn.Linear(128, 72))
    model, x = nn.Sequential(base), torch.randn(9, 128)
    y = model(x).detach().clone()
    adapter = adaptlora.attach(model, config(target_modules=["0"]))
    layer = model[0]
    expected, _ = triplets_ref(weight, "pissa")
    torch.testing.assert_close((layer.scaling * layer.lora_B @ layer.lora_A).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(x), y, atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        layer.lora_B.mul_(1.5)
    torch.testing.assert_close(model(x), y + x @ (0.5 * expected).float().t(), atol=1e-4, rtol=1e-4)
    model(x).square().sum().backward()
    assert layer.lora_A.grad.shape == (R, 128) and layer.lora_B.grad.norm() > 0
    after = model(x)
    adapter.save(tmp_path)
    assert adaptlora.io.read(tmp_path).factors["0"][0].shape == (2 * R, 128)
    assert adapter.detach()[0] is base
    torch.testing.assert_close(model(x), y, atol=0, rtol=0)
    adaptlora.load(model, tmp_path)
    torch.testing.assert_close(model(x), after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_a_clip_leaves_the_residual(init, rescale, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = Net(FP64)
    adapter = adaptlora.attach(model, normal(init, rescale=rescale))
    bases = {name: layer.weight for name, layer in adapter.layers.items()}
    taken = {
        name: layer.scaling * layer.residual_factors()[1] @ layer.residual_factors()[0]
        for name, layer in adapter.layers.items()
    }
    train(adapter)
    assert sum(adapter.ranks().values()) == 4 and max(adapter.ranks().values()) < R
    for name, layer in adapter.layers.items():
        assert layer.weight is bases[name] and layer.residual == (R, ALPHA / R)
        assert layer.scaling == (ALPHA / layer.rank if rescale else ALPHA / R)
        A_0, B_0 = layer.residual_factors()
        torch.testing.assert_close(layer.scaling * B_0 @ A_0, taken[name])
    expected = outputs(model)
    adapter.save(tmp_path)
    torch.testing.assert_close(outputs(peft.PeftModel.from_pretrained(Net(FP64), tmp_path)), expected)
    fresh = adaptlora.load(Net(FP64), tmp_path)
    assert fresh.ranks() == {name: rank + R for name, rank in adapter.ranks().items()}
    torch.testing.assert_close(outputs(fresh.model), expected)
    other = adaptlora.attach(Net(FP64), config(init))
    other.load(tmp_path)
    assert other.ranks() == adapter.ranks() and other.layers["first"].residual == (R, ALPHA / R)
    torch.testing.assert_close(outputs(other.model), expected)


def test_lalora_starts_at_rank_one_and_grows_without_a_jump():
    model = Net(FP64)
    before = outputs(model)
    adapter = adaptlora.attach(model, config(kind=adaptlora.LaLoRAConfig, group_by="module"))
    assert set(adapter.ranks().values()) == {1} and adapter.layers["first"].residual == (1, ALPHA / R)
    torch.testing.assert_close(outputs(model), before)
    torch.testing.assert_close(model.first.start_A, model.first.lora_A.detach())
    for layer in adapter.layers.values():
        layer.pair.grow(R)
    torch.testing.assert_close(outputs(model), before)
    assert "budget" in adapter.summary() and adapter.summary()["residual_error"] == 0


@pytest.mark.parametrize("keep", [True, False])
def test_merge_detach_and_both_ways_of_saving(keep, tmp_path):
    model, original = Net(FP64), Net(FP64)
    held = model.first.weight
    adapter = adaptlora.attach(model, config(keep_original=keep))
    train(adapter)
    expected = outputs(model)
    with torch.no_grad():
        delta = model.first.weight + model.first.scaling * model.first.lora_B @ model.first.lora_A
    torch.testing.assert_close(outputs(adapter.merge()), expected)
    torch.testing.assert_close(model.first.weight, delta)
    adapter.unmerge()
    assert torch.equal(outputs(model), expected)
    adapter.save(tmp_path / "folded")
    adapter.save(tmp_path / "left", fold_residual=False)
    torch.testing.assert_close(outputs(adaptlora.load(Net(FP64), tmp_path / "folded").model), expected)
    residual = Net(FP64)
    residual.load_state_dict(adapter.base_state_dict())
    again = adaptlora.load(residual, tmp_path / "left")
    assert again.ranks() == {"first": R, "second": R}
    torch.testing.assert_close(outputs(residual), expected)
    with pytest.raises(
        ValueError, match="^load: .*left: first must end in the 4 vectors that were taken out of its base"
    ):
        adapter.load(tmp_path / "left")
    assert torch.equal(outputs(model), expected)
    adapter.detach()
    assert (model.first.weight is held) is keep
    for name in TARGETS:
        weight, exact = model.get_submodule(name).weight, original.get_submodule(name).weight
        torch.testing.assert_close(weight, exact, rtol=0, atol=0 if keep else 1e-14)


def flipped(adapter):
    """Another library's signs: the same triplets, and the base as it comes out with them."""
    for layer in adapter.layers.values():
        layer._replace_taken([layer.start_A, layer.start_B], [-layer.start_A, -layer.start_B])
        layer.set_factors(-layer.lora_A, -layer.lora_B)
    return adapter


@pytest.mark.parametrize("other_signs", [False, True])
@pytest.mark.parametrize("make", [config, normal], ids=["lora", "normal"])
def test_a_run_resumes_exactly(make, other_signs, tmp_path):
    def run(start=None):
        adapter = adaptlora.attach(Net(), make())
        if start is not None and other_signs:
            flipped(adapter)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        if start is not None:
            adaptlora.load_checkpoint(start, adapter, optimizer)
            train(adapter, 3, optimizer=optimizer)
            return adapter
        train(adapter, 1, optimizer=optimizer)
        path = adaptlora.save_checkpoint(tmp_path, adapter, optimizer, step=1)
        train(adapter, 3, optimizer=optimizer)
        return adapter, path

    through, path = run()
    resumed = run(path)
    assert through.ranks() == resumed.ranks()
    for name, layer in through.layers.items():
        other = resumed.layers[name]
        assert torch.equal(layer.lora_A, other.lora_A) and torch.equal(layer.lora_B, other.lora_B)
        assert torch.equal(layer.start_A, other.start_A) and torch.equal(layer.weight, other.weight)
    assert torch.equal(resumed.detach().first.weight, Net().first.weight)


def test_states_of_modules_and_copies():
    model = Net()
    adapter = adaptlora.attach(model, config())
    train(adapter)
    copied, fresh = copy.deepcopy(model), adaptlora.attach(Net(), config("milora"))
    fresh.model.load_state_dict(model.state_dict())
    for other in (copied, fresh.model):
        assert torch.equal(outputs(other), outputs(model))
        other.first.restore_base()
        assert torch.equal(other.first.base_layer.weight, Net().first.weight)
        other.first.apply_residual()
        assert torch.equal(outputs(other), outputs(model))
    assert copied.first.start_A is not model.first.start_A


def test_a_tied_weight_stays_and_moves_are_followed():
    model = nn.ModuleDict({"embedding": nn.Embedding(N, K), "head": nn.Linear(K, N, bias=False)})
    tied = model["head"].weight = model["embedding"].weight
    values = tied.detach().clone()
    adapter = adaptlora.attach(model, config(target_modules=["head"]))
    assert model["embedding"].weight is tied and torch.equal(tied, values)
    model.to(FP64)
    assert model["head"].start_A.dtype == FP64
    adapter.detach()
    assert model["head"].weight is model["embedding"].weight and torch.equal(model["head"].weight, values.double())


def test_a_start_that_fails_changes_nothing(monkeypatch):
    model, put, calls = Net(), ResidualLinear._put_weight, []
    held = model.first.weight

    def failing(layer, parameter, **options):
        calls.append(layer)
        if len(calls) == 2:
            raise MemoryError
        put(layer, parameter, **options)

    monkeypatch.setattr(ResidualLinear, "_put_weight", failing)
    with pytest.raises(MemoryError):
        adaptlora.attach(model, config())
    assert len(calls) == 3 and type(model.first) is nn.Linear and model.first.weight is held
    assert held.requires_grad


@pytest.mark.parametrize("keep", [True, False])
def test_an_overflow_of_a_later_layer_changes_nothing(keep):
    """W − ΔW_0 of the second layer is beyond float16; the first layer's was in force by then."""
    torch.manual_seed(0)
    model = Net(torch.float16)
    with torch.no_grad():
        model.second.weight.copy_(65504 * torch.randn(model.second.weight.shape).sign())
    held = dict(model.named_parameters())
    values = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"W − ΔW_0 must be finite in torch\.float16"):
        adaptlora.attach(model, config(keep_original=keep))
    after = dict(model.named_parameters())
    assert after.keys() == held.keys() and all(after[name] is p and p.requires_grad for name, p in held.items())
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("keep", [True, False])
def test_originals_are_freed_when_all_layers_have_started(keep):
    model = Net()
    held = weakref.ref(model.first.weight)
    adapter = adaptlora.attach(model, config(keep_original=keep))
    gc.collect()
    assert (held() is not None) is keep
    assert adapter.layers["first"].base_layer.weight is not held()


def test_refusals(tmp_path):
    with pytest.raises(
        ValueError, match="^LoraConfig: init_lora_weights must be one of kaiming, pissa, milora, got \"?'?olora"
    ):
        config("olora")
    with pytest.raises(ValueError, match="^LoraConfig: keep_original must be True or False, got 1"):
        config(keep_original=1)
    with pytest.raises(
        ValueError, match='^AdaLoRAConfig: init_lora_weights must be "kaiming": AdaLoRA starts at E = 0'
    ):
        config(kind=adaptlora.AdaLoRAConfig, r=None, total_step=10)
    with pytest.raises(
        ValueError, match="^NoRAConfig: init_lora_weights must be \"kaiming\": .* inner_init, got 'pissa'"
    ):
        config(kind=adaptlora.NoRAConfig)
    model = Net()
    with pytest.raises(ValueError, match="'pissa': r of second must be at most the 11 triplets of its weight, got 12"):
        adaptlora.attach(model, config(r=12))
    model.again = model.first
    with pytest.raises(ValueError, match=r"'milora': a module whose weight .* one name, got first and \['again'\]"):
        adaptlora.attach(model, config("milora"))
    model = Net()
    with torch.no_grad():
        model.second.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"weights\[0\] must be finite"):
        adaptlora.attach(model, config())
    assert type(model.first) is nn.Linear


def test_refusals_of_other_starts():
    adapter, plain = adaptlora.attach(Net(), config()), adaptlora.attach(Net(), config("kaiming"))
    for target, source in ((adapter, plain), (plain, adapter)):
        before = outputs(target.model)
        with pytest.raises(ValueError, match="^load_state_dict: first: what was taken out of the base must be "):
            target.load_state_dict(source.state_dict())
        assert torch.equal(outputs(target.model), before)
    old = {key: value for key, value in plain.state_dict().items() if key != "starts"}
    plain.load_state_dict(old)
    with pytest.raises(ValueError, match="^shear: target must not have taken its start out of the base weights"):
        adaptlora.shear(adapter, adaptlora.SVDConfig(rank=2))
    randomise(adapter)
    layer = adapter.model.first
    layer.scaling = 0.0
    with pytest.raises(ValueError, match="^LoraLinear: scaling must not be 0 for scaling · B_0 A_0 to be ΔW_0, got 0"):
        layer.residual_factors()
