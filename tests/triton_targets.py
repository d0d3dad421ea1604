"""Compile what a launcher launches for GPUs that are not there, and read what ptxas made of it.

The launchers run on CPU tensors with triton's `run` replaced by a recorder, so that what is compiled are their own tiles, dtypes
and specialisations; triton's wheel carries ptxas, cuobjdump and nvdisasm.
"""

import contextlib
import dataclasses
import functools
import pathlib
import re
import subprocess
import tempfile

import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_KIB = 1024
_REGISTERS, _WARPS, _BLOCKS = 65536, 64, 32  # a multiprocessor has, of every architecture here


@dataclasses.dataclass(frozen=True)
class Shared:
    """Bytes of shared memory: what one program may have, and what a multiprocessor has for all of its programs."""

    program: int
    multiprocessor: int


SHARED = {
    80: Shared(163 * _KIB, 164 * _KIB),
    90: Shared(227 * _KIB, 228 * _KIB),
    100: Shared(227 * _KIB, 228 * _KIB),
}
_MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "DMMA")
_ASYNCHRONOUS = ("LDGSTS", "UTMALDG")


@dataclasses.dataclass(frozen=True)
class Launch:
    """One `kernel[grid](*args, **kwargs)`: `args` by parameter name, `options` are num_warps and num_stages."""

    kernel: JITFunction
    args: dict
    options: dict

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def specialisation(self) -> tuple[dict, dict, dict]:
        """(types by parameter name, compiled-in values and attributes by path), as triton's launcher chooses them."""
        types, constants, attributes = {}, {}, {}
        for index, param in enumerate(self.kernel.params):
            value = self.args[param.name]
            if param.is_constexpr:
                types[param.name], constants[index,] = "constexpr", value
                continue
            align = not param.do_not_specialize_on_alignment
            types[param.name], keys = native_specialize_impl(
                CUDABackend, value, False, not param.do_not_specialize and not isinstance(value, float), align
            )
            _collect((index,), types[param.name], keys, constants, attributes)
        return types, constants, attributes

    def signature(self) -> str:
        """What two launches that compile to the same code share."""
        return repr((self.name, self.specialisation(), sorted(self.options.items())))


def _collect(path, kind, key, constants, attributes) -> None:
    if isinstance(kind, tuple):
        for place, (inner, inner_key) in enumerate(zip(kind, key, strict=True)):
            _collect((*path, place), inner, inner_key, constants, attributes)
    elif kind == "constexpr":
        constants[path] = key
    elif key:
        attributes[path] = CUDABackend.parse_attr(key)


@dataclasses.dataclass(frozen=True)
class Compiled:
    capability: int
    warps: int
    registers: int
    stack: int
    shared: int
    sass: str

    def count(self, *instructions: str) -> int:
        return sum(len(re.findall(rf"\b{instruction}\b", self.sass)) for instruction in instructions)

    @property
    def spills(self) -> int:
        """Bytes of stack, or instructions that move registers to and from it."""
        return self.stack or self.count("LDL", "STL")

    @property
    def matrix(self) -> int:
        return self.count(*_MATRIX)

    @property
    def asynchronous(self) -> int:
        return self.count(*_ASYNCHRONOUS)

    @property
    def occupancy(self) -> int:
        """Programs that fit on a multiprocessor at the same time."""
        # Registers are given to warps in units of 256, 8 a thread; a program takes 1 KiB of shared memory besides its own.
        per_warp = -(-max(self.registers, 8) // 8) * 8 * 32
        return min(
            _BLOCKS,
            _WARPS // self.warps,
            _REGISTERS // (per_warp * self.warps),
            SHARED[self.capability].multiprocessor // (self.shared + _KIB),
        )


@contextlib.contextmanager
def recorded_launches():
    """Within, kernels are recorded in the yielded list and not run: what they would write stays undefined."""
    assert not triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 leaves nothing to record"
    launches, run = [], JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        named = dict(zip(self.arg_names, args, strict=False))
        options = {key: value for key, value in kwargs.items() if key not in self.arg_names}
        launches.append(Launch(self, named | {k: v for k, v in kwargs.items() if k in self.arg_names}, options))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compiles for compute capability `capability` (80, 90, 100)."""
    types, constants, attributes = launch.specialisation()
    source = ASTSource(launch.kernel, signature=types, constexprs=constants, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    registers, stack, sass = _disassembled(kernel.asm["cubin"])
    return Compiled(capability, kernel.metadata.num_warps, registers, stack, kernel.metadata.shared, sass)


@functools.lru_cache(maxsize=64)
def _disassembled(cubin: bytes) -> tuple[int, int, str]:
    with tempfile.TemporaryDirectory() as directory:
        binary = pathlib.Path(directory) / "kernel.cubin"
        binary.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", binary)
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        return int(registers), int(stack), _tool("nvdisasm", binary)


def _tool(name: str, *args) -> str:
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def faults(kernel: str, compiled: Compiled, *, matrix: bool, asynchronous: bool) -> list[str]:
    """What forbids shipping this configuration, none if it is sound; `matrix`, `asynchronous`: what its code must have."""
    found = []
    if compiled.spills:
        found.append(f"spills ({compiled.stack} bytes of stack)")
    if compiled.shared > SHARED[compiled.capability].program:
        found.append(f"{compiled.shared} bytes of shared memory, more than {SHARED[compiled.capability].program}")
    if matrix and not compiled.matrix:
        found.append("no matrix instructions")
    if kernel.startswith("_lora_gemm") and compiled.capability == 90 and not compiled.count("HGMMA"):
        found.append("no HGMMA")
    if asynchronous and not compiled.asynchronous:
        found.append("no asynchronous copies")
    return found
