"""Which backend is chosen, what an override may ask for, and what a broken extension says."""

import importlib
import importlib.util
import types

import pytest
import torch

from adaptlora.ops import _backend, lora_linear

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No override, no interpreter, and no decision remembered from or for other tests."""

    def forget():
        for cached in (_backend.extension, _backend.has_triton, _backend._choose):
            # A test may have put a plain function in its place.
            getattr(cached, "cache_clear", lambda: None)()

    monkeypatch.delenv("ADAPTLORA_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget()
    yield monkeypatch
    monkeypatch.undo()
    forget()


def built(fresh, module=None):
    fresh.setattr(_backend, "extension", lambda: module or types.SimpleNamespace())


def not_built(fresh):
    fresh.setattr(_backend, "extension", lambda: None)


def on(device: str, dtype=FP32) -> torch.Tensor:
    """Stands in for a tensor of any device; only its device and dtype are asked for."""
    return types.SimpleNamespace(device=torch.device(device), dtype=dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_cpu(fresh, dtype):
    built(fresh)
    assert _backend.choose(on("cpu", dtype)) == "cpp"


def test_cpu_without_extension(fresh):
    not_built(fresh)
    assert _backend.choose(on("cpu")) == "reference"
    x = torch.randn(3, 4)
    assert lora_linear(x, torch.randn(5, 4), None, torch.randn(2, 4), torch.randn(5, 2)).shape == (3, 5)


def test_cuda(fresh):
    fresh.setattr(_backend, "has_triton", lambda: True)
    assert _backend.choose(on("cuda")) == "triton"


def test_cuda_without_triton(fresh):
    fresh.setattr(_backend, "has_triton", lambda: False)
    assert _backend.choose(on("cuda")) == "reference"


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "meta"])
@pytest.mark.parametrize("override", [None, *_backend.BACKENDS])
def test_float64_always_runs_the_reference(fresh, device, override):
    built(fresh)
    if override:
        fresh.setenv("ADAPTLORA_BACKEND", override)
    assert _backend.choose(on(device, FP64)) == "reference"


@pytest.mark.parametrize("device", ["mps", "meta", "xpu"])
def test_other_devices_run_the_reference(fresh, device):
    built(fresh)
    assert _backend.choose(on(device)) == "reference"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_override_reference(fresh, device):
    built(fresh)
    fresh.setenv("ADAPTLORA_BACKEND", "reference")
    assert _backend.choose(on(device)) == "reference"


def test_override_triton_on_cpu_needs_the_interpreter(fresh):
    fresh.setattr(_backend, "has_triton", lambda: True)
    fresh.setenv("ADAPTLORA_BACKEND", "triton")
    with pytest.raises(
        ValueError, match=r"ADAPTLORA_BACKEND=triton runs on cuda tensors .*TRITON_INTERPRET=1.*, got cpu"
    ):
        _backend.choose(on("cpu"))
    fresh.setenv("TRITON_INTERPRET", "1")
    assert _backend.choose(on("cpu")) == "triton"


@pytest.mark.parametrize(
    ("override", "device", "message"),
    [
        ("triton", "cuda", "ADAPTLORA_BACKEND=triton, but triton is not installed"),
        ("cpp", "cpu", r"ADAPTLORA_BACKEND=cpp, but the C\+\+ extension is not built"),
        ("cuda", "cpu", "ADAPTLORA_BACKEND must be one of triton, cpp, reference, got 'cuda'"),
    ],
)
def test_override_that_cannot_run_is_an_error(fresh, override, device, message):
    not_built(fresh)
    fresh.setattr(_backend, "has_triton", lambda: False)
    fresh.setenv("ADAPTLORA_BACKEND", override)
    with pytest.raises(ValueError, match=message):
        _backend.choose(on(device))


def test_override_cpp_on_cuda(fresh):
    built(fresh)
    fresh.setenv("ADAPTLORA_BACKEND", "cpp")
    with pytest.raises(ValueError, match="ADAPTLORA_BACKEND=cpp runs on cpu tensors, got cuda"):
        _backend.choose(on("cuda"))


def test_misspelt_override_is_an_error_for_float64_too(fresh):
    fresh.setenv("ADAPTLORA_BACKEND", "c++")
    with pytest.raises(ValueError, match=r"must be one of .*, got 'c\+\+'"):
        _backend.choose(on("cpu", FP64))


def test_empty_override_is_none(fresh):
    built(fresh)
    fresh.setenv("ADAPTLORA_BACKEND", "")
    assert _backend.choose(on("cpu")) == "cpp"


def test_override_is_read_on_every_call(fresh):
    built(fresh)
    assert _backend.choose(on("cpu")) == "cpp"
    fresh.setenv("ADAPTLORA_BACKEND", "reference")
    assert _backend.choose(on("cpu")) == "reference"


def test_kernels(fresh):
    extension = types.SimpleNamespace()
    built(fresh, extension)
    assert _backend.kernels(on("cpu"), "lora_linear") is extension
    assert _backend.kernels(on("cpu", FP64), "lora_linear") is None


def pretend_found(fresh, load):
    """`adaptlora._C` is found, and importing it calls `load`."""
    fresh.setattr(importlib.util, "find_spec", lambda name: object() if name == "adaptlora._C" else None)
    fresh.setattr(importlib, "import_module", lambda name: load())


def test_missing_extension_is_no_error(fresh):
    fresh.setattr(importlib.util, "find_spec", lambda name: None)
    assert _backend.extension() is None
    assert _backend.choose(on("cpu")) == "reference"


def test_extension_that_does_not_load_says_how_to_rebuild_it(fresh):
    def load():
        raise ImportError("undefined symbol: _ZN3c10")

    pretend_found(fresh, load)
    with pytest.raises(ImportError, match=r"does not load with torch .*; rebuild it with `pip install") as raised:
        _backend.choose(on("cpu"))
    assert "undefined symbol" in str(raised.value.__cause__)


def test_extension_of_another_torch_says_how_to_rebuild_it(fresh):
    pretend_found(fresh, lambda: types.SimpleNamespace(torch_version="1.0.0+cpu"))
    running = torch.__version__.split("+")[0]
    with pytest.raises(ImportError, match=rf"built for torch 1.0.0 but {running} runs; rebuild it with `pip install"):
        _backend.choose(on("cpu"))


def test_extension_of_this_torch_loads(fresh):
    # The same release built for another device is the same C++ interface.
    extension = types.SimpleNamespace(torch_version=torch.__version__.split("+")[0] + "+cu130")
    pretend_found(fresh, lambda: extension)
    assert _backend.extension() is extension


def test_broken_extension_does_not_stop_the_reference(fresh):
    pretend_found(fresh, lambda: types.SimpleNamespace(torch_version="1.0.0"))
    fresh.setenv("ADAPTLORA_BACKEND", "reference")
    assert _backend.choose(on("cpu")) == "reference"


def test_explain(fresh):
    not_built(fresh)
    fresh.setattr(_backend, "has_triton", lambda: True)
    rows = dict(_backend.explain())
    assert rows["cpu float32"] == "reference (the C++ extension is not built)"
    assert rows["cuda bfloat16"] == "triton (cuda tensors)"
    assert rows["cpu float64"] == "reference (torch.float64 has no kernels)"
    assert len(rows) == 8


def test_explain_shows_errors_instead_of_raising(fresh):
    pretend_found(fresh, lambda: types.SimpleNamespace(torch_version="1.0.0"))
    rows = dict(_backend.explain())
    assert rows["cpu float32"].startswith("error (adaptlora: the C++ extension was built for torch 1.0.0")
    fresh.setenv("ADAPTLORA_BACKEND", "numpy")
    assert all(
        answer.startswith("error (ADAPTLORA_BACKEND must be one of") for answer in dict(_backend.explain()).values()
    )
