"""shear_files: adapters on disk, in every format, against stock PEFT and safetensors alone; resuming, errors, processes."""

import json
import os
import subprocess
import sys

import peft
import pytest
import torch
from models import bert_batch, tiny_bert
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adaptlora
from adaptlora import NoRMConfig, SVDConfig, TAIAConfig, shear_files
from adaptlora.lora_files import LoraFile
from adaptlora.shear import files as files_module

CONFIGS = [NoRMConfig(), NoRMConfig(keep_scaling=True, amplification=True), SVDConfig(energy=0.8), TAIAConfig()]


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    tiny_bert().save_pretrained(folder, max_shard_size="4KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


@pytest.fixture
def adapter(tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=6,
        lora_alpha=12,
        target_modules=["query", "key", "dense"],
        init_lora_weights=False,
        modules_to_save=["classifier"],
    )
    model = peft.get_peft_model(tiny_bert(), config)
    torch.nn.init.normal_(model.get_base_model().classifier.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def updates(folder) -> dict[str, torch.Tensor]:
    from peft.tuners.lora import LoraLayer

    model = peft.PeftModel.from_pretrained(tiny_bert(), folder).eval()
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    return {n: m.get_delta_weight("default").detach() for n, m in layers.items()}


def tree(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_stock_peft_computes_what_shearing_in_memory_gives(config, base, adapter, tmp_path):
    out = tmp_path / "out"
    report = shear_files(adapter, out, config, base=base)
    live = peft.PeftModel.from_pretrained(tiny_bert(), adapter)
    expected = adaptlora.shear(live, config)
    assert report.ranks() == expected.ranks() and report.as_dict() == expected.as_dict()
    kept = {s.module.name: s.module.scaling * s.module.lora_B @ s.module.lora_A for s in expected.modules if s.rank}
    found = updates(out)
    assert found.keys() == kept.keys()
    for name, update in kept.items():
        torch.testing.assert_close(found[name], update, rtol=0, atol=0)
    stored, old = load_file(out / "adapter_model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    heads = [key for key in old if "classifier" in key]
    assert heads and all(torch.equal(stored[key], old[key]) for key in heads)
    assert not list(tmp_path.glob("*.unfinished")) and not list(tmp_path.glob(".*"))


def test_the_report(base, adapter, tmp_path):
    out = tmp_path / "out"
    report = shear_files(adapter, out, base=base)
    stored = json.loads((out / "shear_report.json").read_text())
    assert stored["method"] == "NoRM" and stored["config"]["search"] == "expected"
    for name, rank in report.ranks().items():
        module = stored["modules"][name]
        assert module["rank"] == rank == module["c"] and module["rank_before"] == 6 and module["scaling"] == 1.0
        assert len(module["phi"]) == 6 and module["phi"][rank - 1] == max(
            module["phi"][c - 1] for c in module["candidates"]
        )
    for picture in ("ranks.png", "phi.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    shear_files(adapter, tmp_path / "svd", SVDConfig(rank=2))
    assert not (tmp_path / "svd" / "phi.png").exists() and (tmp_path / "svd" / "ranks.png").is_file()


def test_merge(base, adapter, tmp_path):
    from transformers import BertForSequenceClassification

    out = tmp_path / "out"
    shear_files(adapter, out, base=base, merge=True)
    merged = BertForSequenceClassification.from_pretrained(out / "merged").eval()
    reference = peft.PeftModel.from_pretrained(tiny_bert(), out).eval().merge_and_unload()
    assert not torch.equal(reference.classifier.weight, tiny_bert().classifier.weight)
    for name, weight in reference.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], weight)


def test_merge_into_a_base_without_the_trained_head(adapter, tmp_path):
    tiny_bert().bert.save_pretrained(tmp_path / "base")
    with pytest.raises(
        ValueError,
        match=r"merge: the base must hold classifier.(bias|weight) of shape .*, as the adapter does, got None",
    ):
        shear_files(adapter, tmp_path / "out", SVDConfig(rank=2), base=tmp_path / "base", merge=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["kohya", "diffusers"])
def test_other_formats_go_out_as_they_came_in(kind, tmp_path):
    torch.manual_seed(0)
    file, tensors = tmp_path / "in.safetensors", {}
    for i in range(3):
        down, up = torch.randn(4, 20).bfloat16(), torch.randn(30, 4).bfloat16()
        if kind == "kohya":
            stem = f"lora_unet_blocks_{i}_attn_to_q"
            tensors |= {
                f"{stem}.lora_down.weight": down,
                f"{stem}.lora_up.weight": up,
                f"{stem}.alpha": torch.tensor(2.0),
            }
        else:
            stem = f"unet.blocks.{i}.attn.to_q"
            tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    save_file(tensors, file)
    base = tmp_path / "base.safetensors"
    save_file({f"blocks.{i}.attn.to_q.weight": torch.randn(30, 20) for i in range(3)}, base)
    out = tmp_path / "out.safetensors"
    report = shear_files(file, out, NoRMConfig(keep_scaling=True), base=base)
    found = load_file(out)
    assert found.keys() == tensors.keys()
    for sheared in report.modules:
        stem, m = sheared.module.name, sheared.module
        names = ("lora_down", "lora_up") if kind == "kohya" else ("lora_A", "lora_B")
        down, up = (found[f"{stem}.{name}.weight"] for name in names)
        assert down.dtype == torch.bfloat16 and down.shape == (sheared.rank, 20)
        scaling = found[f"{stem}.alpha"].item() / sheared.rank if kind == "kohya" else 1.0
        expected = m.scaling * m.lora_B.float() @ m.lora_A.float()
        torch.testing.assert_close(scaling * up.float() @ down.float(), expected, rtol=1e-5, atol=1e-6)
    assert (tmp_path / "out.report" / "shear_report.json").is_file()


class Stopped(BaseException):
    """As a signal: not an error of the input."""


def test_a_killed_run_goes_on_where_it_stopped(base, adapter, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    shear_files(adapter, whole, base=base)
    loads = []
    original = files_module.BaseWeights.load

    def counted(self, name, *arguments, **options):
        loads.append(name)
        if len(loads) == 5:
            raise Stopped
        return original(self, name, *arguments, **options)

    monkeypatch.setattr(files_module.BaseWeights, "load", counted)
    with pytest.raises(Stopped):
        shear_files(adapter, out, base=base, workers=1)
    assert not out.exists() and len(list((tmp_path / "out.unfinished").glob("*.safetensors"))) == 4
    # What a power failure may leave of a file counts as not done.
    next((tmp_path / "out.unfinished").glob("*.safetensors")).write_bytes(b"cut")
    shear_files(adapter, out, base=base, workers=1)
    modules = len(json.loads((out / "shear_report.json").read_text())["modules"])
    assert len(loads) == 5 + modules - 3
    assert tree(out) == tree(whole) and not (tmp_path / "out.unfinished").exists()


def test_unfinished_work_of_another_run_is_not_used(base, adapter, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(
            LoraFile,
            "write",
            _stop,
        )
        shear_files(adapter, tmp_path / "out", NoRMConfig(search="min"), base=base)
    assert (tmp_path / "out.unfinished").is_dir()
    shear_files(adapter, tmp_path / "out", base=base)
    shear_files(adapter, tmp_path / "whole", base=base)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def _stop(*arguments):
    raise Stopped


@pytest.mark.parametrize("changed", ["base", "adapter"])
def test_work_of_other_inputs_is_not_used(changed, base, adapter, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(LoraFile, "write", _stop)
        shear_files(adapter, tmp_path / "out", base=base)
    if changed == "base":
        damage(base, QUERY, lambda W: torch.randn_like(W))
    else:
        tensors = load_file(adapter / "adapter_model.safetensors")
        save_file({key: 2 * value for key, value in tensors.items()}, adapter / "adapter_model.safetensors")
    for out in ("out", "whole"):
        shear_files(adapter, tmp_path / out, base=base)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("where", ["write", "report", "replace"])
def test_a_kill_while_the_results_are_written(where, base, adapter, tmp_path, monkeypatch):
    shear_files(adapter, tmp_path / "whole", base=base, merge=True)
    target = {
        "write": (LoraFile, "write"),
        "report": (files_module.ShearReport, "write"),
        "replace": (files_module.os, "replace"),
    }
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        if where == "replace":
            real = os.replace
            patch.setattr(
                files_module.os, "replace", lambda a, b: _stop() if str(b).endswith("out/merged") else real(a, b)
            )
        else:
            patch.setattr(*target[where], _stop)
        shear_files(adapter, tmp_path / "out", base=base, merge=True)
    assert not (tmp_path / "out" / "merged").exists()
    shear_files(adapter, tmp_path / "out", base=base, merge=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole") and not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize("left", [f".{name}.{16 * 'a'}.adaptlora-tmp" for name in ("fingerprint", "3.safetensors")])
def test_what_a_kill_leaves_of_files_being_written_is_ours(left, base, adapter, tmp_path):
    folder = tmp_path / "out.unfinished"
    folder.mkdir()
    (folder / left).write_bytes(b"cut")
    if "safetensors" in left:
        (folder / "fingerprint").write_text("another")
    shear_files(adapter, tmp_path / "out", base=base)
    assert (tmp_path / "out" / "shear_report.json").is_file() and not folder.exists()


def test_an_update_of_zeros_alone(base, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["query"])
    peft.get_peft_model(tiny_bert(), config).save_pretrained(tmp_path / "adapter")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="shear: at least one module must keep an update, got only zeros in 2 modules"):
        shear_files(tmp_path / "adapter", tmp_path / "out", base=base, merge=True)
    assert tree(tmp_path) == before


def test_without_matplotlib_there_are_no_pictures(base, adapter, tmp_path, monkeypatch):
    from adaptlora.shear import report as report_module

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "phi.png").write_text("of an earlier run")
    monkeypatch.setattr(report_module.importlib.util, "find_spec", lambda name: None)
    shear_files(adapter, tmp_path / "out", base=base)
    assert not list((tmp_path / "out").glob("*.png"))
    assert (tmp_path / "out" / "shear_report.json").is_file()


def test_a_folder_that_is_not_ours_is_left_alone(base, adapter, tmp_path):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "letter.txt").write_text("dear")
    with pytest.raises(
        ValueError, match=r"out.unfinished must be what an earlier run left, or absent, got other files in it"
    ):
        shear_files(adapter, tmp_path / "out", base=base)
    assert (tmp_path / "out.unfinished" / "letter.txt").read_text() == "dear"


def damage(base, name, change):
    """Rewrite one tensor of the base."""
    index = json.loads((base / "model.safetensors.index.json").read_text())
    file = base / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": None}, "shear: base must be given to compare with the base weights, got None"),
        ({"base": None, "config": SVDConfig(rank=2), "merge": True}, "shear: base must be given to merge, got None"),
        ({"config": SVDConfig(budget=3)}, "budget must be at least one vector for each of the"),
        ({"adapter": "nothing"}, "nothing"),
        ({"out": "adapter"}, "shear: out must not be the adapter itself"),
        ({"out": "base"}, "shear: out must not be the base model or lie in it"),
        ({"out": "base/sheared", "merge": True}, "shear: out must not be the base model or lie in it"),
        ({"out": "adapter/adapter_config.json"}, "shear: out must be a folder for a PEFT adapter, got the file"),
        ({"workers": 0}, "shear: workers must be None or an integer > 0, got 0"),
        ({"device": "cdua"}, "shear: device must be one that torch can use, got 'cdua'"),
    ],
    ids=[
        "no base",
        "no base to merge",
        "budget",
        "no adapter",
        "onto itself",
        "onto the base",
        "into the base",
        "onto a file",
        "workers",
        "device",
    ],
)
def test_bad_arguments(arguments, message, base, adapter, tmp_path):
    before = tree(tmp_path)
    given = {"adapter": adapter, "out": tmp_path / "out", "base": base} | arguments
    for name in ("adapter", "out"):
        given[name] = tmp_path / given[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        shear_files(given.pop("adapter"), given.pop("out"), given.pop("config", None), **given)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda W: torch.full_like(W, float("nan")), "layer.1.attention.self.query must be finite, got 256 NaN"),
        (
            lambda W: W[:8].clone(),
            r"layer.1.attention.self.query must have shape \(16, 16\), as the adapter's factors, got \(8, 16\)",
        ),
        (lambda W: W.to(torch.int8), "query"),
    ],
    ids=["NaN", "shape", "integers"],
)
def test_a_base_that_does_not_fit(change, message, base, adapter, tmp_path):
    damage(base, QUERY, change)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=message):
        shear_files(adapter, tmp_path / "out", base=base)
    assert tree(tmp_path) == before


