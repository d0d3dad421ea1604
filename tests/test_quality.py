"""The quality tables: what is compared with what, how learning rates are found, what is kept, and the numbers that are printed."""

import json
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from models import bert_batch, tiny_bert

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import quality
import quality_report
from quality_methods import PEFT_LORA
from quality_tables import METHODS, RATE_SEED, RATES, TABLES, Curves, Table, Variant
from quality_tasks import FIXED, QualityTask

TINY = QualityTask(6, 4, "accuracy", True, r".*\.encoder\.layer\.\d+\..*\.(query|key|value|dense)", {})


class TinyTask:
    """A BERT of two layers of 16; the score is the logits' mean, which every method's training moves."""

    fixed = TINY

    def model(self, seed):
        return tiny_bert(seed=seed)

    def heads(self, model):
        return ["classifier"]

    def batches(self, seed):
        return (bert_batch(seed=seed + i) for i in range(TINY.steps))

    def score(self, model):
        model.eval()
        with torch.no_grad():
            return model(**bert_batch(seed=99)).logits.mean().item()


def small(variant: Variant) -> Variant:
    """NoRA's outer rank cannot exceed the model's width."""
    fields = variant.fields
    return replace(variant, fields=fields | {"r": 4, "r_out": 12} if "r_out" in fields else fields)


@pytest.mark.parametrize("row", METHODS["trec"])
def test_every_method_trains_and_says_what_is_left(row):
    task, variant = TinyTask(), small(METHODS["trec"][row])
    spec = quality.spec_of("trec", TINY, variant, 1e-2, 0)
    found = quality.train(task, spec)
    untrained = tiny_bert(seed=0)
    assert abs(found["score"] - task.score(untrained)) > 1e-4
    assert found["score"] == quality.train(task, spec)["score"]  # all randomness is the seed's
    modules = 12
    assert len(found["ranks"]) == modules
    sizes = [16 + 16] * 4 + [16 + 24] * 2
    if row in ("PEFT AdaLoRA 6 → 4", "NormAL 8 → 4"):
        assert sum(found["ranks"]) == 4 * modules
    elif row in ("PEFT LoRA", "PEFT PiSSA"):
        assert found["parameters"] == 2 * 4 * sum(sizes)
    elif row == "PEFT DoRA":
        assert found["parameters"] == 2 * (4 * sum(sizes) + 16 * 5 + 24)
    elif row == "NoRA":
        assert found["parameters"] == modules * 2 * 4 * 12


def parameters(row: str, fields: dict, widths: list[tuple[int, int]]) -> int:
    """At the end, where every module ends with the average rank."""
    if row == "NoRA":
        return 2 * fields["r"] * fields["r_out"] * len(widths)
    r = fields.get("target_r", fields.get("r"))
    extra = {"PEFT DoRA": sum(n for _, n in widths), "PEFT AdaLoRA 6 → 4": 4 * len(widths)}.get(row, 0)
    return round(r * sum(k + n for k, n in widths)) + extra


@pytest.mark.parametrize("task", METHODS)
def test_the_methods_of_a_table_end_with_about_as_many_parameters(task):
    """In modules of the models' shapes. La-LoRA's ranks are no setting: what it ended with is in the results."""
    if task != "e2e":
        widths = [(384, 384)] * 4 + [(384, 1536), (1536, 384)]
    else:
        widths = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    found = {row: parameters(row, v.fields, widths) for row, v in METHODS[task].items() if row != "La-LoRA ≤ 8"}
    assert all(abs(value / found["PEFT LoRA"] - 1) < 0.14 for value in found.values()), found
    assert sum(abs(value / found["PEFT LoRA"] - 1) < 0.02 for value in found.values()) >= 5, found


def test_tables_are_complete():
    for name, table in TABLES.items():
        assert table.task in FIXED, name
        assert table.baseline in table.rows, name
        assert all(row.rate_of in METHODS[table.task] for row in table.rows.values()), name
    assert {f"LoRA {r}" for r in range(1, 9)} | {f"NormAL 8 → {r}" for r in range(1, 9)} == set(
        TABLES["trec-rank"].rows
    )


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """A Bench whose runs are not trained: their scores come from a function of the learning rate; the runs made are listed."""
    made = []

    def make(score):
        def train(task, spec):
            made.append((spec["fields"], spec["lr"], spec["seed"]))
            return {"score": score(spec), "ranks": [4, 4], "parameters": 100, "seconds": 0.1}

        monkeypatch.setattr(quality, "train", train)
        monkeypatch.setattr(quality.quality_tasks, "build", lambda *arguments, **options: None)
        return quality.Bench(quality.Store(tmp_path / "quality.json"), ".data", until=float("inf"))

    return make, made


