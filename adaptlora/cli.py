"""The command `adaptlora`: finetune, inspect, tune, doctor."""

import os
import re
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from .finetune._extras import MissingExtraError, need
from .finetune.presets import METHODS, PRESETS, TASKS, FinetuneSpec, preset
from .ops import _backend

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes, as shells use them

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Adaptive-rank LoRA: train with rank vectors to spare, keep the ones that earn their place, and really remove"
    " the rest.",
    epilog="Begin with [bold]adaptlora doctor[/bold], then [bold]adaptlora finetune --preset trec[/bold].",
)

_DEFAULT = FinetuneSpec(model="", data="")
_OPTIONS = {  # help panel → field of FinetuneSpec → text
    "What to train": {
        "model": "A transformers folder (or @minilm, @smollm2: fetched ones).",
        "task": f"{' or '.join(TASKS)}.",
    },
    "Your data": {
        "data": "A .csv file with a header, or .jsonl with an object a line.",
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
        "method": f"{' or '.join(METHODS)}: ranks that adapt, or plain LoRA.",
        "r": "Rank of every module at the start.",
        "target_r": "Average rank after the clip.",
        "threshold": "Instead of --target-r: keep vectors up to the last that scores above this, 0 ≤ threshold < 1.",
        "lora_alpha": "Scaling is lora-alpha / r.",
        "lora_dropout": "Dropout of the adapter's input.",
        "target_modules": "all-linear, names separated by commas, or a regular expression for whole names.",
        "t_p": "Step at which the penalty ends (without it: a third of the steps).",
        "t_c": "Step at which the ranks are clipped (without it: 7/18 of the steps).",
        "penalty_step": "proximal or gradient: shrink vectors after the optimizer's step, or through the loss.",
    },
    "Training": {
        "lr": "AdamW's learning rate.",
        "steps": "Optimizer steps; t-p and t-c move along unless they are given.",
        "batch_size": "Examples in a batch.",
        "warmup": "Steps over which the learning rate rises.",
        "decay": "Let the learning rate fall linearly to 0.",
        "seed": "Of initial values, order and dropout. The test set stays the same.",
        "device": "cpu, cuda or auto.",
        "compare": "Train PEFT's LoRA of the same r on the same batches too, in turns.",
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


@contextmanager
def _one_clear_line():
    """Errors that adaptlora raises about its input become one red line and exit code 2; others keep their traceback."""
    console = Console(stderr=True)
    try:
        yield
    except (ValueError, TypeError, MissingExtraError) as error:
        if not _raised_by_adaptlora(error):
            raise
        message = " ".join(str(error).split())
        console.print(f"[bold red]error:[/bold red] [red]{escape(message)}[/red]", soft_wrap=True, highlight=False)
        raise typer.Exit(BAD_INPUT) from error
    except KeyboardInterrupt as error:
        console.print("[yellow]interrupted: nothing was written[/yellow]")
        raise typer.Exit(INTERRUPTED) from error


def _raised_by_adaptlora(error: BaseException) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return (frames[-1].f_globals.get("__package__") or "").split(".")[0] == __package__


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
    target_r: Annotated[float | None, _option("target_r")] = None,
    threshold: Annotated[float | None, _option("threshold")] = None,
    lora_alpha: Annotated[float | None, _option("lora_alpha")] = None,
    lora_dropout: Annotated[float | None, _option("lora_dropout")] = None,
    target_modules: Annotated[str | None, _option("target_modules")] = None,
    t_p: Annotated[int | None, _option("t_p")] = None,
    t_c: Annotated[int | None, _option("t_c")] = None,
    penalty_step: Annotated[str | None, _option("penalty_step")] = None,
    lr: Annotated[float | None, _option("lr")] = None,
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
            help="Folder for the results (without it: runs/ and the preset's name, or runs/finetune).",
            rich_help_panel="Result",
        ),
    ] = None,
) -> None:
    """Fine-tune a model with adaptive-rank LoRA and see what it gave.

    Prints test scores before training, at the clip and at the end, the rank of
    every module, sizes before and after the clip, and the time of a step beside
    PEFT's.

    Writes a PEFT adapter, pictures of ranks and losses, and report.json with
    everything. The adapter is loaded back by stock PEFT before the command ends,
    and must compute the same.
    """
    os.environ.setdefault(
        "HF_HUB_OFFLINE", "1"
    )  # everything is read from folders; transformers reads this when it is imported
    given = {
        name: value
        for name, value in locals().items()
        if name in FinetuneSpec.__dataclass_fields__ and value is not None
    }
    with _one_clear_line():
        spec = _spec(preset_name, given, short)
        out = out or Path("runs") / (preset_name or "finetune")
        from .finetune.runner import run

        console = Console()
        with _progress(console) as watch, _quiet():
            report = run(spec, out=out, watch=watch)
        report.print(console)


