"""What the formats share: the modules of an adapter file, the checks on them, and the way from one file to another."""

import dataclasses
import re
import sys
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # kohya's alpha may be one
_DORA = "DoRA scales by a trained magnitude"
# Tensors beside the factors by which a module is more than scaling · B A: {part of the key: why}.
_UNSUPPORTED_PARTS = {
    r"lora_magnitude_vector.*": _DORA,
    r"dora_scale": _DORA,
    r"lora_embedding_.*": "an embedding is adapted",
    r"hada_.*": "LoHa is a product by elements",
    r"lokr_.*": "LoKr is a Kronecker product",
    r"lora_mid\..*": "a Tucker core stands between the factors",
    r"base_layer\.lora_.*": "bare parameters are adapted",
    r"token_adapter\..*": "token embeddings are trained",
}
_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>(?:lora_|lora\.|hada_|lokr_|base_layer\.lora_|token_adapter\.).+|dora_scale)"
)


@dataclasses.dataclass
class LoraModule:
    """
    One adapted module: ΔW = scaling · B A, and Δbias = scaling · bias.

    lora_A: (R, K) and lora_B: (N, R) in the file's dtype, convolutions as K = C_in · kh · kw.   scaling: alpha / r, or alpha / √r.
    name: PEFT's module path, elsewhere the stem of the keys.   fan_in_fan_out: the base weight is stored as (K, N).
    use_rslora: it is alpha / √r.
    """

    name: str
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    bias: Tensor | None = None
    fan_in_fan_out: bool = False
    use_rslora: bool = False


