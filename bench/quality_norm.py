"""What shearing does to a trained LoRA: SmolLM2-135M on E2E, r = 64, before and after NoRM, TAIA and random drops.

    make data-e2e data-forgetting
    python bench/quality_norm.py --seeds 3            # resumable: what is done is not repeated
    python bench/quality_norm.py --train-only

The task is judged by the perplexity of every other held-out reference, forgetting by the perplexity of Wikipedia's text. One training run
is about ten minutes on two cores, a variant one. Adapters go to runs/norm, results to bench/results/quality_norm.json.
"""

import argparse
import bz2
import dataclasses
import json
import re
import statistics
from pathlib import Path
from xml.etree import ElementTree

import torch

import adaptlora
from adaptlora import NoRMConfig, RandomConfig, TAIAConfig, doctor
from adaptlora.files import atomic_file
from adaptlora.finetune import data, fetch, preset, run, tasks
from adaptlora.finetune.metrics import perplexity

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "quality_norm.json"
R, TOKENS, CHUNKS = 64, 256, 16
VARIANTS = {
    "no adapter": None,
    "LoRA r = 64": None,
    "NoRM": NoRMConfig(),
    "NoRM, trained scaling": NoRMConfig(keep_scaling=True),
    "TAIA": TAIAConfig(),
    "random half of the vectors": RandomConfig(eta=0.5),
}


def adapter_folder(seed: int, r: int) -> Path:
    return ROOT / "runs" / "norm" / f"lora-r{r}-seed{seed}"


def trained(seed: int, data_dir: str, r: int = R) -> Path:
    """Folder of the adapter of that seed, trained if there is none yet."""
    out = adapter_folder(seed, r)
    if not (out / "report.json").is_file():
        # lora_alpha / r stays the preset's
        base = preset("e2e")
        lora = {"method": "lora", "r": r, "lora_alpha": base.lora_alpha * r / base.r, "generate": 0}
        run(dataclasses.replace(base, seed=seed, data_dir=data_dir, **lora), out=out)
    return out / "adapter"


def wikipedia(tokenizer, data_dir: str) -> list[dict]:
    """Batches of plain text: articles without their markup, TOKENS tokens of each of the first CHUNKS that are long enough."""
    with bz2.open(fetch.locate("wikipedia", data_dir), "rt", encoding="utf-8") as file:
        texts = [element.text or "" for _, element in ElementTree.iterparse(file) if element.tag.endswith("}text")]
    rows = []
    for text in texts:
        text = re.sub(
            r"(?s)\{\{.*?\}\}|\{\|.*?\|\}|<ref.*?(/>|</ref>)|<[^>]*>|\[\[(File|Image):.*?\]\]|={2,}.*?={2,}|'{2,}",
            "",
            text,
        )
        text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text).strip()
        ids = tokenizer(text)["input_ids"][:TOKENS]
        if len(ids) == TOKENS:
            rows.append(ids)
    ids = torch.tensor(rows[:CHUNKS])
    assert len(ids) == CHUNKS
    return [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in ids.split(8)]


def judge(variant: str, seed: int, data_dir: str) -> dict:
    adapter = trained(seed, data_dir)
    spec = dataclasses.replace(preset("e2e"), seed=seed, data_dir=data_dir, generate=0)
    task = tasks.build(spec, data.load(spec))
    task.test = task.test[::2]
    model = task.model().eval()
    config, facts = VARIANTS[variant], {}
    if variant != "no adapter":
        on_model = adaptlora.load(model, adapter)
        if config is not None:
            if hasattr(config, "seed"):
                config = dataclasses.replace(config, seed=seed)
            report = adaptlora.shear(on_model, config)
            facts = {"parameters": report.parameters()[1], "ranks": list(report.ranks().values())}
        else:
            facts = {"parameters": on_model.summary()["adapter_parameters"]}
        model.eval()
    return facts | {
        "task": task.evaluate(model)["perplexity"],
        "wikipedia": perplexity(model, wikipedia(task.tokenizer, data_dir)),
    }


def load() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"runs": {}}


def store(key: str, result: dict) -> None:
    results = load() | {"machine": doctor.machine(), "versions": doctor.versions()}
    results["runs"][key] = result
    with atomic_file(RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")


def table(seeds: int) -> str:
    runs = load()["runs"]
    lines = ["| variant | E2E perplexity | Wikipedia perplexity | average rank | parameters |", "|---|---|---|---|---|"]
    for variant in VARIANTS:
        found = [runs[key] for seed in range(seeds) if (key := f"{variant}/{seed}") in runs]
        if found:
            cells = [f"{statistics.mean(v):.2f} ± {statistics.stdev(v) if len(v) > 1 else 0:.2f}" for v in
                     ([run[name] for run in found] for name in ("task", "wikipedia"))]  # fmt: skip
            ranks = [rank for run in found for rank in run.get("ranks", [])]
            sizes = [run["parameters"] for run in found if "parameters" in run]
            cells += [
                f"{statistics.mean(ranks):.1f}" if ranks else "–",
                f"{statistics.mean(sizes):,.0f}" if sizes else "–",
            ]
            lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data-dir", default=".data")
    parser.add_argument(
        "--train-only", action="store_true", help="the adapters, and one of rank 32, without judging them"
    )
    options = parser.parse_args()
    for seed in range(options.seeds):
        trained(seed, options.data_dir)
    if options.train_only:
        trained(0, options.data_dir, r=32)
        return
    for seed in range(options.seeds):
        for variant in VARIANTS:
            key = f"{variant}/{seed}"
            if variant == "no adapter" and seed:
                continue  # the same model and data
            if key not in load()["runs"]:
                result = judge(variant, seed, options.data_dir)
                store(key, result)
                print(key, {k: v for k, v in result.items() if k != "ranks"}, flush=True)
    print(table(options.seeds))


if __name__ == "__main__":
    main()