def _spec(preset_name: str | None, given: dict, short: bool) -> FinetuneSpec:
    """The preset, or the defaults, with what was given."""
    if "target_modules" in given:
        given["target_modules"] = _target_modules(given["target_modules"])
    if preset_name is not None:
        base = preset(preset_name)
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
def _progress(console: Console):
    """A progress bar for each stage, as the callback that `run` calls."""
    columns = (
        SpinnerColumn(finished_text="[green]✓[/green]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}[/dim]"),
    )
    with Progress(*columns, console=console) as progress:
        bars = {}

        def watch(stage: str, done: int, total: int, note: str) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total, note=note)
            progress.update(bars[stage], completed=done, total=total, note=note)

        try:
            yield watch
        except BaseException:
            progress.live.transient = True  # an error stands alone, without half a bar
            raise


@contextmanager
def _quiet():
    """Without transformers' own bars and load reports, and other packages' warnings about their future."""
    logging = need("transformers", "adaptlora finetune").utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@app.command(
    epilog="""[bold]Examples[/bold]

    adaptlora inspect runs/trec/adapter

    adaptlora inspect runs/trec/adapter -o ranks.png
"""
)
def inspect(
    adapter: Annotated[
        Path,
        typer.Argument(
            help="A PEFT LoRA folder: adapter_config.json and adapter_model.safetensors.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also draw the ranks as a heat map, into this .png file.")
    ] = None,
) -> None:
    """Show an adapter's modules: rank, shapes, parameters, scores. No model is needed.

    The score of a rank vector is its norm ‖a‖ + ‖b‖ as a share of the first
    vector's, at most 1: NormAL keeps vectors by it. There is a bar for each
    vector: a full one is 1, a low one could be clipped. lora_A is (rank, K) and
    lora_B (N, rank).
    """
    from .inspection import inspect_adapter
    from .plots import describe_ranks, rank_heatmap

    console = Console()
    with _one_clear_line():
        if out is not None and out.suffix.lower() != ".png":
            raise ValueError(f"inspect: out must end in .png, got {str(out)!r}")
        found = inspect_adapter(adapter)
        common = _common_prefix([module.name for module in found.modules])
        if common:
            console.print(f"modules of [bold]{escape(common)}[/bold]", highlight=False)
        console.print(_inspect_table(found, common))
        config = found.config
        parameters = sum(module.parameters for module in found.modules)
        ranks = {module.name: module.rank for module in found.modules}
        console.print(
            f"{describe_ranks(ranks)}; {parameters:,} parameters in them; r {config.get('r')}, lora_alpha {config.get('lora_alpha')}; "
            f"file {found.file_bytes:,} bytes",
            highlight=False,
        )
        for name, count in found.others.items():
            console.print(f"beside them: {name} ({count:,} parameters)", highlight=False, markup=False)
        if out is not None:
            top = max([*ranks.values(), config["r"] if isinstance(config.get("r"), int) else 0])
            rank_heatmap(ranks, out, max_rank=top, title=f"Ranks: {describe_ranks(ranks)}")
            console.print(f"heat map in {out}", highlight=False, markup=False, soft_wrap=True)


def _common_prefix(names: list[str]) -> str:
    """Path that all the names are under; told once, it leaves rows that fit a line."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{level[0]}." for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _inspect_table(found, common: str) -> Table:
    table = Table(header_style="dim", box=SIMPLE_HEAD)
    table.add_column("module", overflow="fold")
    for header in ("rank", "K→N", "parameters"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("scores", no_wrap=True)
    table.add_column("lowest", justify="right", no_wrap=True)
    for module in found.modules:
        lowest = f"{min(module.scores):.2f}" if module.scores else "–"
        shape = f"{module.shape_A[1]}→{module.shape_B[0]}"
        name = module.name.removeprefix(common)
        table.add_row(name, str(module.rank), shape, f"{module.parameters:,}", _bars(module.scores), lowest)
    return table


def _bars(scores: list[float], most: int = 24) -> str:
    """One block for each score; where there are more than fit, one for each stretch of them (its mean)."""
    if len(scores) > most:
        edges = [len(scores) * i // most for i in range(most + 1)]
        scores = [sum(scores[a:b]) / (b - a) for a, b in pairwise(edges)]
    return "".join(" ▁▂▃▄▅▆▇█"[round(8 * score)] for score in scores)


@app.command(
    epilog="""[bold]Examples[/bold]

    adaptlora tune

    adaptlora tune --shape 4096,11008,4096 --shape 4096,4096,11008 --rank 8 --dry-run
