"""
Every code block of the documentation: Python runs in its page's order in one namespace, shell lines after it, `adaptlora` in this
process. What a reader would have at hand (a model, data, a loop's names) is made here, small and random.
"""

import dataclasses
import functools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import peft
import pytest
import torch
import torch.distributed as dist
import typer
import yaml
from command_line import bert_folder, invoke, llama_folder, questions  # noqa: F401
from markdown_blocks import ROOT, Block, blocks, check_script, commands, make_targets, pages
from models import Net, bert_batch, task_loss, tiny_bert
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from training_loops import examples
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import adaptlora
from adaptlora import methods
from adaptlora.benchmarks.accuracy import FLOOR
from adaptlora.cli import app

# Blocks that other tests run, as printed, with what takes longer than a page may: {(page, how it begins): the test file}.
ELSEWHERE = {
    ("docs/distributed.md", "# train.py:"): "test_launchers.py",
    ("docs/distributed.md", "# train_trainer.py:"): "test_launchers.py",
}
# Commands of which only the options are read: {the line's beginning: why}.
TOO_DEAR = {
    "adaptlora finetune --preset": "minutes, with the fetched model; test_cli.py runs the short form",
    "adaptlora finetune --recipe": "tests of the recipes try each out",
    "adaptlora bench": "measures for minutes",
    "adaptlora tune": "needs a GPU",
    "torchrun": "starts processes; test_launchers.py and test_shear_files.py do",
    "make": "builds, fetches and measures",
    "pip": "changes the environment; test_packaging.py installs",
    "python": "scripts that measure for minutes",
}
# What a command gets besides, so that it takes a moment.
SHORT = {"adaptlora finetune --model": ["--steps", "12"]}
PAGES = {page: blocks(page) for page in pages()}


# What each page takes for granted


def llama_model(seed: int = 0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))


