"""safetensors out, byte for byte the same every time, and in, with errors that name the file.  [safetensors' format]"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .text_files import open_regular

_LONGEST_NAME = 1000  # bounds what is done with the names of a file, regular expressions among it
# As safetensors orders tensors: the widest first, so that all are aligned.
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PLACES = {dtype: place for place, dtype in enumerate(_DTYPES)}


def save_file(tensors: dict[str, torch.Tensor], file, metadata: dict[str, str] | None = None) -> None:
    """
    Write `tensors` in place. safetensors' own function orders metadata at random, writes to a temporary file of its own, which a
    kill leaves behind, and hides what the system says about a full disk.

    Raises: TypeError (a dtype that the format lacks), OSError.
    """
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"save: {file}: {key} must be of one of {list(_DTYPES.values())}, got {tensor.dtype}")
    order = sorted(tensors, key=lambda key: (_PLACES[tensors[key].dtype], key))
    header: dict = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key in order:
        tensor = tensors[key]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            stream.write(tensors[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


class open_tensors:
    """
    with open_tensors(op, file) as handle: safetensors' own handle, of which only the header has been read.

    Raises: FileNotFoundError, OSError, ValueError (another format, no regular file, one that is cut or damaged, names too long).
    """

    def __init__(self, op: str, file: Path):
        self.op, self.file = op, file

    def __enter__(self):
        with open_regular(self.op, self.file, " (only safetensors are read)"):
            pass
        if self.file.suffix != ".safetensors":
            raise ValueError(
                f"{self.op}: {self.file} must be a .safetensors file (pickles run code when they are read)"
            )
        try:
            handle = safe_open(self.file, framework="pt").__enter__()
            names = list(handle.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{self.op}: {self.file} must be a whole safetensors file: {error}") from error
        longest = max(map(len, names), default=0)
        if longest > _LONGEST_NAME:
            handle.__exit__(None, None, None)
            rule = f"names of tensors must have {_LONGEST_NAME} characters or less"
            raise ValueError(f"{self.op}: {self.file}: {rule}, got {longest}")
        self.handle = handle
        return handle

    def __exit__(self, *exception) -> None:
        self.handle.__exit__(*exception)


def read_tensors(op: str, file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, mapped from disk, and its metadata.  Raises: as `open_tensors`, ValueError (a dtype)."""
    tensors = {}
    with open_tensors(op, file) as handle:
        for key in handle.keys():  # noqa: SIM118
            try:
                tensors[key] = handle.get_tensor(key)
            except (SafetensorError, AttributeError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"{op}: {file}: {key} must be a tensor that torch can hold: {error}") from error
        return tensors, handle.metadata() or {}