"""
)
def tune(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="M,N,K: tokens, out_features, in_features of a layer; N and K multiples of 16. More than one may be given."
            " Without it: those of transformers 768 to 8192 wide, with 2048 and 8192 tokens.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16 or fp16.")] = "bf16",
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and show, but write nothing.")] = False,
) -> None:
    """Measure on this GPU which base GEMM is the faster one, and keep the answers.

    For layers of each shape, torch's product with the adapter added after it is
    timed against the fused ones, forward and backward, once they have been seen
    to give the same numbers. The fastest goes into a file of this GPU. Training
    follows it for sizes up to a factor of 2 away; elsewhere a prediction decides.
    [bold]adaptlora doctor[/bold] says which file is in use.
    """
    console = Console()
    with _one_clear_line():
        shapes = None if shape is None else [_shape(text) for text in shape]
        if not torch.cuda.is_available():
            raise ValueError("tune: a CUDA GPU must be there to measure on, got none")
        if not _backend.has_triton():
            raise ValueError("tune: triton must be installed, got none")
        from . import gemm_table, tuning

        if dtype not in tuning.DTYPES:
            raise ValueError(f"tune: dtype must be {' or '.join(tuning.DTYPES)}, got {dtype!r}")
        shapes = shapes or tuning.SHAPES
        device = torch.device("cuda", torch.cuda.current_device())
        found = []
        with _progress(console) as watch:
            for measured in tuning.measure(shapes, tuning.DTYPES[dtype], rank, device):
                found.append(measured)
                entry = measured.entry
                note = f"{entry.gemm} {entry.M}×{entry.columns}, depth {entry.depth}"
                watch("measuring", len(found), len(shapes) * len(gemm_table.GEMMS), note)
        changed = [measured for measured in found if measured.entry.tile != measured.old]
        if changed:
            console.print(_tune_table(changed))
        console.print(f"{len(found)} products measured, {len(changed)} run another GEMM than before", highlight=False)
        if dry_run:
            console.print("nothing was written")
        else:
            file = gemm_table.update(torch.cuda.get_device_name(device), (measured.entry for measured in found))
            console.print(f"written: {file}", highlight=False, markup=False, soft_wrap=True)


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise ValueError(f"tune: shape must be three integers M,N,K, got {text!r}") from error


def _tune_table(measurements) -> Table:
    table = Table(header_style="dim", box=SIMPLE_HEAD)
    table.add_column("product", no_wrap=True)
    for header in ("M", "columns", "depth"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("before", "now"):
        table.add_column(header, overflow="fold")
    for header in ("ms before", "ms now", "ratio"):
        table.add_column(header, justify="right", no_wrap=True)
    for measured in measurements:
        entry = measured.entry
        sizes = (str(size) for size in (entry.M, entry.columns, entry.depth))
        times = (f"{1000 * seconds:.3f}" for seconds in (measured.old_seconds, entry.seconds))
        table.add_row(
            entry.gemm, *sizes, _gemm_name(measured.old), _gemm_name(entry.tile), *times, f"{measured.ratio:.2f}"
        )
    return table


def _gemm_name(tile) -> str:
    return "torch" if tile is None else f"fused {'×'.join(map(str, tile[:3]))}, {tile[3]} warps, {tile[4]} stages"


@app.command(epilog="[bold]Example[/bold]\n\n    ADAPTLORA_BACKEND=reference adaptlora doctor")
def doctor() -> None:
    """Show versions, extension and GPU, and which backend will run where and why.

    Exit code 1 if something is broken, not merely absent.
    """
    from .doctor import diagnose

    console = Console()
    well = True
    for section, rows in diagnose().items():
        console.print(section, style="bold")
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, style="dim")
        table.add_column(overflow="fold")
        for question, answer, good in rows:
            table.add_row(question, escape(answer) if good else f"[red]{escape(answer)}[/red]")
            well = well and good
        console.print(table)
        console.print()
    raise typer.Exit(0 if well else 1)


if __name__ == "__main__":
    app()
