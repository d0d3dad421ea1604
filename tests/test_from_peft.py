"""PEFT's adapters as ours and back: configurations, files and models in memory, each field in both directions, in float64."""

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_model import Deep
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

import adaptlora
from adaptlora import LoraConfig, NormALConfig
from adaptlora.targets import find_targets

DOUBLE = {"dtype": torch.float64}
DEEP = Deep()
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), **DOUBLE)


def of_peft(model=None, seed=0, **fields):
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q"], "init_lora_weights": False} | fields
    torch.manual_seed(seed)
    model = peft.get_peft_model(
        Deep() if model is None else model, peft.LoraConfig(**fields), autocast_adapter_dtype=False
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("modules_to_save" in name or name.endswith("bias")):
                parameter.add_(torch.randn(parameter.shape, **DOUBLE) / 4)
    return model.eval()


def lora_layers(model):
    return {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def saved_names(model):
    from peft.utils.other import ModulesToSaveWrapper

    return {n for n, m in model.get_base_model().named_modules() if isinstance(m, ModulesToSaveWrapper)}


FIELDS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_dropout": 0.25},
    "patterns": {
        "target_modules": ["q", "mlp.0"],
        "rank_pattern": {"layers.1.q": 2, "mlp.0": 3},
        "alpha_pattern": {r".*\.2\.q": 5, "^model.layers.0.q": 7},
    },
    "pattern regex": {"target_modules": ["q", "mix"], "rank_pattern": {r"layers\.[01]\.q": 1}, "use_rslora": True},
    "regex": {"target_modules": r".*\.(q|mlp\.1)|mix"},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["q", "classifier"]},
    "exclude regex": {"target_modules": ["q", "mlp.0"], "exclude_modules": r".*\.1\..*"},
    "layers": {"target_modules": ["q", "mlp.0"], "layers_to_transform": [0, 2]},
    "layers pattern": {
        "target_modules": ["q", "model.layers.0.mlp.1"],
        "layers_to_transform": 1,
        "layers_pattern": ["blocks", "layers"],
    },
    "lora_bias": {"target_modules": ["q", "mix", "mlp.0"], "lora_bias": True, "use_rslora": True},
    "Conv1D": {"target_modules": ["mix", "q"], "fan_in_fan_out": True},
    "modules_to_save": {"target_modules": ["q", "mix"], "modules_to_save": ["classifier"]},
}


