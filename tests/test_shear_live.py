"""shear on an Adapter and on a PeftModel: what the model computes afterwards, and that nothing changes where it fails."""

import copy

import pytest
import torch
from models import bert_batch, randomise, tiny_bert

import adaptlora
from adaptlora import ClipConfig, DropConfig, LoraConfig, NoRMConfig, RandomConfig, SVDConfig, TAIAConfig
from adaptlora.pool import over

CONFIGS = [
    NoRMConfig(),
    NoRMConfig(keep_scaling=True),
    SVDConfig(rank=3),
    ClipConfig(target_r=3, sort=True),
    SVDConfig(budget=30),
    TAIAConfig(),
    RandomConfig(),
    DropConfig(),
]


def adapted(r=6, seed=0):
    model = tiny_bert()
    adapter = adaptlora.attach(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear"))
    randomise(adapter, seed)
    return model, adapter


def peft_model(seed=0, **fields):
    import peft

    torch.manual_seed(seed)
    fields = {
        "r": 6,
        "lora_alpha": 12,
        "target_modules": ["query", "key", "value", "dense"],
        "init_lora_weights": False,
    } | fields
    return peft.get_peft_model(tiny_bert(), peft.LoraConfig(**fields)).eval()


def logits(model):
    with torch.no_grad():
        return model(**{k: v for k, v in bert_batch().items() if k != "labels"}).logits


def updates(adapter) -> dict[str, torch.Tensor]:
    return {
        name: layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach() for name, layer in adapter.layers.items()
    }


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_an_adapter_becomes_what_the_report_says(config, tmp_path):
    model, adapter = adapted()
    before = updates(adapter)
    report = adaptlora.shear(adapter, config)
    assert report.ranks() == adapter.ranks() and set(report.ranks_before().values()) == {6}
    assert sum(adapter.ranks().values()) < 6 * len(before)
    for sheared in report.modules:
        layer = adapter.layers[sheared.module.name]
        assert layer.lora_A.shape[0] == sheared.rank and layer.pair.capacity == sheared.rank
        assert torch.equal(layer.lora_A, sheared.module.lora_A) and layer.scaling == sheared.module.scaling
    sizes = report.parameters()
    assert sizes[1] == adapter.summary()["adapter_parameters"] < sizes[0]
    if any(adapter.ranks().values()):
        adapter.save(tmp_path)
        again = tiny_bert()
        adaptlora.load(again, tmp_path)
        torch.testing.assert_close(logits(again), logits(model))


def test_norm_keeps_leading_components_and_drops_the_scaling():
    _, adapter = adapted()
    before = {name: update / 2 for name, update in updates(adapter).items()}  # lora_alpha / r is 2
    report = adaptlora.shear(adapter)
    assert isinstance(report.config, NoRMConfig)
    for name, update in updates(adapter).items():
        U, S, Vh = torch.linalg.svd(before[name])
        c = report.ranks()[name]
        torch.testing.assert_close(update, (U[:, :c] * S[:c]) @ Vh[:c], rtol=1e-4, atol=1e-6)


def test_training_goes_on():
    model, adapter = adapted()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    adapter.track(optimizer)
    model.train()
    for _ in range(2):
        model(**bert_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
        if optimizer.state[adapter.factors()[0]]["step"] == 1 and adapter.ranks() != dict.fromkeys(adapter.ranks(), 3):
            adaptlora.shear(adapter, SVDConfig(rank=3))
            assert not any(factor in optimizer.state for factor in adapter.factors()), (
                "old moments belong to other vectors"
            )
    assert all(
        optimizer.state[f]["exp_avg"].shape == f.shape and optimizer.state[f]["step"] == 1 for f in adapter.factors()
    )


def test_a_conv1d_base_and_modules_of_rank_0():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=20, n_positions=12)).eval()
    adapter = adaptlora.attach(model, LoraConfig(r=4, target_modules=["c_attn", "c_fc"]))
    randomise(adapter)
    first, *rest = adapter.layers
    adapter.replace_factors(
        {name: (adapter.layers[name].lora_A, adapter.layers[name].lora_B) for name in rest}, dict.fromkeys(rest, 1.0)
    )
    report = adaptlora.shear(adapter)
    assert first not in report.ranks() and adapter.ranks()[first] == 0 and report.ranks().keys() == set(rest)


def test_the_number_of_workers_does_not_matter():
    bits = []
    threads = torch.get_num_threads()
    for workers, now in ((1, 1), (2, 2), (4, 1), (None, 2)):
        torch.set_num_threads(now)
        _, adapter = adapted()
        report = adaptlora.shear(adapter, workers=workers)
        bits.append((report.as_dict(), [factor.detach().clone() for factor in adapter.factors()]))
        assert torch.get_num_threads() == now
    torch.set_num_threads(threads)
    for facts, factors in bits[1:]:
        assert facts == bits[0][0] and all(torch.equal(a, b) for a, b in zip(factors, bits[0][1], strict=True))


def test_progress_is_told():
    _, adapter = adapted()
    seen = []
    adaptlora.shear(adapter, SVDConfig(rank=2), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(adapter.layers)) for i in range(len(adapter.layers))]


def test_a_failure_changes_nothing():
    _, adapter = adapted()
    last = list(adapter.layers.values())[-1]
    with torch.no_grad():
        last.lora_A[0, 0] = float("nan")
    before = copy.deepcopy(adapter.state_dict())
    with pytest.raises(ValueError, match="low_rank_svd: lora_As.0. must be finite, got 1"):
        adaptlora.shear(adapter)
    for name, factors in adapter.state_dict()["factors"].items():
        for factor, values in factors.items():
            torch.testing.assert_close(values, before["factors"][name][factor], rtol=0, atol=0, equal_nan=True)


