"""What every test shares: offline, seeded, one backend at a time, and uninitialised memory that shows."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What `adaptlora tune` measured on this machine must not choose for the tests.
os.environ["ADAPTLORA_CACHE_DIR"] = tempfile.mkdtemp(prefix="adaptlora-tests-")

import pytest
import torch

from adaptlora.ops import _backend


def pytest_collection_modifyitems(items):
    # A slow test that starts last is waited for by a worker that has nothing else to do.
    items.sort(key=lambda item: "slow" not in item.keywords)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and this machine has none"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpp"])
def backend(request, monkeypatch):
    """Name of the backend that every op runs on in this test."""
    if request.param == "cpp" and _backend.extension() is None:
        pytest.skip("the C++ extension adaptlora._C is not built")
    monkeypatch.setenv("ADAPTLORA_BACKEND", request.param)
    return request.param


@pytest.fixture
def poisoned():
    """Fills what `torch.empty` returns, in Python and C++, with NaN: an element that a kernel forgets is then seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
