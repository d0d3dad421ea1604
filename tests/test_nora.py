"""NoRA as a method: outer factors, residuals, training, files, merging; on models and in numbers of the paper."""

import copy

import pytest
import torch
from models import Net, bert_batch, randomise, task_loss, tiny_bert
from test_quantised_bases import bitsandbytes_nf4, torchao_int8

import adaptlora
from adaptlora.methods.nora import mean_activations, outer_factors
from adaptlora.nn import NoRALinear, nora_serial_ref

R, R_OUT = 3, 9


def config(**fields):
    base = {"r": R, "r_out": R_OUT, "lora_alpha": 2 * R, "target_modules": ["first", "second"]}
    return adaptlora.NoRAConfig(**base | fields)


def attach(dtype=torch.float64, **fields):
    return adaptlora.attach(Net(dtype), config(**fields))


def train(adapter, steps, start=0):
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    adapter.track(optimizer)
    dtype = next(adapter.model.parameters()).dtype
    for t in range(start, start + steps):
        (task_loss(adapter.model, dtype=dtype, seed=t) + adapter.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert adapter.step() is None
    return optimizer


def inputs(dtype=torch.float64):
    return torch.randn(7, 13, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


# Outer factors


def test_outer_factors_are_the_leading_triplets():
    weight = torch.randn(30, 20, dtype=torch.float64)
    outer = outer_factors(weight, 6, None, seed=0)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(outer.S, S[:6], rtol=1e-6, atol=0)
    best = U[:, :6] * S[:6] @ Vh[:6]
    torch.testing.assert_close(outer.U * outer.S @ outer.Vh, best, rtol=0, atol=1e-4 * S[0].item())
    largest = outer.U.gather(0, outer.U.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_signs_do_not_depend_on_the_library(monkeypatch):
    weight = torch.randn(12, 10, dtype=torch.float64)
    expected = outer_factors(weight, 10, None, seed=0)
    real = torch.linalg.svd
    monkeypatch.setattr(
        "adaptlora.methods.spectral.randomized_svd",
        lambda weights, rank, seed: [(-(f := real(weights[0], full_matrices=False))[0], f[1], -f[2], 0.0)],
    )
    found = outer_factors(weight, 10, None, seed=0)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_activation_weighting_is_undone():
    """W diag(d) = U S V'ᵀ, so U S (V'ᵀ diag(1/d)) is W itself at full rank, and the best of rank r in the weighted norm below it."""
    weight, d = torch.randn(11, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64) + 0.1
    full = outer_factors(weight, 8, d, seed=0)
    torch.testing.assert_close(full.U * full.S @ full.Vh, weight)
    cut = outer_factors(weight, 3, d, seed=0)
    missed = ((cut.U * cut.S @ cut.Vh - weight) * d).norm()
    torch.testing.assert_close(missed, torch.linalg.svdvals(weight * d)[3:].norm())


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_mean_activations_by_hand(power):
    model = Net(torch.float64)
    targets = {"first": model.first, "second": model.second}
    x = inputs()
    model.train()
    found = mean_activations(model, targets, x, power)
    assert model.training and not model.first._forward_pre_hooks
    hidden = torch.relu(model.first(x))
    for name, seen in (("first", x), ("second", hidden)):
        d = seen.abs().pow(power).mean(0)
        expected = (d / d.mean()).clamp(min=1e-3).float()
        torch.testing.assert_close(found[name], expected)


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_calibration_takes_what_the_model_takes(form):
    x = inputs()
    batch = {"tensor": x, "tuple": (x,), "dict": {"x": x}}[form]
    adapter = adaptlora.attach(Net(torch.float64), config(outer="activation"), calibration=batch)
    weighting = adapter.layers["first"].weighting
    assert weighting.shape == (13,) and weighting.std() > 0
    torch.testing.assert_close(adapter.model(x), Net(torch.float64)(x))


def test_every_module_has_its_own_ranks_and_progress_is_told():
    told = []
    adapter = adaptlora.attach(
        Net(), config(r_out=12, rank_pattern={"second": 2}), progress=lambda *counts: told.append(counts)
    )
    assert adapter.ranks() == {"first": 3, "second": 2} and sorted(told) == [(1, 2), (2, 2)]
    assert adapter.layers["first"].outer.U.shape == (17, 12) and adapter.layers["second"].outer.U.shape == (11, 11)
    assert adapter.layers["first"].scaling == 2.0 and adapter.layers["second"].scaling == 3.0


def test_the_start_depends_on_the_seed_alone():
    fields = {"inner_init": "orthogonal"}
    first, second, other = attach(**fields, seed=1), attach(**fields, seed=1), attach(**fields, seed=2)
    for mine, theirs, different in zip(*(a.layers.values() for a in (first, second, other)), strict=True):
        assert torch.equal(mine.lora_A, theirs.lora_A) and not torch.equal(mine.lora_A, different.lora_A)
        assert all(map(torch.equal, mine.outer, theirs.outer))


# The start


@pytest.mark.parametrize("inner_init", ["sigma", "kaiming", "orthogonal"])
def test_the_output_is_unchanged_at_step_0(inner_init):
    x, model = inputs(), Net(torch.float64)
    expected = model(x)
    adaptlora.attach(model, config(inner_init=inner_init))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_sigma_without_a_residual_adds_the_best_approximation():
    adapter = attach(residual=False, target_modules=["second"])
    layer = adapter.layers["second"]
    U, S, Vh = torch.linalg.svd(layer.weight)
    best = U[:, :R] * S[:R] @ Vh[:R]
    torch.testing.assert_close(layer.merged_weight(), layer.weight + 2.0 * best, rtol=0, atol=1e-5)
    assert torch.equal(layer.weight, Net(torch.float64).second.weight)


def test_the_residual_is_taken_out_of_the_weight():
    adapter = attach(target_modules=["second"])
    layer, original = adapter.layers["second"], Net(torch.float64).second.weight
    U, S, Vh = torch.linalg.svd(original)
    torch.testing.assert_close(layer.weight, original - 2.0 * (U[:, :R] * S[:R] @ Vh[:R]), rtol=0, atol=1e-5)
    A_0, B_0 = layer.residual_factors()
    torch.testing.assert_close(layer.weight, original - 2.0 * B_0 @ A_0)


def test_a_bfloat16_base_reports_what_rounding_the_residual_costs():
    model = Net(torch.bfloat16)
    x = inputs(torch.bfloat16)
    expected = model(x).double()
    adapter = adaptlora.attach(model, config())
    error = adapter.summary()["residual_error"]
    assert 1e-4 < error < 2**-8
    moved = (model(x).double() - expected).norm() / expected.norm()
    assert moved < 4 * 2**-8
    assert attach().summary()["residual_error"] < 1e-16


@pytest.mark.parametrize("quantise", [bitsandbytes_nf4, torchao_int8])
def test_a_quantised_base_is_not_written_to(quantise, tmp_path):
    linear = torch.nn.Linear(128, 72)
    base, weight = quantise(linear)
    model = torch.nn.Sequential(base)
    x = torch.randn(5, 128)
    expected = model(x)
    stored = base.weight.data
    adapter = adaptlora.attach(model, adaptlora.NoRAConfig(r=4, r_out=16, lora_alpha=4, target_modules=["0"]))
    assert base.weight.data is stored or torch.equal(base.weight.data.dequantize(), stored.dequantize())
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    outer = adapter.layers["0"].outer
    torch.testing.assert_close(outer.S, torch.linalg.svdvals(weight.float())[:16], rtol=1e-3, atol=0)
    randomise(adapter)
    trained = model(x)
    adapter.save(tmp_path, format="nora")
    again = adaptlora.load(torch.nn.Sequential(copy.deepcopy(base)), tmp_path)
    assert torch.equal(again.model(x), trained)
    with pytest.raises(ValueError, match="merge: base_layer must not be quantised"):
        adapter.merge()
    assert torch.equal(adapter.detach()(x), expected)


def test_a_failure_half_way_leaves_the_model(monkeypatch):
    model = Net(torch.float64)
    before = {name: p for name, p in model.named_parameters()}
    values = copy.deepcopy(model.state_dict())
    real, calls = NoRALinear.apply_residual, []

    def fail(layer, **options):
        calls.append(layer)
        if len(calls) == 2:
            raise MemoryError("out of memory")
        real(layer, **options)

    monkeypatch.setattr(NoRALinear, "apply_residual", fail)
    with pytest.raises(MemoryError):
        adaptlora.attach(model, config())
    after = dict(model.named_parameters())
    assert all(after[name] is p and p.requires_grad for name, p in before.items())
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


# Training


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_is_that_of_the_serial_form(accumulation):
    """Losses and inner factors over steps of AdamW, against factors applied one after the other, in float64."""
    adapter = attach(target_modules=["first"])
    layer = adapter.layers["first"]
    plain = Net(torch.float64).requires_grad_(False)
    A, B = (factor.detach().clone().requires_grad_() for factor in (layer.lora_A, layer.lora_B))
    mine = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    adapter.track(mine)
    theirs = torch.optim.AdamW([A, B], lr=0.02)
    for _ in range(5):
        for _ in range(accumulation):
            x = torch.randn(9, 13, dtype=torch.float64)
            loss = adapter.model(x).square().mean()
            hidden = nora_serial_ref(x, layer.weight, layer.bias, A, B, layer.outer.Vh, layer.outer.U, layer.scaling)
            expected = plain.classifier(torch.relu(plain.second(torch.relu(hidden)))).square().mean()
            torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
            loss.backward()
            expected.backward()
        torch.testing.assert_close(layer.lora_A.grad, A.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.lora_B.grad, B.grad, rtol=1e-10, atol=1e-12)
        for optimizer in (mine, theirs):
            optimizer.step()
            optimizer.zero_grad()
        adapter.step()
    torch.testing.assert_close(layer.lora_A, A, rtol=1e-8, atol=1e-10)


def test_factors_are_composed_once_a_step_by_the_tracked_optimizer(monkeypatch):
    from adaptlora.nn import composed

    made, real = [], composed.compose
    monkeypatch.setattr(composed, "compose", lambda *a: made.append(1) or real(*a))
    adapter = attach()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    adapter.track(optimizer)
    for t in range(3):
        made.clear()
        for micro in range(4):
            task_loss(adapter.model, dtype=torch.float64, seed=4 * t + micro).backward()
        assert len(made) == len(adapter.layers)
        optimizer.step()
        optimizer.zero_grad()


def test_an_optimizer_that_writes_past_torchs_counters_is_followed():
    class Raw(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.detach().numpy()[...] -= p.grad.numpy()

    adapter = attach()
    optimizer = Raw(adapter.parameters())
    adapter.track(optimizer)
    x = inputs()
    before = adapter.model(x).detach()
    adapter.model(x).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(adapter.model(x), before)


def test_parameter_counts_are_the_papers():
    adapter = attach()
    assert adapter.summary()["adapter_parameters"] == 2 * (2 * R_OUT * R)


# The model around it


@pytest.mark.parametrize("keep_original", [True, False])
def test_detach_gives_the_model_back(keep_original):
    model = Net()
    original, second = model.first.weight, model.second.weight.detach().clone()
    adapter = adaptlora.attach(model, config(keep_original=keep_original))
    train(adapter, 2)
    adapter.detach()
    assert model.first.weight.requires_grad
    if keep_original:
        assert model.first.weight is original and torch.equal(model.second.weight, second)
    else:
        torch.testing.assert_close(model.second.weight, second, rtol=1e-5, atol=1e-6)


def test_merge_and_unmerge():
    adapter = attach()
    train(adapter, 3)
    x = inputs()
    trained = adapter.model(x)
    adapter.merge()
    torch.testing.assert_close(adapter.model(x), trained)
    adapter.unmerge()
    assert torch.equal(adapter.model(x), trained)
    adapter.merge()
    adapter.detach()
    assert torch.equal(adapter.model.first.weight, Net(torch.float64).first.weight)


# Bad input


@pytest.mark.parametrize(
    ("fields", "calibration", "text"),
    [
        ({"r": 12, "r_out": 12}, None, "r of second must be at most its outer rank 11, got 12"),
        ({"outer": "activation"}, None, 'calibration must be a batch with outer="activation", got None'),
        ({}, torch.zeros(1, 13), 'calibration must be None with outer="weight", got a batch'),
        ({"outer": "activation"}, torch.zeros(1, 13), "activations of first must be finite and not all zero"),
        ({"outer": "activation"}, torch.full((1, 13), float("nan")), "activations of first must be finite"),
    ],
)
def test_attach_refuses_and_changes_nothing(fields, calibration, text):
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=text):
        adaptlora.attach(model, config(**fields), calibration=calibration)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and type(model.first) is torch.nn.Linear


def test_a_module_that_the_calibration_misses_is_named():
    model = tiny_bert()
    model.extra = torch.nn.Linear(4, 4)
    settings = adaptlora.NoRAConfig(r=2, r_out=4, target_modules=["query", "extra"], outer="activation")
    with pytest.raises(ValueError, match="calibration must reach every adapted module, got no activations of extra"):
        adaptlora.attach(model, settings, calibration=bert_batch())


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"r_out": 2, "r": 3}, "r_out must be an integer ≥ r=3, got 2"),
        ({"inner_init": "zeros"}, "inner_init must be one of sigma, kaiming, orthogonal, got 'zeros'"),
        ({"outer": "x"}, 'outer must be "weight" or "activation", got .x.'),
        ({"activation_power": 0}, "activation_power must be a number > 0, got 0"),
        ({"residual": 1}, "residual must be True or False, got 1"),
    ],
)
def test_configuration_errors(fields, text):
    with pytest.raises(ValueError, match=f"NoRAConfig: {text}"):
        config(**fields)


