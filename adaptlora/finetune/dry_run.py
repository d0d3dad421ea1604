"""A recipe, tried out: its own run on a small random model of the same architecture and made-up data with the same columns.

It goes the whole way: the data set's loader, tokenisation, batches, model, loss, metrics, the method's rank changes, shearing, the
adapter's file and its reload by stock PEFT. What the real model would train is counted on it without its weights.
Left out are the hub with its tokenizers, splits and columns, pretrained weights, other precisions than float32, the GPU, and PEFT's twin
of `compare`.
"""

import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from ..methods import METHODS
from ..methods.normal import budget_ranks
from ..nn import linear_shape
from ..plots import describe_ranks
from ..targets import find_targets
from . import runner, synthetic
from .presets import FinetuneSpec
from .recipes import Recipe
from .registry import task_class
from .report import Report

STEPS, T_P, T_C = 6, 2, 3
SMALL_R = 8
ROWS = {"train": 24, "test": 8}


@dataclass(frozen=True)
class RealSizes:
    """What the method adapts in the real model."""

    modules: dict[str, tuple[int, int]]  # name → (out_features, in_features)
    parameters: int  # trained ones in the adapter, at its largest ranks
    base_parameters: int


@dataclass(frozen=True)
class DryRun:
    """What was found out."""

    recipe: Recipe
    real: RealSizes
    tiny: FinetuneSpec
    report: Report

    def print(self, console: Console) -> None:
        recipe, real, spec, report = self.recipe, self.real, self.recipe.spec, self.report
        moment, found = list(report.scores["ours"].items())[-1]
        scores = ", ".join(f"{name} {value:.3g}" for name, value in found.items()) + (
            " sheared" if moment == "sheared" else ""
        )
        kinds = ", ".join(_kinds(real.modules))
        lines = {
            "recipe": f"{recipe.name}: {recipe.title} ({recipe.paper['where']})",
            "model": f"{spec.model}: {real.base_parameters:,} parameters, {recipe.architecture['model_type']}",
            "adapted": f"{len(real.modules)} modules: {kinds}",
            "adapter": f"{spec.method}, {real.parameters:,} parameters at its largest ranks"
            + _amount(spec, len(real.modules)),
            "run": f"{spec.steps:,} steps of {spec.batch_size}, {recipe.epochs:.3g} epochs of {recipe.data['train']:,} rows",
            "tried": f"{len(report.ranks)} modules of the same kinds, {self.tiny.steps} steps: loss {report.losses['ours'][0]:.3f} →"
            f" {report.losses['ours'][-1]:.3f}; {describe_ranks(report.ranks)}; {scores}",
            "reload": f"stock PEFT computes the same: {report.peft_difference:.1e} relative",
        }
        for name, text in lines.items():
            console.print(f"[green]✓[/green] {name:<8} ", end="")
            console.print(text, highlight=False, markup=False)


def dry_run(recipe: Recipe, *, watch: runner.Watch | None = None) -> DryRun:
    """Try a recipe out, in a folder that is removed afterwards.

    Raises: ValueError (modules that the real or the small model does not have, ranks that the method cannot have on the real one), and what
        `run` raises.
    """
    task = task_class(recipe.spec.task)
    real = real_sizes(recipe)
    with tempfile.TemporaryDirectory(prefix="adaptlora-recipe-") as name:
        folder = Path(name)
        rows = synthetic.rows(recipe.data["columns"], sum(ROWS.values()))
        (folder / "model").mkdir()
        task.write_tiny(recipe.architecture, folder / "model", rows)
        spec = small_spec(recipe, folder, len(real.modules))
        parts = {spec.train_split: rows[: ROWS["train"]], spec.test_split or "unused": rows[ROWS["train"] :]}
        synthetic.write(folder / "data", recipe.data["columns"], parts, spec.data_config)
        report = runner.run(spec, out=folder / "out", watch=watch)
    if _kinds(report.ranks) != _kinds(real.modules):
        only = sorted(set(_kinds(report.ranks)) ^ set(_kinds(real.modules)))
        raise ValueError(
            f"finetune: {recipe.path}: architecture.tiny must leave the kinds of adapted modules as they are, got a difference in"
            f" {', '.join(only)}"
        )
    return DryRun(recipe, real, spec, report)


