"""adaptlora finetune"""

import importlib.util
import os
import re
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..finetune._extras import need
from ..finetune.presets import HUB, METHODS, PRESETS, FinetuneSpec, preset
from ..finetune.registry import TASKS
from .app import app
from .console import one_clear_line, progress

_DEFAULT = FinetuneSpec(model="", data="")
_OPTIONS = {  # help panel → field of FinetuneSpec → text
    "What to train": {
        "model": "A transformers folder, hub:NAME (or @minilm, @smollm2: fetched ones).",
        "task": f"{' or '.join(TASKS)}.",
    },
    "Your data": {
        "data": "A .csv file with a header, .jsonl with an object a line, .parquet, a data set's folder, or hub:NAME.",
        "eval_data": "A file to test on. Without it a part of --data is held out.",
        "text_column": "Column of the text; of the prompt, in causal-lm with --label-column.",
        "label_column": "Column of the label (without it: label); in causal-lm of the text to learn after the prompt"
        " (without it: no prompts).",
        "chat": "causal-lm: put prompts into the tokenizer's chat template.",
        "holdout": "Different texts to hold out for the test (without it: a fifth, at most 1,000).",
        "max_length": "Tokens of an example; longer ones are cut.",
        "data_dir": "Where fetched models and data are.",
    },
    "Method": {
        "method": f"{', '.join(METHODS)}: NormAL's one clip of the ranks, plain LoRA, La-LoRA's ranks that grow, NoRA's nested pairs,"
        " AdaLoRA's choice of triplets, or DyLoRA's drawn prefixes.",
        "r": "Rank of every module at the start; lalora, dylora: the largest; nora: of the inner pair that trains.",
        "init_lora_weights": "kaiming: B = 0; pissa, milora: the leading or trailing singular triplets of the weights, taken out of them.",
        "target_r": "normal: average rank after the clip; adalora: at the end.",
        "threshold": "normal, instead of --target-r: keep vectors up to the last that scores above this, 0 ≤ threshold < 1.",
        "lora_alpha": "Scaling is lora-alpha / r.",
        "lora_dropout": "Dropout of the adapter's input.",
        "target_modules": "all-linear, names separated by commas, or a regular expression for whole names.",
        "t_p": "normal: step at which the penalty ends (without it: a third of the steps).",
        "t_c": "normal: step at which the ranks are clipped (without it: 7/18 of the steps).",
        "penalty_step": "normal: shrink vectors after the optimizer's step (proximal), or through the loss (gradient).",
        "gamma": "lalora: how fast the budget of ranks grows with the norms of the factors.",
        "temperature": "lalora: the higher, the more evenly the budget is shared out over the blocks.",
        "r_out": "nora: rank of the frozen factors of the weights that the pair is trained between.",
        "r_min": "dylora: the smallest rank that is drawn.",
        "frozen": "dylora: train only the last vector of each drawn prefix.",
    },
    "Training": {
        "lr": "AdamW's learning rate.",
        "loraplus_lr_ratio": "LoRA+: lora_B's learning rate in parts of --lr (without it: the same).",
        "steps": "Optimizer steps; t-p and t-c move along unless they are given.",
        "batch_size": "Examples in a batch.",
        "warmup": "Steps over which the learning rate rises.",
        "decay": "Let the learning rate fall linearly to 0.",
        "seed": "Of initial values, order and dropout. The test set stays the same.",
        "device": "cpu, cuda or auto.",
        "compare": "Train PEFT's LoRA on the same batches too, in turns: of the same r, beside nora of as many parameters.",
    },
}


def _option(field: str, *flags: str):
    """The option of a field of FinetuneSpec: its text, its default, and the presets' values where they differ."""
    panel = next(panel for panel, texts in _OPTIONS.items() if field in texts)
    values = {name: getattr(spec, field) for name, spec in PRESETS.items()}
    default = getattr(_DEFAULT, field)
    shown = [] if default in (None, "") else [f"default: {default}"]
    if panel != "What to train" and field not in ("data", "target_modules"):
        shown += [f"{name}: {value}" for name, value in values.items() if value != default]
    suffix = f" [{', '.join(shown)}]" if shown else ""
    return typer.Option(*flags, help=escape(_OPTIONS[panel][field] + suffix), rich_help_panel=panel)