# Resuming


@pytest.mark.parametrize("other_outer", [False, True])
def test_resuming_is_exact(other_outer, monkeypatch):
    """Also where the outer factors of a new process come out otherwise: the state holds them."""
    adapter = attach()
    optimizer = train(adapter, 3)
    state, saved = copy.deepcopy(adapter.state_dict()), copy.deepcopy(optimizer.state_dict())
    if other_outer:
        real = outer_factors
        monkeypatch.setattr(
            "adaptlora.methods.nora.outer_factors",
            lambda *a: (o := real(*a))._replace(U=o.U.roll(1, 1), Vh=o.Vh.roll(1, 0)),
        )
    resumed = attach()
    other = torch.optim.AdamW(resumed.parameters(), lr=0.01)
    resumed.track(other)
    resumed.load_state_dict(state)
    other.load_state_dict(saved)
    for each, steps in ((adapter, optimizer), (resumed, other)):
        for t in range(3, 6):
            task_loss(each.model, dtype=torch.float64, seed=t).backward()
            steps.step()
            steps.zero_grad()
            each.step()
    x = inputs()
    assert torch.equal(adapter.model(x), resumed.model(x))
    assert all(map(torch.equal, adapter.factors(), resumed.factors()))


@pytest.mark.parametrize(
    "fields",
    [{"lora_alpha": 5}, {"residual": False}, {"r": 2, "lora_alpha": 4}, {"inner_init": "kaiming"}],
    ids=str,
)
def test_a_state_of_another_start_is_refused(fields):
    """What was taken out of the base decides what the trained factors mean."""
    source, target = attach(), attach(**fields)
    train(source, 2)
    before = [factor.clone() for factor in target.factors()]
    with pytest.raises(ValueError, match="load_state_dict: first: what was taken out of the base must be of"):
        target.load_state_dict(source.state_dict())
    assert all(map(torch.equal, target.factors(), before))