def test_bad_targets():
    model, adapter = adapted()
    with pytest.raises(
        TypeError, match="shear: target must be an Adapter or a PeftModel, got BertForSequenceClassification"
    ):
        adaptlora.shear(model)
    with pytest.raises(TypeError, match="shear: config must be one of"):
        adaptlora.shear(adapter, LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="adapter_name must be None for an Adapter, got 'x'"):
        adaptlora.shear(adapter, adapter_name="x")
    adapter.merge()
    with pytest.raises(ValueError, match="shear: the adapter must not be merged"):
        adaptlora.shear(adapter)


# PEFT


def peft_updates(model, name="default") -> dict[str, torch.Tensor]:
    from peft.tuners.lora import LoraLayer

    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    return {n: m.get_delta_weight(name).detach() for n, m in layers.items() if name in m.lora_A}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"query": 4}, "alpha_pattern": {"key": 5}},
        {"layers_to_transform": [0], "layers_pattern": "layer"},
    ],
    ids=str,
)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_peft_model_computes_saves_and_loads_what_the_report_says(config, fields, tmp_path):
    import peft

    model = peft_model(**fields)
    report = adaptlora.shear(model, config)
    kept = {s.module.name: s.module.scaling * s.module.lora_B @ s.module.lora_A for s in report.modules if s.rank}
    found = peft_updates(model)
    assert found.keys() == kept.keys()
    for name, update in kept.items():
        torch.testing.assert_close(found[name], update)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    assert peft_updates(again).keys() == kept.keys()
    torch.testing.assert_close(logits(again), logits(model))
    if isinstance(config, NoRMConfig) and not config.keep_scaling:
        layers = [m for m in again.modules() if hasattr(m, "scaling") and "default" in getattr(m, "lora_A", {})]
        assert {m.scaling["default"] for m in layers} == {1.0}


def test_the_adapter_that_is_named():
    import peft

    model = peft_model()
    torch.manual_seed(1)
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=False))
    first = peft_updates(model)
    report = adaptlora.shear(model, SVDConfig(rank=2), adapter_name="other")
    assert set(report.ranks().values()) == {2} and all(name.endswith("query") for name in report.ranks())
    assert all(torch.equal(first[name], update) for name, update in peft_updates(model).items())
    with pytest.raises(
        ValueError, match=r"shear: adapter 'none' must be a LoRA adapter of the model, got adapters \['default'"
    ):
        adaptlora.shear(model, adapter_name="none")


def test_lora_bias_acts_as_before():
    model = peft_model(lora_bias=True)
    report = adaptlora.shear(model, NoRMConfig())
    before = peft_model(lora_bias=True)
    for name in report.ranks():
        old, new = before.get_base_model().get_submodule(name), model.get_base_model().get_submodule(name)
        torch.testing.assert_close(
            new.scaling["default"] * new.lora_B["default"].bias, old.scaling["default"] * old.lora_B["default"].bias
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "must be a plain LoRA of a linear layer, got Dora"),
        ({"target_modules": ["query", "word_embeddings"]}, "word_embeddings must be a plain LoRA of a linear layer"),
    ],
    ids=["DoRA", "embedding"],
)
def test_what_is_no_plain_lora_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        adaptlora.shear(peft_model(**fields))


def test_a_merged_peft_model():
    model = peft_model()
    model.merge_adapter()
    with pytest.raises(ValueError, match="must not be merged"):
        adaptlora.shear(model)


# The pool


def test_the_pool_takes_items_only_when_there_is_room_and_stops_at_an_error():
    taken, under_way = [], []

    def items():
        for i in range(20):
            taken.append(i)
            yield i

    def call(i):
        under_way.append(len(taken) - len(done))
        if i == 7:
            raise ValueError("seven")
        assert torch.get_num_threads() == 1
        return i * i

    done = []
    with pytest.raises(ValueError, match="seven"):
        for i, square in over(call, items(), workers=2):
            assert square == i * i
            done.append(i)
    assert max(under_way) <= 3 and len(taken) <= 10


def test_an_update_of_zeros_alone_is_an_error_and_stays(tmp_path):
    import peft

    model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(r=4, target_modules=["query"]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="shear: at least one module must keep an update, got only zeros in 2 modules"):
        adaptlora.shear(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    adapter = adaptlora.attach(tiny_bert(), LoraConfig(r=4, target_modules=["query"]))
    with pytest.raises(ValueError, match="got only zeros"):
        adaptlora.shear(adapter)
    assert set(adapter.ranks().values()) == {4}


@pytest.mark.parametrize("workers", [0, -1, 1.5, True])
def test_workers_must_be_a_number(workers):
    _, adapter = adapted()
    with pytest.raises(ValueError, match="shear: workers must be None or an integer > 0, got"):
        adaptlora.shear(adapter, workers=workers)


@pytest.mark.parametrize("scaling", [None, float("nan"), "1"])
def test_factors_without_a_scaling_change_nothing(scaling):
    _, adapter = adapted()
    name, layer = next(iter(adapter.layers.items()))
    scalings = {} if scaling is None else {name: scaling}
    with pytest.raises(ValueError, match=f"replace_factors: scalings must give {name} a finite number"):
        adapter.replace_factors({name: (layer.lora_A[:2], layer.lora_B[:, :2])}, scalings)
    assert set(adapter.ranks().values()) == {6}
