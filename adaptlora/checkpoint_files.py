"""The manifest that makes a folder a checkpoint: size and SHA-256 of every file, written last."""

import hashlib
import json
import os
import re
from pathlib import Path

from . import text_files
from .files import atomic_file, sync_folder

MANIFEST = "adaptlora_checkpoint.json"
FORMAT = 1
LOOP, TRAINER = "loop", "transformers"  # who wrote the rest
_NAME = re.compile(r"checkpoint-(\d+)")
_MOST_BYTES = 1 << 30  # a long run logs much
_FIELDS = {"format": int, "kind": str, "step": int, "files": dict}


def step_of(path: Path) -> int | None:
    """N of a folder checkpoint-N, else None."""
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else None


def checkpoints(folder: Path) -> dict[int, Path]:
    """{N: folder/checkpoint-N}, the latest first."""
    found = {step_of(path): path for path in folder.iterdir() if step_of(path) is not None and path.is_dir()}
    return dict(sorted(found.items(), reverse=True))


def read_json(file: Path, *, strict: bool = True) -> dict:
    """`text_files.read_json` of a checkpoint's file.  Raises: ValueError that names the file, a missing one too."""
    try:
        return text_files.read_json("checkpoint", file, strict=strict, most_bytes=_MOST_BYTES)
    except OSError as error:
        raise ValueError(str(error)) from error


def write_manifest(folder: Path, kind: str, step: int, names) -> None:
    """Sync the files `names` of the folder, and its folders, to disk; then write the manifest that vouches for them."""
    files = {}
    for name in sorted(names):
        with open(folder / name, "rb") as stream:
            os.fsync(stream.fileno())
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            files[name] = {"size": stream.tell(), "sha256": digest}
    for parent in {(folder / name).parent for name in files} | {folder}:
        sync_folder(parent)
    with atomic_file(folder / MANIFEST) as temporary:
        manifest = {"format": FORMAT, "kind": kind, "step": step, "files": files}
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync_folder(folder)


def read_manifest(folder: Path) -> dict:
    """The manifest, not yet what it says of other files.  Raises: ValueError that names it."""
    file = folder / MANIFEST
    manifest = read_json(file)
    if isinstance(manifest, dict) and isinstance(manifest.get("format"), int) and manifest["format"] > FORMAT:
        raise ValueError(
            f"{file} must be of format {FORMAT} at most, got {manifest['format']} (a newer adaptlora wrote it: upgrade)"
        )
    whole = isinstance(manifest, dict) and manifest.keys() == _FIELDS.keys()
    if not whole or not all(type(manifest[field]) is kind for field, kind in _FIELDS.items()):
        raise ValueError(f"{file} must hold {', '.join(_FIELDS)} and nothing else; it is damaged")
    if manifest["format"] != FORMAT or manifest["kind"] not in (LOOP, TRAINER):
        raise ValueError(f"{file} must be of format {FORMAT} and a known kind, got {manifest['kind']!r}")
    if step_of(folder) not in (None, manifest["step"]):
        raise ValueError(f"{file} must be of step {step_of(folder)}, as the folder's name says, got {manifest['step']}")
    for name, facts in manifest["files"].items():
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if not inside or not isinstance(facts, dict) or facts.keys() != {"size", "sha256"}:
            raise ValueError(f"{file} must give size and sha256 of {name!r}; it is damaged")
    return manifest


def check_files(folder: Path, manifest: dict) -> None:
    """Raises: ValueError that names the first file that is missing, or is not what it was when the manifest was written."""
    for name, facts in manifest["files"].items():
        file = folder / name
        try:
            with open(file, "rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                if size != facts["size"]:
                    raise ValueError(
                        f"{file} must have {facts['size']} bytes, as {MANIFEST} says, got {size}: one of them is damaged"
                    )
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"{file} is missing or cannot be read: {error.strerror}") from error
        if digest != facts["sha256"]:
            raise ValueError(
                f"{file} must have the SHA-256 {str(facts['sha256'])[:12]}… of {MANIFEST}, got {digest[:12]}…: one of them is damaged"
            )
