"""Test accuracy of MiniLM on TREC-6 over seeds: NormAL, La-LoRA and NoRA beside plain LoRA, same steps and batches.

    python bench/quality_trec.py --seeds 3            # every variant; resumable: finished runs are not repeated
    python bench/quality_trec.py --only lora-r8 --seeds 5

The preset's schedule and penalty step were chosen by this table. One run is about two minutes on one thread; results go to
bench/results/quality_trec.json as they come, and the table of means and standard deviations is printed at the end. A variant `…-as-lora`
is plain LoRA at the average rank, rounded, that La-LoRA ended with at the same seed.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import torch

from adaptlora import doctor
from adaptlora.files import atomic_file
from adaptlora.finetune import preset, run

RESULTS = Path(__file__).parent / "results" / "quality_trec.json"


def normal(target_r=4.0, t_p=60, t_c=70, penalty_step="proximal", **options):
    # Nothing is taken over from the preset's own choice of schedule and penalty: a variant is what is written here.
    fields = {"method": "normal", "target_r": target_r, "t_p": t_p, "t_c": t_c, "penalty_step": penalty_step}
    return fields | {"options": options}


def lalora(gamma, temperature):
    return {"method": "lalora", "r": 8, "gamma": gamma, "temperature": temperature}


def nora(inner_init="sigma", outer="weight", **fields):
    # lora_alpha = r: the update that is taken out of W at the start is then W's own best approximation of rank r.
    options = {"inner_init": inner_init, "outer": outer}
    return {"method": "nora", "r": 16, "r_out": 256, "lora_alpha": 16, "options": options} | fields


VARIANTS = {
    "lora-r8": {"method": "lora", "r": 8},
    "lora-r4": {"method": "lora", "r": 4},
    "lora-r2": {"method": "lora", "r": 2},
    "normal-4-proximal": normal(),
    "normal-4-gradient": normal(penalty_step="gradient"),
    "normal-4-proximal-eta0.1": normal(eta_p=0.1),
    "normal-4-proximal-eta0.3": normal(eta_p=0.3),
    "normal-4-proximal-early": normal(t_p=30, t_c=40),
    "normal-4-proximal-early-eta3": normal(t_p=30, t_c=40, eta_p=3.0),
    "normal-4-proximal-late": normal(t_p=90, t_c=100),
    "normal-4-no-penalty": normal(penalty="none"),
    "normal-2-proximal": normal(target_r=2.0),
    "normal-2-gradient": normal(target_r=2.0, penalty_step="gradient"),
    "lalora-gamma1": lalora(1.0, 1.0),
    "lalora-gamma1-temperature10": lalora(1.0, 10.0),
    "lalora-gamma1.5-temperature10": lalora(1.5, 10.0),
    "lalora-gamma4-temperature10": lalora(4.0, 10.0),  # at the largest rank everywhere from step 25 on
    "lalora-gamma1-temperature10-as-lora": {"method": "lora", "like": "lalora-gamma1-temperature10"},
    "lalora-gamma1.5-temperature10-as-lora": {"method": "lora", "like": "lalora-gamma1.5-temperature10"},
    "lora-r7": {"method": "lora", "r": 7},  # 290,304 numbers, NoRA's 294,912
    "nora-sigma": nora(),
    "nora-sigma-lr5e-4": nora(lr=5e-4),
    "nora-kaiming": nora(inner_init="kaiming"),
    "nora-activation": nora(outer="activation"),
}


def spec_of(variant: str, seed: int, data_dir: str):
    fields = dict(VARIANTS[variant])
    if like := fields.pop("like", None):
        run_like = load()["runs"].get(f"{like}/{seed}")
        if run_like is None:
            raise ValueError(
                f"quality_trec: {variant} needs the average rank of {like} at seed {seed}, which must run first"
            )
        fields["r"] = max(1, round(statistics.mean(run_like["ranks"])))
    base = dataclasses.replace(preset("trec"), compare=False, seed=seed, data_dir=data_dir, options={})
    if fields["method"] == "lora":
        # alpha / r is kept, so that ranks differ in capacity and not in step size.
        fields = fields | {"lora_alpha": base.lora_alpha * fields["r"] / base.r}
    return dataclasses.replace(base, **fields)


def load() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"runs": {}}


def store(key: str, result: dict) -> None:
    # Read again first: several processes may share the file, one variant each.
    results = load()
    results["machine"], results["versions"] = doctor.machine(), doctor.versions()
    results["runs"][key] = result
    with atomic_file(RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def table() -> str:
    by_variant: dict[str, list[dict]] = {}
    for key, result in load()["runs"].items():
        by_variant.setdefault(key.rsplit("/", 1)[0], []).append(result)
    lines = [
        "| variant | seeds | accuracy | std | at the clip | average rank at the end | over the run | adapter parameters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        runs = by_variant.get(variant)
        if runs:
            accuracy = [r["accuracy"] for r in runs]
            clip = [r["clip"] for r in runs if r["clip"] is not None]
            over_the_run = [r["run_average"] for r in runs if r.get("run_average") is not None]
            cells = (
                variant,
                len(runs),
                f"{statistics.mean(accuracy):.4f}",
                f"{statistics.stdev(accuracy):.4f}" if len(runs) > 1 else "–",
                f"{statistics.mean(clip):.4f}" if clip else "–",
                f"{statistics.mean(rank for r in runs for rank in r['ranks']):.2f}",
                f"{statistics.mean(over_the_run):.2f}" if over_the_run else "–",
                round(statistics.mean(r["parameters"] for r in runs)),
            )
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data-dir", default=".data")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads; two processes of one thread each share two cores"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for seed in range(options.seeds):
        for variant in options.only:
            key = f"{variant}/{seed}"
            if key in load()["runs"]:
                continue
            report = run(spec_of(variant, seed, options.data_dir))
            scores = report.scores["ours"]
            final = next(report.sizes[at] for at in ("compacted", "after", "before") if at in report.sizes)
            result = {
                "accuracy": scores["end"]["accuracy"],
                "clip": scores.get("clip", {}).get("accuracy"),
                "parameters": final["adapter_parameters"],
                "ranks": list(report.ranks.values()),
                "run_average": report.run_average(),
            }
            store(key, result)
            print(key, result["accuracy"], f"{report.total_seconds:.0f} s", flush=True)
    print(table())


if __name__ == "__main__":
    main()
