"""The methods that need no base weight: singular values, random vectors, TAIA, layers and modules."""

import dataclasses
import math

import pytest
import torch

from adaptlora import DropConfig, RandomConfig, SVDConfig, TAIAConfig
from adaptlora.lora_files import LoraModule
from adaptlora.shear.drop import is_feed_forward
from adaptlora.shear.methods import method_for

NAMES = [f"model.layers.{i}.{kind}" for i in range(4) for kind in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]


def module(name="m", S=(8.0, 4.0, 2.0, 1.0), N=20, K=15, scaling=1.0, dtype=torch.float64) -> LoraModule:
    """B A with the singular values S, its factors far from the SVD's."""
    R = len(S)
    U, V, mix = (torch.linalg.qr(torch.randn(n, R, dtype=torch.float64)).Q for n in (N, K, R))
    lora_B, lora_A = U * torch.tensor(S, dtype=torch.float64) @ mix, mix.mT @ V.mT
    return LoraModule(name, lora_A.to(dtype), lora_B.to(dtype), scaling)


def shear(config, modules: list[LoraModule]):
    method = method_for(config)
    method.prepare([m.name for m in modules])
    return method.finish([method.module(m, None) for m in modules])


def delta(m: LoraModule) -> torch.Tensor:
    return m.scaling * m.lora_B @ m.lora_A


def leading(m: LoraModule, c: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(delta(m))
    return (U[:, :c] * S[:c]) @ Vh[:c]


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (SVDConfig(rank=2), 2),
        (SVDConfig(rank=9), 4),
        (SVDConfig(energy=1.0), 4),
        (SVDConfig(energy=0.75), 1),  # 64 / 85 = 0.753
        (SVDConfig(energy=0.76), 2),
        (SVDConfig(energy=0.99), 4),  # 84 / 85 = 0.988
        (SVDConfig(ratio=0.24), 3),
        (SVDConfig(ratio=0.26), 2),
        (SVDConfig(ratio=1.0), 1),
        (SVDConfig(budget=3), 3),
    ],
    ids=str,
)
def test_singular_values(config, kept):
    m = module(scaling=0.5)
    (sheared,) = shear(config, [m])
    assert (sheared.rank_before, sheared.rank, sheared.module.scaling) == (4, kept, 0.5)
    torch.testing.assert_close(delta(sheared.module), leading(m, kept))
    torch.testing.assert_close(sheared.facts["singular_values"], [4.0, 2.0, 1.0, 0.5])


def test_budget_compares_modules_with_their_scaling():
    modules = [
        module("a", (8, 4, 2), scaling=1.0),
        module("b", (9, 3.5, 1.2), scaling=2.0),
        module("c", (0.1, 0.01, 0.001)),
    ]
    # One each, then 7 of b, 4 of a, 2.4 of b, 2 of a.
    for budget, ranks in ((3, [1, 1, 1]), (5, [2, 2, 1]), (6, [2, 3, 1]), (7, [3, 3, 1]), (99, [3, 3, 3])):
        found = shear(SVDConfig(budget=budget), modules)
        assert [s.rank for s in found] == ranks
        for s, m in zip(found, modules, strict=True):
            torch.testing.assert_close(delta(s.module), leading(m, s.rank))


def test_budget_gives_the_smallest_error_that_this_many_vectors_can():
    modules = [
        module(str(i), tuple((torch.rand(4, dtype=torch.float64) + 0.01).sort(descending=True).values.tolist()))
        for i in range(3)
    ]
    found = shear(SVDConfig(budget=7), modules)

    def lost(ranks) -> float:
        return sum((delta(m) - leading(m, r)).square().sum().item() for m, r in zip(modules, ranks, strict=True))

    every = [(a, b, 7 - a - b) for a in range(1, 5) for b in range(1, 5) if 1 <= 7 - a - b <= 4]
    assert math.isclose(lost([s.rank for s in found]), min(map(lost, every)))


def test_equal_singular_values_go_to_the_earlier_module():
    modules = [dataclasses.replace(module(S=(4, 2)), name=name) for name in "ab"]
    modules[1] = dataclasses.replace(modules[0], name="b")
    assert [s.rank for s in shear(SVDConfig(budget=3), modules)] == [2, 1]


def test_zero_vectors_go():
    m = module(S=(4, 2, 0, 0))
    assert [s.rank for s in shear(SVDConfig(energy=1.0), [m])] == [2]
    nothing = dataclasses.replace(m, lora_B=torch.zeros_like(m.lora_B))
    assert [s.rank for s in shear(SVDConfig(energy=0.9), [nothing])] == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_stays(dtype):
    (sheared,) = shear(SVDConfig(rank=2), [module(dtype=dtype)])
    assert sheared.module.lora_A.dtype == sheared.module.lora_B.dtype == dtype