def tokens(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": x, "labels": x} for x in torch.randint(0, 40, (count, 2, 7), generator=generator)]


def train(model, optimizer, loader) -> None:
    model.train()
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def peft_model():
    """(a trained PeftModel, its optimizer)"""
    model = peft.get_peft_model(llama_model(), peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, optimizer, tokens(4))
    return model, optimizer


def normal(**fields):
    return adaptlora.NormALConfig(
        **{"r": 8, "target_r": 4, "t_p": 2, "t_c": 3, "target_modules": "all-linear"} | fields
    )


def fresh_adapter(names: dict) -> None:
    names["model"] = tiny_bert()
    names["adapter"] = adaptlora.attach(names["model"], normal())


def for_trainer(names: dict, steps: int = 4) -> None:
    fresh_adapter(names)
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_steps": steps}
    names["arguments"] = TrainingArguments("trained", per_device_train_batch_size=4, max_steps=steps, **options)
    names |= {"Trainer": Trainer, "data": examples(16)}


def for_trainer_of_a_plain_model(names: dict) -> None:
    for_trainer(names, steps=301)  # t_c is 300 there
    names["adapter"].detach()


def for_peft(names: dict) -> None:
    names["peft_model"], names["optimizer"] = peft_model()


def files_of_peft(names: dict) -> None:
    """A trained adapter, and the folder of its base model."""
    llama_model().save_pretrained("base")
    peft_model()[0].save_pretrained("trained-adapter")


def adapters_to_look_at(names: dict) -> None:
    """One before its clip and after it, the latter sheared, and one whose ranks changed in many steps."""
    configs = {"mine": normal(), "lalora": adaptlora.LaLoRAConfig(r=4, gamma=20.0, target_modules="all-linear")}
    for name, config in configs.items():
        adapter = adaptlora.attach(tiny_bert(), config)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        adapter.track(optimizer)
        for seed in range(4):
            adapter.model(**bert_batch(seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if name == "mine" and seed == 2:
                adapter.save("runs/other/adapter")
            adapter.step()
        adapter.save(f"runs/{name}/adapter")
    invoke("shear", "runs/mine/adapter", "--method", "svd", "--budget", "20", "-o", "runs/sheared")


def llama_folder_here(names: dict) -> None:
    llama_model().save_pretrained("llama")


def one_process(names: dict) -> None:
    fresh_adapter(names)
    names["DistributedDataParallel"] = DistributedDataParallel
    dist.init_process_group("gloo", init_method=f"file://{Path('rendezvous').absolute()}", rank=0, world_size=1)


def stopped(names: dict) -> None:
    """A loop of four steps, of which two are done and saved."""
    fresh_adapter(names)
    optimizer = torch.optim.AdamW(names["adapter"].parameters(), lr=1e-2)
    names["adapter"].track(optimizer)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    adaptlora.save_checkpoint("out", names["adapter"], optimizer, scheduler=scheduler, step=2, extra={"epoch": 0})
    batches = {step: bert_batch(seed=step) for step in range(1, 5)}
    names |= {"optimizer": optimizer, "scheduler": scheduler, "epoch": 0}
    names["batches_from"] = lambda done: [item for item in batches.items() if item[0] > done]


def to_compile(names: dict) -> None:
    model = Net()
    names["adapter"] = adaptlora.attach(model, adaptlora.LaLoRAConfig(r=4, target_modules="all-linear"))
    compile = functools.partial(torch.compile, backend="eager")  # graphs as always, without a minute of code generation
    names |= {"model": model, "torch": SimpleNamespace(compile=compile)}
    names["train"] = lambda compiled: task_loss(compiled).backward()


class MyOptimizer(torch.optim.AdamW):
    pass


# {page: names of its first block, and of all that follow}
NAMES = {
    "README.md": lambda: {"torch": torch, "model": tiny_bert(), "loader": [bert_batch()] * 60},
    "docs/index.md": lambda: {"model": tiny_bert(), "loader": [bert_batch()] * 60, "make_model": tiny_bert},
    "docs/migrating.md": lambda: {
        "base_model": llama_model,
        "loader": tokens(8),
        "train": functools.partial(train, loader=tokens(8)),
    },
    "docs/training.md": lambda: {"adaptlora": adaptlora, "MyOptimizer": MyOptimizer},
    "docs/extending.md": lambda: {
        "torch": torch,
        "make_model": tiny_bert,
        "loader": [bert_batch(seed=i) for i in range(40)],
    },
}
# {(page, words of a block): what is made before it}
BEFORE = {
    ("README.md", "Trainer(model"): for_trainer,
    ("README.md", "DistributedDataParallel(adapter.model)"): one_process,
    ("README.md", "adaptlora.accelerate(peft_model)"): for_peft,
    ("README.md", "adaptlora.shear(peft_model)"): for_peft,
    ("README.md", "adaptlora shear ADAPTER"): files_of_peft,
    ("docs/index.md", "Trainer(model"): for_trainer,
    ("docs/inspecting.md", "adaptlora inspect runs/mine/adapter\n"): adapters_to_look_at,
    ("docs/index.md", "adaptlora.accelerate(peft_model)"): for_peft,
    ("docs/migrating.md", "import copy"): llama_folder_here,
    ("docs/training.md", "Trainer(model"): for_trainer_of_a_plain_model,
    ("docs/training.md", "load_checkpoint"): stopped,
    ("docs/training.md", "torch.compile(model)"): to_compile,
}


# What a page's blocks must have done, beyond running


def ranks(folder: str) -> list[int]:
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    return [tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key]


def after_readme(names: dict) -> None:
    assert sum(ranks("runs/mine/adapter")) == 4 * len(ranks("runs/mine/adapter"))
    assert set(ranks("served")) == {8}


def after_index(names: dict) -> None:
    after_readme(names)
    assert sum(ranks("out")) == 4 * len(ranks("out"))
    assert sum(names["report"].ranks().values()) == 16


def after_inspecting(names: dict) -> None:
    assert {path.name for path in Path("pictures").iterdir()} == {"ranks.png", "norms.png", "singular_values.png"}
    assert Path("steps.png").exists() and "<html" in Path("compared.html").read_text()


def after_migrating(names: dict) -> None:
    assert sum(ranks("pruned")) == sum(ranks("ours")) == 16
    assert set(ranks("dylora-4")) == {4}
    assert sum(ranks("baseline-AdaLoRAConfig-kaiming")) == 16
    assert sum(ranks("small")) == 8
    batch = names["loader"][0]
    expected = names["theirs"].eval()(**batch).logits
    for start in ("", "theirs-"):
        assert sum(ranks(f"{start}served")) == 16 and set(ranks(f"{start}padded")) == {8}
        for folder in (f"{start}served", f"{start}padded"):
            config = json.loads((Path(folder) / "adapter_config.json").read_text())
            assert config["r"] == config["lora_alpha"] and not config["use_rslora"]
            loaded = peft.PeftModel.from_pretrained(llama_model(), folder).eval()
            torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        merged = LlamaForCausalLM.from_pretrained(f"{start}merged").eval()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def after_extending(names: dict) -> None:
    for field, value in {"every": "3", "drop": 1.5, "target_r": math.nan}.items():
        with pytest.raises(ValueError, match=f"^FadeConfig: {field} must be an? (integer|number) > 0, got {value!r}"):
            names["FadeConfig"](**{"target_modules": "all-linear", field: value})
    names["test_rank_energy"]()
    assert sum(ranks("faded")) == 4 * len(names["adapter"].layers)


AFTER = {
    "README.md": after_readme,
    "docs/index.md": after_index,
    "docs/inspecting.md": after_inspecting,
    "docs/migrating.md": after_migrating,
    "docs/extending.md": after_extending,
}


# Running them


@pytest.fixture(scope="module", autouse=True)
def registrations():
    """What pages register is gone when they are through."""
    with patch.dict(methods.METHODS):
        yield


@pytest.fixture
def stand_ins(bert, llama, tmp_path, monkeypatch):
    """An empty folder to work in, and {page: {what a shell line calls something: what stands for it}}."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    pairs = [
        f'{{"prompt": "who is the {word}", "answer": "{word} of the city"}}'
        for word in ("cat", "river", "year", "name")
    ]
    Path("pairs.jsonl").write_text("\n".join(pairs * 5) + "\n", encoding="utf-8")
    questions("questions.csv")
    readme = {"PATH": llama, "MODEL": "base", "ADAPTER": "trained-adapter", "OUT": "OUT"}
    return {"README.md": readme, "docs/index.md": readme}


def run_python(block: Block, names: dict) -> None:
    # Empty lines before it make a traceback's numbers those of the page.
    exec(compile("\n" * block.line + block.text, block.page, "exec"), names)


def check_options(words: list[str]) -> None:
    """adaptlora COMMAND …: every option is one of the command's, and its values are of its types."""
    command, words = typer.main.get_command(app), words[1:]
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"adaptlora has no command {words[:1]}"
        command, words = command.commands[words[0]], words[1:]
    parameters = command.make_context(command.name, list(words)).params
    recipe = parameters.get("recipe")
    assert not recipe or (ROOT / "recipes" / f"{recipe}.yaml").exists(), f"no recipe {recipe}"


def check_install(words: list[str]) -> None:
    """pip install [options] . or ".[extra]": the extras are there."""
    assert words[1] == "install"
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for word in words[2:]:
        found = re.fullmatch(r"--no-build-isolation|-e|\.(?:\[([\w,]+)\])?", word)
        assert found, f"pip install {word}"
        assert set((found[1] or "").split(",")) - {""} <= declared.keys(), word


def check_make(words: list[str]) -> None:
    missing = {word for word in words[1:] if "=" not in word} - make_targets()
    assert not missing, f"Makefile has no {missing}"


def run_line(block: Block, words: list[str], of_page: dict) -> None:
    line = " ".join(words)
    words = [str(of_page.get(word, word)) for word in words]
    dear = any(line.startswith(start) for start in TOO_DEAR)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables of the environment
        words = words[1:]
    match words[0]:
        case "adaptlora" if dear:
            check_options(words)
        case "adaptlora":
            invoke(*words[1:], *SHORT.get(" ".join(words[:3]), []))
        case "make":
            check_make(words)
        case "python" if words[1:3] == ["-m", "adaptlora.cli"]:
            invoke(*words[3:])
        case "python":
            check_script(words)
        case "torchrun":
            from torch.distributed.run import get_args_parser

            options = get_args_parser().parse_args(words[1:])
            if options.training_script == "adaptlora.cli" and options.module:
                check_options(["adaptlora", *options.training_script_args])
            else:
                check_script(["python", options.training_script])
        case "pip":
            check_install(words)
        case _:
            raise AssertionError(f"{block.where}: `{line}` is neither run nor among the commands that are checked")


def run_page(page: str, stand_ins: dict) -> None:
    names, of_page = NAMES.get(page, dict)(), stand_ins.get(page, {})
    hooks = {words: hook for (of, words), hook in BEFORE.items() if of == page}
    for block in PAGES[page]:
        if any(of == page and block.text.startswith(start) for of, start in ELSEWHERE):
            continue
        for words in [words for words in hooks if words in block.text]:
            hooks.pop(words)(names)
        match block.language:
            case "python":
                run_python(block, names)
            case "sh" | "bash":
                for words in commands(block):
                    run_line(block, words, of_page)
            case "yaml":
                yaml.safe_load(block.text)
            case "text":
                pass
            case _:
                raise AssertionError(
                    f"{block.where}: a block must say that it is python, sh, yaml or text, got {block.language!r}"
                )
    assert not hooks, f"{page} has no block with {list(hooks)}"
    AFTER.get(page, lambda names: None)(names)


@pytest.mark.parametrize("page", [page for page in PAGES if PAGES[page]])
def test_every_block_runs(page, stand_ins):
    try:
        run_page(page, stand_ins)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_method_and_an_op_take_fifty_lines():
    method, _, op, test = (len(block.text.splitlines()) for block in PAGES["docs/extending.md"])
    assert method <= 50 and op + test <= 50


def test_what_runs_elsewhere_is_there():
    for (page, start), file in ELSEWHERE.items():
        assert any(block.text.startswith(start) for block in PAGES[page]), f"{page} has no block {start!r}"
        assert Path(page).name in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_tables_and_plots_of_results():
    """What the pages hold, from the committed results: as many rows and points as there are, their numbers as they are there."""
    with patch.object(sys, "path", [str(ROOT / "docs"), *sys.path]):
        import results

    shown = {match for page in PAGES for match in re.findall(r"<!-- results: ([\w-]+) -->", (ROOT / page).read_text())}
    assert {name for name in shown if not name.startswith("quality-")} == results.TABLES.keys()
    step = results.read("bench_step")
    table = results.TABLES["step"]()
    for case in step["cases"]:
        for provider, row in case["providers"].items():
            assert re.search(rf"\| {re.escape(provider)} \| {row['median_ms']:.2f} \| {row['ratio']:.2f} \|", table)
    kernel = next(k for k in results.read("kernel_traffic")["cases"][0]["kernels"] if k["kernel"] == "lora_da_kernel")
    assert f"| {kernel['requested / ideal']:.3f} |" in results.TABLES["traffic"]()
    checked = results.read("gpu_check")["rows"]
    assert f"{len(checked):,} compilations" in results.TABLES["compiled"]()
    with pytest.raises(ValueError, match="has no table 'nothing'"):
        results.quality("nothing")
    # A kernel's place: its useful FLOPs over the bytes, and never above the roof.
    label, flops, least, asked = next(point for point in results.gpu_points() if point[0].startswith("lora_shrink"))
    assert label == "lora_shrink, M 2048, K 1024, N 1024, R 8" and flops == 2 * 2048 * 1024 * 8 and least <= asked
    assert results.gpu_roofline().lstrip().startswith("<?xml")


def test_cpu_roofline_of_a_result_with_limits(tmp_path, monkeypatch):
    with patch.object(sys, "path", [str(ROOT / "docs"), *sys.path]):
        import results

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    limits = {"threads": 2, "gb_per_s_by_mib": {"1": 80.0, "512": 20.0}, "gflop_per_s": {"float32": 100.0}}
    machine = {"cpu": "a processor", "cores": 2, "threads": 2}
    counted = {"flops": 3e9, "bytes": 1e9, "gflop_per_s": 40.0}
    cases = [{"providers": {"adaptlora": counted, "PEFT": counted | {"gflop_per_s": 20.0}, "frozen": {"ratio": 1.0}}}]
    cases.append({"dtype": "torch.bfloat16", "providers": {"adaptlora": counted}})  # under another roof
    (tmp_path / "bench_old.json").write_text(json.dumps({"environment": {}, "cases": cases}))
    assert results.cpu_points() == ({}, []) and "did not measure" in results.cpu_figure()

    def write(name, machine, limits, **environment):
        environment |= {"machine": machine, "limits": limits}
        (tmp_path / f"bench_{name}.json").write_text(json.dumps({"environment": environment, "cases": cases}))

    # The roof is what either of two runs on one machine saw at best; no GPU's points and no other machine's are under it.
    write("layer", machine, limits)
    write("other", machine, limits | {"gb_per_s_by_mib": {"1": 90.0, "512": 10.0}}, device="cpu")
    write("a_gpu", machine | {"gpu": "H100"}, limits, device="cuda")
    write("an_old_gpu", machine | {"gpu": "H100"}, limits)
    write("on_the_cpu_of_a_gpu", machine | {"gpu": "H100"}, limits, device="cpu")
    write("one_thread", machine, limits | {"threads": 1})
    found, points = results.cpu_points()
    assert found == limits | {"gb_per_s_by_mib": {"1": 90.0, "512": 20.0}}
    names = ["layer", "on_the_cpu_of_a_gpu", "other"]
    assert points == [(n, *row) for n in names for row in (("adaptlora", 3.0, 40.0), ("PEFT", 3.0, 20.0))]
    figure = results.cpu_figure()
    assert "figures/roofline_cpu.svg" in figure and "threads: bench_one_thread." in figure
    assert "bench_a" not in figure and "<svg" in results.cpu_roofline()


def test_what_is_not_measured_yet_is_said_and_shown_once_it_is(tmp_path, monkeypatch):
    with patch.object(sys, "path", [str(ROOT / "docs"), *sys.path]):
        import results

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    results.sweep_pictures.cache_clear()
    commands = {"ops": "make bench", "layer-sweep": "make bench", "cost-growth": "python bench/cost_growth.py"}
    for name, command in (commands | {"cost-growth-here": commands["cost-growth"]}).items():
        assert results.TABLES[name]().startswith(f"Not measured yet: `{command}`")
    times = {
        "median_ms": 2.0,
        "quartiles_ms": [1.9, 2.1],
        "ratio": 1.0,
        "ratio_quartiles": [1, 1],
        "roofline_share": 0.5,
    }
    facts = {"floor": "frozen linear", "K": 64, "M": 8, "dropout": 0.0, "dtype": "torch.float32", "axes": ["R"]}
    cases = [
        {
            "case": f"R = {R}",
            "R": R,
            "rounds": 5,
            "providers": {"frozen linear": times, "adaptlora": times | {"ratio": 1.25}},
            **facts,
        }
        for R in (8, 16)
    ]
    machine = {"cpu": "a processor", "cores": 2, "threads": 2}
    versions = {"torch": "2", "peft": "0"}
    environment = {"machine": machine, "versions": versions, "isa": "avx2", "load_before": 0.1}
    content = json.dumps({"environment": environment, "cases": cases})
    for name in ("bench_rank_norms", "bench_layer_sweep"):
        (tmp_path / f"{name}.json").write_text(content)
    assert "| R = 8 | 2.000 | 1.00 (50%) | 1.25 (50%) |" in results.TABLES["ops"]()
    assert "rank_norms" not in results.TABLES["ops"]().partition("Not measured yet")[2]
    assert "![One layer, r](figures/layer_r.png)" in results.TABLES["layer-sweep"]()
    assert results.sweep_pictures()["layer_r"].startswith(b"\x89PNG")
    results.sweep_pictures.cache_clear()
    # Tables of the growth's own script, and none of a run that is not complete.
    (tmp_path / "cost_growth.json").write_text(json.dumps({"benchmark": "cost_growth", "points": []}))
    assert results.TABLES["cost-growth"]().startswith("Not measured yet")
    row = {
        "quantity": "step",
        "axis": "rank",
        "provider": "PEFT",
        "from": 1,
        "to": 256,
        "smallest": 1.5,
        "largest": 9.0,
    }
    row |= {"unit": "ms", "slope": [0.71, 0.02], "upper": [0.9, 0.03]}
    (tmp_path / "cost_growth.json").write_text(
        json.dumps({"environment": environment, "fits": [row], "predictions": {}})
    )
    assert "| step | rank 1 … 256 | PEFT | 1.5 … 9 ms | 0.71 ± 0.02 | 0.90 ± 0.03 |" in results.TABLES["cost-growth"]()
    title = "Predicted, not measured: a model, on the machine of the measurements"
    tables = [("of a GPU", ["a"], [["0"]]), (title, ["average rank"], [["8 → 4"]])]
    monkeypatch.setattr("cost_growth.prediction_tables", lambda found: tables)
    assert results.TABLES["cost-growth-here"]().startswith(f"{title}\n\n| average rank |\n| --- |\n| 8 → 4 |")


def test_the_tolerance_on_the_page_is_the_rules():
    text = (ROOT / "docs" / "correctness.md").read_text(encoding="utf-8")
    found = dict((name, -int(power)) for power, name in re.findall(r"2\^−(\d+) for (\w+)", text))
    assert {getattr(torch, name): 2.0**power for name, power in found.items()} == FLOOR


@pytest.mark.parametrize("page", PAGES)
def test_what_prose_names_is_there(page):
    """Commands between backticks, and links to files; mkdocs looks at those from page to page itself."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for command in re.findall(r"`((?:make|python (?:-m pytest )?\S+\.py)\b[^`]*)`", text):
        words = shlex.split(command)
        if words[0] == "python":
            check_script(words)
        else:
            check_make(words)
    for target in re.findall(r"\]\((?!\w+:)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


@pytest.mark.skipif(peft.__version__ != "0.21.2", reason="the guide lists this version's fields")
def test_the_guide_names_every_field_of_pefts():
    text = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    table = text.partition("| PEFT's LoraConfig | here |")[2].partition("\n\n")[0]
    first = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= set(", ".join(first).split(", "))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built pages; a warning of mkdocs' fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # the theme's word on mkdocs' future
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "WARNING" not in result.stderr, result.stderr
    return folder


def test_every_page_is_in_the_navigation(site):
    listed = (site / "index.html").read_text(encoding="utf-8")
    for page in ROOT.glob("docs/**/*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix(".html")
        assert f'href="{name}"' in listed, f"mkdocs.yml's nav lacks {name}"


def test_every_public_name_is_in_the_api(site):
    shown = set()
    for page in (site / "api").glob("*.html"):
        shown |= set(re.findall(r'id="(adaptlora[\w.]+)"', page.read_text(encoding="utf-8")))
    for module in (adaptlora, adaptlora.ops, adaptlora.nn):
        for name in module.__all__:
            thing, public = getattr(module, name), f"{module.__name__}.{name}"
            if isinstance(thing, ModuleType):
                continue
            # Where a module is called like the function in it, only the whole name is the function's.
            names = {f"{thing.__module__}.{thing.__qualname__}"} | ({public} - sys.modules.keys())
            assert names & shown, f"no page of docs/api shows {public}"
    assert {"adaptlora.Adapter.save", "adaptlora.Adapter.step", "adaptlora.methods.Method.step"} <= shown


def test_pages_read_offline(site):
    """What a browser would fetch from another server by itself: scripts, styles, fonts, images."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"""<(?:script|img|iframe|source)[^>]+src=["']?(?:https?:)?//""", text), page.name
        for link in re.findall(r"<link[^>]+>", text):
            assert "//" not in link or 'rel="canonical"' in link, f"{page.name}: {link}"
    for style in site.rglob("*.css"):
        assert not re.findall(r"""(?:url\(|@import )["']?(?:https?:)?//""", style.read_text(encoding="utf-8")), (
            style.name
        )


def test_house_docstrings_become_markdown():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from docstrings import markdown
    finally:
        sys.path.remove(str(ROOT / "docs"))
    made = markdown(
        "y = a_b * c   [LoRA, eq. 3]\n\nArgs:\n    x: (..., K),\n        any strides.   p, q: `a_b` <one>.\n        - a dimension;\n"
        "Returns: y,\n    whole.   Raises: ValueError."
    )
    assert made.splitlines() == [
        r"y = a\_b \* c   \[LoRA, eq. 3\]",
        "",
        "",
        "**Args**",
        "",
        "- `x`: (..., K), any strides.",
        "- `p, q`: `a_b` &lt;one>.",
        "    - a dimension;",
        "",
        "",
        "**Returns**: y, whole.",
        "",
        "**Raises**: ValueError.",
    ]