def test_the_rate_search_ends_inside_what_it_tried(scored):
    make, made = scored
    bench = make(lambda spec: -abs(spec["lr"] - 0.016) if spec["lr"] < 0.1 else None)
    assert bench.rate("trec", "PEFT LoRA") == 0.016
    assert [lr for _, lr, _ in made] == [*RATES["trec"], 0.008, 0.016, 0.032]
    assert {seed for *_, seed in made} == {RATE_SEED}
    assert bench.rate("trec", "PEFT LoRA") == 0.016 and len(made) == 6  # nothing twice


def test_a_run_that_diverged_is_no_best_rate(scored):
    make, _ = scored
    bench = make(lambda spec: None if spec["lr"] > 1e-3 else 0.5)
    assert bench.rate("trec", "PEFT LoRA") <= 1e-3


def test_a_method_that_always_diverges_has_no_rate(scored):
    make, _ = scored
    with pytest.raises(RuntimeError, match="PEFT LoRA on trec must be trainable at one of .*, all diverged"):
        make(lambda spec: None).rate("trec", "PEFT LoRA")


def test_what_a_run_depends_on_is_its_key():
    variant = METHODS["trec"]["PEFT LoRA"]
    keys = {
        quality.Store.key(quality.spec_of("trec", fixed, variant, 1e-3, 0))
        for fixed in (
            TINY,
            replace(TINY, steps=7),
            replace(TINY, targets="all-linear"),
            replace(TINY, data={"test": 1}),
        )
    }
    assert len(keys) == 4


def test_a_score_that_is_not_finite_is_none(monkeypatch):
    task = TinyTask()
    monkeypatch.setattr(task, "score", lambda model: float("inf"), raising=False)
    variant = METHODS["trec"]["PEFT LoRA"]
    assert quality.train(task, quality.spec_of("trec", TINY, variant, 1e-2, 0))["score"] is None


def test_a_stopped_command_goes_on(scored):
    make, made = scored
    table = Table("trec", "two", 2, {row: METHODS["trec"][row] for row in ("PEFT LoRA", "PEFT PiSSA")}, "PEFT LoRA")
    bench = make(lambda spec: 1 - abs(spec["lr"] - 2e-3))
    bench.until = 0.0
    bench.fill(table, 2)
    assert not made and bench.runs(table, 2) == {"PEFT LoRA": {}, "PEFT PiSSA": {}}
    bench.until = float("inf")
    bench.fill(table, 1)
    before = len(made)
    bench.fill(table, 2)
    assert len(made) == before + 2
    assert {seed for runs in bench.runs(table, 2).values() for seed in runs} == {0, 1}


def test_summary_by_hand():
    rows = {"a": Variant(PEFT_LORA, {}, "a"), "b": Variant(PEFT_LORA, {}, "b"), "c": Variant(PEFT_LORA, {}, "c")}
    table = Table("trec", "by hand", 3, rows, "a")
    numbers = count(100)

    def run(score):
        return {"score": score, "ranks": [3, 5], "parameters": next(numbers), "lr": 1e-3}

    runs = {"a": {0: run(0.5), 1: run(0.7)}, "b": {0: run(0.6), 1: run(0.9), 2: run(None)}, "c": {}}
    summary = quality_report.summary(table, TINY, runs)
    a, b = summary["rows"].values()
    assert list(summary["rows"]) == ["a", "b"]
    assert a["mean"] == pytest.approx(0.6) and a["std"] == pytest.approx(0.141421, rel=1e-5)
    assert (b["seeds"], b["failed"], b["rank"]) == (3, 1, 4)
    assert b["difference"] == pytest.approx(0.15) and b["difference_std"] == pytest.approx(0.0707107, rel=1e-5)
    text = quality_report.markdown(summary)
    assert "| b | 0.7500 ± 0.2121 | +0.1500 ± 0.0707 | 3 (1 diverged) | 0.001 | 4.00 | 102 |" in text


@pytest.mark.parametrize("curves", [None, Curves("η", {"a": ("one", 0.1), "b": ("two", 1.0)}, log=True)])
def test_plots_are_pictures(tmp_path, curves):
    rows = {name: Variant(PEFT_LORA, {}, name) for name in "abc"}
    table = Table("trec", "a plot", 1, rows, "a", curves)
    runs = {name: {0: {"score": 0.5, "ranks": [1], "parameters": 1, "lr": 1e-3}} for name in "ab"}
    summary = quality_report.summary(table, TINY, runs | {"c": {}})
    assert json.loads(json.dumps(summary))["rows"].keys() == {"a", "b"}
    quality_report.figure(json.loads(json.dumps(summary))).savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_of_rows_that_there_are():
    for name, table in TABLES.items():
        assert table.curves is None or set(table.curves.points) <= set(table.rows), name


def test_unknown_tables_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quality.py", "nothing"])
    with pytest.raises(SystemExit):
        quality.main()
    assert "TABLE must be one of trec-methods, " in capsys.readouterr().err
