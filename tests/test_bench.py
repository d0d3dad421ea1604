"""The benchmarks: what is counted, what is refused, what is written, and what counts as a regression."""

import copy
import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import elsewhere, invoke  # noqa: F401  (a fixture)
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import adaptlora.ops.flops  # noqa: F401  (the counter then knows the adapted layers)
from adaptlora.benchmarks import comparison, layer, memory, models, rank_change, roofline, step, svd, timing, work
from adaptlora.benchmarks.accuracy import WrongResultError
from adaptlora.benchmarks.case import Case, Options
from adaptlora.benchmarks.harness import Interleaved, Report
from adaptlora.benchmarks.plots import draw
from adaptlora.benchmarks.roofline import MIB, Limits
from adaptlora.benchmarks.work import Work

CPU = torch.device("cpu")


# Bytes, FLOPs and the roofline


def test_the_work_of_a_layer_by_hand():
    # x, y, dy, dx: 3·5, 3·7, 3·7, 3·5; W twice: 2·35; bias: 7; 4 bytes each
    assert work.layer(3, 5, 7, 0, torch.float32) == Work(
        4 * (15 + 21 + 21 + 15 + 70 + 7), 4 * 105, footprint=4 * (72 + 42)
    )
    # x again, A and B (2·12) read twice and their gradients written, S (3·2) written and read; 6·3·2·12 FLOPs more
    adapted = work.layer(3, 5, 7, 2, torch.float32)
    assert adapted.bytes == 4 * (149 + 15 + 3 * 24 + 2 * 6) and adapted.flops == 420 + 6 * 3 * 2 * 12
    # 16 bits: the base's operands alone become smaller
    assert work.layer(3, 5, 7, 2, torch.bfloat16).bytes == 2 * (149 + 15) + 4 * (72 + 12)
    # siblings share x and dx
    three = work.layer(3, 5, 7, 2, torch.float32, siblings=3)
    assert three.bytes == 3 * adapted.bytes - 2 * 4 * 3 * 15 and three.flops == 3 * adapted.flops
    # f(K + N)R = 4·2·12 twice, with S 2 values; products of 2 columns: 2·2·12 multiply-adds, twice
    assert work.low_rank_svd(5, 7, 2) == Work(4 * (24 + 24 + 2), 2 * (2 * 48))
    # W (35) twice, 3 vectors of 5 and of 7; a sketch and a projection, 2·35·3 FLOPs each
    assert work.randomized_svd(5, 7, 3) == Work(4 * (70 + 36), 2 * 210, footprint=4 * (35 + 36))
    # parameter, gradient and two moments read, all but the gradient written
    assert work.adamw(10) == Work(4 * (40 + 30), 0, footprint=4 * 40)
    # 2 texts of 3 tokens, width 4: QKᵀ and ·V are 2·9·4 multiply-adds a text; causal 2·6·4; backward twice as many
    assert work.attention(6, 3, 4, 1) == 3 * 2 * 2 * 72 and work.attention(6, 3, 4, 1, causal=True) == 3 * 2 * 2 * 48
    # one adapted linear, the frozen 7 → 11 after it (x, y, dy, dx: 2·21 + 2·33, W twice: 2·77), AdamW over 2·12 numbers
    whole = work.training_step([(5, 7, 2, True, True)], [(7, 11)], 3, 1000)
    assert whole.bytes == adapted.bytes + 4 * (42 + 66 + 154) + 28 * 24
    assert whole.flops == 1000 + adapted.flops + 4 * 3 * 77
    assert work.rank_change(100).bytes == 2400 and work.penalty(100).bytes == work.shrink(100).bytes == 1200


def test_the_flops_of_a_step_are_those_that_torch_counts():
    """All but the classifier's and the pooler's, which see 2 tokens of 32; torch does not count a CPU's attention."""
    model = models.build("tiny").eval()
    batch = models.batch_for("tiny", 2, 16)
    trained = models.Ours(model, models.plain(0.0, "tiny"))
    trained.model.eval()
    with FlopCounterMode(display=False) as counter:
        trained.step(batch)
    dims, ranks = models.MODELS["tiny"], trained.adapter.ranks()
    bare = models.build("tiny")
    counted = models.step_work(bare, "tiny", 2, 16, ranks).flops - work.attention(32, 16, dims.width, dims.blocks)
    head = 2 * (4 * 64 * 64 + 4 * 64 * 6)
    assert counter.get_total_flops() == counted + head