def check_same_model(model, adapter, y):
    layers = lora_layers(model) if isinstance(model, peft.PeftModel) else model
    assert adapter.ranks() == {n: m.r["default"] for n, m in layers.items()}
    for name, layer in layers.items():
        ours = adapter.layers[name]
        assert torch.equal(ours.lora_A, layer.lora_A["default"].weight)
        assert torch.equal(ours.lora_B, layer.lora_B["default"].weight)
        assert ours.scaling == layer.scaling["default"]
        assert (ours.lora_bias is None) == (layer.lora_B["default"].bias is None)
    adapter.model.eval()
    torch.testing.assert_close(adapter.model(X), y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.filterwarnings("ignore")
def test_there_and_back(name, tmp_path):
    model = of_peft(**FIELDS[name])
    y = model(X).detach()
    model.save_pretrained(tmp_path / "peft")
    of_file = adaptlora.from_peft(tmp_path / "peft", Deep())
    check_same_model(model, of_file, y)
    of_file.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Deep(), tmp_path / "ours", autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(again(X), y, rtol=1e-13, atol=1e-13)
    assert saved_names(again) == saved_names(model)

    layers, whole = lora_layers(model), saved_names(model)
    live = adaptlora.from_peft(model)
    check_same_model(layers, live, y)
    assert set(live.saved) == whole and live.config.lora_dropout == FIELDS[name].get("lora_dropout", 0.0)
    assert {layer.dropout_p for layer in live.layers.values()} == {live.config.lora_dropout}
    assert not any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in live.model.modules())
    live.save(tmp_path / "live")
    again = peft.PeftModel.from_pretrained(Deep(), tmp_path / "live", autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(again(X), y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.filterwarnings("ignore")
def test_a_configuration_means_the_same_modules_ranks_and_scalings(name):
    theirs = of_peft(**FIELDS[name])
    config = LoraConfig.from_peft(peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q"]} | FIELDS[name]))
    adapter = adaptlora.attach(Deep(), config)
    layers = lora_layers(theirs)
    assert adapter.ranks() == {n: m.r["default"] for n, m in layers.items()}
    assert {n: m.scaling for n, m in adapter.layers.items()} == {n: m.scaling["default"] for n, m in layers.items()}
    assert set(adapter.saved) == saved_names(theirs)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in adapter.parameters()) == adaptlora.trained_parameters(Deep(), config) == trained


TARGETS = st.one_of(
    st.lists(
        st.sampled_from(["q", "mlp.0", "mlp.1", "mix", "model.layers.2.mlp.1", "layers.1.q"]), min_size=1, unique=True
    ),
    st.sampled_from([r".*q", r"model\.layers\.[02]\..*[q1]", r"(.*\.)?(mix|q)"]),
)
NUMBERS = st.one_of(st.none(), st.just([]), st.integers(0, 2), st.lists(st.integers(0, 3), max_size=2, unique=True))
EXCLUDED = st.one_of(
    st.none(), st.just(["mlp.1"]), st.just(["layers.0.q", "mlp.0"]), st.sampled_from([r".*\.2\..*", "mix"])
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    TARGETS,
    NUMBERS,
    st.sampled_from([None, "layers", ["h", "layers"], "mlp"]),
    EXCLUDED,
    st.sampled_from([None, ["classifier"], ["mix"], ["mlp"], ["0.mlp"]]),
)
def test_targets_are_peft_s(targets, numbers, pattern, excluded, saved):
    if isinstance(targets, str):
        numbers = None
    fields = {"target_modules": targets, "exclude_modules": excluded, "modules_to_save": saved}
    fields |= {"layers_to_transform": numbers, "layers_pattern": pattern if numbers not in (None, []) else None}
    config = peft.LoraConfig(**fields)
    found = {name for name, _ in DEEP.named_modules() if check_target_module_exists(config, name)}
    ours = LoraConfig.from_peft(config)
    if found:
        assert set(find_targets(DEEP, ours)) == found
    else:
        with pytest.raises(ValueError, match="attach: target_modules must match at least one module"):
            find_targets(DEEP, ours)


def test_fields_given_take_the_place_of_pefts():
    config = peft.LoraConfig(r=6, lora_alpha=3, target_modules=["q"], init_lora_weights="gaussian", use_rslora=True)
    ours = NormALConfig.from_peft(config, init_lora_weights="kaiming", t_p=1, t_c=2, target_r=3, r=5)
    assert (ours.r, ours.lora_alpha, ours.use_rslora, ours.target_modules, ours.target_r) == (5, 3, True, ["q"], 3)
    assert (
        LoraConfig.from_peft(peft.LoraConfig(target_modules=["q"], init_lora_weights="pissa")).init_lora_weights
        == "pissa"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"use_dora": True},
            "LoraConfig.from_peft: use_dora must be False, which is all that has a counterpart, got True",
        ),
        ({"layer_replication": [(0, 1)]}, r"layer_replication must be None, .*got \[\(0, 1\)\]"),
        ({"target_parameters": ["experts"]}, r"target_parameters must be None, .* got \['experts'\]"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices must be None"),
        ({"init_lora_weights": "olora"}, "init_lora_weights must be True or .pissa., or be given anew, got 'olora'"),
        ({"init_lora_weights": False}, "init_lora_weights must be True or .pissa., or be given anew, got False"),
        ({"bias": "all"}, "bias must be 'none', which is all that has a counterpart, got 'all'"),
        ({"target_modules": None}, "target_modules must be given: PEFT chooses by the kind of model, got None"),
        (
            {"task_type": "SEQ_CLS"},
            r"modules_to_save must name the head, .* 'SEQ_CLS': .*\(classifier or score\), got None",
        ),
        ({"task_type": "TOKEN_CLS", "modules_to_save": ["pooler"]}, r"modules_to_save must name .*, got \['pooler'\]"),
        ({"task_type": "QUESTION_ANS", "modules_to_save": ["score"]}, r"\(qa_outputs\), got \['score'\]"),
    ],
)
def test_fields_without_a_counterpart_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig.from_peft(peft.LoraConfig(**{"target_modules": ["q"]} | fields))


def test_heads_that_peft_would_add_by_the_task():
    for task, head in (("SEQ_CLS", "model.score"), ("TOKEN_CLS", "classifier"), ("QUESTION_ANS", "qa_outputs")):
        config = peft.LoraConfig(target_modules=["q"], task_type=task, modules_to_save=["pooler", head])
        assert LoraConfig.from_peft(config).modules_to_save == ["pooler", head]
        ours = LoraConfig.from_peft(peft.LoraConfig(target_modules=["q"], task_type=task), modules_to_save=["out"])
        assert ours.modules_to_save == ["out"]


