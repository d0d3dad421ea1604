"""The tests that need triton's interpreter, which needs no GPU.

Whether a kernel is interpreted is fixed when triton is imported, which another test of this process may have done, so each
file runs in a process of its own.
"""

import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    [
        "test_triton_kernels.py",
        "test_triton_group.py",
        "test_triton_gemm.py",
        "test_triton_linalg.py",
        "test_traffic.py",
        "test_layer_traffic.py",
    ],
)
def test_in_the_interpreter(file):
    pytest.importorskip("triton", reason="triton is not installed")
    tests = pathlib.Path(__file__).resolve().parent
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment.pop("ADAPTLORA_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests / file)]
    done = subprocess.run(command, env=environment, cwd=tests.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout
