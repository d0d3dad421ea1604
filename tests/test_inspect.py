"""adaptlora inspect: what is in an adapter's folder, without a model."""

import json
from pathlib import Path

import models
import pytest
import torch
from command_line import elsewhere, invoke  # noqa: F401 - one is a fixture
from PIL import Image

import adaptlora
from adaptlora.inspection import inspect_adapter
from adaptlora.rank_history import RankHistory

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_inspect_our_adapter(tmp_path):
    model = models.tiny_bert()
    config = adaptlora.LoraConfig(
        r=4,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
        rank_pattern={"layer.1.attention.self.value": 2},
    )
    adapter = adaptlora.attach(model, config)
    models.randomise(adapter)
    adapter.save(tmp_path / "a")
    result = invoke("inspect", "a", "-o", "pictures/ranks.png")
    for text in (
        "bert.encoder.layer",
        "1.attention.self.value",
        "16→16",
        "14 vectors in 4 modules, 3.50 on average",
        "█",
        "classifier",
    ):
        assert text in result.output
    with Image.open("pictures/ranks.png") as image:
        image.verify()
    found = inspect_adapter("a")
    assert {module.name: module.rank for module in found.modules} == adapter.ranks()
    assert sum(module.parameters for module in found.modules) == adapter.summary()["adapter_parameters"]
    layer = adapter.layers["bert.encoder.layer.1.attention.self.value"]
    norms = (layer.lora_A.norm(dim=1) + layer.lora_B.norm(dim=0)).tolist()
    expected = [min(1, norm / norms[0]) for norm in norms]
    assert found.modules[-1].scores == pytest.approx(expected, rel=1e-5)


def test_inspect_any_peft_adapter_layers_in_order(tmp_path):
    """DoRA has tensors that adaptlora cannot train; they can be looked at."""
    base = torch.nn.Sequential(*[torch.nn.Linear(6, 6) for _ in range(11)])
    targets = [str(i) for i in range(11)]
    peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=targets, use_dora=True)).save_pretrained(
        tmp_path / "dora"
    )
    found = inspect_adapter(tmp_path / "dora")
    assert [module.name for module in found.modules] == targets
    assert found.modules[0].scores == pytest.approx([1.0, *found.modules[0].scores[1:]])
    assert len(found.others) == 11 and all("magnitude" in name for name in found.others)
    assert "33 vectors in 11 modules" in invoke("inspect", "dora").output


def test_inspect_refuses_what_it_cannot_read(tmp_path):
    def refused(*arguments):
        lines = [line for line in invoke("inspect", *arguments, code=2).stderr.splitlines() if line]
        assert len(lines) == 1
        return lines[0]

    assert "must be a folder with adapter_config.json, got 'nowhere'" in refused("nowhere")
    folder = tmp_path / "a"
    folder.mkdir()
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config.write_text("{")
    assert "must be a folder with adapter_model.safetensors" in refused("a")
    weights.write_bytes(b"not tensors")
    assert "must be JSON" in refused("a")
    config.write_text('{"peft_type": "IA3"}')
    assert "peft_type must be \"LORA\", got 'IA3'" in refused("a")
    config.write_text('{"peft_type": "LORA", "r": 2}')
    assert "must be a whole safetensors file" in refused("a")
    from safetensors.torch import save_file

    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 3)}, weights)
    assert "x must hold lora_A (R, K) and lora_B (N, R) of one rank" in refused("a")
    save_file({"y": torch.zeros(2)}, weights)
    assert "must hold lora_A and lora_B of at least one module" in refused("a")
    assert "out must end in .png, got 'picture.jpg'" in refused("a", "-o", "picture.jpg")


# Ranks over the steps


@pytest.fixture
def grown(tmp_path):
    """A La-LoRA adapter that made six steps, saved in the folder `grown`."""
    model = models.tiny_bert()
    config = adaptlora.LaLoRAConfig(
        r=4, gamma=4, temperature=10, target_modules=["query", "dense"], modules_to_save=["classifier"]
    )
    adapter = adaptlora.attach(model, config)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    adapter.track(optimizer)
    for _ in range(6):
        model(**models.bert_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
    adapter.save(tmp_path / "grown")
    return adapter


def test_inspect_mentions_and_draws_the_ranks_over_the_steps(grown):
    history = RankHistory(**grown.method.history())
    told = f"rank_history.json: ranks over 6 steps in 3 groups, {history.average_rank():.2f} on average over the run"
    assert told in invoke("inspect", "grown").output
    result = invoke("inspect", "grown", "--over-steps", "new/steps.png", "-o", "ranks.png")
    assert "ranks over the steps in new/steps.png" in result.output
    for name in ("new/steps.png", "ranks.png"):
        with Image.open(name) as image:
            image.verify()
    assert inspect_adapter("grown").history == history and history.final_ranks() == grown.ranks()
    assert "--over-steps steps.png" in invoke("inspect", "--help").output


def test_inspect_refuses_a_history_that_is_missing_damaged_or_anothers(grown):
    def refused(*arguments):
        lines = [line for line in invoke("inspect", "grown", *arguments, code=2).stderr.splitlines() if line]
        assert len(lines) == 1
        return lines[0]

    assert "over_steps must end in .png, got 'steps.gif'" in refused("--over-steps", "steps.gif")
    file = Path("grown/rank_history.json")
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole)[:-20])
    assert "grown/rank_history.json must hold the ranks over the steps of a run" in refused()
    file.write_text("[1, 2]")
    assert "must hold the ranks over the steps of a run" in refused("--over-steps", "steps.png")
    file.write_bytes(b"\xff\xfe")
    assert "must hold the ranks over the steps of a run" in refused()
    file.write_text(json.dumps(whole | {"start": [1]}))
    assert "start must be a rank for each of 3 groups, got [1]" in refused()
    name = "bert.encoder.layer.0.attention.output.dense"
    file.write_text(json.dumps(whole | {"changes": [], "start": [9, 9, 9]}))
    assert f"must end with the adapter's own ranks, got 9 for {name}, of rank {grown.ranks()[name]}" in refused()
    file.unlink()
    assert "over_steps needs a rank_history.json in the adapter's folder, got none in 'grown'" in refused(
        "--over-steps", "steps.png"
    )
    assert "rank_history" not in invoke("inspect", "grown").output and not Path("steps.png").exists()
