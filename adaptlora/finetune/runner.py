"""run(spec): data → model → adapter → training → report, and the files of a run."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import adaptlora

from .. import doctor, plots
from ..files import atomic_file
from ..io import HISTORY_FILE
from . import data as data_module
from . import metrics, peft_twin, tasks
from ._extras import need
from .presets import FinetuneSpec, check_paths
from .registry import task_class
from .report import MAX_PEFT_DIFFERENCE, OURS, PEFT, Report
from .train import Learner, NonFiniteLossError, seed_everything, train

_OF_SOME_RUNS = (
    "steps.png",
    f"adapter/{HISTORY_FILE}",
    "trained/adapter_model.safetensors",
    "trained/adapter_config.json",
    "diffusers/pytorch_lora_weights.safetensors",
)

Watch = Callable[[str, int, int, str], None]  # stage, done, total, note


def run(spec: FinetuneSpec, *, out: str | Path | None = None, watch: Watch | None = None) -> Report:
    """Fine-tune as the spec says.

    Args:
        out: folder for adapter/ (sheared, where the spec says so, beside it as trained in trained/), ranks.png, loss.png, report.json and
            La-LoRA's steps.png, replacing files of these names; they appear when everything is done, and not before. None: nothing is
            written.
        watch: called with (stage, done, total, note) as the work goes on.
    Returns: the report, complete.
    Raises: ValueError, TypeError (arguments, data; before training), MissingExtraError,
        RuntimeError (PEFT does not compute the same with the saved adapter; everything is written nevertheless).

    A run that ends early after its first step, by an error or by Ctrl-C, keeps its adapter as it was then, with the report so far, in
    the folder unfinished/ of `out`; what the error says is followed by where. It cannot be resumed.
    """
    started = time.perf_counter()
    watch = watch or (lambda stage, done, total, note: None)
    check_paths(spec, out)
    task_class(spec.task).check(spec)
    spec.shear_config()
    spec.config(None)  # its mistakes are cheaper to find before the data are read and the model is loaded
    _need_extras(spec, out)
    watch("loading", 0, 3, "data")
    data = data_module.load(spec)
    watch("loading", 1, 3, "model")
    task = tasks.build(spec, data)
    model = task.model()
    watch("loading", 2, 3, "adapter")
    seed_everything(spec.seed)
    base = model if not spec.compare else task.model()
    adapter = _attach(task, model, watch)
    options = {"lr": spec.lr, "weight_decay": spec.weight_decay}
    training = {**options, "max_grad_norm": spec.max_grad_norm, "losses": task.losses}
    trained = adapter.parameters()
    if spec.loraplus_lr_ratio is not None:
        trained = adapter.parameter_groups(**options, loraplus_lr_ratio=spec.loraplus_lr_ratio)
    learners = {OURS: Learner(model, trained, **training, adapter=adapter)}
    if spec.compare:
        theirs = peft_twin.twin(base, adapter)
        trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
        learners[PEFT] = Learner(theirs, trained, **training)
    watch("loading", 3, 3, "")
    report = Report(
        spec=asdict(spec),
        versions=doctor.versions(),
        machine=doctor.machine(),
        data={"train": len(data.train), "test": len(data.test), "duplicates": data.duplicates},
        higher_is_better=task.scores,
        peft_r=peft_twin.rank(adapter) if spec.compare else None,
    )
    if spec.test_split is not None and spec.eval_data is None and Path(spec.data).is_file():
        report.notes.append(
            f"{spec.data} is one file, without the split {spec.test_split}: {len(data.test):,} of its rows were held out to test on"
        )
    if task.dropped:
        report.notes.append(
            f"{task.dropped:,} of {len(data.train):,} rows to train on were left out: within max_length={spec.max_length} tokens there is"
            " nothing to learn in them"
        )
    with _kept_if_it_fails(adapter, report, out):
        _learn(task, learners, report, watch)
        with _folder_beside(out) as partial:
            if spec.shear is not None:
                _shear(task, learners, report, watch, partial)
            report.total_seconds = time.perf_counter() - started
            if partial is not None:
                _write(report, task, adapter, Path(out), partial, watch, started)
    limit = MAX_PEFT_DIFFERENCE[spec.dtype]
    if report.peft_difference is not None and not report.peft_difference <= limit:
        raise RuntimeError(
            f"finetune: logits after reloading with PEFT must differ by at most {limit:.0e}"
            f" (relative), got {report.peft_difference:.2e}; adapter and report are in {out}"
        )
    return report


@contextmanager
def _kept_if_it_fails(adapter, report: Report, out: str | Path | None) -> Iterator[None]:
    """What was trained is not lost with an error after hours: it is saved to `out`/unfinished, and the error says so."""
    try:
        yield
    except BaseException as error:
        steps = len(report.losses.get(OURS, []))
        if out is None or not steps:
            raise
        folder = Path(out) / "unfinished"
        try:
            adapter.save(folder)
            with atomic_file(folder / "report.json") as file:
                file.write_text(report.to_json(), encoding="utf-8")
            told = f"the adapter after step {steps} is in {folder}"
        except Exception as failure:  # the first error is the one to tell; this one is told with it
            told = f"the adapter after step {steps} could not be kept: {failure}"
        if isinstance(error, KeyboardInterrupt | NonFiniteLossError):
            raise type(error)(f"{error}; {told}".removeprefix("; ")) from error
        error.add_note(told)
        raise


@contextmanager
def _folder_beside(out: str | Path | None) -> Iterator[Path | None]:
    """A hidden folder beside `out`, removed at the end."""
    if out is None:
        yield None
        return
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _attach(task, model, watch: Watch) -> adaptlora.Adapter:
    config = task.spec.config(task.heads(model) or None)
    calibration = next(task.batches()) if getattr(config, "outer", None) == "activation" else None
    return adaptlora.attach(
        model,
        config,
        calibration=calibration,
        progress=lambda done, total: watch("factorising", done, total, "base weights"),
    )


def _need_extras(spec: FinetuneSpec, out) -> None:
    task = task_class(spec.task)
    wanted = [*task.packages]
    wanted += [metrics.PACKAGES[name] for name in task.chosen_metrics(spec) if name in metrics.PACKAGES]
    if spec.compare or out is not None:
        wanted.append("peft")
    if out is not None:
        wanted.append("matplotlib")
    for package in dict.fromkeys(wanted):
        need(package, "adaptlora finetune")


def _learn(task, learners: dict[str, Learner], report: Report, watch: Watch) -> None:
    spec, adapter = task.spec, learners[OURS].adapter
    report.scores = {name: {} for name in learners}
    report.losses = {name: [] for name in learners}
    report.seconds = {name: [] for name in learners}

    def evaluate(moment: str, stage: str, names) -> None:
        for done, name in enumerate(names):
            watch(stage, done, len(names), "")
            report.scores[name][moment] = task.evaluate(learners[name].model)
        watch(stage, len(names), len(names), _scores_text(report.scores[OURS][moment]))

    # B (or E) = 0 in both: they are still the same function.
    same = PEFT in learners and spec.init_lora_weights == "kaiming" and not adapter.method.nested
    evaluate("before", "test before training", [OURS] if same else list(learners))
    if same:
        report.scores[PEFT]["before"] = report.scores[OURS]["before"]
    watch("training", 0, spec.steps, "")
    steps = train(learners, task.batches(), steps=spec.steps, seed=spec.seed, warmup=spec.warmup, decay=spec.decay)
    for step in steps:
        for name, result in step.results.items():
            report.losses[name].append(result.loss)
            report.seconds[name].append(result.seconds)
        watch("training", step.number, spec.steps, f"loss {step.results[OURS].loss:.3f}, {adapter.method.phase}")
        if step.number == adapter.method.t_c:
            report.sizes["after"] = _counts(adapter.summary())
            evaluate("clip", "test at the clip", list(learners))
    if adapter.method.parks:
        report.sizes["end"] = _counts(adapter.summary())
        adapter.compact()
        report.sizes["compacted"] = _counts(adapter.summary())
    elif adapter.method.t_c is None and adapter.ranks() != learners[OURS].first_summary["ranks"]:
        report.sizes["end"] = _counts(adapter.summary())
    evaluate("end", "test at the end", list(learners))

    report.sizes["before"] = _counts(learners[OURS].first_summary)
    report.ranks, report.history = adapter.ranks(), adapter.method.history()
    report.t_p, report.t_c = adapter.method.t_p, adapter.method.t_c
    if spec.adaptive and report.t_c is None:
        report.notes.append(
            f"the ranks were not clipped: the loss was not calm enough for the adaptive rule in {spec.steps} steps;"
            " options.max_steps says when it clips at the latest"
        )
    if PEFT in learners:
        report.sizes["peft"] = peft_twin.sizes(learners[PEFT].model, learners[PEFT].optimizer)


def _shear(task, learners: dict[str, Learner], report: Report, watch: Watch, partial: Path | None) -> None:
    """Remove what the spec says from the trained adapter, of which a copy is kept, and test what is left."""
    adapter = learners[OURS].adapter
    if partial is not None:
        adapter.save(partial / "trained")
    adaptlora.shear(
        adapter, task.spec.shear_config(), progress=lambda done, total: watch("shearing", done, total, "modules")
    )
    report.scores[OURS]["sheared"] = task.evaluate(adapter.model)
    report.sizes["sheared"] = _counts(adapter.summary())
    report.ranks = adapter.ranks()


def _counts(summary: dict) -> dict[str, int]:
    # Between steps there are no gradients to count.
    counted = ("_parameters", "adapter_bytes", "optimizer_bytes", "outer_bytes")
    return {name: value for name, value in summary.items() if name.endswith(counted)}


def _scores_text(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())


def _write(report: Report, task, adapter, out: Path, partial: Path, watch: Watch, started: float) -> None:
    """Everything into the folder `partial`, checked there, then moved to `out` file by file."""
    watch("writing", 0, 3, "adapter")
    adapter.save(partial / "adapter")
    watch("writing", 1, 3, "reloading it with PEFT")
    report.peft_difference = peft_twin.reload_difference(
        partial / "adapter", task.model(), adapter.model, task.probe(), task.output
    )
    task.export(partial / "adapter", partial)
    watch("writing", 2, 3, "pictures")
    plots.rank_heatmap(
        report.ranks,
        partial / "ranks.png",
        max_rank=report.spec["r"],
        title=f"Ranks: {plots.describe_ranks(report.ranks)}",
    )
    plots.loss_curve(
        {report.label(name): losses for name, losses in report.losses.items()},
        partial / "loss.png",
        t_p=report.t_p,
        t_c=report.t_c,
    )
    if report.history is not None:
        plots.rank_steps(report.history, partial / "steps.png")
    names = [
        *sorted(file.name for file in partial.iterdir() if file.is_dir()),
        *sorted(file.name for file in partial.glob("*.png")),
        "report.json",
    ]
    report.files = {name: str(out / name) for name in names}
    report.total_seconds = time.perf_counter() - started
    (partial / "report.json").write_text(report.to_json(), encoding="utf-8")
    files = sorted((file for file in partial.rglob("*") if file.is_file()), key=lambda file: file.name == "report.json")
    for file in files:
        target = out / file.relative_to(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    for name in _OF_SOME_RUNS:
        if partial / name not in files:
            (out / name).unlink(missing_ok=True)  # another run's: it would not belong to what lies beside it now
    watch("writing", 3, 3, "")