@app.command(
    epilog="""[bold]Examples[/bold]

The demo, after `make data` or `python -m adaptlora.finetune.fetch trec`:

    adaptlora finetune --preset trec

Your own classifier, from a transformers folder and a file with the columns question and topic; rank 16, cut to 4:

    adaptlora finetune --model ./bert --data train.csv --text-column question --label-column topic --r 16 --target-r 4

A language model on prompts and answers:

    adaptlora finetune --model ./llama --task causal-lm --data pairs.jsonl --text-column prompt --label-column answer

The same steps with plain LoRA, all ranks kept:

    adaptlora finetune --preset trec --method lora -o runs/trec-lora

A paper's setting: what there is, one of them tried out on a small random model, and carried out (a GPU and the Hugging Face hub):

    adaptlora finetune --list-recipes

    adaptlora finetune --recipe glue-mrpc-deberta-v3-base --dry-run

    adaptlora finetune --recipe glue-mrpc-deberta-v3-base -o runs/mrpc

With La-LoRA, ranks from 1 up to 8 over the steps; with NoRA, 2 · 256 · 16 numbers a module:

    adaptlora finetune --preset trec --method lalora --temperature 10 -o runs/trec-lalora

    adaptlora finetune --preset trec --method nora --r 16 --r-out 256 -o runs/trec-nora

With AdaLoRA, 12 triplets a module pruned to 4 on average; with PiSSA's start and LoRA+'s two learning rates:

    adaptlora finetune --preset trec --method adalora --r 12 --target-r 4 -o runs/trec-adalora

    adaptlora finetune --preset trec --method lora --init pissa --loraplus-lr-ratio 8 -o runs/trec-pissa
"""
)
def finetune(
    preset_name: Annotated[
        str | None,
        typer.Option(
            "--preset",
            help=f"Model, data and numbers that go together: {', '.join(PRESETS)}. Options below override them.",
            rich_help_panel="What to train",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="A paper's setting, by its name or as a .yaml file. Options below override its section run.",
            rich_help_panel="What to train",
        ),
    ] = None,
    list_recipes: Annotated[
        bool, typer.Option("--list-recipes", help="Print the recipes there are.", rich_help_panel="What to train")
    ] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="A field of the recipe's section run, its value in YAML; may be given several times.",
            rich_help_panel="What to train",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Try the recipe out on a small random model of the same architecture and made-up data, without hub or GPU.",
            rich_help_panel="Training",
        ),
    ] = False,
    model: Annotated[str | None, _option("model")] = None,
    task: Annotated[str | None, _option("task")] = None,
    data: Annotated[str | None, _option("data")] = None,
    eval_data: Annotated[str | None, _option("eval_data")] = None,
    text_column: Annotated[str | None, _option("text_column")] = None,
    label_column: Annotated[str | None, _option("label_column")] = None,
    chat: Annotated[bool | None, _option("chat", "--chat/--no-chat")] = None,
    holdout: Annotated[int | None, _option("holdout")] = None,
    max_length: Annotated[int | None, _option("max_length")] = None,
    data_dir: Annotated[str | None, _option("data_dir")] = None,
    method: Annotated[str | None, _option("method")] = None,
    r: Annotated[int | None, _option("r", "--r")] = None,
    init_lora_weights: Annotated[str | None, _option("init_lora_weights", "--init")] = None,
    target_r: Annotated[float | None, _option("target_r")] = None,
    threshold: Annotated[float | None, _option("threshold")] = None,
    lora_alpha: Annotated[float | None, _option("lora_alpha")] = None,
    lora_dropout: Annotated[float | None, _option("lora_dropout")] = None,
    target_modules: Annotated[str | None, _option("target_modules")] = None,
    t_p: Annotated[int | None, _option("t_p")] = None,
    t_c: Annotated[int | None, _option("t_c")] = None,
    penalty_step: Annotated[str | None, _option("penalty_step")] = None,
    gamma: Annotated[float | None, _option("gamma")] = None,
    temperature: Annotated[float | None, _option("temperature")] = None,
    r_out: Annotated[int | None, _option("r_out")] = None,
    r_min: Annotated[int | None, _option("r_min")] = None,
    frozen: Annotated[bool | None, _option("frozen", "--frozen/--no-frozen")] = None,
    lr: Annotated[float | None, _option("lr")] = None,
    loraplus_lr_ratio: Annotated[float | None, _option("loraplus_lr_ratio")] = None,
    steps: Annotated[int | None, _option("steps")] = None,
    batch_size: Annotated[int | None, _option("batch_size")] = None,
    warmup: Annotated[int | None, _option("warmup")] = None,
    decay: Annotated[bool | None, _option("decay", "--decay/--no-decay")] = None,
    seed: Annotated[int | None, _option("seed")] = None,
    device: Annotated[str | None, _option("device")] = None,
    compare: Annotated[bool | None, _option("compare", "--compare/--no-compare")] = None,
    short: Annotated[
        bool,
        typer.Option(
            "--short",
            help="A dozen steps that take every turn of the whole run, to see that it works.",
            rich_help_panel="Training",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the results (without it: runs/ and the preset's or recipe's name, or runs/finetune).",
            rich_help_panel="Result",
        ),
    ] = None,
) -> None:
    """Fine-tune a model with adaptive-rank LoRA and see what it gave.

    Prints test scores before training, at NormAL's clip and at the end, the rank
    of every module, sizes, and the time of a step beside PEFT's.

    Writes a PEFT adapter, pictures of ranks and losses (for La-LoRA of the ranks
    over the steps too), and report.json with everything. The adapter is loaded
    back by stock PEFT before the command ends, and must compute the same.
    """
    given = {
        name: value
        for name, value in locals().items()
        if name in FinetuneSpec.__dataclass_fields__ and value is not None
    }
    console = Console()
    with one_clear_line():
        if list_recipes:
            _print_recipes(console)
            return
        if recipe is None:
            for option, value in (("--set", changes), ("--dry-run", dry_run)):
                if value:
                    raise ValueError(f"finetune: {option} must go with --recipe, got none")
            spec = _spec(preset_name, given, short)
        else:
            for option, value in (("--preset", preset_name), ("--short", short)):
                if value:
                    raise ValueError(f"finetune: {option} must not be given with --recipe, got {value!r}")
            found = _recipe(recipe, given, changes or [])
            spec = found.spec
        # Read by transformers when it is imported: what lies in folders is found without asking a hub for it.
        if dry_run or not any(str(name).startswith(HUB) for name in (spec.model, spec.data, spec.eval_data)):
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        if dry_run:
            from ..finetune.dry_run import dry_run as try_out

            with progress(console) as watch, quiet():
                result = try_out(found, watch=watch)
            result.print(console)
            return
        out = out or Path("runs") / (preset_name or (found.name if recipe else "finetune"))
        from ..finetune.runner import run

        with progress(console) as watch, quiet():
            report = run(spec, out=out, watch=watch)
        report.print(console)
        if recipe is not None and report.data["train"] != found.data["train"]:
            console.print(
                f"The recipe counts its epochs over {found.data['train']:,} rows; these data had {report.data['train']:,}.",
                highlight=False,
            )


