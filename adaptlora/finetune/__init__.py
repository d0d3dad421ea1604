"""Fine-tuning runs: presets, the user's own models and data, and their reports.

    from adaptlora.finetune import PRESETS, run
    report = run(PRESETS["trec"], out="runs/trec")
    report.scores["ours"]["end"]["accuracy"]

`adaptlora finetune` is this on the shell; the loop alone is adaptlora.finetune.train.
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
