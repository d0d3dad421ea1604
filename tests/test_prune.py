"""prune on PeftModels: what is left, that training goes on as from a fresh start with the same state, that failures change nothing."""

import copy
import dataclasses
import warnings

import peft
import pytest
import torch
from models import Net, batch, task_loss
from optimizers import RowMeans
from torch import nn

import adaptlora
from adaptlora import ClipConfig, DropConfig, NoRMConfig, SVDConfig
from adaptlora.integrations import peft_ranks

ALPHA = 12


def peft_net(seed=0, dtype=torch.float64, **fields):
    torch.manual_seed(seed)
    fields = {"r": 6, "lora_alpha": ALPHA, "target_modules": ["first", "second"], "init_lora_weights": False} | fields
    return peft.get_peft_model(Net(dtype=dtype, seed=seed), peft.LoraConfig(**fields), autocast_adapter_dtype=False)


def layers(model, adapter="default"):
    found = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {name: layer for name, layer in found.items() if adapter in layer.lora_A}


def factors(model, adapter="default"):
    return {n: (m.lora_A[adapter].weight, m.lora_B[adapter].weight) for n, m in layers(model, adapter).items()}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, optimizer, steps, start=0):
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss = task_loss(model, dtype=next(model.parameters()).dtype, seed=step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def everything(model, optimizer):
    """All that a failure must leave alone, in copies, and the parameters by identity."""
    of_layers = [(n, m.r, m.lora_alpha, m.scaling, m.lora_A["default"].out_features) for n, m in layers(model).items()]
    state = copy.deepcopy(
        (model.state_dict(), optimizer.state_dict(), dataclasses.asdict(model.peft_config["default"]))
    )
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    identity = [id(p) for p in model.parameters()] + [id(p) for g in optimizer.param_groups for p in g["params"]]
    return copy.deepcopy(of_layers), *state, grads, identity


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other) and one.stride() == other.stride()
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def clipped(model, k, sort=False):
    """Vectors that the clip to k in all keeps: {module: places}, in float64 and one vector after the other."""
    sums = {n: A.double().norm(dim=1) + B.double().norm(dim=0) for n, (A, B) in factors(model).items()}
    places = {n: s.argsort(descending=True).tolist() if sort else list(range(len(s))) for n, s in sums.items()}
    ranks = dict.fromkeys(sums, 0)
    for _ in range(k):
        free = [n for n in sums if ranks[n] < len(sums[n])]
        score = {
            n: 2 - ranks[n] if ranks[n] == 0 else min(1, sums[n][places[n][ranks[n]]] / sums[n][places[n][0]])
            for n in free
        }
        best = max(free, key=lambda n: (score[n], -ranks[n], -free.index(n)))
        ranks[best] += 1
    return {n: places[n][: ranks[n]] for n in sums}


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_from_a_fresh_model_with_the_same_state(name, sort):
    model = peft_net(modules_to_save=["classifier"])
    optimizer = OPTIMIZERS[name](trained(model))
    train(model, optimizer, 3)
    kept = clipped(model, 5, sort)
    assert sorted(map(len, kept.values())) != [2, 2] and sum(map(len, kept.values())) == 5
    before, moments = factors(model), copy.deepcopy(optimizer.state_dict()["state"])
    values = {n: [t.detach().clone() for t in pair] for n, pair in before.items()}

    report = adaptlora.prune(model, ClipConfig(target_r=2.5, sort=sort), optimizer=optimizer)

    assert report.ranks() == {n: len(v) for n, v in kept.items()}
    for n, (A, B) in factors(model).items():
        assert A is before[n][0] and B is before[n][1]
        assert torch.equal(A, values[n][0][kept[n]]) and torch.equal(B, values[n][1][:, kept[n]])
        for parameter in (A, B):
            states = [t for t in optimizer.state[parameter].values() if t.shape == parameter.shape]
            for tensor in (parameter, parameter.grad, *states):
                assert tensor.is_contiguous()
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()

    fresh = peft_net(
        modules_to_save=["classifier"],
        rank_pattern=report.ranks(),
        alpha_pattern={n: ALPHA * len(v) / 6 for n, v in kept.items()},
    )
    fresh.load_state_dict(model.state_dict())
    other = OPTIMIZERS[name](trained(fresh))
    place = {id(p): (n, side) for n, pair in before.items() for side, p in enumerate(pair)}
    state = {}
    for number, parameter in enumerate(trained(model)):
        state[number] = dict(moments[number])
        if id(parameter) in place:
            n, side = place[id(parameter)]
            for key, value in state[number].items():
                if value.dim() == 2 and value.shape[side] == 6:
                    state[number][key] = (value[kept[n]] if side == 0 else value[:, kept[n]]).contiguous()
    other.load_state_dict(other.state_dict() | {"state": state})
    torch.testing.assert_close(train(model, optimizer, 4, 3), train(fresh, other, 4, 3), rtol=1e-12, atol=0)


