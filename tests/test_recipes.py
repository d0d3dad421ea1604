"""Recipes: each is consistent and runs, on a small model; what is wrong with one is said; data come in as they are."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

datasets = pytest.importorskip("datasets")
yaml = pytest.importorskip("yaml")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("rouge_score")

from command_line import invoke  # noqa: E402

from adaptlora import plots  # noqa: E402
from adaptlora.finetune import FinetuneSpec, data, metrics, recipes, synthetic, tasks, tiny  # noqa: E402
from adaptlora.finetune.dry_run import dry_run  # noqa: E402
from adaptlora.finetune.registry import task_class  # noqa: E402
from adaptlora.finetune.tasks import classification, question_answering  # noqa: E402
from adaptlora.finetune.tasks.text import TextTask  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
MRPC = "glue-mrpc-deberta-v3-base"
LANGUAGE = [
    name for name in recipes.names() if issubclass(task_class(recipes.read(recipes.find(name)).spec.task), TextTask)
]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def mrpc():
    return recipes.read(recipes.find(MRPC))


# What there is


def test_every_recipe_is_found_by_its_name_and_by_its_path():
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    assert [path.stem for path in files] == recipes.names() and len(LANGUAGE) >= 14
    readme = (ROOT / "recipes" / "README.md").read_text()
    for path in files:
        assert recipes.find(path.stem).samefile(path) and recipes.find(str(path)) == path
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{path.stem}` |")).split("|")
        spec = recipes.read(path).spec
        method = spec.method if spec.shear is None else f"{spec.method} + {spec.shear['method']}"
        assert [cell.strip() for cell in row[4:7]] == [method, spec.task, f"{spec.steps:,}"]
    with pytest.raises(ValueError, match=f"recipe must be a .yaml file or one of .*{MRPC}.*, got 'glue-mrpx'"):
        recipes.find("glue-mrpx")
    with pytest.raises(ValueError, match="must be a file that exists, got 'no.yaml'"):
        recipes.find("no.yaml")


def test_recipes_take_their_numbers_from_the_file(mrpc):
    spec = mrpc.spec
    assert (spec.steps, spec.batch_size, spec.lr, spec.max_length) == (3439, 32, 1e-3, 320)  # 30 · 3,668 / 32
    assert spec.columns == {"pair": "sentence2"} and spec.metrics == ("accuracy", "f1")
    config = spec.config(["classifier"])
    assert (config.r, config.target_r, config.t_p, config.t_c, config.eta_p) == (8, 2.0, 1146, 1337, 1e-3)
    changed = recipes.read(mrpc.path, {"steps": 400, "options": {}, "lr": 2})
    assert (changed.spec.steps, changed.spec.lr, changed.spec.options) == (400, 2, {})


def test_steps_at_which_something_happens_move_along_with_the_steps(tmp_path, mrpc):
    adaptive = {"schedule": "adaptive", "lambda_p": 0.1, "lambda_c": 0.1, "min_steps": 344, "max_steps": 1719}

    def change(content):
        content["run"]["options"] = adaptive
        content["sources"] = {"ours": list(content["run"])}

    path = broken(tmp_path, mrpc, change)
    spec = recipes.read(path, {"steps": 344}).spec
    assert (spec.warmup, spec.options["min_steps"], spec.options["max_steps"]) == (34, 34, 172)
    assert recipes.read(path, {"epochs": 15}).spec.options["max_steps"] == 860
    spec = recipes.read(path, {"steps": 1720, "warmup": 3, "options": {**adaptive, "min_steps": 3}}).spec
    assert (spec.warmup, spec.options["max_steps"]) == (3, 1719)


# What is wrong


def broken(tmp_path, mrpc, change) -> Path:
    """The recipe for MRPC after change(content), or with `change` in place of its text."""
    content = yaml.safe_load(mrpc.path.read_text())
    if not isinstance(change, str):
        change(content)
    path = tmp_path / "mine.yaml"
    path.write_text(change if isinstance(change, str) else yaml.safe_dump(content))
    return path


def run_with(**fields):
    return lambda content: content["run"].update(fields)


BAD = [
    ("a: [", "a recipe must be a YAML file"),
    ("- a", r"a recipe must be a mapping, got \['a'\]"),
    ("title: a\nrun: {r: 1,\n  r: 2}", "a key must be there once, got 'r' again in line 3"),
    ("title: a\n? [b]\n: c", r"a key must be text or an integer, got \['b'\] in line 2"),
    ("title: a\non: c", "a key must be text or an integer, got True in line 2"),
    (lambda c: c.pop("paper"), "paper must be given"),
    (lambda c: c.update(rum=1), "section rum must be one of title, paper, sources, run"),
    (lambda c: c.update(title=3), "title must be text, got 3"),
    (lambda c: c["paper"].update(table="7"), "paper.table must be one of name, where"),
    (lambda c: c["data"].update(train=0), "data.train must be at least 1, got 0"),
    (run_with(rank=8), "run.rank must be a field of FinetuneSpec, or epochs, got 8"),
    (run_with(lr="1e-3"), r"run.lr must be a number \(YAML takes 1e-3 for text: write 1.0e-3\), got '1e-3'"),
    (run_with(r=8.0), "run.r must be an integer, got 8.0"),
    (run_with(decay=1), "run.decay must be true or false, got 1"),
    (run_with(metrics="f1"), "run.metrics must be a list of texts or null, got 'f1'"),
    (
        run_with(metrics=["bleu"]),
        r"metrics must be of those of task classification \(accuracy, f1, matthews\), got 'bleu'",
    ),
    (run_with(task="sorting"), "run.task must be one of classification, .*, got 'sorting'"),
    (
        run_with(task_options={"beams": 2}),
        r"task_options must be settings of task classification \(it has none\), got 'beams'",
    ),
    (
        run_with(task="question-answering", columns={}, metrics=None, task_options={"stride": "128"}),
        "task_options.stride must be an integer, got '128'",
    ),
    (
        run_with(task="question-answering", columns={}, metrics=None, task_options={"none": "no"}),
        "task_options.none must be true or false, got 'no'",
    ),
    (run_with(task="causal-lm", columns={}, metrics=["answer"]), "metric answer must go with task_options.answer"),
    (
        run_with(task="causal-lm", columns={}, metrics=["bleu"], generate=0),
        "generate must be at least 1 for metric bleu, got 0",
    ),
    (
        run_with(columns={"pear": "sentence2"}),
        r"columns must have the further roles of task classification as keys \(pair\), got 'pear'",
    ),
    (
        run_with(text_column="sentence"),
        r"data.columns must have the column that run reads as text \(.*sentence1.*\), got 'sentence'",
    ),
    (run_with(options={"budgie": 3}), "options must be fields of NormALConfig, got budgie"),
    (run_with(target_r=9), r"run.target_r must be in \[1, r=8\], got 9"),
    (run_with(t_p=10, t_c=3439, options={}), "t_c must be less than steps=3439"),
    (
        run_with(options={"schedule": "adaptive", "lambda_p": 0.1, "lambda_c": 0.1, "max_steps": 3439}),
        "options.max_steps must be less than steps=3439, .*, got 3439",
    ),
    (run_with(t_p=10, options={"schedule": "adaptive"}), "t_p must be left out where options.schedule is adaptive"),
    (run_with(batch_size=0), "run.batch_size must be at least 1, got 0"),
    (run_with(epochs=float("inf")), "run.epochs must be greater than 0 and finite, got inf"),
    (run_with(shear={"method": "nom"}), "shear.method must be one of norm, svd, .*, got 'nom'"),
    (run_with(shear={"method": "norm", "tau": 3}), r"NoRMConfig: tau must be in \[0.001, 1\], got 3"),
    (run_with(steps=3), r"run must have either epochs or steps, got \['epochs', 'steps'\]"),
    (lambda c: c["run"].pop("model"), "run.model must be given"),
    (lambda c: c["sources"].update(mine=["gamma"]), "sources must name fields of run, got 'gamma'"),
    (
        run_with(seed=4),
        'sources must say where every number of run comes from, if only "our choice"; nothing about, got .*seed',
    ),
    (lambda c: c["data"]["columns"].update(label="klass"), "data.columns.label must be one of text, .*, got 'klass'"),
    (
        lambda c: c["data"]["columns"].update(label={"classes": 2}),
        "data.columns.label must have a list of names after classes",
    ),
    (lambda c: c["architecture"].pop("tokenizer"), "architecture.tokenizer must be given"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_recipes_name_file_field_rule_and_value(tmp_path, mrpc, change, message):
    path = broken(tmp_path, mrpc, change)
    with pytest.raises(recipes.RecipeError, match=message) as error:
        recipes.read(path)
    assert str(error.value).startswith(f"finetune: {path}: ")


def test_what_only_the_models_can_tell_is_said_too(tmp_path, mrpc):
    def targets(content):
        content["run"]["target_modules"] = ["q_proj"]

    def budget(content):
        content["run"]["options"] = {**content["run"]["options"], "budget": 71}
        content["sources"]["our choice"].append("options.budget")

    with pytest.raises(ValueError, match="target_modules must name modules of the model, got 'q_proj'"):
        dry_run(recipes.read(broken(tmp_path, mrpc, targets)))
    with pytest.raises(ValueError, match="budget must be between 72 .* and 576 .*, got 71"):
        dry_run(recipes.read(broken(tmp_path, mrpc, budget)))


# What runs


@pytest.mark.parametrize("name", LANGUAGE)
def test_dry_run(name, monkeypatch):
    recipe = recipes.read(recipes.find(name))
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: Path(path).touch())  # half of the time
    found = dry_run(recipe)
    report, real = found.report, found.real
    assert len(report.losses["ours"]) == 6 and report.peft_difference <= 1e-5
    assert set(report.scores["ours"]["end"]) == set(
        recipe.spec.metrics or task_class(recipe.spec.task).chosen_metrics(recipe.spec)
    )
    layers = next(value for key, value in recipe.architecture["config"].items() if key.endswith("layers"))
    assert len(real.modules) * 2 == len(report.ranks) * layers
    if recipe.spec.method == "normal":
        expected = recipe.spec.target_r * found.tiny.r / recipe.spec.r
        assert sum(report.ranks.values()) == round(expected * len(report.ranks)) and report.t_c <= 3
    if recipe.spec.shear is not None:
        assert set(report.scores["ours"]) == {"before", "end", "sheared"} and sum(report.ranks.values()) < 8 * len(
            report.ranks
        )
    assert not Path(found.tiny.model).exists()


def test_sizes_are_those_of_the_real_models():
    """As published: DeBERTaV3-base has 184 M parameters, LLaMA-3 8B 8.03 B; NoRA trains 7.2 M of these."""
    from adaptlora.finetune.dry_run import real_sizes

    deberta = real_sizes(recipes.read(recipes.find(MRPC)))
    assert deberta.base_parameters == 184_423_682 and deberta.parameters == 8 * 12 * (4 * 2 * 768 + 2 * (768 + 3072))
    llama = real_sizes(recipes.read(recipes.find("commonsense-170k-llama-3-8b-nora")))
    assert llama.base_parameters == 8_030_261_248 and llama.parameters == 32 * 5 * 2 * 704 * 32
    assert llama.modules["model.layers.0.self_attn.k_proj"] == (1024, 4096)


def test_dry_run_and_list_from_the_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("finetune", "--recipe", MRPC, "--dry-run", "--set", "options={}", "--set", "t_p=100", "--r", 6)
    text = " ".join(result.output.split())
    for part in (
        "184,423,682 parameters",
        "of 432 vectors 144 stay",
        "3,439 steps of 32",
        "stock PEFT computes the same",
    ):
        assert part in text
    assert list(tmp_path.iterdir()) == []
    assert MRPC[:16] in invoke("finetune", "--list-recipes").output
    for arguments, message in (
        (("--dry-run",), "--dry-run must go with --recipe"),
        (("--recipe", MRPC, "--preset", "trec"), "--preset must not be given with --recipe"),
        (("--recipe", MRPC, "--set", "lr"), "--set must be FIELD=VALUE, got 'lr'"),
        (("--recipe", MRPC, "--set", "speed=3"), "run.speed must be a field of FinetuneSpec"),
    ):
        assert message in " ".join(invoke("finetune", *arguments, code=2).stderr.split())


def test_a_recipe_runs_as_it_is_on_a_model_and_data_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_task(tmp_path, MRPC)
    changes = (
        "model=model",
        "data=data",
        "steps=8",
        "warmup=2",
        "batch_size=4",
        "micro_batch=2",
        "options={}",
        "max_length=64",
    )
    result = invoke(
        "finetune", "--recipe", MRPC, *(part for change in changes for part in ("--set", change)), "-o", "out"
    )
    text = " ".join(result.output.split())
    for part in (
        "f1 ↑",
        "at the clip (step 3)",
        "counts its epochs over 3,668 rows; these data had 12",
        "✓ stock PEFT",
    ):
        assert part in text
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["spec"]["columns"] == {"pair": "sentence2"} and sum(report["ranks"].values()) == 2 * 12
    assert set(report["scores"]["ours"]["end"]) == {"accuracy", "f1"}


# Data


def test_a_folder_and_files_come_in_as_the_hub_would_give_them(tmp_path):
    rows = [{"a": f"one {i}", "b": f"two {i}", "label": i % 2} for i in range(12)]
    columns = {"a": "text", "b": "text", "label": {"classes": ["no", "yes"]}}
    synthetic.write(tmp_path / "set", columns, {"train": rows[:8], "dev": rows[8:]}, "pairs")
    spec = FinetuneSpec(
        model="unused", data=str(tmp_path / "set"), data_config="pairs", test_split="dev", text_column="a", columns={"pair": "b"},
        data_dir=str(tmp_path),
    )  # fmt: skip
    loaded = data.load(spec)
    assert list(loaded.train) == [{"text": row["a"], "pair": row["b"], "label": row["label"]} for row in rows[:8]]
    assert loaded.test["text"] == [row["a"] for row in rows[8:]] and loaded.train.features["label"].names == [
        "no",
        "yes",
    ]
    assert len(data.load(replace(spec, train_split="train[:3]")).train) == 3
    held = data.load(replace(spec, test_split=None, holdout=2))
    assert len(held.test) == 2 and not set(held.test["text"]) & set(held.train["text"])

    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    from_file = data.load(replace(spec, data=str(tmp_path / "t.jsonl"), data_config=None, test_split=None, holdout=3))
    assert sorted([*from_file.train["pair"], *from_file.test["pair"]]) == sorted(row["b"] for row in rows)


def test_files_of_ones_own_have_the_columns_that_the_task_reads(tmp_path):
    path, rows = tmp_path / "t.jsonl", [{"text": f"a {i}", "label": i / 2, "context": "c"} for i in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)))
    spec = FinetuneSpec(model="unused", data=str(path), holdout=1, data_dir=str(tmp_path))
    for task in ("seq2seq", "regression"):
        loaded = data.load(replace(spec, task=task))
        assert {"text": "a 3", "label": "1.5"} in [*loaded.train, *loaded.test]
    with pytest.raises(ValueError, match=r"columns\['question'\] must be one of the columns of .*, got 'question'"):
        data.load(replace(spec, task="question-answering"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": {"pair": "c"}}, r"columns\['pair'\] must be one of the columns of .* \(a, b, label\), got 'c'"),
        ({"text_column": "text"}, "text_column must be one of the columns of .*, got 'text'"),
        ({"test_split": "test"}, "data must load, got .* with split 'test': Unknown split"),
        ({"data_config": "mrpc"}, "data must load, .*'mrpc' not found"),
    ],
)
def test_bad_data_sets_are_refused(tmp_path, change, message):
    rows = [{"a": "x", "b": "y", "label": i % 2} for i in range(4)]
    columns = {"a": "text", "b": "text", "label": {"classes": ["no", "yes"]}}
    synthetic.write(tmp_path / "set", columns, {"train": rows, "dev": rows}, "pairs")
    spec = FinetuneSpec(
        model="unused", data=str(tmp_path / "set"), data_config="pairs", test_split="dev", text_column="a", columns={"pair": "b"},
        data_dir=str(tmp_path),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        data.load(replace(spec, **change))


def test_one_file_has_no_splits_and_never_tests_on_what_it_trains_on(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        "\n".join(json.dumps({"a": f"one {i}", "b": "c", "label": i % 2}) for i in range(10))
    )
    spec = FinetuneSpec(
        model="unused", data=str(tmp_path / "t.jsonl"), test_split="validation", text_column="a", columns={"pair": "b"},
        data_dir=str(tmp_path),
    )  # fmt: skip
    loaded = data.load(spec)
    assert len(loaded.train) == 8 and len(loaded.test) == 2 and not set(loaded.train["text"]) & set(loaded.test["text"])


def test_labels_that_are_integers_are_classes_by_their_values(tmp_path):
    rows = [{"text": f"one {i}", "pair": "b", "label": i % 12 + 1} for i in range(24)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = FinetuneSpec(
        model="unused", data=str(tmp_path / "t.jsonl"), columns={"pair": "pair"}, data_dir=str(tmp_path)
    )
    loaded = data.load(replace(spec, holdout=1))
    assert classification.classes(loaded.train) == [str(i) for i in range(1, 13)]
    task = classification.Classification.__new__(classification.Classification)
    task._named, task._index = False, {name: i for i, name in enumerate(classification.classes(loaded.train))}
    assert [task._target(label) for label in (1, 10, 12)] == [0, 9, 11]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, [*rows, {**rows[0], "text": "no", "label": None}])))
    with pytest.raises(
        ValueError, match="column 'label' must hold a value in every row, got None in row 24 of the rows to train on"
    ):
        data.load(replace(spec, holdout=1))


def test_hidden_labels_are_refused(tmp_path):
    rows = [{"text": "x", "label": i % 2} for i in range(4)]
    hidden = [{"text": "x", "label": -1}]
    synthetic.write(
        tmp_path / "set", {"text": "text", "label": {"classes": ["no", "yes"]}}, {"train": rows, "test": hidden}, None
    )
    spec = FinetuneSpec(model="unused", data=str(tmp_path / "set"), test_split="test", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="every label of test must be in the training data, got -1"):
        data.load(spec)


# Tasks


def small_task(tmp_path, name, **changes):
    """The task of a recipe on its small model and made-up data."""
    from adaptlora.finetune.dry_run import small_spec

    recipe = recipes.read(recipes.find(name))
    kind = task_class(recipe.spec.task)
    rows = synthetic.rows(recipe.data["columns"], 12)
    kind.write_tiny(recipe.architecture, tmp_path / "model", rows)
    spec = replace(small_spec(recipe, tmp_path, 72), **changes)
    synthetic.write(
        tmp_path / "data", recipe.data["columns"], {"train": rows, spec.test_split or "unused": rows}, spec.data_config
    )
    return tasks.build(spec, data.load(spec)), rows


@pytest.mark.parametrize("name", [MRPC, "e2e-tinyllama", "cnn-dailymail-t5-small"])
def test_micro_batches_add_up_to_the_batch(tmp_path, name):
    task, _ = small_task(tmp_path, name, batch_size=7, model_dropout=0.0)
    model, batch = task.model().eval(), next(task.batches())
    (whole,) = task.losses(model, batch)
    task.spec = replace(task.spec, micro_batch=3)
    parts = list(task.losses(model, batch))
    assert len(parts) == 3 and sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


def test_both_texts_of_a_pair_are_read(tmp_path):
    task, rows = small_task(tmp_path, MRPC)
    ids = task.train[0]["input_ids"]
    first, second = (
        task.tokenizer(rows[0][column], add_special_tokens=False)["input_ids"] for column in ("sentence1", "sentence2")
    )
    cls, sep = task.tokenizer.cls_token_id, task.tokenizer.sep_token_id
    assert ids.tolist() == [cls, *first, sep, *second, sep]


def test_conversations_learn_what_the_assistant_says(tmp_path):
    task, rows = small_task(tmp_path, "tulu-v2-llama-3-8b-norm")
    row = task._conversation(rows[0])
    learnt, pieces = [], []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if label == tasks.IGNORED:
            pieces, _ = ([], learnt.append(pieces)) if pieces else (pieces, None)
        else:
            pieces.append(token)
    said = [m["content"] + "<|eot_id|>" for m in rows[0]["messages"] if m["role"] == "assistant"]
    assert [task.tokenizer.decode(piece) for piece in [*learnt, pieces]] == said
    whole = task.tokenizer.decode(row["input_ids"])
    assert whole.startswith("<|begin_of_text|><|start_header_id|>user") and whole.count("<|eot_id|>") == 4


def test_answers_are_found_again_in_their_windows(tmp_path):
    """Logits that point at the marked tokens give the right answers back, from whichever window holds them."""
    task, rows = small_task(
        tmp_path, "squad-v2-deberta-v3-base", max_length=80, task_options={"none": True, "stride": 24}
    )
    assert len(task.test) > len(rows) and any(not row["answers"]["text"] for row in rows)

    def output(model, batch):
        logits = torch.zeros(2, *batch["input_ids"].shape)
        for part, name in enumerate(("start_positions", "end_positions")):
            logits[part].scatter_(1, batch[name][:, None], 9.0)
        return logits

    with pytest.raises(
        ValueError, match="max_length must leave more than stride=24 tokens after every question, got 30"
    ):
        tasks.build(replace(task.spec, max_length=30), task.data)
    task.output = output
    assert task.evaluate(torch.nn.Identity()) == {"exact": 100.0, "f1": 100.0}


def test_rows_that_cannot_be_learnt_are_left_out_and_counted(tmp_path):
    task, rows = small_task(tmp_path, "e2e-tinyllama")
    prompts = sorted(len(row["input_ids"]) - int((row["labels"] != tasks.IGNORED).sum()) for row in task.train)
    test = [min(rows, key=lambda row: len(row["meaning_representation"]))]
    data_ = replace(task.data, test=[{"text": "a", "label": test[0]["human_reference"]}])
    fewer = tasks.build(replace(task.spec, max_length=prompts[-1]), data_)
    assert fewer.dropped == prompts.count(prompts[-1]) and len(fewer.train) == len(rows) - fewer.dropped
    with pytest.raises(ValueError, match=r"leave room after a prompt of the rows to train on, got 2 for 12 rows"):
        tasks.build(replace(task.spec, max_length=2), data_)


@pytest.mark.parametrize("text", [None, ""])
def test_rows_without_text_are_named(tmp_path, text):
    rows = [{"a": "x", "b": "y"}, {"a": "x", "b": text}]
    (tmp_path / "t.json").write_text("\n".join(map(json.dumps, rows)))
    spec = FinetuneSpec(
        model="unused", data=str(tmp_path / "t.json"), eval_data=str(tmp_path / "t.json"), text_column="a", label_column="b",
        task="seq2seq", data_dir=str(tmp_path),
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=f"column 'b' must hold a value in every row, got {text!r} in row 2 of the rows to train on"
    ):
        data.load(spec)


def test_fields_that_the_model_does_not_read_are_refused(tmp_path):
    task, _ = small_task(tmp_path, MRPC)
    assert task.spec.model_options == {"cls_dropout": 0.0} and task.model() is not None
    task.spec = replace(task.spec, model_options={"cls_dropuot": 0.0})
    with pytest.raises(ValueError, match="model_options must be fields of DebertaV2Config, .*, got 'cls_dropuot'"):
        task.model()


def test_the_best_span_is_short_ordered_and_inside():
    import numpy

    spans = numpy.array([[-1, -1], [0, 2], [3, 5], [6, 9], [-1, -1]])
    start, end = numpy.array([9.0, 0, 1, 5, 9, 9]), numpy.array([9.0, 8, 4, 2, 9, 9])
    assert question_answering._best_span(start, end, spans, 3) == (8.0, 1, 1)
    assert question_answering._best_span(start, numpy.array([0, -9.0, 0, 7, 9, 9]), spans, 1) == (12.0, 3, 3)
    assert question_answering._best_span(start, end, spans[[0, 4]], 3)[0] == -numpy.inf


def test_scores_of_texts_by_hand():
    scores = metrics.answer_scores(["The red  House!", "two cats", "", "x"], [["red house"], ["a cats", "dog"], [], []])
    assert scores == {"exact": 50.0, "f1": pytest.approx(100 * (1 + 2 / 3 + 1 + 0) / 4)}
    rouge = metrics.rouge(["the cat sat"], [["dogs run", "cats sat down"]])
    assert rouge["rougeL"] == pytest.approx(100 * 2 / 3) and rouge["rouge2"] == pytest.approx(50)
    two = metrics.rouge(["A dog ran. The cat sat."], [["the cat sat. a dog ran."]])
    assert two["rougeLsum"] == pytest.approx(100) and two["rougeL"] == pytest.approx(50)
    references = [["the correct answer is answer1"], ["the correct answer is true"]]
    assert metrics.same_answers(["It is Answer1", "answer2 is"], references, r"(?i)answer\d|true") == 0.5
    with pytest.raises(ValueError, match="answer must match in every reference"):
        metrics.same_answers(["a"], [["b"]], "c")


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_small_tokenizers_keep_the_special_tokens(tmp_path, kind):
    tiny.write_tokenizer(kind, tmp_path, [{"a": "the old bridge near the river", "b": ["under the tower"]}])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    known = tiny.KINDS[kind]
    ids = tokenizer("the river")["input_ids"]
    assert re.sub(r"\s", "", tokenizer.decode(ids)) == re.sub(r"\s", "", known.single.replace("$A", "the river"))
    assert [tokenizer.convert_tokens_to_ids(token) for token in known.special] == list(range(len(known.special)))
    assert len(tokenizer) <= tiny.VOCABULARY