def test_limits_take_the_larger_of_two_times_at_the_size_of_the_case():
    limits = Limits({MIB: 100e9, 4 * MIB: 25e9}, {"float32": 50e9}, threads=1, cache=2 * MIB)
    assert limits.bandwidth_at(2 * MIB) == pytest.approx(50e9)  # halfway in the logarithms
    assert limits.bandwidth_at(1) == 100e9 and limits.bandwidth_at(2**40) == 25e9
    bytes_bound = Work(100_000_000, 1_000_000, footprint=4 * MIB)
    assert limits.seconds(bytes_bound) == pytest.approx(4e-3)
    found = limits.describe(bytes_bound, seconds=8e-3)
    assert found["roofline_share"] == 0.5 and found["bound"] == "memory" and found["gb_per_s"] == 12.5
    assert limits.describe(Work(MIB, 0), 1.0)["bound"] == "cache"
    compute_bound = Work(1000, 100_000_000)
    assert limits.seconds(compute_bound) == 2e-3 and limits.describe(compute_bound, 4e-3)["bound"] == "compute"
    # an unknown peak is no infinite one
    assert limits.seconds(Work(1, 1, torch.bfloat16)) is None
    assert "roofline_share" not in limits.describe(Work(1, 1, torch.bfloat16), 1.0)


def test_measured_limits_are_plausible(monkeypatch):
    monkeypatch.setattr(roofline, "bf16_unusable", lambda device: "no instructions")
    limits = roofline.measure(timing.CpuTimer(), quick=True)
    assert all(1e8 < rate < 1e13 for rate in (*limits.bandwidth.values(), *limits.peak.values()))
    assert list(limits.peak) == ["float32"] and limits.not_measured == {"bfloat16": "no instructions"}


# What is refused and how things are timed


def test_a_provider_with_a_wrong_result_is_refused():
    def wrong(base, lora_A, lora_B, p):
        return layer.our_layer(base, lora_A, 1.01 * lora_B, p)

    point = layer.Point(8, 16, 16, 2, 0.0, torch.float32)
    with pytest.raises(WrongResultError, match="a case: not right: y: error"):
        layer.layer_case(point, CPU, name="a case", compiled=False, layers={"not right": wrong})


def test_our_layers_are_checked_with_the_masks_that_are_timed(monkeypatch):
    class Unscaled(layer.LoraLinear):
        """Right without dropout; with it dx is another one."""

        def forward(self, x):
            if self.training:
                x.register_hook(lambda grad: 1.01 * grad)
            return super().forward(x)

    def unscaled(base, lora_A, lora_B, p):
        made = right(base, lora_A, lora_B, p)
        made.__class__ = Unscaled
        return made

    right = layer.our_layer
    point = layer.Point(8, 16, 16, 2, 0.5, torch.float32)
    layer.group_case(point, CPU)
    monkeypatch.setattr(layer, "our_layer", unscaled)
    with pytest.raises(WrongResultError, match="a case: adaptlora, training: dx: error"):
        layer.layer_case(point, CPU, name="a case", compiled=False)
    monkeypatch.setattr(layer, "our_layer", right)
    seeds = iter(range(100))
    monkeypatch.setattr(layer, "new_seed", lambda device: torch.tensor(next(seeds)))
    with pytest.raises(WrongResultError, match="adaptlora, 3 layers, training: y: error"):
        layer.group_case(point, CPU)


