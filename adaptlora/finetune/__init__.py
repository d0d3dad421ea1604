"""Fine-tuning runs: presets, recipes, the user's own models and data, and their reports.

    from adaptlora.finetune import PRESETS, run
    report = run(PRESETS["trec"], out="runs/trec")
    report.scores["ours"]["end"]["accuracy"]

    from adaptlora.finetune import recipes
    recipe = recipes.read(recipes.find("glue-mrpc-deberta-v3-base"))
    report = run(recipe.spec, out="runs/mrpc")

`adaptlora finetune` is this on the shell; the loop alone is adaptlora.finetune.train. A task is a class in adaptlora.finetune.tasks.
"""

from .presets import PRESETS, FinetuneSpec, preset

__all__ = ["PRESETS", "FinetuneSpec", "Report", "preset", "run"]


def __getattr__(name: str):
    # on first use: plots import this package for its optional imports, and the runner imports plots
    if name == "run":
        from .runner import run

        return run
    if name == "Report":
        from .report import Report

        return Report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
