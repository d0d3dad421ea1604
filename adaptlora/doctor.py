"""What is installed, what was built, and which backend will run where: the facts behind `adaptlora doctor`."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator

import torch

from . import gemm_table
from .ops import _backend, _cuda_library

PACKAGES = ("adaptlora", "torch", "triton", "numpy", "safetensors", "transformers", "peft")
Row = tuple[str, str, bool]  # question, answer, whether all is well


def versions() -> dict[str, str | None]:
    """Version of Python and of each package; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, str | int]:
    """What a measurement depends on: processor, its cores, torch's threads, and the GPU where there is one."""
    facts: dict[str, str | int] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def diagnose() -> dict[str, list[Row]]:
    """Everything doctor prints: (question, answer, well) by section."""
    return {
        "Versions": list(_version_rows()),
        "This machine": [(name, str(value), True) for name, value in machine().items()] + [_gpu_row()],
        "C++ extension": list(_extension_rows()),
        "Which backend runs": [(where, answer, not answer.startswith("error")) for where, answer in _backend.explain()],
        "Which base GEMM runs (cuda, 16 bits)": [_gemm_row()],
    }


def _version_rows() -> Iterator[Row]:
    missing = {
        "adaptlora": "not installed (running from a checkout)",
        "triton": "not installed: CUDA tensors would run the reference",
        "transformers": 'not installed: pip install "adaptlora[demo]" for `adaptlora finetune`',
        "peft": 'not installed: pip install "adaptlora[demo]" for `adaptlora finetune`',
    }
    for package, version in versions().items():
        yield package, version or missing.get(package, "not installed"), True


def _gpu_row() -> Row:
    if torch.version.cuda is None:
        return "CUDA", "this torch is built without CUDA", True
    if not torch.cuda.is_available():
        return "CUDA", f"torch is built for CUDA {torch.version.cuda}, but sees no GPU", True
    major, minor = torch.cuda.get_device_capability()
    return "CUDA", f"{torch.version.cuda}, compute capability {major}.{minor}", True


def _gemm_row() -> Row:
    """What decides; not well if it is nothing that can be followed."""
    question = "decided by"
    try:
        override = gemm_table.forced()
        if override is not None:
            return question, f"ADAPTLORA_GEMM={override}", True
        table = gemm_table.read(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    except ValueError as error:
        return question, str(error), False
    if table is None:
        return question, "prediction: no table for this GPU (`adaptlora tune` measures one)", True
    return question, f"{gemm_table.path(table.device)}: {len(table.entries)} entries, measured {table.date}", True


def _extension_rows() -> Iterator[Row]:
    try:
        extension = _backend.extension()
    except ImportError as error:
        yield "adaptlora._C", str(error), False
    else:
        if extension is None:
            yield "adaptlora._C", "not built: CPU tensors run the reference", True
        else:
            yield "adaptlora._C", f"loads ({extension.__file__})", True
            yield "built for torch", extension.torch_version, True
            yield "instructions", extension.isa(), True
    yield _cuda_library_row()
    compiler = _compiler()
    yield "compiler", compiler or "none found: the extension can only be installed, not built, here", True


def _cuda_library_row() -> Row:
    """Whether the factorizations on CUDA tensors are built, and for which GPUs."""
    try:
        library = _cuda_library.library()
    except ImportError as error:
        return "adaptlora._cuda", str(error), False
    if library is None:
        return "adaptlora._cuda", "not built: torch factorizes on CUDA tensors", True
    built = ", ".join(f"sm_{number}" for number in _cuda_library.architectures(library))
    return "adaptlora._cuda", f"loads, for {built} and, through PTX, later GPUs", True


def _compiler() -> str | None:
    """First line of the C++ compiler's own version text; CXX, then what Python was built with, then c++."""
    for command in (os.environ.get("CXX"), (sysconfig.get_config_var("CXX") or "").split(" ")[0], "c++"):
        path = shutil.which(command) if command else None
        if path:
            answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
            return f"{(answer.stdout or answer.stderr).strip().splitlines()[0]} ({path})"
    return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except FileNotFoundError:  # not Linux
        return platform.processor() or "unknown"
    return platform.processor() or "unknown"
