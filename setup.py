"""Adds the C++ extension adaptlora._C, and the library adaptlora._cuda, to what pyproject.toml declares.

The extension needs torch at build time (pip install --no-build-isolation) and a C++ compiler; without either, or with
ADAPTLORA_NO_EXT=1, the package is installed without it and CPU tensors take the reference implementation.
ADAPTLORA_SANITIZE=1 builds it for AddressSanitizer and UndefinedBehaviorSanitizer (make asan).
The library, small factorizations on CUDA tensors, needs nvcc as well, and is built where torch is built for CUDA or with
ADAPTLORA_CUDA=1 (never with 0); without it torch factorizes.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
# Code for every GPU from sm_80 on: machine code for these two, and PTX that later ones compile when it is loaded.
NVCC_FLAGS = [
    *("-shared", "-cudart", "static", "-Xcompiler", "-fPIC", "-std=c++17", "-O3", "--expt-relaxed-constexpr"),
    *("-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=[sm_90,compute_90]"),
]


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


def find_nvcc():
    """nvcc of CUDA_HOME, or on the PATH, or None."""
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=Path(home) / "bin") if home else None) or shutil.which("nvcc")


def why_no_cuda_library():
    """The reason not to build adaptlora._cuda, or None."""
    import torch

    wanted = os.environ.get("ADAPTLORA_CUDA")
    if wanted == "0":
        return "ADAPTLORA_CUDA=0"
    if wanted != "1" and torch.version.cuda is None:
        return "this torch is built without CUDA (ADAPTLORA_CUDA=1 builds it nevertheless)"
    if find_nvcc() is None and wanted != "1":
        return "no nvcc in CUDA_HOME or on the PATH"
    return None


def depends(*patterns):
    return [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(CSRC.rglob(pattern))]


def extension():
    """ext_modules and cmdclass for what can be built here (with the reason printed for what cannot)."""
    reason = why_no_extension()
    if reason is not None:
        print(f"adaptlora: building without the C++ extension: {reason}", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # torch's wheels for Linux use libgomp; Apple's compiler has no OpenMP, and at::parallel_for is then serial.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    optimise, sanitize = ["-O3", "-g0"], []
    if os.environ.get("ADAPTLORA_SANITIZE") == "1":
        # Under Python's own -fwrapv signed overflow would be defined.
        optimise = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv", "-D_GLIBCXX_ASSERTIONS"]
        sanitize = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    modules = [
        CppExtension(
            name="adaptlora._C",
            sources=depends("*.cpp"),
            depends=depends("*.h"),
            extra_compile_args=[*optimise, *sanitize, "-ffp-contract=fast", "-Wall", *openmp],
            extra_link_args=[*sanitize, *openmp],
        )
    ]

    class Build(BuildExtension):
        def build_extension(self, ext):
            if ext.name != "adaptlora._cuda":
                return super().build_extension(ext)
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # Not among the extension's sources: torch would take it for one of its own CUDA extensions.
            self.spawn([find_nvcc() or "nvcc", *NVCC_FLAGS, *depends("*.cu"), "-o", str(target)])

    reason = why_no_cuda_library()
    if reason is not None:
        print(f"adaptlora: building without the CUDA library: {reason}", file=sys.stderr)
    else:
        # Where nobody asked for it, a failure (an nvcc that does not like the compiler) is a warning.
        optional = os.environ.get("ADAPTLORA_CUDA") != "1"
        modules.append(Extension("adaptlora._cuda", [], depends=depends("*.cu", "*.cuh", "*.h"), optional=optional))
    return {"ext_modules": modules, "cmdclass": {"build_ext": Build}}


if __name__ == "__main__":
    setup(**extension())
