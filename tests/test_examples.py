"""The scripts of examples/, each run with --tiny for a few steps, and the blocks of docs/migrating.md."""

import dataclasses
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from adaptlora.cli import app

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


@pytest.mark.skipif(peft.__version__ != "0.21.2", reason="the guide lists this version's fields")
def test_the_guide_names_every_field_of_pefts():
    text = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    table = text.partition("| PEFT's LoraConfig | here |")[2].partition("\n\n")[0]
    first = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= set(", ".join(first).split(", "))


def test_the_guide_from_peft_runs_as_one_script_and_its_shell_lines_after_it(monkeypatch, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    loader = [{"input_ids": row, "labels": row} for row in torch.randint(0, 40, (8, 2, 7))]

    def base_model():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))

    def train(model, optimizer):
        model.train()
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    text = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    lines = re.findall(r"^    adaptlora (.+)$", text, re.MULTILINE)
    assert (len(blocks), len(lines)) == (8, 4)
    monkeypatch.chdir(tmp_path)
    base_model().save_pretrained("llama")
    names = {"base_model": base_model, "train": train, "loader": loader}
    for block in blocks:
        exec(compile(block, "docs/migrating.md", "exec"), names)
    assert sum(ranks(tmp_path / "pruned")) == sum(ranks(tmp_path / "ours")) == 16
    assert set(ranks(tmp_path / "dylora-4")) == {4}
    assert sum(ranks(tmp_path / "baseline-AdaLoRAConfig-kaiming")) == 16
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    for line in lines:
        result = CliRunner().invoke(app, shlex.split(line))
        assert result.exit_code == 0, f"{line}: {result.output}"
    assert before.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}.items()
    assert sum(ranks(tmp_path / "small")) == 8
    expected = names["theirs"].eval()(**loader[0]).logits
    for start in ("", "theirs-"):
        served, padded = tmp_path / f"{start}served", tmp_path / f"{start}padded"
        assert sum(ranks(served)) == 16 and set(ranks(padded)) == {8}
        for folder in (served, padded):
            config = json.loads((folder / "adapter_config.json").read_text())
            assert config["r"] == config["lora_alpha"] and not config["use_rslora"]
            loaded = peft.PeftModel.from_pretrained(base_model(), folder).eval()
            torch.testing.assert_close(loaded(**loader[0]).logits, expected, rtol=1e-4, atol=1e-5)
        merged = LlamaForCausalLM.from_pretrained(tmp_path / f"{start}merged").eval()
        torch.testing.assert_close(merged(**loader[0]).logits, expected, rtol=1e-4, atol=1e-5)