@pytest.mark.parametrize("part", [0, 1, 2], ids=["U", "S", "Vh"])
def test_triplets_of_which_a_part_is_wrong_are_refused(part):
    W = svd.decaying(12, 20, CPU)
    triplets = list(torch.linalg.svd(W, full_matrices=False))
    svd.assert_triplets("svd", [triplets], [W], 4, off=1e-5, least=1e-5)
    triplets[part] = torch.zeros_like(triplets[part])
    with pytest.raises(WrongResultError, match="is off by 1" if part == 1 else "lacks 1 of the best product"):
        svd.assert_triplets("svd", [triplets], [W], 4, off=1e-5, least=1e-5)


def test_a_step_that_trains_otherwise_and_a_change_that_keeps_others_are_refused(monkeypatch):
    model, batch = models.build("tiny"), models.batch_for("tiny", 2, 16)
    trained = {name: models.Ours(models.shared_copy(model), models.plain(0.0, "tiny")) for name in ("one", "other")}
    for each in trained.values():
        models.fill(each)
    with torch.no_grad():
        next(iter(trained["other"].factors().values()))[0].mul_(1.01)
    with pytest.raises(WrongResultError, match="other differs from one"):
        step.assert_same_training(trained, batch, 2)
    rows = rank_change.NewParameters.rows
    monkeypatch.setattr(rank_change.NewParameters, "rows", lambda self, name: [t + 1 for t in rows(self, name)])
    with pytest.raises(WrongResultError, match="new parameters and optimizer: module 0 does not keep its first 4"):
        rank_change.change_case("tiny", CPU)


def test_rounds_start_with_another_provider_each_and_prepare_is_not_timed():
    calls = []

    class Prepared:
        def prepare(self):
            calls.append("prepare")

        def __call__(self):
            calls.append("b")

    case = Case("a case", {"a": lambda: calls.append("a"), "b": Prepared()}, "a", rounds=2, warmup=1, work=Work(10, 0))
    found = case.measure(Options(CPU), Limits({MIB: 1e9}, {}, 1))
    assert calls == ["a", "prepare", "b", "prepare", "b", "a", "a", "prepare", "b"]
    assert {name: len(times) for name, times in found.samples.items()} == {"a": 2, "b": 2}
    assert found.summary()["providers"]["b"]["bytes"] == 10


@pytest.fixture
def fake_gpu(monkeypatch):
    """What CudaTimer calls, as a list of the calls."""
    calls = []

    class Recorder:
        def __init__(self, name="", **options):
            self.name = name

        def __getattr__(self, method):
            return lambda *arguments: calls.append(method) or 2.0

    class Stream(Recorder):
        device = SimpleNamespace(index=0)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    class Capture(Stream):
        """As torch.cuda.graph: its end raises too after a call that may not be captured."""

        def __enter__(self):
            calls.append("capturing")

        def __exit__(self, kind, *error):
            if kind is not None:
                raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1000))
    for name in ("Event", "Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Recorder)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: calls.append("set_stream"))
    generator = SimpleNamespace(clone_state=lambda: "drawn", graphsafe_set_state=lambda state: calls.append(state))
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Stream())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: Capture())
    monkeypatch.setattr(torch, "empty", lambda size, **options: calls.append(("buffer", size)) or Recorder())
    return calls


def test_a_gpu_is_timed_by_events_with_a_cold_cache_and_by_graphs_where_it_can(fake_gpu):
    def refused():
        if "capturing" in fake_gpu:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    timer = timing.CudaTimer(graphs=True)
    assert fake_gpu == [("buffer", 2000)]
    fake_gpu.clear()
    # milliseconds of the events; the cache is cleared before the first of them
    assert timer.seconds(lambda: fake_gpu.append("run")) == 2e-3
    assert fake_gpu == ["zero_", "record", "run", "record", "synchronize", "elapsed_time"]
    replay = timer.ready("graph", lambda: fake_gpu.append("run"))
    fake_gpu.clear()
    replay()
    assert fake_gpu == ["replay"] and timer.not_captured == {}
    fake_gpu.clear()
    assert timer.ready("eager", refused) is refused
    # on the stream and with the random numbers that it had before the capture
    assert fake_gpu[fake_gpu.index("capturing") :] == ["capturing", "set_stream", "drawn"]
    prepared = rank_change.Masks({"a": 1}, CPU)
    assert timer.ready("masks", prepared) is prepared
    assert timer.not_captured == {
        "eager": "operation not permitted when stream is capturing",
        "masks": "it is prepared anew before each call",
    }