@dataclasses.dataclass
class LoraFile(ABC):
    """
    An adapter as it was read.

    modules: {name: LoraModule}, layer 10 after layer 9.   skipped: {name: why it is no plain LoRA}.   metadata: the file's own.
    tensors: every tensor of the file by key.   keys: {name in modules: {"lora_A" | "lora_B" | "bias" | "alpha": key}}.
    """

    path: Path
    kind: str
    modules: dict[str, LoraModule]
    skipped: dict[str, str]
    metadata: dict[str, str]
    tensors: dict[str, Tensor]
    keys: dict[str, dict[str, str]]

    def write(self, out, modules: dict[str, LoraModule]) -> None:
        """
        Write `modules` in the place of those that were read, in the file's own format, keys and dtypes; a module that is absent is
        left out, all else is written as it was. Ranks and scalings are free.

        Args: out: a folder for PEFT, a .safetensors file for the others; replaced as a whole or not at all.
        Raises: ValueError (an unknown module, a shape, a rank or scaling that is not above 0, numbers that overflow the file's dtype,
            nothing left), before anything is written.
        """
        out = Path(out)
        if not modules and not self.skipped:
            raise ValueError(f"write: {out}: modules must hold at least one module, got none")
        tensors = {key: self.tensors[key] for key in self.others()}
        for name, module in modules.items():
            self._check(out, name, module)
            stored = self._stored(name, module)
            for key, tensor in stored.items():
                if not tensor.isfinite().all():
                    raise ValueError(
                        f"write: {out}: {name}: {key} must be finite in {tensor.dtype}, got an overflow or NaN"
                    )
            tensors |= stored
        self._save(out, tensors, modules)

    def _check(self, out: Path, name: str, module: LoraModule) -> None:
        if name not in self.modules:
            raise ValueError(f"write: {out}: modules must be modules of {self.path}, got {name!r}")
        old = self.modules[name]
        rank = module.lora_A.shape[0]
        expected = [(rank, old.lora_A.shape[1]), (old.lora_B.shape[0], rank), _shape(old.bias)]
        shapes = [_shape(tensor) for tensor in (module.lora_A, module.lora_B, module.bias)]
        if rank < 1 or shapes != expected:
            raise ValueError(
                f"write: {out}: {name}: lora_A, lora_B and bias must have shapes {expected}, rank above 0, got {shapes}"
            )
        if not is_positive(module.scaling):
            raise ValueError(f"write: {out}: {name}: scaling must be a number > 0, got {module.scaling!r}")

    def others(self) -> list[str]:
        """Keys of the tensors that belong to no module of `modules` and are written as they were: modules_to_save and the like."""
        replaced = {key for keys in self.keys.values() for key in keys.values()}
        return [key for key in self.tensors if key not in replaced]

    def _stored(self, name: str, module: LoraModule) -> dict[str, Tensor]:
        """{key: tensor} of one module, in the shapes and dtypes of the tensors they replace."""
        parts = {"lora_A": module.lora_A, "lora_B": module.lora_B, "bias": module.bias}
        stored = {}
        for part, key in self.keys[name].items():
            if part in parts:
                old = self.tensors[key]
                kernel = old.shape[1:] if part == "lora_A" else old.shape[2:]
                shape = (module.lora_A.shape[0], *kernel) if part == "lora_A" else (*parts[part].shape, *kernel)
                new = parts[part].detach().reshape(shape).to("cpu", old.dtype)
                stored[key] = new.clone(memory_format=torch.contiguous_format)
        return stored

    @abstractmethod
    def _save(self, out: Path, tensors: dict[str, Tensor], modules: dict[str, LoraModule]) -> None:
        """Write the checked `tensors` in the format's own way."""


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def is_positive(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def natural(name: str) -> list:
    """Sort key by which layer 10 comes after layer 9."""
    parts = ((part.lstrip("0"), part) for part in re.split(r"([0-9]+)", name))
    return [(1, len(digits), digits) if part.isdecimal() else (0, 0, part) for digits, part in parts]


def find_parts(op: str, file: Path, names: dict[str, str], known) -> dict[str, dict[str, str]]:
    """
    {module: {part: key}} for the keys that belong to adapted modules.

    Args: names: {key: key without the format's prefix}.   known: name → (module, part) for the parts of a plain LoRA, else None.
    Raises: ValueError (two tensors for one part).
    """
    parts: dict[str, dict[str, str]] = {}
    rest = {}
    for key, name in names.items():
        found = known(name)
        if found is None and (match := _PART.fullmatch(name)):
            found = match["module"], match["part"]
        if found is None:
            rest[key] = name
            continue
        module, part = found
        if part in parts.setdefault(module, {}):
            raise ValueError(f"{op}: {file}: {module} must have one {part}, got {parts[module][part]!r} and {key!r}")
        parts[module][part] = key
    for key, name in rest.items():
        module, _, part = name.rpartition(".")
        if module in parts:
            parts[module][part] = key
    return {module: parts[module] for module in sorted(parts, key=natural)}


def unsupported_part(parts, known=("lora_A", "lora_B", "bias", "alpha")) -> str | None:
    """Why a module with these parts is more than scaling · B A; None if it is not."""
    for part in parts:
        if part not in known:
            why = next(
                (why for rule, why in _UNSUPPORTED_PARTS.items() if re.fullmatch(rule, part)), "no part of a LoRA"
            )
            return f"{part} is not supported ({why})"
    return None


def split_supported(op: str, file: Path, parts: dict, reason, *, skip: bool) -> tuple[dict, dict[str, str]]:
    """({module: its keys} of plain LoRAs, {other module: why}).  Raises: ValueError (one of the latter, unless `skip`; no module)."""
    reasons = {name: why for name in parts if (why := reason(name))}
    if reasons and not skip:
        name, why = next(iter(reasons.items()))
        raise ValueError(f"{op}: {file}: {name}: {why}")
    if not parts:
        raise ValueError(f"{op}: {file} must hold lora_A and lora_B of at least one module, got none")
    return {name: keys for name, keys in parts.items() if name not in reasons}, reasons


def check_numbers(op: str, file: Path, where: str, tensor: Tensor, allowed=DTYPES) -> None:
    """Raises: ValueError (another dtype, NaN, infinity)."""
    known = tensor.dtype in allowed  # torch cannot tell whether numbers of 8 bits are finite
    if not known or not tensor.isfinite().all():
        got = "NaN or infinity" if known else tensor.dtype
        raise ValueError(f"{op}: {file}: {where} must hold finite floating-point numbers of 16 bits or more, got {got}")


def pair(op: str, file: Path, name: str, found: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """
    (lora_A (R, K), lora_B (N, R), bias (N,) or None) of one module; a convolution's kernel (R, C_in, kh, kw) is flattened.

    Raises: ValueError (a half is missing, shapes that do not fit, not finite, another dtype).
    """
    shapes = {part: tuple(tensor.shape) for part, tensor in found.items() if part != "alpha"}
    shape_A, shape_B = shapes.get("lora_A", ()), shapes.get("lora_B", ())
    linear = len(shape_A) == len(shape_B) == 2
    convolution = len(shape_A) == len(shape_B) > 2 and set(shape_B[2:]) == {1}
    # A tensor without numbers may have any other dimension: a rank of billions in a tiny file.
    fits = (linear or convolution) and shape_A[0] == shape_B[1] and 0 not in (*shape_A, *shape_B)
    if not fits or shapes.get("bias", shape_B[:1]) != shape_B[:1]:
        raise ValueError(f"{op}: {file}: {name} must hold lora_A (R, K) and lora_B (N, R) of one rank, got {shapes}")
    for part, tensor in found.items():
        check_numbers(op, file, f"{name}: {part}", tensor, (*DTYPES, *_INTEGERS) if part == "alpha" else DTYPES)
    return found["lora_A"].flatten(1), found["lora_B"].flatten(1), found.get("bias")