def test_adalora_from_either_configuration_of_pefts():
    more = {"target_r": 3, "total_step": 20}
    lora = peft.LoraConfig(r=6, lora_alpha=4, target_modules=["q"])
    ours = adaptlora.AdaLoRAConfig.from_peft(lora, **more)
    assert (ours.init_r, ours.r, ours.target_r, ours.lora_alpha) == (6, 6, 3, 4)
    assert adaptlora.AdaLoRAConfig.from_peft(lora, init_r=5, **more).r == 5
    theirs = peft.AdaLoraConfig(
        init_r=7, tinit=2, tfinal=3, deltaT=4, beta1=0.5, beta2=0.6, orth_reg_weight=0.1, target_modules=["q"], **more
    )
    ours = adaptlora.AdaLoRAConfig.from_peft(theirs)
    for field in ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"):
        assert getattr(ours, field) == getattr(theirs, field)
    model = peft.get_peft_model(Deep(), theirs)
    assert adaptlora.attach(Deep(), ours).ranks() == {n: 7 for n in lora_layers(model)}
    with pytest.raises(
        ValueError, match='AdaLoRAConfig.from_peft: peft_type must be "LORA" or "ADALORA", got \'LOHA\''
    ):
        adaptlora.AdaLoRAConfig.from_peft(peft.LoHaConfig(target_modules=["q"]))
    with pytest.raises(ValueError, match="LoraConfig.from_peft: peft_type must be \"LORA\", got 'ADALORA'"):
        LoraConfig.from_peft(theirs)


def test_what_is_no_lora_configuration():
    with pytest.raises(ValueError, match="LoraConfig.from_peft: peft_type must be \"LORA\", got 'LOHA'"):
        LoraConfig.from_peft(peft.LoHaConfig(target_modules=["q"]))
    with pytest.raises(TypeError, match="LoraConfig.from_peft: peft_config must be a peft.LoraConfig, got dict"):
        LoraConfig.from_peft({"r": 4})
    with pytest.raises(TypeError, match="LoraConfig.from_peft: peft_config must be a peft.LoraConfig, got type"):
        LoraConfig.from_peft(peft.LoraConfig)
    for fields, message in (
        ({"layers_to_transform": [0, -1]}, "layers_to_transform must be an integer ≥ 0 or a list of them"),
        ({"layers_pattern": "h"}, "layers_pattern must go with layers_to_transform"),
        (
            {"target_modules": "q", "layers_to_transform": 1},
            "layers_to_transform must be None where target_modules is one string",
        ),
        ({"layers_pattern": ["("], "layers_to_transform": 1}, "layers_pattern must be a regular expression"),
        ({"lora_bias": 1}, "lora_bias must be True or False, got 1"),
    ):
        with pytest.raises(ValueError, match=f"LoraConfig: {message}"):
            LoraConfig(**{"target_modules": ["q"]} | fields)
    with pytest.raises(ValueError, match="AdaLoRAConfig: lora_bias must be False"):
        adaptlora.AdaLoRAConfig(target_modules=["q"], lora_bias=True, total_step=9)


# In memory


def test_flags_and_modes_stay():
    model = of_peft(lora_dropout=0.5, lora_bias=True, modules_to_save=["classifier"])
    model.train()
    layers = lora_layers(model)
    layers["model.layers.0.q"].lora_dropout["default"].eval()
    layers["model.layers.1.q"].lora_A["default"].weight.requires_grad_(False)
    base = model.get_base_model()
    base.mix.weight.requires_grad_(True)
    base.classifier.modules_to_save["default"].bias.requires_grad_(False)
    base.classifier.modules_to_save["default"].eval()
    adapter = adaptlora.from_peft(model)
    assert adapter.model is base
    assert [layer.training for layer in adapter.layers.values()] == [False, True, True]
    assert [layer.lora_A.requires_grad for layer in adapter.layers.values()] == [True, False, True]
    assert all(layer.lora_B.requires_grad and layer.lora_bias.requires_grad for layer in adapter.layers.values())
    assert base.mix.weight.requires_grad and not base.mix.bias.requires_grad
    assert [p.requires_grad for p in adapter.saved["pre_classifier"].parameters()] == [True, True]
    assert [p.requires_grad for p in base.classifier.parameters()] == [True, False] and not base.classifier.training


@pytest.mark.parametrize("accelerated", [False, True])
def test_training_goes_on_as_it_would_have(accelerated):
    def curve(model, parameters):
        optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
        for step in range(4):
            optimizer.zero_grad()
            loss = model(X + step).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    fields = {"target_modules": ["q", "mix"], "lora_bias": True, "modules_to_save": ["classifier"]}
    theirs, model = of_peft(**fields), of_peft(**fields)
    if accelerated:
        adaptlora.accelerate(model)
    adapter = adaptlora.from_peft(model)
    expected = curve(theirs, [p for p in theirs.parameters() if p.requires_grad])
    torch.testing.assert_close(curve(adapter.model, adapter.parameters()), expected, rtol=1e-10, atol=0)