# Regressions


def result(*ratios, floor="frozen", provider=None, **fields):
    """The content of a result of one case with the ratio (low, median, high) of "adaptlora", or of "PEFT" where the floor is ours."""
    low, median, high = ratios
    row = {"ratio": median, "ratio_quartiles": [low, high]}
    providers = {
        floor: {"ratio": 1.0, "ratio_quartiles": [1.0, 1.0]},
        provider or ("PEFT" if floor == "adaptlora" else "adaptlora"): row,
    }
    environment = {"machine": {"cpu": "a", "threads": 2}, "versions": {"torch": "2"}}
    return {"environment": environment, "cases": [{"case": "layer", "floor": floor, "providers": providers, **fields}]}


def compared(old, new):
    return comparison.compare(
        *(comparison.parse(content, name) for content, name in ((old, "old.json"), (new, "new.json")))
    )


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ((1.1, 1.2, 1.3), (1.31, 1.4, 1.5), "regressed"),
        ((1.1, 1.2, 1.3), (1.30, 1.4, 1.5), ""),  # the quartiles touch
        ((1.19, 1.2, 1.21), (1.22, 1.25, 1.26), ""),  # apart, but by less than 5 %
        ((1.19, 1.2, 1.21), (1.22, 1.27, 1.28), "regressed"),
        ((1.31, 1.4, 1.5), (1.1, 1.2, 1.3), "improved"),
        ((1.1, 1.2, 1.3), (1.1, 1.2, 1.3), ""),
    ],
)
def test_a_regression_is_apart_in_quartiles_and_more_than_five_percent(old, new, verdict):
    (row,) = compared(result(*old), result(*new)).rows
    assert (row.provider, row.verdict) == ("adaptlora", verdict)


def test_where_the_floor_is_ours_its_ratio_to_the_others_counts():
    (row,) = compared(result(2.0, 2.1, 2.2, floor="adaptlora"), result(1.6, 1.7, 1.8, floor="adaptlora")).rows
    assert row.provider == "adaptlora over PEFT" and row.verdict == "regressed"
    assert row.old.median == pytest.approx(1 / 2.1)


def test_what_cannot_be_compared_is_said():
    old, new = result(1, 1, 1, M=8), result(1, 1, 1, M=16)
    found = compared(old, new)
    assert (found.rows, found.missing, found.added) == ([], ["layer, M 8"], ["layer, M 16"])
    new = result(1, 1, 1, M=8)
    new["cases"][0]["providers"]["PEFT"] = new["cases"][0]["providers"].pop("adaptlora")
    new["environment"] = {
        "machine": {"cpu": "b", "threads": 1},
        "versions": {"torch": "2", "peft": "1"},
        "device": "cpu",
    }
    found = compared(old, new)
    assert found.missing == ["adaptlora, of layer, M 8"] and found.added == ["PEFT, of layer, M 8"]
    assert found.conditions == ["processor: a, now b", "threads: 2, now 1", "version of peft: none, now 1"]
    assert compared(old, result(1, 1, 1, floor="another", M=8)).floors == ["layer, M 8: 'frozen', now 'another'"]
    assert compared(result(1, 1, 1, rounds=3) | {"complete": False}, result(1, 1, 1, rounds=5)).conditions == [
        "old.json is of a run that did not come to its end",
        "fewer than 5 rounds, whose quartiles say little: layer",
    ]


