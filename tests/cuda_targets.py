"""Build the CUDA library as setup.py does, without a GPU, and read what ptxas made of its kernels."""

import functools
import pathlib
import re
import runpy
import subprocess
import tempfile

from triton_targets import SHARED, TOOLS, Compiled

from adaptlora.ops import _cuda_library

ROOT = pathlib.Path(__file__).resolve().parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
CAPABILITIES = (80, 90)
# Sizes that lie in shared memory whole, in part and not at all.
SIZES = {"jacobi_svd": (8, 64, 128, 170, 200, 256), "cholesky_inverse": (8, 64, 128, 256)}


def nvcc() -> str | None:
    return SETUP["find_nvcc"]()


@functools.cache
def built() -> pathlib.Path:
    """The library, built once in a process; needs nvcc."""
    folder = tempfile.mkdtemp(prefix="adaptlora-cuda-")
    target = pathlib.Path(folder) / "_cuda.so"
    sources = [ROOT / source for source in SETUP["depends"]("*.cu")]
    done = subprocess.run([nvcc(), *SETUP["NVCC_FLAGS"], *sources, "-o", target], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@functools.cache
def usage(capability: int) -> dict[str, tuple[int, int, str]]:
    """(registers, stack, machine code) of every kernel of the library for a capability."""
    texts = [
        subprocess.run(
            [TOOLS / "cuobjdump", option, "-arch", f"sm_{capability}", built()],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for option in ("-res-usage", "-sass")
    ]
    found = {}
    for kernel in SIZES:
        registers, stack = re.search(rf"Function \w*{kernel}_kernel\w*:\s+REG:(\d+) STACK:(\d+)", texts[0]).groups()
        code = next(part for part in texts[1].split("Function : ")[1:] if f"{kernel}_kernel" in part.split("\n")[0])
        found[kernel] = int(registers), int(stack), code
    return found


def compiled(kernel: str, capability: int, size: int) -> Compiled:
    """A launch of `kernel` for matrices of `size` rows, where a block may have what the architecture lets it."""
    library = _cuda_library.load(str(built()))
    _, threads, shared = _cuda_library.plan(library, kernel, size, SHARED[capability].program)
    registers, stack, code = usage(capability)[kernel]
    return Compiled(capability, threads // 32, registers, stack, shared, code)