def _recipe(name: str, given: dict, changes: list[str]):
    """The recipe of that name or file, with what was given and set instead of its own."""
    from ..finetune import recipes

    if "target_modules" in given:
        given["target_modules"] = _target_modules(given["target_modules"])
    yaml = need("yaml", "reading recipes")
    for change in changes:
        field, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"finetune: --set must be FIELD=VALUE, got {change!r}")
        try:
            given[field.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"finetune: --set must have a value in YAML, got {change!r}") from error
    return recipes.read(recipes.find(name), given)


def _print_recipes(console: Console) -> None:
    from ..finetune import recipes

    table = Table(header_style="dim", box=SIMPLE_HEAD)
    for heading in ("recipe", "method", "model", "paper"):
        table.add_column(heading, overflow="fold")
    for name in recipes.names():
        recipe = recipes.read(recipes.find(name))
        model = recipe.spec.model.removeprefix(HUB)
        table.add_row(name, recipe.spec.method, model, f"{recipe.paper['name']}: {recipe.paper['where']}")
    console.print(table)


def _spec(preset_name: str | None, given: dict, short: bool) -> FinetuneSpec:
    """The preset, or the defaults, with what was given."""
    if "target_modules" in given:
        given["target_modules"] = _target_modules(given["target_modules"])
    if preset_name is not None:
        base = preset(preset_name)
        if given.get("method", base.method) != base.method:
            base = replace(base, options={})  # they are fields of the preset's own method
        if "steps" in given:
            base = replace(base, t_p=None, t_c=None)
    else:
        missing = [f"--{name}" for name in ("model", "data") if name not in given]
        if missing:
            raise ValueError(
                f"finetune: --preset, or both --model and --data, must be given, got no {' and no '.join(missing)}"
            )
        base = _DEFAULT
    if short:
        base = base.shortened()
    return replace(base, **given)


def _target_modules(text: str) -> str | tuple[str, ...]:
    """all-linear and regular expressions as they are; plain names, separated by commas, as names."""
    names = [name.strip() for name in text.split(",")]
    plain = text != "all-linear" and all(re.fullmatch(r"[\w.]+", name) for name in names)
    return tuple(names) if plain else text


@contextmanager
def quiet():
    """Without transformers' and datasets' own bars and load reports, and other packages' warnings about their future."""
    logging = need("transformers", "adaptlora finetune").utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if importlib.util.find_spec("datasets"):
        need("datasets", "adaptlora finetune").disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