@pytest.mark.parametrize(("provider", "fails"), [("adaptlora LoRA", True), ("PEFT", False), ("masked", False)])
def test_only_our_own_regressions_fail(provider, fails):
    found = compared(result(1.1, 1.2, 1.3, provider=provider), result(2.1, 2.2, 2.3, provider=provider))
    assert found.rows[0].verdict == "regressed" and bool(found.regressed) is fails


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("cases"), "old.json must be a result of these benchmarks"),
        (lambda content: content["cases"].append(3), r"cases\[1\] must have the texts case and floor"),
        (lambda content: content["cases"][0].update(floor="nobody"), "must have providers, 'nobody' among them"),
        (
            lambda content: content["cases"].append(content["cases"][0]),
            "named otherwise than the cases before it, got 'layer'",
        ),
        (lambda content: content["cases"][0]["providers"].update(x={"ratio": "1"}), "x must have a number ratio"),
        (
            lambda content: content["cases"][0]["providers"].update(x={"ratio": 1, "ratio_quartiles": [2, 3]}),
            "0 < lower",
        ),
    ],
)
def test_foreign_results_are_refused(change, message):
    content = result(1, 1, 1)
    change(content)
    with pytest.raises(ValueError, match=message):
        comparison.parse(content, "old.json")


def test_the_stored_results_of_the_suite_can_be_compared(request):
    stored = request.config.rootpath / "bench" / "results"
    for name in ("bench_lora_linear", "bench_step", "bench_step_parts", "bench_rank_penalty", "bench_nora"):
        results = comparison.read(stored / f"{name}.json")
        found = comparison.compare(results, results)
        assert found.rows and not found.regressed and not found.notes()


# The command


@pytest.fixture
def no_processes(monkeypatch):
    """Memory's processes take seconds each; what they do is tested below."""
    monkeypatch.setattr(memory, "run", lambda provider, *rest: {"peak": (2 + len(provider)) * MIB, "before": MIB})


def test_every_scenario_runs_and_is_written_drawn_and_compared(elsewhere, tmp_path, no_processes):  # noqa: F811
    """The quick sizes; then the file against itself, and against one in which adaptlora was faster."""
    torch.set_num_threads(1)
    output = invoke("bench", "--quick", "--rounds", 1, "--threads", 1, "--json", "new.json", "--plot", "plots").output
    content = json.loads((tmp_path / "new.json").read_text())
    assert {case["scenario"] for case in content["cases"]} == {
        "layer",
        "penalty",
        "rank-change",
        "svd",
        "step",
        "memory",
    }
    assert "limits measured here: float32" in output
    assert content["environment"]["limits"]["threads"] == content["environment"]["machine"]["threads"] == 1
    for case in content["cases"]:
        assert (
            case["rounds"] == 1
            and case["floor"] in case["providers"]
            and case["providers"][case["floor"]]["ratio"] == 1
        )
        timed = case["scenario"] != "memory"
        counted = [name for name, row in case["providers"].items() if "bytes" in row and "flops" in row]
        assert not timed or case["floor"] in counted
        for row in case["providers"].values():
            assert math.isfinite(row["ratio"]) and (row["median_ms"] if timed else row["median_MiB"]) > 0
    pictures = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert pictures == sorted(
        [f"layer_{axis}.png" for axis in ("m", "k_n", "r", "dropout", "dtype")]
        + [f"{name}_ratios.png" for name in ("layer", "penalty", "rank_change", "svd", "step", "memory")]
        + ["roofline.png"]
    )
    for name in pictures:
        with Image.open(tmp_path / "plots" / name) as image:
            image.verify()
            assert image.format == "PNG" and min(image.size) > 200

    assert ": 0 regressed" in invoke("bench", "--compare", "new.json", "--new", "new.json").output
    old = copy.deepcopy(content)
    row = old["cases"][0]["providers"]["adaptlora"]
    row["ratio"], row["ratio_quartiles"] = row["ratio"] / 2, [q / 2 for q in row["ratio_quartiles"]]
    (tmp_path / "old.json").write_text(json.dumps(old))
    output = invoke("bench", "--compare", "old.json", "--new", "new.json", code=1).output
    assert "+100.0%" in output and ": 1 regressed" in output