def several(model):
    model.add_adapter("other", peft.LoraConfig(target_modules=["mix"]))


def frozen(model):
    model.get_base_model().model.layers[1].q.base_layer.weight.requires_grad_(True)


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (
            several,
            {},
            r"the PeftModel must have no adapter but 'default', since the others would be lost, got \['other'\]",
        ),
        (lambda m: m.merge_adapter(), {}, "from_peft: model.layers.0.q must not be merged"),
        (
            lambda m: m.base_model.disable_adapter_layers(),
            {},
            "adapter 'default' must be active in model.layers.0.q, and is not",
        ),
        (frozen, {}, "from_peft: the base of model.layers.1.q must be frozen, got requires_grad=True"),
        (
            lambda m: None,
            {"use_dora": True},
            "from_peft: model.layers.0.q must be a plain LoRA of a linear layer, got Dora",
        ),
        (lambda m: None, {"init_lora_weights": "pissa"}, "init_lora_weights must leave the base weights alone"),
        (lambda m: None, {"bias": "all"}, "bias must be .none., which is all that has a counterpart, got 'all'"),
    ],
    ids=["several", "merged", "disabled", "frozen", "DoRA", "PiSSA", "bias"],
)
def test_a_refusal_leaves_the_model_as_it_was(change, fields, message):
    model = peft.get_peft_model(Deep().float(), peft.LoraConfig(**{"r": 4, "target_modules": ["q"]} | fields))
    change(model)
    before = {n: id(m) for n, m in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        adaptlora.from_peft(model)
    assert {n: id(m) for n, m in model.named_modules()} == before
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_failure_on_the_way_puts_pefts_layers_back(monkeypatch):
    model = of_peft(modules_to_save=["classifier"])
    y, before = model(X), {n: id(m) for n, m in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    monkeypatch.setattr(adaptlora.Adapter, "_fill", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError):
        adaptlora.from_peft(model)
    assert {n: id(m) for n, m in model.named_modules()} == before and torch.equal(model(X), y)
    assert [p.requires_grad for p in model.parameters()] == flags
    model.get_base_model().peft_config  # noqa: B018 - still there


def test_arguments(tmp_path):
    with pytest.raises(TypeError, match="from_peft: source must be a PeftModel or a path, got Deep"):
        adaptlora.from_peft(Deep())
    with pytest.raises(ValueError, match="from_peft: model must be the base model for a path, got None"):
        adaptlora.from_peft(tmp_path)
    with pytest.raises(ValueError, match="from_peft: model must be None for a PeftModel, which has its own, got Deep"):
        adaptlora.from_peft(of_peft(), Deep())


# Files


def test_folders_of_several_adapters(tmp_path):
    model = of_peft()
    model.add_adapter("style", peft.LoraConfig(r=2, target_modules=["mix"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert set(adaptlora.from_peft(tmp_path, Deep()).ranks().values()) == {4}
    assert adaptlora.from_peft(tmp_path, Deep(), adapter_name="style").ranks() == {"mix": 2}
    assert set(adaptlora.from_peft(tmp_path, Deep(), adapter_name="default").ranks().values()) == {4}
    with pytest.raises(
        ValueError, match=r"from_peft: adapter_name must be one of \['default', 'style'\] in .*, got 'none'"
    ):
        adaptlora.from_peft(tmp_path, Deep(), adapter_name="none")
    alone = of_peft()
    alone.save_pretrained(tmp_path / "again")
    named = peft.PeftModel.from_pretrained(Deep(), tmp_path / "again", adapter_name="mine")
    named.save_pretrained(tmp_path / "named")
    assert set(adaptlora.from_peft(tmp_path / "named", Deep()).ranks().values()) == {4}


def tied_free_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 30,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).double().eval()


def test_a_head_whose_base_weight_peft_stores(tmp_path):
    model = of_peft(tied_free_llama(), target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    tokens = torch.arange(8)[None]
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    ours = tied_free_llama()
    adapter = adaptlora.from_peft(tmp_path, ours)
    assert "lm_head" in adapter.layers
    torch.testing.assert_close(ours(tokens).logits, model(tokens).logits, rtol=1e-12, atol=1e-12)
    other = tied_free_llama()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(
        ValueError,
        match="lm_head.weight of the file must be the base model's own, as it is not trained, got other values",
    ):
        adaptlora.load(other, tmp_path)
    assert type(other.lm_head) is nn.Linear


def test_numbers_of_modules_to_save_are_looked_at(tmp_path):
    from safetensors.torch import load_file, save_file

    of_peft(modules_to_save=["classifier"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.pre_classifier.bias"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="pre_classifier.bias must hold finite floating-point numbers"):
        adaptlora.load(Deep(), tmp_path)
