"""How NoRM's choice of c depends on what should not matter, on a real trained adapter: SmolLM2-135M on E2E, r = 32.

    make data-e2e data-forgetting; python bench/quality_norm.py --train-only; python bench/norm_choice.py

Exact and randomized base subspaces on all 210 modules; the official search over 20 seeds on every 20th module, beside the closed form.
Writes bench/results/norm_choice.json. About ten minutes on two cores.
"""

import argparse
import json
import statistics
from pathlib import Path

from adaptlora import NoRMConfig, doctor
from adaptlora.base_weights import BaseWeights
from adaptlora.files import atomic_file
from adaptlora.lora_files import read
from adaptlora.pool import over
from adaptlora.shear.methods import method_for

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "norm_choice.json"


def facts(config, modules, base) -> dict[str, dict]:
    method = method_for(config)
    return {m.name: s.facts for m, s in over(lambda m: method.module(m, lambda: base.load(m.name)), modules)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", default=ROOT / "runs" / "norm" / "lora-r32-seed0" / "adapter")
    parser.add_argument("--base", default=ROOT / ".data" / "smollm2-135m-instruct")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--every", type=int, default=20, help="the official search runs on every so many-th module")
    options = parser.parse_args()
    modules, base = list(read(options.adapter).modules.values()), BaseWeights(options.base)

    exact = facts(NoRMConfig(base_svd="exact"), modules, base)
    sketches = [facts(NoRMConfig(seed=seed), modules, base) for seed in range(3)]
    given_up, differs, off = [], [], []
    for sketch in sketches:
        for name, truth in exact.items():
            given_up.append(truth["phi"][truth["c"] - 1] - truth["phi"][sketch[name]["c"] - 1])
            differs.append(sketch[name]["c"] != truth["c"])
            off.append(max(abs(a - b) for a, b in zip(truth["phi"], sketch[name]["phi"], strict=True)))
    seeded = facts(NoRMConfig(base_svd="exact", seed=1), modules, base)
    moved = sum(seeded[name]["c"] != exact[name]["c"] for name in exact)
    print(f"exact base, another seed: c differs in {moved} of {len(exact)} modules")
    print(
        f"randomized base, 3 seeds: φ given up at most {max(given_up):.1e}, c differs in {statistics.mean(differs):.1%},"
    )
    print(f"φ of any c off by {max(off):.1e} at most")

    chosen = modules[:: options.every]
    official = [
        facts(NoRMConfig(base_svd="exact", search="official", seed=s), chosen, base) for s in range(options.seeds)
    ]
    pairs, choices = [], {}
    for module in chosen:
        truth = exact[module.name]
        choices[module.name] = {"expected": truth["c"], "official": [run[module.name]["c"] for run in official]}
        for c in truth["candidates"]:
            pairs.append((truth["phi"][c - 1], statistics.mean(run[module.name]["phi"][c - 1] for run in official)))
    correlation = statistics.correlation(*zip(*pairs, strict=True))
    distance = max(abs(a - b) for a, b in pairs)
    varied = statistics.mean(len(set(choice["official"])) > 1 for choice in choices.values())
    print(
        f"official over {options.seeds} seeds, {len(chosen)} modules: its c changes with the seed in {varied:.0%} of them;"
    )
    print(f"its mean φ and the closed form correlate with {correlation:.5f}, and differ by {distance:.1e} at most")
    results = {
        "machine": doctor.machine(),
        "versions": doctor.versions(),
        "modules": len(exact),
        "randomized": {"given_up": max(given_up), "c_differs": statistics.mean(differs), "phi_off": max(off)},
        "official": {
            "seeds": options.seeds,
            "c_changes": varied,
            "correlation": correlation,
            "largest_difference": distance,
            "choices": choices,
        },
    }
    with atomic_file(RESULTS) as file:
        file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