def test_a_merged_model_that_is_there_already(base, adapter, tmp_path):
    (tmp_path / "out" / "merged").mkdir(parents=True)
    (tmp_path / "out" / "merged" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="merge: out must not exist or be an empty folder"):
        shear_files(adapter, tmp_path / "out", base=base, merge=True)


def test_dora_is_refused_by_name_or_passed_through(tmp_path, base):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["query"], use_dora=True, init_lora_weights=False)
    peft.get_peft_model(tiny_bert(), config).save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match="attention.self.query: use_dora is not supported"):
        shear_files(tmp_path / "dora", tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="no module"):
        shear_files(tmp_path / "dora", tmp_path / "out", base=base, skip_unsupported=True)


def test_memory_holds_one_base_weight_at_a_time(base, adapter, tmp_path, monkeypatch):
    alive, most = [], []
    original = files_module.BaseWeights.load

    def watched(self, *arguments, **options):
        import weakref

        weight = original(self, *arguments, **options)
        alive.append(weakref.ref(weight))
        most.append(sum(ref() is not None for ref in alive))
        return weight

    monkeypatch.setattr(files_module.BaseWeights, "load", watched)
    shear_files(adapter, tmp_path / "out", base=base, workers=1)
    assert max(most) == 1
    shear_files(adapter, tmp_path / "two", base=base, workers=2)
    assert max(most) <= 2


# Many processes


def torchrun(processes: int, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "adaptlora.cli", "shear", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_many_processes_give_the_bits_of_one(base, adapter, tmp_path):
    shear_files(adapter, tmp_path / "one", base=base, workers=2)
    result = torchrun(3, adapter, "-o", tmp_path / "many", "--base", base)
    assert result.returncode == 0, result.stderr[-2000:]
    assert tree(tmp_path / "one") == tree(tmp_path / "many")
    assert not (tmp_path / "many.unfinished").exists()


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_and_leaves_nothing(base, adapter, tmp_path):
    damage(base, QUERY, lambda W: torch.full_like(W, float("nan")))
    before = tree(tmp_path)
    result = torchrun(2, adapter, "-o", tmp_path / "many", "--base", base)
    assert result.returncode != 0 and "must be finite, got 256 NaN" in result.stderr
    assert tree(tmp_path) == before


# The command


def invoke(*arguments, code=0):
    from typer.testing import CliRunner

    from adaptlora.cli import app

    result = CliRunner().invoke(app, ["shear", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_the_command(base, adapter, tmp_path):
    result = invoke(adapter, "--base", base, "-o", tmp_path / "out", "--start", 3, "--keep-scaling")
    assert "parameters (−" in result.output and str(tmp_path / "out") in result.output.replace("\n", "")
    stored = json.loads((tmp_path / "out" / "shear_report.json").read_text())
    assert stored["config"] == vars(NoRMConfig(start=3, keep_scaling=True))
    invoke(adapter, "--method", "svd", "--keep", "energy=0.9", "-o", tmp_path / "svd")
    with safe_open(tmp_path / "svd" / "adapter_model.safetensors", framework="pt") as file:
        assert len(file.keys()) > 20


OTHERS = [("taia",), ("random", "--eta", 0.3), ("layer", "--ratio", 0.5), ("module",), ("svd", "--budget", 40)]


@pytest.mark.parametrize("options", OTHERS, ids=lambda options: options[0])
def test_the_command_with_other_methods(options, adapter, tmp_path):
    out = tmp_path / "out"
    invoke(adapter, "--method", *options, "-o", out)
    assert peft.PeftModel.from_pretrained(tiny_bert(), out)(**bert_batch()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "best"], "shear: method must be one of norm, svd, clip, taia, random, layer, module, got 'best'"),
        (["--method", "svd"], "exactly one of rank, energy, ratio and budget must be given, got none"),
        (["--method", "svd", "--keep", "8"], "--keep must be rank=NUMBER, energy=PART or ratio=PART, got '8'"),
        (["--method", "svd", "--keep", "rank=x"], "--keep must be rank=NUMBER"),
        (["--method", "svd", "--keep", "rank=4", "--tau", "0.2"], "--tau must go with method norm, got method svd"),
        (["--eta", "0.5"], "--eta must go with method random, got method norm"),
        (
            ["--method", "taia", "--seed", "1"],
            "--seed must go with method norm or random or layer or module, got method taia",
        ),
        ([], "base must be given to compare with the base weights, got None"),
        (["--search", "worst"], "NoRMConfig: search must be one of expected, official, min, got 'worst'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_one_red_line(options, message, adapter, tmp_path):
    before = tree(tmp_path)
    result = invoke(adapter, "-o", tmp_path / "out", *options, code=2)
    assert result.stderr.count("\n") == 1 and message in result.stderr
    assert tree(tmp_path) == before


def test_files_that_are_missing_are_one_red_line(tmp_path, adapter):
    for arguments in ([tmp_path / "none"], [adapter, "--base", tmp_path / "none"]):
        result = invoke(*arguments, "-o", tmp_path / "out", code=2)
        assert result.stderr.startswith("error: ") and str(tmp_path / "none") in result.stderr.replace("\n", "")


def test_merging_an_adapted_head_whose_base_weight_peft_stores(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    def llama():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=30, tie_word_embeddings=False, **sizes)).eval()

    llama().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert any("lm_head.base_layer" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    shear_files(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").eval()
    reference = peft.PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
    ids = torch.arange(8)[None]
    torch.testing.assert_close(merged(ids).logits, reference(ids).logits)
    damage_one = load_file(tmp_path / "base" / "model.safetensors")
    save_file(
        damage_one | {"lm_head.weight": torch.randn(30, 16)},
        tmp_path / "base" / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(
        ValueError, match="shear: the base weight of lm_head must be the one that the adapter stores, got another"
    ):
        shear_files(tmp_path / "adapter", tmp_path / "again", base=tmp_path / "base", merge=True)
