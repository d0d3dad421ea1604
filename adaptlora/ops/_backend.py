"""Which implementation runs: the one place that decides.

CUDA tensors go to Triton, CPU tensors to the C++ extension, everything else (float64, other devices, no extension) to the
torch reference. `ADAPTLORA_BACKEND=triton|cpp|reference` overrides it; an override that cannot run is an error, not a fall-back
(but float64, which has no kernels, takes the reference under any override).
"""

import functools
import importlib
import importlib.util
import os

import torch

BACKENDS = ("triton", "cpp", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def extension():
    """The module adaptlora._C, or None where the package was built without it; broken is an ImportError, never a fall-back."""
    if importlib.util.find_spec("adaptlora._C") is None:
        return None
    rebuild = "rebuild it with `pip install --no-build-isolation --force-reinstall --no-deps adaptlora` (or `-e .`)"
    try:
        module = importlib.import_module("adaptlora._C")
    except ImportError as error:
        raise ImportError(
            f"adaptlora: the C++ extension does not load with torch {torch.__version__}; {rebuild}"
        ) from error
    built, running = module.torch_version.split("+")[0], torch.__version__.split("+")[0]
    if built != running:
        raise ImportError(f"adaptlora: the C++ extension was built for torch {built} but {running} runs; {rebuild}")
    return module


@functools.cache
def has_triton() -> bool:
    """Whether triton can be imported (it is loaded only when a tensor needs it)."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in triton's interpreter, where they take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _choose(device: str, dtype: torch.dtype, override: str | None, interpret: bool) -> tuple[str, str]:
    if override and override not in BACKENDS:
        raise ValueError(f"ADAPTLORA_BACKEND must be one of {', '.join(BACKENDS)}, got {override!r}")
    if dtype not in KERNEL_DTYPES:
        return "reference", f"{dtype} has no kernels"
    if override == "reference":
        return "reference", "ADAPTLORA_BACKEND=reference"
    if override == "triton" or (override is None and device == "cuda"):
        if not has_triton():
            if override is None:
                return "reference", "triton is not installed"
            raise ValueError("ADAPTLORA_BACKEND=triton, but triton is not installed")
        if device != "cuda" and not interpret:
            raise ValueError(
                f"ADAPTLORA_BACKEND=triton runs on cuda tensors (or with TRITON_INTERPRET=1), got {device}"
            )
        return "triton", "cuda tensors" if override is None else "ADAPTLORA_BACKEND=triton"
    if override == "cpp" or (override is None and device == "cpu"):
        if extension() is None:
            if override is None:
                return "reference", "the C++ extension is not built"
            raise ValueError("ADAPTLORA_BACKEND=cpp, but the C++ extension is not built")
        if device != "cpu":
            raise ValueError(f"ADAPTLORA_BACKEND=cpp runs on cpu tensors, got {device}")
        return "cpp", "cpu tensors" if override is None else "ADAPTLORA_BACKEND=cpp"
    return "reference", f"no kernels for device {device}"


def choose(tensor: torch.Tensor) -> str:
    """Backend for an op whose main operand is `tensor`: "triton", "cpp" or "reference"."""
    return _choose(tensor.device.type, tensor.dtype, os.environ.get("ADAPTLORA_BACKEND") or None, interpreting())[0]


def kernels(tensor: torch.Tensor, op: str):
    """The module that holds the kernels named like `op` for `tensor`, or None where the reference runs."""
    backend = choose(tensor)
    if backend == "cpp":
        return extension()
    if backend == "triton":
        return importlib.import_module(f"adaptlora.kernels.{op}")
    return None


def direct(tensor):
    """
    The extension, for an eager call whose main operand is `tensor`, or None where something else may have to run.

    Its `*_direct` functions take a call as the public functions get it, gradients included, without the dispatcher; they return
    None, having done nothing, for calls that are not plain (see csrc/direct.h). Those go on through the dispatcher and `choose`.
    """
    if torch.compiler.is_compiling() or not isinstance(tensor, torch.Tensor) or not tensor.is_cpu:
        return None
    return extension() if (os.environ.get("ADAPTLORA_BACKEND") or "cpp") == "cpp" else None


def explain() -> list[tuple[str, str]]:
    """(device and dtype, backend and why) for every combination: what `adaptlora doctor` prints."""
    override = os.environ.get("ADAPTLORA_BACKEND") or None
    rows = []
    for device in ("cpu", "cuda"):
        for dtype in (*KERNEL_DTYPES, torch.float64):
            try:
                backend, why = _choose(device, dtype, override, interpreting())
            except (ImportError, ValueError) as error:
                backend, why = "error", str(error)
            rows.append((f"{device} {str(dtype).removeprefix('torch.')}", f"{backend} ({why})"))
    return rows