def test_what_fails_late_leaves_what_was_measured_and_is_no_regression(elsewhere, tmp_path, monkeypatch):  # noqa: F811
    def killed(*arguments):
        raise memory.ProcessError("bench: memory: PEFT LoRA ended with -9: killed")

    monkeypatch.setattr(memory, "run", killed)
    arguments = ["bench", "penalty", "memory", "--quick", "--rounds", 1, "--json", "new.json"]
    output = invoke(*arguments, code=2).output
    assert "error: bench: memory: PEFT LoRA ended with -9: killed (new.json has the cases" in output
    assert "Traceback" not in output
    content = json.loads((tmp_path / "new.json").read_text())
    assert [case["scenario"] for case in content["cases"]] == ["penalty"] * 2 and content["complete"] is False
    assert content["environment"]["device"] == "cpu"

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "run", interrupted)
    assert "new.json has the cases" in invoke(*arguments, code=130).output
    monkeypatch.setattr(memory, "unusable", lambda: "no high-water mark")
    assert "not run: peak of resident memory: no high-water mark" in invoke(*arguments).output
    content = json.loads((tmp_path / "new.json").read_text())
    assert content["complete"] is True and content["not_run"][0]["scenario"] == "memory"
    monkeypatch.setattr(roofline, "measure", lambda *a, **k: 1 / 0)
    assert "ZeroDivisionError" in invoke("bench", "penalty", "--quick", code=2).output


def test_memory_is_not_run_where_the_kernel_keeps_no_mark(monkeypatch):
    assert memory.unusable() is None
    monkeypatch.setattr(memory.Path, "write_text", lambda *a: (_ for _ in ()).throw(PermissionError("not allowed")))
    assert "cannot be read or start anew: not allowed" in memory.unusable()
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    (found,) = memory.comparisons(Options(CPU, quick=True))
    assert found.reason == "needs Linux, whose kernel keeps the high-water mark, got darwin"


def test_files_with_nothing_in_common_are_an_error(elsewhere, tmp_path):  # noqa: F811
    for name, content in (("old", result(1, 1, 1, M=8)), ("new", result(1, 1, 1, M=16))):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    output = invoke("bench", "--compare", "old.json", "--new", "new.json", code=2).output
    assert "only in the old file: layer, M 8" in output and "got none to compare" in output


def test_a_run_of_memory_is_a_process_of_its_own(monkeypatch):
    """The process is not started here: it imports for seconds. What it does is done in this one."""
    found = memory.child("adaptlora LoRA", "tiny", 0.1, 1)
    assert 100 * MIB < found["before"] < found["peak"]
    ended = SimpleNamespace(returncode=0, stdout=f"a library's words\n{json.dumps(found)}\n", stderr="")
    monkeypatch.setattr(memory.subprocess, "run", lambda command, **options: ended)
    assert memory.run("adaptlora LoRA", "tiny", 0.1, 1) == found
    ended.returncode, ended.stderr = -9, "killed"
    with pytest.raises(RuntimeError, match="bench: memory: PEFT LoRA ended with -9: killed"):
        memory.run("PEFT LoRA", "tiny", 0.1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layers"], "bench: scenario must be one of layer, penalty, rank-change, svd, step, memory, got 'layers'"),
        (["layer", "--rounds", 0], "bench: rounds must be an integer > 0, got 0"),
        (["layer", "--threads", 0], "bench: threads must be an integer > 0, got 0"),
        (["layer", "--device", "tpu"], "bench: device must be auto, cpu or cuda, got 'tpu'"),
        (["layer", "--compare", "absent.json"], "bench: absent.json is missing"),
        (["--compare", "text.json"], "bench: text.json must be JSON"),
        (["--new", "text.json"], "bench: --new needs --compare or --plot"),
        (["layer", "--json", "."], "bench: json must be a file, got the folder '.'"),
        (["layer", "--json", "text.json/x.json"], "bench: json must be a place that can be written to"),
        (["layer", "--plot", "text.json/x"], "bench: plot must be a place that can be written to"),
        (["--plot", "plots", "--new", "text.json", "--quick", "--rounds", 3], "already, without --quick, --rounds"),
        (["--compare", "text.json", "--rounds", 1], "bench: --compare needs at least 5 rounds"),
        (["--compare", "text.json", "--quick"], "got --quick with its 3: --rounds"),
    ],
)
def test_bad_calls_are_told_before_anything_is_measured(elsewhere, tmp_path, monkeypatch, arguments, message):  # noqa: F811
    monkeypatch.setattr(roofline, "measure", lambda *a, **k: pytest.fail("measured"))
    (tmp_path / "text.json").write_text("no")
    output = " ".join(invoke("bench", *arguments, code=2).output.split())
    assert message in output