def test_random_vectors():
    modules = [module(name) for name in "abcdefgh"]
    found = shear(RandomConfig(eta=0.5), modules)
    for s, m in zip(found, modules, strict=True):
        ranks = s.facts["kept"]
        assert (
            len(set(ranks)) == 2
            and torch.equal(s.module.lora_A, m.lora_A[ranks])
            and torch.equal(s.module.lora_B, m.lora_B[:, ranks])
        )
    assert len({tuple(s.facts["kept"]) for s in found}) > 1
    # A module's choice depends on the seed and its name alone.
    assert shear(RandomConfig(eta=0.5), modules[3:4])[0].facts == found[3].facts
    other = shear(RandomConfig(eta=0.5, seed=1), modules)
    assert [s.facts for s in other] != [s.facts for s in found]
    assert [s.rank for s in shear(RandomConfig(eta=0.01), modules)] == [1] * 8
    assert [s.rank for s in shear(RandomConfig(eta=1.0), modules)] == [4] * 8


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("model.layers.3.mlp.down_proj", True),
        ("bert.encoder.layer.0.intermediate.dense", True),
        ("bert.encoder.layer.0.output.dense", True),
        ("bert.encoder.layer.0.attention.output.dense", False),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0", True),
        ("encoder.block.0.layer.0.SelfAttention.q", False),
        ("model.decoder.layers.0.fc1", True),
        ("model.decoder.layers.0.self_attn.out_proj", False),
        ("transformer.h.0.mlp.c_proj", True),
        ("transformer.h.0.attn.c_proj", False),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h", True),
        ("gpt_neox.layers.0.attention.query_key_value", False),
        ("model.layers.0.block_sparse_moe.experts.0.w1", True),
        ("distilbert.transformer.layer.0.ffn.lin1", True),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", False),
        ("lm_head", False),
        ("transformer.output_layer", False),
        ("output", False),
        ("blocks.0.att.output", False),
        ("score", False),
    ],
)
def test_feed_forward_modules(name, answer):
    assert is_feed_forward(name) is answer


def test_taia():
    modules = [module(name) for name in NAMES]
    found = shear(TAIAConfig(), modules)
    assert {s.module.name for s in found if s.rank} == {name for name in NAMES if "self_attn" in name}
    assert all(torch.equal(s.module.lora_A, m.lora_A) for s, m in zip(found, modules, strict=True) if s.rank)
    for names, rule in (
        (["a.q_proj", "b.mlp.up"], None),
        (["x.attn.q"], "some feed-forward"),
        (["mlp.up"], "some other"),
    ):
        if rule:
            with pytest.raises(ValueError, match=f"shear: method taia must find {rule}"):
                method_for(TAIAConfig()).prepare(names)
        else:
            method_for(TAIAConfig()).prepare(names)


def test_layers():
    found = shear(DropConfig("layer", ratio=0.5), [module(name) for name in [*NAMES, "lm_head"]])
    ranks = {s.module.name: s.rank for s in found}
    layers = {i: {ranks[name] for name in NAMES if f".{i}." in name} for i in range(4)}
    assert sorted(map(tuple, layers.values())) == [(0,), (0,), (4,), (4,)] and ranks["lm_head"] == 4
    kohya = [f"lora_unet_down_blocks_{i}_attn_{kind}" for i in range(4) for kind in "qk"]
    gone = [
        s.module.name for s in shear(DropConfig("layer", ratio=0.25), [module(name) for name in kohya]) if not s.rank
    ]
    assert len(gone) == 2 and gone[0][:-1] == gone[1][:-1]
    with pytest.raises(ValueError, match="shear: method layer must find numbered layers"):
        method_for(DropConfig("layer")).prepare(["a", "b"])


def test_modules():
    found = [shear(DropConfig("module", ratio=0.25, seed=seed), [module(name) for name in NAMES]) for seed in range(3)]
    gone = [{s.module.name for s in run if not s.rank} for run in found]
    assert [len(names) for names in gone] == [3, 3, 3] and gone[0] != gone[1]
    assert sum(s.rank > 0 for s in shear(DropConfig("module", ratio=0.99), [module(name) for name in "abc"])) == 1
    assert all(s.rank for s in shear(DropConfig("module", ratio=0.0), [module(name) for name in "abc"]))


BAD = [
    (SVDConfig, {}, "exactly one of rank, energy, ratio and budget must be given, got none"),
    (SVDConfig, {"rank": 2, "energy": 0.5}, "got rank, energy"),
    (SVDConfig, {"rank": 0}, "SVDConfig: rank must be an integer > 0, got 0"),
    (SVDConfig, {"budget": 2.5}, "budget must be an integer > 0, got 2.5"),
    (SVDConfig, {"energy": 1.5}, r"energy must be in \(0, 1\], got 1.5"),
    (SVDConfig, {"ratio": math.nan}, r"ratio must be in \(0, 1\], got nan"),
    (RandomConfig, {"eta": 0}, r"RandomConfig: eta must be in \(0, 1\], got 0"),
    (RandomConfig, {"seed": "x"}, "seed must be an integer of 64 bits, got 'x'"),
    (DropConfig, {"level": "block"}, "DropConfig: level must be one of layer, module, got 'block'"),
    (DropConfig, {"ratio": 1.0}, r"ratio must be in \[0, 1\), got 1.0"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), BAD, ids=range(len(BAD)))
def test_bad_configuration(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**fields)


def test_a_budget_below_the_number_of_modules():
    with pytest.raises(ValueError, match="budget must be at least one vector for each of the 3 modules, got 2"):
        shear(SVDConfig(budget=2), [module(name) for name in "abc"])


def test_no_configuration():
    with pytest.raises(TypeError, match="shear: config must be one of NoRMConfig, .*, got dict"):
        method_for({})
