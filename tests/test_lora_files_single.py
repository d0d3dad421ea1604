"""kohya's and diffusers' files: scalings as their loaders compute them, the same keys out as in, metadata that stays true."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adaptlora import lora_files
from adaptlora.lora_files import kohya

UNET, TEXT = "lora_unet_down_blocks_{}_attentions_0_to_q", "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
STYLES = {
    "peft": ("unet.down_blocks.{}.attn1.to_q", ".lora_A.weight", ".lora_B.weight"),
    "named": ("unet.down_blocks.{}.attn1.to_q", ".lora_A.default.weight", ".lora_B.default.weight"),
    "dots": ("text_encoder.layers.{}.to_q", ".lora.down.weight", ".lora.up.weight"),
    "processor": ("unet.down_blocks.{}.attn1.processor.to_q", "_lora.down.weight", "_lora.up.weight"),
    "linear_layer": ("text_encoder.layers.{}.q_proj", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}


def factors(rank, K=6, N=5, dtype=torch.float32, kernel=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    ones = (1,) * len(kernel)
    return (
        torch.randn(rank, K, *kernel, generator=generator).to(dtype),
        torch.randn(N, rank, *ones, generator=generator).to(dtype),
    )


def kohya_file(path, dtype=torch.float32, metadata=None):
    tensors = {}
    for i, (stem, rank, alpha, kernel) in enumerate(
        [(UNET.format(10), 4, 2.0, ()), (UNET.format(9), 4, 8.0, (3, 3)), (TEXT, 2, None, ())]
    ):
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = factors(rank, 6, 5, dtype, kernel, i)
        if alpha:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=dtype)
    save_file(tensors, path, metadata=metadata)
    return tensors


def kohya_update(tensors, stem):
    """scaling · B A as sd-scripts computes it: alpha / r with r the rows of lora_down, 1 without alpha; in float64."""
    down, up = tensors[f"{stem}.lora_down.weight"].double(), tensors[f"{stem}.lora_up.weight"].double()
    scale = tensors[f"{stem}.alpha"].item() / down.shape[0] if f"{stem}.alpha" in tensors else 1.0
    return scale * torch.einsum("nr,r...->n...", up.flatten(1), down)


def update(module):
    return module.scaling * (module.lora_B.double() @ module.lora_A.double())


def resized(module, rank, scaling):
    lora_A, lora_B = factors(rank, module.lora_A.shape[1], module.lora_B.shape[0], seed=7)
    dtype = module.lora_A.dtype
    return dataclasses.replace(module, lora_A=lora_A.to(dtype), lora_B=lora_B.to(dtype), scaling=scaling)


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kohya_both_ways(dtype, tmp_path):
    tensors = kohya_file(tmp_path / "in.safetensors", dtype)
    file = lora_files.read(tmp_path / "in.safetensors")
    assert file.kind == "kohya" and list(file.modules) == [TEXT, UNET.format(9), UNET.format(10)]
    assert [module.scaling for module in file.modules.values()] == [1, 2, 0.5]
    for stem, module in file.modules.items():
        torch.testing.assert_close(update(module), kohya_update(tensors, stem).flatten(1))
    file.write(tmp_path / "same.safetensors", file.modules)
    same = load_file(tmp_path / "same.safetensors")
    assert same.keys() == tensors.keys() and all(torch.equal(same[key], tensors[key]) for key in tensors)
    assert all(same[key].dtype == dtype and same[key].shape == tensors[key].shape for key in tensors)
    modules = {stem: resized(file.modules[stem], 3, 0.37) for stem in (TEXT, UNET.format(9))}
    file.write(tmp_path / "out.safetensors", modules)
    out = load_file(tmp_path / "out.safetensors")
    assert {key.split(".")[0] for key in out} == modules.keys()
    assert out[f"{UNET.format(9)}.lora_down.weight"].shape == (3, 6, 3, 3) and out[f"{TEXT}.alpha"].shape == ()
    for stem, module in modules.items():
        torch.testing.assert_close(kohya_update(out, stem).flatten(1), update(module), rtol=1e-7, atol=0)
        assert out[f"{stem}.lora_up.weight"].dtype == dtype


def test_alpha_keeps_its_dtype_where_that_holds_it():
    assert kohya.stored_alpha(torch.tensor(4.0).bfloat16(), 0.5, 3).dtype == torch.bfloat16
    rounded = kohya.stored_alpha(torch.tensor([4.0]).bfloat16(), 0.37, 3)
    assert rounded.dtype == torch.float32 and rounded.shape == (1,)
    assert kohya.stored_alpha(torch.tensor(4), 0.37, 3).dtype == torch.float32


def test_kohya_metadata(tmp_path):
    metadata = {
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "sshs_model_hash": "a",
        "sshs_legacy_hash": "b",
        "x": "y",
    }
    kohya_file(tmp_path / "in.safetensors", metadata=metadata)
    file = lora_files.read(tmp_path / "in.safetensors")
    file.write(tmp_path / "out.safetensors", file.modules)
    expected = {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic", "x": "y"}
    assert metadata_of(tmp_path / "out.safetensors") == expected
    file.write(tmp_path / "out.safetensors", {TEXT: resized(file.modules[TEXT], 3, 0.5)})
    assert metadata_of(tmp_path / "out.safetensors") == {"ss_network_dim": "3", "ss_network_alpha": "1.5", "x": "y"}


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_diffusers_styles_stay(style, alpha, tmp_path):
    stem, down, up = STYLES[style]
    tensors = {}
    for i in (10, 9):
        tensors[stem.format(i) + down], tensors[stem.format(i) + up] = factors(4, seed=i)
        if alpha:
            tensors[f"{stem.format(i)}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "in.safetensors")
    file = lora_files.read(tmp_path / "in.safetensors")
    assert file.kind == "diffusers" and list(file.modules) == [stem.format(9), stem.format(10)]
    assert {module.scaling for module in file.modules.values()} == {0.5 if alpha else 1}
    modules = {name: resized(module, 3, 0.37) for name, module in file.modules.items()}
    file.write(tmp_path / "out.safetensors", modules)
    out = load_file(tmp_path / "out.safetensors")
    assert out.keys() == tensors.keys()
    for name, module in modules.items():
        scale = out[f"{name}.alpha"].item() / 3 if alpha else 1.0
        torch.testing.assert_close(
            scale * (out[name + up].double() @ out[name + down].double()), update(module), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("component", ["unet", ""])
def test_diffusers_metadata_gives_the_scaling(component, tmp_path):
    prefix = f"{component}." if component else ""
    config = {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"b": 2},
        "alpha_pattern": {"c": 1},
        "target_modules": ["a", "b", "c"],
    }
    tensors = {}
    for name, rank in (("x.a", 4), ("x.b", 2), ("x.c", 4)):
        for part, value in zip("AB", factors(rank), strict=True):
            tensors[f"{prefix}{name}.lora_{part}.weight"] = value
    metadata = {
        "lora_adapter_metadata": json.dumps({prefix + field: value for field, value in config.items()}),
        "format": "pt",
    }
    save_file(tensors, tmp_path / "in.safetensors", metadata=metadata)
    file = lora_files.read(tmp_path / "in.safetensors")
    assert [module.scaling for module in file.modules.values()] == [1.5, 3, 0.25]
    modules = {
        f"{prefix}x.a": file.modules[f"{prefix}x.a"],
        f"{prefix}x.c": resized(file.modules[f"{prefix}x.c"], 3, 0.75),
    }
    file.write(tmp_path / "out.safetensors", modules)
    again = lora_files.read(tmp_path / "out.safetensors")
    assert {name: module.scaling for name, module in again.modules.items()} == {
        name: module.scaling for name, module in modules.items()
    }
    assert torch.equal(again.modules[f"{prefix}x.c"].lora_B, modules[f"{prefix}x.c"].lora_B)
    written = json.loads(metadata_of(tmp_path / "out.safetensors")["lora_adapter_metadata"])
    assert written[f"{prefix}target_modules"] == ["x.a", "x.c"] and written.keys() >= {
        prefix + field for field in config
    }


def test_diffusers_bias_is_folded_with_the_scaling(tmp_path):
    lora_A, lora_B = factors(4)
    parts = {"t.a.lora_A.weight": lora_A, "t.a.lora_B.weight": lora_B, "t.a.lora_B.bias": torch.arange(5.0)}
    save_file(parts, tmp_path / "in.safetensors")
    file = lora_files.read(tmp_path / "in.safetensors")
    file.write(tmp_path / "out.safetensors", {"t.a": dataclasses.replace(file.modules["t.a"], scaling=0.5)})
    out = load_file(tmp_path / "out.safetensors")
    assert torch.equal(out["t.a.lora_B.weight"], lora_B / 2) and torch.equal(
        out["t.a.lora_B.bias"], torch.arange(5.0) / 2
    )


UNSUPPORTED = {
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lora_mid.weight": "a Tucker core",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "diff_b": "no part of a LoRA",
    "lora_A.weight": "no part of a LoRA",
}


@pytest.mark.parametrize("part", UNSUPPORTED)
def test_unsupported_modules(part, tmp_path):
    tensors = kohya_file(tmp_path / "in.safetensors")
    tensors |= {f"{TEXT}.{part}": torch.ones(3), "bundle_emb.a": torch.ones(2)}
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(
        ValueError, match=rf"read: .*in.safetensors: {TEXT}: {part} is not supported \({UNSUPPORTED[part]}"
    ):
        lora_files.read(tmp_path / "in.safetensors")
    file = lora_files.read(tmp_path / "in.safetensors", skip_unsupported=True)
    assert list(file.skipped) == [TEXT] and len(file.modules) == 2
    file.write(tmp_path / "out.safetensors", {})
    out = load_file(tmp_path / "out.safetensors")
    kept = {key for key in tensors if key.startswith((TEXT, "bundle_emb"))}
    assert out.keys() == kept and all(torch.equal(out[key], tensors[key]) for key in kept)


def changed(tensors, key, value):
    tensors[key] = value


DAMAGE = {
    "half": (lambda t: t.pop(f"{TEXT}.lora_up.weight"), f"{TEXT} must hold lora_A"),
    "alpha alone": (
        lambda t: [t.pop(f"{UNET.format(9)}.lora_{half}.weight") for half in ("up", "down")],
        "must hold lora_A",
    ),
    "alpha": (lambda t: changed(t, f"{TEXT}.alpha", torch.tensor(-1.0)), "alpha must be one number > 0.*got -1.0"),
    "alphas": (lambda t: changed(t, f"{TEXT}.alpha", torch.ones(2)), "alpha must be one number > 0"),
    "nan alpha": (lambda t: changed(t, f"{TEXT}.alpha", torch.tensor(torch.nan)), "alpha must hold finite"),
    "kernel": (
        lambda t: changed(t, f"{UNET.format(9)}.lora_up.weight", torch.ones(5, 4, 3, 3)),
        r"must hold lora_A .* got .*\(5, 4, 3, 3\)",
    ),
    "fp8": (
        lambda t: changed(t, f"{TEXT}.lora_up.weight", torch.ones(5, 2).to(torch.float8_e4m3fn)),
        "got torch.float8_e4m3fn",
    ),
    "none": (lambda t: [t.pop(key) for key in list(t)[1:]] and changed(t, "a", t.popitem()[1]), "at least one module"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name, tmp_path):
    spoil, text = DAMAGE[name]
    tensors = kohya_file(tmp_path / "in.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match=f"read: .*in.safetensors.*{text}"):
        lora_files.read(tmp_path / "in.safetensors")


def test_no_file_no_safetensors(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.safetensors is missing"):
        lora_files.read(tmp_path / "none.safetensors")
    (tmp_path / "lora.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="lora.pt must be a .safetensors file"):
        lora_files.read(tmp_path / "lora.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    kohya_file(tmp_path / "a.safetensors")
    file = lora_files.read(tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(kohya, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            file.write(tmp_path / "a.safetensors", {TEXT: file.modules[TEXT]})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.safetensors", before)]
    file.write(tmp_path / "a.safetensors", {TEXT: file.modules[TEXT]})  # in the place of what is mapped
    assert list(lora_files.read(tmp_path / "a.safetensors").modules) == [TEXT]
