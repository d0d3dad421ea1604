"""`adaptlora finetune` with La-LoRA, whose ranks grow, and NoRA, whose pairs are nested: whole runs, their reports, PEFT beside them."""

import json
from dataclasses import replace
from pathlib import Path

import models
import pytest
import torch
from command_line import bert_folder, elsewhere, invoke, llama_folder, questions  # noqa: F401 - some are fixtures
from PIL import Image
from safetensors.torch import load_file

import adaptlora
from adaptlora.cli.finetune import _spec
from adaptlora.finetune import FinetuneSpec, peft_twin, run, runner, tasks
from adaptlora.finetune import data as data_module
from adaptlora.finetune.train import Learner
from adaptlora.rank_history import RankHistory

pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("elsewhere")
LALORA = ("--method", "lalora", "--r", 4, "--gamma", 2, "--temperature", 10, "--lr", 0.01)
MODULES, A_RANK = 13, 2 * (4 * 32 + 2 * 40) + 32  # of tiny_bert: Σ (K + N) over two blocks of six linears and a pooler


def finetune(bert, tmp_path, *arguments, out="out"):
    table = questions(tmp_path / "train.csv")
    result = invoke("finetune", "--model", bert, "--data", table, "--batch-size", 8, *arguments, "-o", out)
    return result, json.loads((Path(out) / "report.json").read_text())


def own_spec(bert, tmp_path, **fields):
    table = str(questions(tmp_path / "t.csv"))
    return FinetuneSpec(model=str(bert), data=table, **({"steps": 6, "batch_size": 8, "compare": False} | fields))


# La-LoRA


def test_lalora_from_the_shell(bert, tmp_path):
    result, report = finetune(bert, tmp_path, *LALORA, "--short")
    for text in (
        "La-LoRA",
        "PEFT LoRA r=4",
        "at the start",
        "compacted",
        "at the end (step 12)",
        "over the run",
        "all steps",
        "✓",
    ):
        assert text in result.output
    assert "clip" not in result.output
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "adapter",
        "loss.png",
        "ranks.png",
        "report.json",
        "steps.png",
    ]
    with Image.open("out/steps.png") as image:
        image.verify()
    history = json.loads(Path("out/adapter/rank_history.json").read_text())
    assert report["history"] == history and history["steps"] == 12 and len(history["changes"]) > 2
    assert RankHistory(**history).final_ranks() == report["ranks"] and len(report["ranks"]) == MODULES
    average = sum(report["ranks"].values()) / MODULES
    assert 1 < report["run_average"] == RankHistory(**history).average_rank() < average
    assert report["t_c"] is None and set(report["step_times"]) == {"all"} and report["peft_r"] == 4
    assert 0 <= report["peft_difference"] <= 1e-5


def test_lalora_sizes_are_those_of_the_ranks_once_compacted(bert, tmp_path):
    _, report = finetune(bert, tmp_path, *LALORA, "--short")
    sizes = report["sizes"]
    assert set(sizes) == {"before", "end", "compacted", "peft"}
    assert sizes["before"]["adapter_parameters"] == A_RANK
    assert sizes["before"]["optimizer_bytes"] == 2 * 4 * A_RANK
    held = {at: sizes[at]["adapter_bytes"] for at in sizes}
    assert held["before"] == held["end"] == held["peft"] == 4 * 4 * A_RANK
    assert A_RANK < sizes["end"]["adapter_parameters"] == sizes["compacted"]["adapter_parameters"] < 4 * A_RANK
    assert held["compacted"] == 4 * sizes["compacted"]["adapter_parameters"]
    assert sizes["compacted"]["optimizer_bytes"] == 2 * held["compacted"] < sizes["end"]["optimizer_bytes"]


def test_rank_changes_do_not_ask_for_a_test_each(bert, tmp_path, monkeypatch):
    tested = []
    evaluate = tasks.Task.evaluate
    monkeypatch.setattr(tasks.Task, "evaluate", lambda *args: tested.append(1) or evaluate(*args))
    report = run(own_spec(bert, tmp_path, method="lalora", r=4, gamma=8.0, temperature=10.0, lr=0.01))
    assert len(report.history["changes"]) > 1
    assert len(tested) == 2 and set(report.scores["ours"]) == {"before", "end"}