def real_sizes(recipe: Recipe) -> RealSizes:
    """What the recipe adapts in the model of its real sizes, which has no weights here.

    Raises: ValueError (targets that are not there, ranks or a budget that these modules cannot have).
    """
    spec, task = recipe.spec, task_class(recipe.spec.task)
    model = task.meta_model(recipe.architecture)
    config = spec.config(task.heads(model) or None)
    found = find_targets(model, config)
    method = METHODS[type(config)]
    ranks = {name: method.rank_and_scaling(config, name)[0] for name in found}
    if spec.method == "normal" and config.threshold is None:
        budget = config.budget or round(config.target_r * len(found))
        budget_ranks([[1.0] * rank for rank in ranks.values()], budget)
    shapes = {name: linear_shape(module)[::-1] for name, module in found.items()}
    for name, shape in shapes.items():
        if method.nested and ranks[name] > min(*shape):
            raise ValueError(
                f"finetune: {recipe.path}: run.r must be at most the sizes of {name}, {shape}, got {ranks[name]}"
            )
    return RealSizes(
        modules=shapes,
        parameters=sum(method.parameters(config, name, module) for name, module in found.items()),
        base_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def small_spec(recipe: Recipe, folder: Path, modules: int) -> FinetuneSpec:
    """The recipe's spec for the small model and the made-up data in `folder`.

    What decides the way of the run stays. Steps, batches, lengths and ranks shrink, average ranks and budgets in proportion; the precision
    is float32, in which PEFT's reload can be compared exactly.

    Args: modules: how many the recipe adapts in the real model.
    """
    spec, task = recipe.spec, task_class(recipe.spec.task)
    r = min(spec.r, SMALL_R)
    average = spec.options.get("budget", (spec.target_r or 1) * modules) / modules
    small = {"deltaT": 1, "interval": 1, "min_steps": T_P, "max_steps": T_C}
    fixed = ("budget", "tinit", "tfinal", "total_step")
    options = {name: small.get(name, value) for name, value in spec.options.items() if name not in fixed}
    fields = {
        "model": str(folder / "model"),
        "data": str(folder / "data"),
        "eval_data": None,
        "data_dir": str(folder),
        "revision": None,
        "data_revision": None,
        "train_split": spec.train_split.partition("[")[0],
        "test_split": spec.test_split and spec.test_split.partition("[")[0],
        "test_limit": None,
        "holdout": None,
        "max_length": min(spec.max_length, 64),
        "r": r,
        "target_r": max(1.0, average * r / spec.r),
        "r_out": min(spec.r_out, 2 * SMALL_R),
        "t_p": None if spec.adaptive else T_P,
        "t_c": None if spec.adaptive else T_C,
        "options": options,
        "steps": STEPS,
        "batch_size": min(spec.batch_size, 4),
        "micro_batch": spec.micro_batch and 2,
        "warmup": min(spec.warmup, 1),
        "dtype": "float32",
        "generate": min(spec.generate, 2),
        "new_tokens": min(spec.new_tokens, 8),
        "compare": False,
        "device": "cpu",
    }
    return replace(spec, **{**fields, **task.tiny_fields(spec)})


def _kinds(modules) -> list[str]:
    """Names of modules with their numbers blanked out, each once."""
    return sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in modules})


def _amount(spec: FinetuneSpec, modules: int) -> str:
    """What of the ranks stays, for people."""
    if spec.method not in ("normal", "adalora"):
        return ""
    if spec.method == "normal" and spec.threshold is not None:
        return f", clipped to scores above {spec.threshold}"
    average = (spec.options["budget"] if "budget" in spec.options else spec.target_r * modules) / modules
    return f", of {modules * spec.r:,} vectors {round(average * modules):,} stay ({average:.3g} of {spec.r} a module)"