def test_a_state_that_is_damaged_changes_nothing():
    source, target = attach(), attach()
    train(source, 2)
    state = copy.deepcopy(source.state_dict())
    state["outer"]["second"]["S"][0] = float("nan")
    before = [factor.clone() for factor in target.factors()]
    with pytest.raises(ValueError, match="load_state_dict: second: NoRALinear: outer.S"):
        target.load_state_dict(state)
    assert all(map(torch.equal, target.factors(), before))


def test_an_ema_of_the_factors_can_be_evaluated_and_put_back():
    adapter = attach()
    train(adapter, 2)
    x = inputs()
    trained = adapter.model(x)
    kept = [factor.detach().clone() for factor in adapter.factors()]
    with torch.no_grad():
        for factor in adapter.factors():
            factor.data.copy_(factor.data / 2)
        assert not torch.allclose(adapter.model(x), trained)
        for factor, values in zip(adapter.factors(), kept, strict=True):
            factor.data.copy_(values)
    assert torch.equal(adapter.model(x), trained)


def test_training_goes_on_when_nobody_holds_the_adapter():
    model = Net()
    parameters = adaptlora.attach(model, config()).parameters()
    optimizer = torch.optim.AdamW(parameters, lr=0.05, fused=True)
    losses = []
    for _ in range(3):
        loss = task_loss(model)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(set(losses)) == 3


def test_a_module_under_two_names_is_refused():
    model = Net()
    model.again = model.first
    with pytest.raises(ValueError, match=r"must have one name, got first and \['again'\]"):
        adaptlora.attach(model, config(target_modules=["first"]))
    assert type(model.first) is torch.nn.Linear
    plain = adaptlora.LoraConfig(target_modules=["first"])
    with pytest.raises(ValueError, match="calibration must be None for LoraConfig, got a batch"):
        adaptlora.attach(Net(), plain, calibration=inputs())