def test_peft_is_asked_for_by_name(elsewhere, monkeypatch):  # noqa: F811
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    monkeypatch.setattr(roofline, "measure", lambda *a, **k: pytest.fail("measured"))
    output = " ".join(invoke("bench", "layer", "--quick", code=2).output.split())
    assert 'bench: layer needs the package peft, which is not installed: pip install "adaptlora[demo]"' in output


def test_a_case_that_cannot_run_is_listed_with_its_reason(monkeypatch):
    monkeypatch.setattr(layer, "bf16_unusable", lambda device: "no bf16 instructions")
    point = layer.Point(8, 16, 16, 2, 0.0, torch.bfloat16)
    found = layer.sweep_case(point, ["dtype"], Options(CPU, quick=True))
    report = Report()
    report.skip("layer", found.case, found.reason)
    assert report.content()["not_run"][0]["reason"] == "no bf16 instructions"
    assert "no bf16 instructions" in report.render(120)


def test_a_file_without_sweeps_and_limits_is_drawn_too(tmp_path):
    assert [path.name for path in draw(result(1.1, 1.2, 1.3), tmp_path)] == ["cases_ratios.png"]


def test_the_collector_runs_again_after_a_provider_that_fails():
    import gc

    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        Interleaved({"a": fail}, timing.CpuTimer())()
    assert gc.isenabled()


# make bench


@pytest.fixture
def bench_plugin(request, tmp_path, monkeypatch):
    """bench/conftest.py, with folders of the test's own."""
    spec = importlib.util.spec_from_file_location("bench_conftest", request.config.rootpath / "bench" / "conftest.py")
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)
    monkeypatch.setattr(plugin, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(plugin, "PARTIAL", tmp_path / "partial")
    return plugin


@pytest.mark.parametrize(
    ("why", "folder"),
    [("", "results"), ("failed", "partial"), ("deselected", "partial"), ("interrupted", "partial"), ("one", "partial")],
)
def test_a_stored_result_is_replaced_by_a_whole_file_alone(bench_plugin, tmp_path, why, folder):
    options = {"--quick": False, "--results": None}
    config = SimpleNamespace(
        stash=pytest.Stash(), option=SimpleNamespace(), getoption=options.get,
        args=["bench/bench_x.py::test_1" if why == "one" else "bench"],
    )  # fmt: skip
    items = [SimpleNamespace(path=Path("bench_x.py"), nodeid=f"test_{i}", config=config) for i in range(2)]
    bench_plugin.pytest_configure(config)
    left_out = {"deselected": items[1:], "one": items[1:]}.get(why, [])
    bench_plugin.pytest_collection_modifyitems(config, [item for item in items if item not in left_out])
    if why == "deselected":
        bench_plugin.pytest_deselected(left_out)
    for item in items[:1] if left_out or why == "interrupted" else items:
        for when in ("setup", "call", "teardown"):
            hook = bench_plugin.pytest_runtest_makereport(item, None)
            next(hook)
            report = SimpleNamespace(failed=why == "failed" and when == "call", when=when)
            with pytest.raises(StopIteration):
                hook.send(SimpleNamespace(get_result=lambda report=report: report))
    config.stash[bench_plugin.REPORT].add("bench_x", Case("a", {"a": int}, "a", 1).measure(Options(CPU), None))
    bench_plugin.pytest_sessionfinish(SimpleNamespace(config=config))
    assert [path.parent.name for path in tmp_path.rglob("*.json")] == [folder]
    (line,) = config.stash[bench_plugin.WRITTEN]
    assert ("is as it was" in line) is (folder == "partial")
