"""Runs linalg_threads.cpp: the factorizations in the order of a block of threads, watched by ThreadSanitizer where there is one."""

import functools
import os
import pathlib
import shutil
import subprocess
import tempfile

import pytest
import torch

_SOURCE = pathlib.Path(__file__).with_suffix(".cpp")


@functools.cache
def _program() -> str:
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0])
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = f"{tempfile.mkdtemp(prefix='adaptlora-linalg-')}/linalg_threads"
    for sanitize in (["-fsanitize=thread"], []):
        command = [compiler, "-std=c++20", "-O1", "-g", "-pthread", *sanitize, str(_SOURCE), "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        runs = done.returncode == 0 and subprocess.run([target, "jacobi", "1", "1", "1"], input=b"1234").returncode == 0
        if runs:
            return target
    raise AssertionError(done.stderr)


def _run(factorization: str, matrix: torch.Tensor, groups: int, lanes: int) -> torch.Tensor:
    command = [_program(), factorization, str(len(matrix)), str(groups), str(lanes)]
    done = subprocess.run(command, input=matrix.contiguous().numpy().tobytes(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return torch.frombuffer(bytearray(done.stdout), dtype=matrix.dtype)


def jacobi_svd(a: torch.Tensor, groups: int, lanes: int):
    """U, S, Vh, info of a (R, R) float32 matrix."""
    R = len(a)
    ut, s, vh, info = _run("jacobi", a, groups, lanes).split([R * R, R, R * R, 1])
    return ut.view(R, R).mT, s, vh.view(R, R), int(info)


def cholesky_inverse(gram: torch.Tensor, groups: int, lanes: int):
    """R, R⁻¹, condition of a (l, l) float64 matrix."""
    size = len(gram)
    r, inverse_t, condition = _run("cholesky", gram, groups, lanes).split([size * size, size * size, 1])
    return r.view(size, size), inverse_t.view(size, size).mT, condition[0]
