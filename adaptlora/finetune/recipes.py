"""Recipes: a paper's setting as one YAML file, found by name, read and checked before anything is loaded.

    from adaptlora.finetune import recipes, run
    recipe = recipes.read(recipes.find("glue-mrpc-deberta-v3-base"))
    report = run(recipe.spec, out="runs/mrpc")

A recipe has the sections title, paper, sources, run (the fields of FinetuneSpec), data, architecture, and perhaps notes:
recipes/README.md describes them.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from . import sources, synthetic
from ._extras import need
from .field_types import described, fits
from .presets import FinetuneSpec
from .registry import TASKS, task_class

_SECTIONS = {"title": str, "paper": dict, "sources": dict, "run": dict, "data": dict, "architecture": dict}
_DATA = {"train": int, "test": int, "columns": dict}
_ARCHITECTURE = {"model_type": str, "config": dict, "tiny": dict}
# Fields of `run` that are no numbers of a paper: names, and how a machine carries a run out.
_UNSOURCED = (
    *("task", "model", "revision", "data", "data_config", "data_revision", "train_split", "test_split", "eval_data"),
    *(
        "text_column",
        "label_column",
        "columns",
        "metrics",
        "compare",
        "micro_batch",
        "gradient_checkpointing",
        "generate",
    ),
)


_SETS_STEPS = {"steps", "epochs", "batch_size"}
_STEPS = {"min_steps", "max_steps", "tinit", "tfinal", "total_step"}  # options that are steps of the run


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names file, field, rule and value."""


@dataclass(frozen=True)
class Recipe:
    """A setting of a paper, complete and consistent."""

    path: Path
    title: str
    paper: Mapping[str, str]  # name, where (the table or section), arxiv or url
    sources: Mapping[str, Any]  # where the numbers come from → which fields
    notes: str
    spec: FinetuneSpec
    data: Mapping[str, Any]  # train and test: rows of the real data set; columns: column → kind of synthetic.KINDS
    architecture: Mapping[str, Any]  # model_type, config, tiny, and what the task asks for

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def epochs(self) -> float:
        return self.spec.steps * self.spec.batch_size / self.data["train"]


def folder() -> Path:
    """Where the recipes are: in the installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def names() -> list[str]:
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(name: str | Path) -> Path:
    """The file of a recipe, given as a path or by its name. Raises: ValueError."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise ValueError(f"finetune: recipe must be a file that exists, got {str(name)!r}")
        return path
    if str(name) not in names():
        raise ValueError(f"finetune: recipe must be a .yaml file or one of {', '.join(names())}, got {str(name)!r}")
    return folder() / f"{name}.yaml"


