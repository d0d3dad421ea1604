"""Modules that are done while others are not, on disk, so that a killed run can go on."""

import dataclasses
import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..files import LEFTOVER, atomic_file
from ..tensor_files import save_file
from .base import Sheared

_FINGERPRINT = "fingerprint"
_OURS = re.compile(
    rf"\.?(\d+\.safetensors|fingerprint|merged)(\.{LEFTOVER})?$"
)  # with what a kill leaves of files being written


class Unfinished:
    """
    The folder `out`.unfinished beside `out`: a file for each module that is done.

    Args:
        fingerprint: of everything the result depends on; what a run with another one left is removed.
        modules: {name: LoraModule} of the input, in order.   group: the processes at work; the first makes the folder.
    """

    def __init__(self, out: Path, fingerprint: str, modules: dict, group):
        self.folder = out.with_name(f"{out.name}.unfinished")
        self.merged = self.folder / "merged"  # a place for the merged model until all else is written
        self._modules = modules
        self._files = {name: self.folder / f"{i}.safetensors" for i, name in enumerate(modules)}
        with group.agreement("shear"):
            if group.first:
                self._begin(fingerprint)

    def _begin(self, fingerprint: str) -> None:
        mark = self.folder / _FINGERPRINT
        if self.folder.exists() and not (mark.is_file() and mark.read_bytes() == fingerprint.encode()):
            names = [entry.name for entry in self.folder.iterdir()]
            started = mark.is_file() or not any(name.endswith(".safetensors") for name in names)
            if not started or not all(map(_OURS.match, names)):
                raise ValueError(
                    f"shear: {self.folder} must be what an earlier run left, or absent, got other files in it"
                )
            self.discard()
        if self.merged.exists():
            shutil.rmtree(self.merged)
        with atomic_file(mark) as file:
            file.write_text(fingerprint, encoding="utf-8")

    @contextmanager
    def undone_by_bad_input(self):
        """A ValueError in the block leaves nothing behind; after anything else the same call can go on."""
        try:
            yield
        except ValueError:
            self.discard()
            raise

    def done(self) -> set[str]:
        """Names of the modules that `load` can give."""
        return {name for name, file in self._files.items() if file.is_file() and _whole(file)}

    def keep(self, sheared: Sheared) -> None:
        module = sheared.module
        tensors = {"lora_A": module.lora_A, "lora_B": module.lora_B}
        if module.bias is not None:
            tensors["bias"] = module.bias
        facts = {"rank_before": sheared.rank_before, "scaling": module.scaling, "facts": sheared.facts}
        with atomic_file(self._files[module.name]) as file:
            tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(tensors, file, metadata={"sheared": json.dumps(facts)})

    def load(self, name: str) -> Sheared:
        with safe_open(self._files[name], framework="pt") as file:
            stored = json.loads(file.metadata()["sheared"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is not a mapping
        module = dataclasses.replace(self._modules[name], scaling=stored["scaling"], **tensors)
        return Sheared(module, stored["rank_before"], stored["facts"])

    def discard(self) -> None:
        """Remove the folder, its mark last: what a kill leaves of it is still known to be ours."""
        for file in self.folder.glob("*.safetensors"):
            file.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _whole(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False
