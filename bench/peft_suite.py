"""
PEFT's own LoRA tests, unmodified, on PEFT as it is and on models that `accelerate` took: python bench/peft_suite.py --json

    --tests PATH    the source archive of the installed version of PEFT, or its unpacked folder, instead of a download by pip
    --extra PATH    a folder for PYTHONPATH with what the tests import and this package does not need (parameterized, scipy, attrs)

Models of the hub are replaced by tiny ones with random weights (peft_standins.py); what else the tests need from the hub fails or is
skipped in both runs. The result is bench/results/peft_suite.json: outcomes of both runs counted, reasons of what did not pass, the
tests whose outcomes differ, and the calls that the ops of this package took.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import peft_standins

BENCH = Path(__file__).resolve().parent
FILES = [
    "arrow",
    "bdlora",
    "custom_models",
    "decoder_models",
    "encoder_decoder_models",
    "feature_extraction_models",
    "helpers",
    "initialization",
    "integrations",
    "lora_conversion",
    "lora_ga",
    "lora_intruders",
    "lora_variants",
    "lorafa",
    "loraplus",
    "low_level_api",
    "mixed",
    "other",
    "quantization",
    "seq_classifier",
    "stablediffusion",
    "target_parameters",
    "token_classification_qa",
    "torch_compile",
    "tuners_utils",
    "velora",
    "vision_models",
]
VERSIONS = ("adaptlora", "peft", "torch", "transformers", "diffusers", "bitsandbytes", "torchao")


def unpack(source: Path | None, into: Path) -> None:
    """PEFT's tests as into/tests; pip downloads them without a source."""
    if source is None:
        requirement = f"peft=={importlib.metadata.version('peft')}"
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(into)]
        subprocess.run([*pip, requirement], check=True)
        (source,) = into.glob("peft-*.tar.gz")
    if source.is_dir():
        shutil.copytree(source / "tests", into / "tests")
    else:
        with tarfile.open(source) as archive:
            archive.extractall(into, filter="data")
        (unpacked,) = into.glob("peft-*/tests")
        unpacked.rename(into / "tests")
    # What the archive leaves out: the tests import each other as a package.
    (into / "tests" / "__init__.py").touch()
    (into / "pytest.ini").write_text("[pytest]\n")


def run(folder: Path, *, accelerate: bool, extra: Path | None, files: list[str], timeout: int) -> dict[str, dict]:
    """Outcome, reason and calls of every test, by its name."""
    result = folder / f"outcomes-{accelerate}.json"
    path = [str(BENCH.parent), str(BENCH), *([str(extra)] if extra else [])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "ADAPTLORA_PEFT_SUITE": str(result),
        "ADAPTLORA_PEFT_ACCELERATE": str(int(accelerate)),
    }
    tests = [f"tests/test_{name}.py" for name in files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peft_plugin", "--continue-on-collection-errors"]
    if extra and (extra / "pytest_timeout.py").exists():
        command.append(f"--timeout={timeout}")
    subprocess.run([*command, *tests], cwd=folder, env=environment, check=False)
    return json.loads(result.read_text())


# What a reason must have in it: the group in which it is counted.
GROUPS = (
    (r"CUDA|GPU|accelerator|hardware|device", "needs a GPU"),
    (r"LocalEntryNotFound|offline mode|OfflineMode|couldn't connect|Couldn't reach|cached files|Hub", "needs the hub"),
    (
        r"No module named|not installed|requires the|is not available|importorskip|could not import",
        "needs a package that is not there",
    ),
)


def _group(found: dict) -> str:
    for pattern, group in GROUPS:
        if re.search(pattern, found["reason"], re.IGNORECASE):
            return group
    return re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?(e-?\d+)?", "…", _first_line(found))[:120] or "no reason given"


def _first_line(found: dict) -> str:
    return found["reason"].strip().split("\n")[0][:300]


def _counts(tests: dict[str, dict]) -> dict:
    outcomes = Counter(found["outcome"] for found in tests.values())
    reasons = {
        outcome: dict(Counter(_group(t) for t in tests.values() if t["outcome"] == outcome).most_common())
        for outcome in ("failed", "skipped")
    }
    return {"tests": len(tests), **{o: outcomes[o] for o in ("passed", "failed", "skipped")}, "reasons": reasons}


def summary(plain: dict[str, dict], accelerated: dict[str, dict]) -> dict:
    """What bench/results/peft_suite.json holds; tests that only one of the runs came to are left out and counted."""
    both = plain.keys() & accelerated.keys()
    plain, fast = ({name: run[name] for name in sorted(both)} for run in (plain, accelerated))
    calls = Counter()
    for found in fast.values():
        calls.update(found["calls"])
    ops = {name for name, found in fast.items() if {"lora_linear", "lora_delta_"} & found["calls"].keys()}
    differ = {
        name: {
            "peft": plain[name]["outcome"],
            "accelerated": fast[name]["outcome"],
            "reason": fast[name]["reason"][:300],
        }
        for name in both
        if plain[name]["outcome"] != fast[name]["outcome"]
    }
    files = Counter(name.split("::")[0].removeprefix("tests/") for name in fast if fast[name]["outcome"] == "passed")
    return {
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "peft": _counts(plain),
        "accelerated": {
            **_counts(fast),
            "passed with calls of the ops": sum(fast[name]["outcome"] == "passed" for name in ops),
            "calls": dict(calls),
        },
        "passed by file": dict(sorted(files.items())),
        "outcomes that differ": dict(sorted(differ.items())),
        "failed": {name: _first_line(found) for name, found in fast.items() if found["outcome"] == "failed"},
        "failed only when accelerated": sorted(n for n, d in differ.items() if d["accelerated"] == "failed"),
        "in one run only": len(accelerated) + len(plain) - 2 * len(both),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path)
    parser.add_argument("--extra", type=Path)
    parser.add_argument("--files", nargs="*", default=FILES, help="test_NAME.py of PEFT, NAME each")
    parser.add_argument(
        "--timeout", type=int, default=300, help="seconds for a test, where pytest-timeout is in --extra"
    )
    parser.add_argument("--json", action="store_true", help="write bench/results/peft_suite.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peft-suite-") as name:
        folder = Path(name)
        unpack(options.tests and options.tests.resolve(), folder)
        failed = peft_standins.build(folder / "hub" / "hub")
        given = {"extra": options.extra and options.extra.resolve(), "files": options.files, "timeout": options.timeout}
        plain, accelerated = (run(folder, accelerate=accelerate, **given) for accelerate in (False, True))
    found = {**summary(plain, accelerated), "stand-ins that could not be built": failed}
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    print(text)
    if options.json:
        (BENCH / "results" / "peft_suite.json").write_text(text)


if __name__ == "__main__":
    main()