def read(path: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe, checked: fields, types, and everything that can be known before a model or data are loaded.

    Args: changes: fields of `run` to take instead of the file's.
    Raises: RecipeError (file, field, rule, value), MissingExtraError.
    """
    file = _File(Path(path))
    content = file.parse()
    if not isinstance(content, dict):
        file.refuse("a recipe", "be a mapping", content)
    file.table("", content, _SECTIONS, {"notes": str})
    file.table("paper.", content["paper"], {"name": str, "where": str}, {"arxiv": str, "url": str})
    file.table("data.", content["data"], _DATA)
    for part in ("train", "test"):
        if content["data"][part] < 1:
            file.refuse(f"data.{part}", "be at least 1", content["data"][part])
    spec = _spec(content["run"], content["data"]["train"], changes or {}, file)
    own = dict.fromkeys(task_class(spec.task).architecture_keys, object)
    file.table("architecture.", content["architecture"], _ARCHITECTURE | own)
    recipe = Recipe(path=file.path, notes=content.get("notes", ""), spec=spec, **_without(content, "notes", "run"))
    _check(recipe, file)
    _check_sources(content, file)
    return recipe


class _File:
    """A recipe's file: what is in it, and errors that name it."""

    def __init__(self, path: Path):
        self.path = path

    def error(self, message: str) -> RecipeError:
        return RecipeError(f"finetune: {self.path}: {message}")

    def refuse(self, field: str, rule: str, value) -> NoReturn:
        raise self.error(f"{field} must {rule}, got {value!r}")

    def table(
        self, prefix: str, value: Mapping, wanted: Mapping[str, type], optional: Mapping[str, type] | None = None
    ) -> None:
        """`value` has the keys `wanted`, perhaps `optional` ones, and no others, with values of these types."""
        known = {**wanted, **(optional or {})}
        for name in value:
            if name not in known:
                self.refuse(f"{prefix or 'section '}{name}", f"be one of {', '.join(known)}", name)
        for name, kind in known.items():
            if name in wanted and name not in value:
                self.refuse(f"{prefix}{name}", "be given", None)
            if name in value and not fits(value[name], kind):
                self.refuse(f"{prefix}{name}", f"be {described(kind)}", value[name])

    def parse(self):
        yaml = need("yaml", "reading recipes")
        file = self

        class Loader(yaml.SafeLoader):
            """PyYAML lets a key pass that is there twice, and the last one wins."""

            def construct_mapping(self, node, deep=False):
                seen = set()
                for key, _ in node.value:
                    name = self.construct_object(key, deep=True)
                    if not isinstance(name, str | int) or isinstance(name, bool):
                        raise file.error(
                            f"a key must be text or an integer, got {name!r} in line {key.start_mark.line + 1}"
                        )
                    if name in seen:
                        raise file.error(
                            f"a key must be there once, got {name!r} again in line {key.start_mark.line + 1}"
                        )
                    seen.add(name)
                return super().construct_mapping(node, deep)

        try:
            return yaml.load(self.path.read_text(encoding="utf-8"), Loader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())[:200]
            raise self.error(f"a recipe must be a YAML file, got one that is not: {reason}") from error


def _check_sources(content: Mapping, file: _File) -> None:
    """Every number of `run` is said to come from somewhere, if only from us."""
    named = []
    for source, given in content["sources"].items():
        if not fits(given, tuple[str, ...]):
            file.refuse(f"sources.{source}", "be a list of fields of run", given)
        named += given
    run = content["run"]
    inner = [f"{name}.{key}" for name, value in run.items() if isinstance(value, dict) for key in value]
    for name in named:
        if name not in (*run, *inner):
            file.refuse("sources", "name fields of run", name)
    told = {*named, *_UNSOURCED}
    plain = [name for name, value in run.items() if not isinstance(value, dict)]
    missing = [name for name in (*plain, *inner) if name not in told and name.partition(".")[0] not in told]
    if missing:
        rule = 'say where every number of run comes from, if only "our choice"; nothing about'
        file.refuse("sources", rule, ", ".join(missing))


def _spec(run: Mapping, train: int, changes: Mapping, file: _File) -> FinetuneSpec:
    """The section `run` as a FinetuneSpec, with `epochs` over `train` rows as steps."""
    hints = get_type_hints(FinetuneSpec) | {"epochs": float}
    theirs = run
    if "steps" in changes:
        run = _without(run, "epochs")
    if "method" in changes and changes["method"] != run.get("method"):
        run = _without(run, "options")  # they are fields of the recipe's own method
    run = {**run, **changes}
    for name, value in run.items():
        if name not in hints:
            file.refuse(f"run.{name}", "be a field of FinetuneSpec, or epochs", value)
        if not fits(value, hints[name]):
            hint = " (YAML takes 1e-3 for text: write 1.0e-3)" if _is_number_in_text(value) else ""
            file.refuse(f"run.{name}", f"be {described(hints[name])}{hint}", value)
    if ("epochs" in run) == ("steps" in run):
        file.refuse("run", "have either epochs or steps", [name for name in ("epochs", "steps") if name in run])
    for name in ("task", "model", "data"):
        if name not in run:
            file.refuse(f"run.{name}", "be given", None)
    if run["task"] not in TASKS:
        file.refuse("run.task", f"be one of {', '.join(TASKS)}", run["task"])
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in _without(run, "epochs").items()
    }
    if "epochs" in run:
        size = run.get("batch_size", FinetuneSpec.batch_size)
        if not 0 < run["epochs"] < math.inf:
            file.refuse("run.epochs", "be greater than 0 and finite", run["epochs"])
        if size < 1:
            file.refuse("run.batch_size", "be at least 1", size)
        values["steps"] = math.ceil(run["epochs"] * train / size)
    _scale_schedule(values, theirs, changes, train)
    try:
        return FinetuneSpec(**values)
    except ValueError as error:
        raise file.error(f"run: {_bare(error)}") from error


def _scale_schedule(values: dict, run: Mapping, changes: Mapping, train: int) -> None:
    """In `values`: the steps at which ranks change, which the recipe gave for its own number of steps, moved along with them."""
    size = run.get("batch_size", FinetuneSpec.batch_size)
    own = run["steps"] if "steps" in run else math.ceil(run.get("epochs", 0) * train / size) if size > 0 else 0
    if own < 1 or not _SETS_STEPS & changes.keys():
        return

    def moved(step):
        return max(1, round(step * values["steps"] / own)) if isinstance(step, int) else step

    if "options" in values and "options" not in changes:
        values["options"] = {name: moved(v) if name in _STEPS else v for name, v in values["options"].items()}
    for name in {"t_p", "t_c", "warmup"} & values.keys() - changes.keys():
        values[name] = moved(values[name]) if values[name] else values[name]


def _check(recipe: Recipe, file: _File) -> None:
    spec, there, task = recipe.spec, recipe.data["columns"], task_class(recipe.spec.task)
    try:
        task.check(spec)
        config = spec.config(None)
        spec.shear_config()
    except (ValueError, TypeError) as error:
        raise file.error(f"run: {_bare(error)}") from error
    if getattr(config, "target_r", None) is not None and not 1 <= config.target_r <= config.r:
        file.refuse("run.target_r", f"be in [1, r={config.r}]", config.target_r)
    for role, column in sources.columns(spec, task.roles_of(spec)).items():
        if column not in there:
            file.refuse("data.columns", f"have the column that run reads as {role} ({', '.join(there)})", column)
    for column, kind in there.items():
        try:
            synthetic.parse(kind)
        except ValueError as error:
            raise file.error(f"data.columns.{column} must {error}, got {kind!r}") from error


def _bare(error: Exception) -> str:
    return str(error).removeprefix("finetune: ")


def _without(mapping: Mapping, *names: str) -> dict:
    return {name: value for name, value in mapping.items() if name not in names}


def _is_number_in_text(value) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value) is not None