def test_the_clip_is_normals():
    model, config = (
        peft_net(),
        adaptlora.NormALConfig(r=6, lora_alpha=ALPHA, t_p=1, t_c=1, target_r=2.5, target_modules=["first", "second"]),
    )
    net = Net(dtype=torch.float64)
    adapter = adaptlora.attach(net, config)
    for name, (A, B) in factors(model).items():
        adapter.layers[name].set_factors(A.detach(), B.detach())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
    adapter.track(optimizer)
    adapter.step()
    report = adaptlora.prune(model, target_r=2.5)
    assert report.ranks() == adapter.ranks()
    for name, layer in adapter.layers.items():
        A, B = factors(model)[name]
        assert torch.equal(layer.lora_A, A) and torch.equal(layer.lora_B, B)
        assert layer.scaling == layers(model)[name].scaling["default"]
    x, _ = batch(dtype=torch.float64)
    torch.testing.assert_close(model(x), net(x))


FIELDS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"first": 4}, "alpha_pattern": {"second": 5}},
    {"target_modules": "all-linear", "exclude_modules": ["classifier"]},
    {"target_modules": ".*(first|second)"},
    {"lora_bias": True, "modules_to_save": ["classifier"]},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize(
    "config",
    [ClipConfig(budget=5), ClipConfig(threshold=0.9, sort=True, rescale=True), SVDConfig(rank=2), DropConfig("module")],
    ids=str,
)
def test_what_is_saved_computes_the_same(config, fields, tmp_path):
    model = peft_net(**fields)
    report = adaptlora.prune(model, config)
    assert 0 < report.parameters()[1] < report.parameters()[0]
    x, _ = batch(dtype=torch.float64)
    y = model(x)
    for sheared in report.modules:
        if sheared.rank and isinstance(config, ClipConfig) and config.rescale:
            alpha = fields.get("alpha_pattern", {}).get(sheared.module.name, ALPHA)
            by = sheared.rank**0.5 if fields.get("use_rslora") else sheared.rank
            assert sheared.module.scaling == pytest.approx(alpha / by, rel=1e-15)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(Net(dtype=torch.float64), tmp_path, autocast_adapter_dtype=False)
    assert {n: m.r["default"] for n, m in layers(again).items()} == {n: r for n, r in report.ranks().items() if r}
    torch.testing.assert_close(again(x), y, rtol=1e-13, atol=1e-13)
    if not fields.get("lora_bias"):  # which PEFT merges only into a bias, and `second` has none
        torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=1e-9, atol=1e-11)


def test_modules_without_an_update_leave_layers_and_optimizer():
    model = peft_net()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["first", "second"], init_lora_weights=False))
    groups = [{"params": [(n, p)], "lr": 1e-2} for n, p in model.named_parameters() if "default" in n]
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, 2)
    others = {n: [t.detach().clone() for t in pair] for n, pair in factors(model, "other").items()}
    report = adaptlora.prune(model, DropConfig("module", ratio=0.5), optimizer=optimizer)
    (gone,) = (n for n, rank in report.ranks().items() if not rank)
    (left,) = layers(model)
    assert left != gone and layers(model, "other").keys() == {left, gone}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in factors(model)[left]] and set(optimizer.state) == set(held)
    assert len(optimizer.param_groups) == 4 and all(
        len(g["params"]) == len(g["param_names"]) for g in optimizer.param_groups
    )
    train(model, optimizer, 2)
    scheduler.step()
    for n, pair in factors(model, "other").items():
        assert all(torch.equal(a, b) for a, b in zip(pair, others[n], strict=True))


