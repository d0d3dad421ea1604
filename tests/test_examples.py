"""The scripts of examples/, each run with --tiny for a few steps."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs an example into `tmp_path`; returns what it printed."""

    def run(name: str, *options: str) -> str:
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [name, "--tiny", "--out", str(tmp_path), *options])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def ranks(folder: Path) -> list[int]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return [tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key]


def test_nlu_encoder(run, tmp_path):
    text = run("nlu_encoder.py", "--steps", "12")
    assert "the same with stock PEFT" in text
    kept = ranks(tmp_path / "adapter")
    assert sum(kept) == 4 * len(kept) and set(kept) != {4}


def test_causal_lm_4bit(run, tmp_path):
    pytest.importorskip("bitsandbytes")
    text = run("causal_lm_4bit.py", "--steps", "10", "--lr", "1e-2")
    before, after, pruned = (float(line.rpartition(":")[2]) for line in text.splitlines() if "perplexity" in line)
    assert after < before and pruned < before
    assert sum(ranks(tmp_path / "adapter")) == 4 * len(ranks(tmp_path / "adapter"))
    assert set(ranks(tmp_path / "served")) == {8}
    config = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8


def test_vit(run, tmp_path):
    text = run("vit.py", "--steps", "12")
    assert "merged, without adaptlora" in text and "rank vectors" in text
    assert (tmp_path / "merged" / "model.safetensors").exists()
    with pytest.raises(SystemExit):
        run("vit.py")


def test_the_encoder_needs_three_steps(run, tmp_path):
    with pytest.raises(SystemExit):
        run("nlu_encoder.py", "--steps", "2")
    run("nlu_encoder.py", "--steps", "3")
    kept = ranks(tmp_path / "adapter")
    assert sum(kept) == 4 * len(kept)
