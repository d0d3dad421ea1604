"""Adds the C++ extension adaptlora._C to what pyproject.toml declares.

It needs torch at build time (pip install --no-build-isolation) and a C++ compiler; without either, or with
ADAPTLORA_NO_EXT=1, the package is installed without it and CPU tensors take the reference implementation.
ADAPTLORA_SANITIZE=1 builds it for AddressSanitizer and UndefinedBehaviorSanitizer (make asan).
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup


def why_no_extension():
    """The reason not to build adaptlora._C, or None."""
    if os.environ.get("ADAPTLORA_NO_EXT") == "1":
        return "ADAPTLORA_NO_EXT=1"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) on the PATH"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported here ({error}); pip install --no-build-isolation builds against yours"
    return None


def extension():
    """ext_modules and cmdclass for adaptlora._C, or nothing (with the reason printed)."""
    reason = why_no_extension()
    if reason is not None:
        print(f"adaptlora: building without the C++ extension: {reason}", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    root = Path(__file__).parent.resolve()
    csrc = root / "csrc"
    sources = sorted(csrc.rglob("*.cpp"))
    headers = sorted(csrc.rglob("*.h"))
    # torch's wheels for Linux use libgomp; Apple's compiler has no OpenMP, and at::parallel_for is then serial.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    optimise, sanitize = ["-O3", "-g0"], []
    if os.environ.get("ADAPTLORA_SANITIZE") == "1":
        # Under Python's own -fwrapv signed overflow would be defined.
        optimise = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv", "-D_GLIBCXX_ASSERTIONS"]
        sanitize = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    module = CppExtension(
        name="adaptlora._C",
        sources=[str(path.relative_to(root)) for path in sources],
        depends=[str(path.relative_to(root)) for path in headers],
        extra_compile_args=[*optimise, *sanitize, "-ffp-contract=fast", "-Wall", *openmp],
        extra_link_args=[*sanitize, *openmp],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