def test_new_vectors_start_without_state_and_the_rest_keeps_its_own():
    model = peft_net(modules_to_save=["classifier"], lora_bias=True)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    train(model, optimizer, 2)
    before = factors(model)
    biases = {n: m.lora_B["default"].bias for n, m in layers(model).items()}
    effect = {n: m.scaling["default"] * biases[n].detach().clone() for n, m in layers(model).items()}
    of_head = copy.deepcopy([optimizer.state[p] for p in trained(model) if p.dim() and p.shape[0] == 3])
    report = adaptlora.prune(model, NoRMConfig(), optimizer=optimizer)
    for n, pair in factors(model).items():
        assert all(
            new is old and new.grad is None and new not in optimizer.state
            for new, old in zip(pair, before[n], strict=True)
        )
        assert pair[0].shape[0] == report.ranks()[n] == layers(model)[n].lora_B["default"].in_features
        assert layers(model)[n].lora_B["default"].bias is biases[n] and layers(model)[n].scaling["default"] == 1
        torch.testing.assert_close(biases[n].detach(), effect[n])
    assert_same(of_head, [optimizer.state[p] for p in trained(model) if p.shape[0] == 3])
    train(model, optimizer, 2)


def test_gradients_follow_between_backward_and_step_and_a_live_graph_does_no_harm():
    model = peft_net()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    loss = task_loss(model, dtype=torch.float64)
    loss.backward()
    grads = {n: [p.grad.clone() for p in pair] for n, pair in factors(model).items()}
    adaptlora.prune(model, ClipConfig(threshold=0.7, sort=True), optimizer=optimizer)
    optimizer.step()
    for n, (A, B) in factors(model).items():
        order = clipped(peft_net(), 12, True)[n][: A.shape[0]]
        assert torch.equal(A.grad, grads[n][0][order]) and torch.equal(B.grad, grads[n][1][:, order])
    train(model, optimizer, 1)
    assert loss.grad_fn is not None


def test_an_optimizer_in_a_wrapper():
    from accelerate import Accelerator

    model = peft_net(dtype=torch.float32)
    optimizer = Accelerator(cpu=True).prepare_optimizer(torch.optim.AdamW(trained(model), lr=1e-2))
    train(model, optimizer, 2)
    adaptlora.prune(model, target_r=2, optimizer=optimizer)
    assert all(
        optimizer.optimizer.state[p]["exp_avg"].shape == p.shape for pair in factors(model).values() for p in pair
    )
    train(model, optimizer, 1)


def test_a_model_that_runs_on_our_kernels():
    model, twin = peft_net(dtype=torch.float32), peft_net(dtype=torch.float32)
    assert set(adaptlora.accelerate(model).accelerated) == {"first", "second"}
    curves, ranks = [], []
    for net in (model, twin):
        optimizer = torch.optim.AdamW(trained(net), lr=1e-2, fused=True)
        losses = train(net, optimizer, 2)
        ranks.append(adaptlora.prune(net, target_r=2.5, optimizer=optimizer).ranks())
        curves.append(losses + train(net, optimizer, 3, 2))
    assert ranks[0] == ranks[1]
    torch.testing.assert_close(*curves, rtol=1e-4, atol=0)
    adaptlora.restore(model)
    train(model, torch.optim.AdamW(trained(model)), 1)


def test_only_the_adapter_that_is_named():
    model = peft_net()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["first"], init_lora_weights=False))
    before = {n: [t.detach().clone() for t in pair] for n, pair in factors(model).items()}
    report = adaptlora.prune(model, budget=1, adapter_name="other")
    assert report.ranks() == {"first": 1} and model.peft_config["default"].r == 6 and model.peft_config["other"].r == 1
    assert all(torch.equal(a, b) for n, pair in factors(model).items() for a, b in zip(pair, before[n], strict=True))


# Refusals


def unknown_state(model):
    optimizer = RowMeans(trained(model), lr=1e-2, momentum=0.9)
    train(model, optimizer, 1)
    return optimizer