def test_lalora_on_a_language_model(llama):
    rows = [{"p": f"{word} is :", "a": f"the {word} ."} for word in ("cat", "river", "city", "year", "name", "when")]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = ("--task", "causal-lm", "--text-column", "p", "--label-column", "a")
    result = invoke(
        *("finetune", "--model", llama, "--data", "pairs.jsonl", *columns, *LALORA, "--steps", 5, "--batch-size", 2),
        *("--no-compare", "-o", "out"),
    )
    assert "perplexity ↓" in result.output and "PEFT LoRA" not in result.output
    report = json.loads(Path("out/report.json").read_text())
    assert list(report["history"]["groups"]) == ["model.layers.0", "model.layers.1"]


def test_another_methods_run_leaves_no_history_of_this_one(bert, tmp_path):
    finetune(bert, tmp_path, *LALORA, "--short", "--no-compare")
    assert Path("out/steps.png").is_file() and Path("out/adapter/rank_history.json").is_file()
    Path("out/notes.txt").write_text("mine")
    _, report = finetune(bert, tmp_path, "--method", "lora", "--short", "--no-compare")
    assert not Path("out/steps.png").exists() and not Path("out/adapter/rank_history.json").exists()
    assert Path("out/notes.txt").is_file() and report["history"] is report["run_average"] is None


def test_an_adaptive_clip_is_tested_when_it_comes(bert, tmp_path):
    adaptive = {"schedule": "adaptive", "min_steps": 2, "max_steps": 4}
    report = run(own_spec(bert, tmp_path, r=4, target_r=2.0, options=adaptive))
    assert 2 <= report.t_p <= report.t_c <= 4
    assert set(report.scores["ours"]) == {"before", "clip", "end"} and set(report.sizes) == {"before", "after"}


def test_a_clip_that_never_comes_and_a_split_that_is_not_there_are_noted(bert, tmp_path):
    calm = {"schedule": "adaptive", "lambda_p": 1e-12, "lambda_c": 1e-13, "min_steps": 1}
    report = run(own_spec(bert, tmp_path, options=calm, test_split="validation"))
    assert report.t_c is None and [note.partition(":")[0] for note in report.notes] == [
        f"{tmp_path / 't.csv'} is one file, without the split validation",
        "the ranks were not clipped",
    ]


# NoRA


def test_nora_from_the_shell(bert, tmp_path):
    result, report = finetune(bert, tmp_path, "--method", "nora", "--r", 4, "--r-out", 12, "--short")
    trained = MODULES * 2 * 12 * 4
    for text in ("NoRA", "frozen factors, bytes", "factorising", f"{trained:,}", "PEFT LoRA r=3", "all steps", "✓"):
        assert text in result.output
    assert "clip" not in result.output and not Path("out/steps.png").exists()
    assert report["sizes"]["before"]["adapter_parameters"] == trained and set(report["sizes"]) == {"before", "peft"}
    assert report["sizes"]["before"]["outer_bytes"] == 4 * 12 * A_RANK
    assert report["peft_r"] == round(trained / A_RANK) == 3
    assert report["sizes"]["peft"]["adapter_parameters"] == 3 * A_RANK
    # what is taken out of the base weights leaves the outputs as they were
    assert report["losses"]["ours"][0] == pytest.approx(report["losses"]["peft"][0], rel=1e-4)
    assert set(report["scores"]["peft"]) == {"before", "end"}
    assert set(report["ranks"].values()) == {4} and 0 <= report["peft_difference"] <= 1e-5
    tensors = load_file("out/adapter/adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {8}


def test_activation_weighted_factors_come_from_the_first_training_batch(bert, tmp_path, monkeypatch):
    seen = []
    attach = adaptlora.attach
    monkeypatch.setattr(adaptlora, "attach", lambda *args, **more: seen.append(more) or attach(*args, **more))
    spec = own_spec(bert, tmp_path, method="nora", r=4, r_out=8, options={"outer": "activation"})
    run(spec)
    task = tasks.build(spec, data_module.load(spec))
    first = next(task.batches())
    assert seen[0]["calibration"].keys() == first.keys()
    assert all(torch.equal(seen[0]["calibration"][name], tensor) for name, tensor in first.items())
    run(replace(spec, options={}))
    assert seen[1]["calibration"] is None


def test_without_a_residual_both_learners_are_tested_at_the_start(bert, tmp_path, monkeypatch):
    tested = []
    monkeypatch.setattr(tasks.Task, "evaluate", lambda self, model: tested.append(model) or {"accuracy": len(tested)})
    spec = own_spec(bert, tmp_path, method="nora", r=4, r_out=8, options={"residual": False}, compare=True)
    report = run(spec)
    assert (report.scores["ours"]["before"], report.scores["peft"]["before"]) == ({"accuracy": 1}, {"accuracy": 2})
    run(replace(spec, method="lora", options={}))
    assert len(tested) == 4 + 3


# AdaLoRA, DyLoRA, PiSSA and LoRA+


def test_adalora_from_the_shell(bert, tmp_path):
    result, report = finetune(bert, tmp_path, "--method", "adalora", "--r", 4, "--target-r", 2, "--short")
    for text in ("AdaLoRA", "PEFT LoRA r=4", "at the start", "at the end (step 12)", "✓"):
        assert text in result.output
    assert sum(report["ranks"].values()) == 2 * MODULES and max(report["ranks"].values()) <= 4
    assert set(report["sizes"]) == {"before", "end", "peft"}
    assert report["sizes"]["before"]["adapter_parameters"] == 4 * (A_RANK + MODULES)
    assert report["sizes"]["end"]["adapter_parameters"] < 3 * A_RANK
    assert 0 <= report["peft_difference"] <= 1e-5 and report["scores"]["peft"]["before"]


def test_dylora_from_the_shell(bert, tmp_path):
    result, report = finetune(bert, tmp_path, "--method", "dylora", "--r", 4, "--r-min", 2, "--frozen", "--short")
    assert "DyLoRA" in result.output and report["spec"]["frozen"] is True
    assert set(report["ranks"].values()) == {4} and 0 <= report["peft_difference"] <= 1e-5
    assert report["sizes"]["before"]["adapter_parameters"] in [b * A_RANK for b in (2, 3, 4)]
    assert (
        report["sizes"]["compacted"]["adapter_parameters"]
        == 4 * A_RANK
        == report["sizes"]["peft"]["adapter_parameters"]
    )


@pytest.mark.parametrize("method", ["lora", "normal"])
def test_pissa_and_loraplus_from_the_shell(bert, tmp_path, method):
    arguments = ("--method", method, "--r", 4, "--target-r", 2, "--init", "pissa", "--loraplus-lr-ratio", 4)
    result, report = finetune(bert, tmp_path, *arguments, "--short")
    assert "(PiSSA)" in result.output and "factorising" in result.output
    assert report["losses"]["ours"][0] == pytest.approx(report["losses"]["peft"][0], rel=1e-4)
    assert sum(report["ranks"].values()) == (2 if method == "normal" else 4) * MODULES
    tensors = load_file("out/adapter/adapter_model.safetensors")
    found = [tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name]
    assert sum(found) == sum(report["ranks"].values()) + 4 * MODULES, "what was taken out of the base comes along"
    assert 0 <= report["peft_difference"] <= 1e-5


def test_learning_rates_keep_their_ratio():
    model = models.tiny_bert()
    config = adaptlora.LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    adapter = adaptlora.attach(model, config)
    learner = Learner(model, adapter.parameter_groups(0.1, loraplus_lr_ratio=8), lr=0.1, adapter=adapter)
    for factor in (0.5, 0.25):
        learner.step(models.bert_batch(), factor)
        rates = [group["lr"] for group in learner.optimizer.param_groups]
        assert rates == pytest.approx([0.1 * factor, 0.8 * factor, 0.8 * factor])


# PEFT beside them


def test_twin_of_lalora_has_all_its_vectors():
    model, base = models.tiny_bert(), models.tiny_bert()
    config = adaptlora.LaLoRAConfig(
        r=5, lora_alpha=10, target_modules=["query", "dense"], rank_pattern={"query": 3}, group_by="module"
    )
    adapter = adaptlora.attach(model, config)
    theirs = peft_twin.twin(base, adapter).base_model.model
    assert peft_twin.rank(adapter) == 5 and set(adapter.ranks().values()) == {1}
    for name, layer in adapter.layers.items():
        lora_A, lora_B = layer.pair.whole()
        module = theirs.get_submodule(name)
        assert torch.equal(module.lora_A["default"].weight, lora_A) and lora_A.shape[0] == (5, 3)["query" in name]
        assert torch.equal(module.lora_B["default"].weight, lora_B)
        assert module.scaling["default"] == pytest.approx(layer.scaling)


@pytest.mark.parametrize(("r", "r_out", "expected"), [(4, 12, 3), (1, 2, 1), (8, 16, 7)])
def test_twin_of_nora_has_as_many_parameters_and_the_same_scaling(r, r_out, expected):
    base = models.tiny_bert()
    config = adaptlora.NoRAConfig(r=r, r_out=r_out, lora_alpha=6, target_modules="all-linear")
    adapter = adaptlora.attach(models.tiny_bert(), config)
    assert peft_twin.rank(adapter) == expected and len(adapter.layers) == MODULES
    theirs = peft_twin.twin(base, adapter).base_model.model
    for name, layer in adapter.layers.items():
        module = theirs.get_submodule(name)
        assert module.lora_A["default"].weight.shape[0] == expected and not module.lora_B["default"].weight.any()
        assert module.scaling["default"] == pytest.approx(layer.scaling)
    narrower = adaptlora.attach(models.tiny_bert(), replace(config, rank_pattern={"dense": 1}))
    assert peft_twin.rank(narrower) == max(1, round((6 * r + 7) * 2 * r_out / A_RANK))


# The specification


def test_fields_of_a_method_reach_its_configuration_and_no_others():
    own = FinetuneSpec(model="unused", data="unused", gamma=3.0, temperature=7.0, r_out=32, t_p=5, t_c=6)
    lalora = replace(own, method="lalora", options={"group_by": "module"}).config(["head"])
    assert type(lalora) is adaptlora.LaLoRAConfig and (lalora.gamma, lalora.temperature) == (3.0, 7.0)
    assert lalora.group_by == "module" and lalora.modules_to_save == ["head"]
    nora = replace(own, method="nora", r=4, options={"inner_init": "kaiming"}).config(None)
    assert type(nora) is adaptlora.NoRAConfig and (nora.r, nora.r_out, nora.inner_init) == (4, 32, "kaiming")
    with pytest.raises(ValueError, match="options must be fields of LaLoRAConfig, got r_out, eta_p"):
        replace(own, method="lalora", options={"r_out": 2, "eta_p": 1}).config(None)
    replace(own, method="nora", steps=3)  # t_c = 6 is NormAL's alone


@pytest.mark.parametrize("method", ["lora", "lalora", "nora"])
def test_a_presets_own_options_stay_with_its_method(method):
    kinds = {"lora": adaptlora.LoraConfig, "lalora": adaptlora.LaLoRAConfig, "nora": adaptlora.NoRAConfig}
    spec = _spec("trec", {"method": method}, short=False)
    assert type(spec.config(None)) is kinds[method] and spec.lr == 2e-3
    assert _spec("trec", {"method": "normal"}, short=True).config(None).eta_p == 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "lalora", "--gamma", -1), "LaLoRAConfig: gamma must be a number ≥ 0, got -1.0"),
        (("--method", "lalora", "--temperature", 0), "LaLoRAConfig: temperature must be a number > 0, got 0.0"),
        (("--method", "nora", "--r", 8, "--r-out", 4), "NoRAConfig: r_out must be an integer ≥ r=8, got 4"),
        (
            ("--method", "nora", "--r", 20),
            "r of bert.encoder.layer.0.attention.self.query must be at most its outer rank 16, got 20",
        ),
    ],
)
def test_bad_numbers_are_one_clear_line(bert, tmp_path, arguments, message):
    table = questions(tmp_path / "t.csv")
    result = invoke("finetune", "--model", bert, "--data", table, *arguments, "-o", "out", code=2)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not Path("out").exists()


def test_an_interrupted_run_keeps_the_history_that_was_there(bert, tmp_path, monkeypatch):
    finetune(bert, tmp_path, *LALORA, "--short", "--no-compare")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.plots, "rank_steps", interrupt)
    arguments = ("--model", bert, "--data", "train.csv", *LALORA, "--short", "--no-compare", "-o", "out")
    invoke("finetune", *arguments, code=130)
    there = (path for path in tmp_path.rglob("*") if path.is_file() and "unfinished" not in path.parts)
    assert {path: path.read_bytes() for path in there} == before
