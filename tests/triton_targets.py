"""Compile what a launcher launches for GPUs that are not there, and read what ptxas made of it.

The launchers run on small CPU tensors with triton's `run` replaced by a recorder, so that what is compiled are their own
tiles, dtypes and specialisations; triton's wheel carries ptxas, cuobjdump and nvdisasm.
"""

import contextlib
import dataclasses
import functools
import pathlib
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int8: "*i8",
}  # fmt: skip


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
        """(types by parameter name, compiled-in values and attributes by index), as triton's launcher would choose them."""
        types, constants, attributes = {}, {}, {}
        for index, param in enumerate(self.kernel.params):
            value = self.args[param.name]
            types[param.name], divisible = _specialised(param, value)
            if types[param.name] == "constexpr":
                constants[(index,)] = value
            elif divisible:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return types, constants, attributes


@dataclasses.dataclass(frozen=True)
class Compiled:
    registers: int
    stack: int
    shared: int
    sass: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", self.sass))


@contextlib.contextmanager
def recorded_launches():
    """Within, kernels are recorded in the yielded list and not run: what they would write stays undefined."""
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


def _specialised(param, value) -> tuple[str, bool]:
    """(type, whether divisible by 16) of an argument as triton's launcher would see it; "constexpr" is compiled in."""
    if param.is_constexpr or value is None:
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    if not param.do_not_specialize and value == 1:
        return "constexpr", False
    return "i32" if -(2**31) <= value < 2**31 else "i64", not param.do_not_specialize and value % 16 == 0


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compiles for compute capability `capability` (80, 90, …)."""
    types, constants, attributes = launch.specialisation()
    source = ASTSource(launch.kernel, signature=types, constexprs=constants, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    registers, stack, sass = _disassembled(kernel.asm["cubin"])
    return Compiled(registers, stack, kernel.metadata.shared, sass)


@functools.cache
def _disassembled(cubin: bytes) -> tuple[int, int, str]:
    with tempfile.TemporaryDirectory() as directory:
        binary = pathlib.Path(directory) / "kernel.cubin"
        binary.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", binary)
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        return int(registers), int(stack), _tool("nvdisasm", binary)


def _tool(name: str, *args) -> str:
    return subprocess.run([_TOOLS / name, *args], capture_output=True, text=True, check=True).stdout