def lbfgs(model):
    optimizer = torch.optim.LBFGS(trained(model))
    optimizer.step(lambda: task_loss(model, dtype=torch.float64))
    return optimizer


def elsewhere(model):
    return torch.optim.AdamW(nn.Linear(2, 2).parameters())


@pytest.mark.parametrize(
    ("make", "config", "error", "message"),
    [
        (
            unknown_state,
            ClipConfig(target_r=2),
            TypeError,
            "first: rank change: optimizer state must be shaped like.*RowMeans keeps 'row_mean'",
        ),
        (lbfgs, SVDConfig(rank=2), TypeError, "got LBFGS: it keeps flat vectors"),
        (elsewhere, ClipConfig(target_r=2), ValueError, "shear: optimizer must hold the adapter's factors"),
        (None, ClipConfig(budget=1), ValueError, "budget must be between 2 .* and 12 .*, got 1"),
        (None, ClipConfig(target_r=7), ValueError, "budget must be between 2 .* and 12 .*, got 14"),
    ],
    ids=["unknown state", "LBFGS", "other parameters", "budget", "target_r"],
)
def test_a_refusal_changes_nothing(make, config, error, message):
    model = peft_net()
    task_loss(model, dtype=torch.float64).backward()
    optimizer = make(model) if make else torch.optim.AdamW(trained(model))
    before = everything(model, optimizer)
    with pytest.raises(error, match=message):
        adaptlora.prune(model, config, optimizer=optimizer)
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize("name", ["to_rows", "check_wrappers"])
@pytest.mark.parametrize("config", [ClipConfig(target_r=2), DropConfig("module")], ids=["clip", "drop"])
def test_a_failure_on_the_way_changes_nothing(config, name, monkeypatch):
    model = peft_net()
    optimizer = torch.optim.AdamW(trained(model))
    train(model, optimizer, 1)
    before, calls = everything(model, optimizer), []

    def fail(*args):
        calls.append(args)
        if len(calls) == 3 or name == "check_wrappers":
            raise MemoryError("no room")
        return original(*args)

    original = getattr(peft_ranks, name)
    monkeypatch.setattr(peft_ranks, name, fail)
    if isinstance(config, DropConfig) and name == "to_rows":
        adaptlora.prune(model, config, optimizer=optimizer)
        assert not calls, "nothing moves where whole updates go"
        return
    with pytest.raises(MemoryError, match="no room"):
        adaptlora.prune(model, config, optimizer=optimizer)
    assert calls
    assert_same(everything(model, optimizer), before)


def test_numbers_that_are_not_finite():
    model = peft_net()
    with torch.no_grad():
        factors(model)["second"][1][3, 2] = float("inf")
    before = everything(model, elsewhere(model))
    with pytest.raises(ValueError, match="shear: second: norms of the rank vectors must be finite"):
        adaptlora.prune(model, target_r=2)
    assert_same(everything(model, elsewhere(model))[0], before[0])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.first = nn.Linear(8, 8)
        self.experts = nn.Parameter(torch.randn(3, 8, 8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "shear: 0.first must be a plain LoRA of a linear layer, got DoraLinearVariant"),
        (
            {"target_modules": ["attention"]},
            "shear: 0.attention must be a plain LoRA of a linear layer, got MultiheadAttention",
        ),
        ({"target_parameters": ["experts"]}, "shear: 0 must be a plain LoRA of a linear layer, got Attention"),
        (
            {"init_lora_weights": "pissa"},
            "adapter 'default': init_lora_weights must leave the base weights alone .* got 'pissa'",
        ),
    ],
    ids=["DoRA", "attention", "parameters", "PiSSA"],
)
def test_what_is_no_plain_lora_is_named(fields, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**{"r": 4, "target_modules": ["first"]} | fields)
        model = peft.get_peft_model(nn.Sequential(Attention()), config)
    before = model.state_dict()
    with pytest.raises(ValueError, match=message):
        adaptlora.prune(model, target_r=2)
    assert_same(model.state_dict(), before)


def test_tied_factors_and_merged_layers_are_refused():
    model = peft_net()
    model.merge_adapter()
    with pytest.raises(ValueError, match="shear: first must not be merged"):
        adaptlora.prune(model, target_r=2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    model.base_model.model[1].lora_A["default"].weight = nn.Parameter(
        model.base_model.model[0].lora_A["default"].weight
    )
    with pytest.raises(ValueError, match="shear: 1 must have factors of its own, got those of 0"):
        adaptlora.prune(model, target_r=1)


def test_arguments():
    model = peft_net()
    with pytest.raises(TypeError, match="prune: peft_model must be a PeftModel, got Net"):
        adaptlora.prune(Net(), target_r=2)
    for fields, found in (({}, "none"), ({"target_r": 2, "budget": 4}, "target_r, budget")):
        with pytest.raises(
            ValueError, match=f"prune: exactly one of config, target_r, budget and threshold.*, got {found}"
        ):
            adaptlora.prune(model, **fields)
    adapter = adaptlora.attach(Net(), adaptlora.LoraConfig(target_modules=["first"]))
    with pytest.raises(
        ValueError, match="shear: optimizer must be None for an Adapter, which tracks its own, got AdamW"
    ):
        adaptlora.shear(adapter, ClipConfig(target_r=2), optimizer=torch.optim.AdamW(adapter.parameters()))
    for fields, message in (
        ({}, "exactly one of target_r, budget and threshold must be given, got none"),
        ({"budget": 2.0}, "budget must be an integer > 0, got 2.0"),
        ({"target_r": -1}, "target_r must be a number > 0, got -1"),
        ({"threshold": 1.0}, r"threshold must be in \[0, 1\), got 1.0"),
        ({"target_r": 2, "first_below": True}, "first_below must go with threshold, got True"),
        ({"target_r": 2, "sort": 1}, "sort must be True or False, got 1"),
    ):
        with pytest.raises(ValueError, match=f"ClipConfig: {message}"):
            ClipConfig(**fields)


# Adapters, files and the command line


def test_an_adapter_keeps_the_optimizer_state_of_vectors_that_stay():
    model = Net(dtype=torch.float64)
    adapter = adaptlora.attach(model, adaptlora.LoraConfig(r=6, target_modules=["first", "second"]))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.track(optimizer)
    train(model, optimizer, 2)
    sums = {n: layer.lora_A.norm(dim=1) + layer.lora_B.norm(dim=0) for n, layer in adapter.layers.items()}
    order = {n: s.argsort(descending=True).tolist() for n, s in sums.items()}
    moments = {n: optimizer.state[layer.lora_B]["exp_avg"].clone() for n, layer in adapter.layers.items()}
    values = {n: layer.lora_A.detach().clone() for n, layer in adapter.layers.items()}
    adaptlora.shear(adapter, ClipConfig(budget=5, sort=True))
    assert sum(adapter.ranks().values()) == 5
    for n, layer in adapter.layers.items():
        kept = order[n][: layer.rank]
        assert torch.equal(layer.lora_A, values[n][kept]) and layer.pair.capacity == layer.rank
        assert torch.equal(optimizer.state[layer.lora_B]["exp_avg"], moments[n][:, kept])
    train(model, optimizer, 1)


def test_files_and_the_command_line_clip_alike(tmp_path):
    from typer.testing import CliRunner

    from adaptlora.cli import app

    model = peft_net(dtype=torch.float32, use_rslora=True)
    model.save_pretrained(tmp_path / "in")
    config = ClipConfig(threshold=0.8, sort=True, rescale=True)
    report = adaptlora.shear_files(tmp_path / "in", tmp_path / "out", config)
    arguments = ["--method", "clip", "--threshold", "0.8", "--sort", "--rescale"]
    result = CliRunner().invoke(app, ["shear", str(tmp_path / "in"), "-o", str(tmp_path / "cli"), *arguments])
    assert result.exit_code == 0, result.output
    adaptlora.prune(model, config)
    assert report.ranks() == {n: m.r["default"] for n, m in layers(model).items()}
    x, _ = batch()
    for folder in ("out", "cli"):
        again = peft.PeftModel.from_pretrained(Net(), tmp_path / folder)
        torch.testing.assert_close(again(x), model(x))
