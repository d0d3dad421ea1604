"""A model folder with LoRA modules merged into its weights, written one shard at a time."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .base_weights import BaseWeights
from .files import atomic_folder, check_new_folder
from .lora_files import LoraModule, peft
from .tensor_files import read_tensors, save_file

# Weights in other formats are not those of the merged model, and an adapter's configuration would be loaded on top of it.
_LEFT_OUT = (
    ".index.json",
    "adapter_config.json",
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".ot",
)


def merged_weight(weight: Tensor, module: LoraModule) -> Tensor:
    """W + scaling · B A for W (N, K), in float32 (float64 where W is), rounded once to W's dtype."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    total = torch.addmm(
        weight.to(dtype),
        *(factor.to(weight.device, dtype) for factor in (module.lora_B, module.lora_A)),
        alpha=module.scaling,
    )
    return total.to(weight.dtype)


def merged_bias(bias: Tensor, module: LoraModule) -> Tensor:
    """bias + scaling · lora_B's bias, in float32 (float64 where the bias is), rounded once."""
    dtype = torch.promote_types(bias.dtype, torch.float32)
    return torch.add(bias.to(dtype), module.bias.to(bias.device, dtype), alpha=module.scaling).to(bias.dtype)


def write_merged(base: BaseWeights, modules: Iterable[LoraModule], out, saved: dict[str, Tensor] | None = None) -> None:
    """
    Write the model folder of `base` to `out` with W + scaling · B A in the place of the modules' weights, and the tensors `saved`,
    trained whole, in the place of those of the same names.

    Memory holds one shard at most. Other tensors, shards and files (config.json, tokenizer, …) are copied; weights in other formats
    are not. `out` is filled under a temporary name and renamed. A head tied to the embedding is refused, adapted or saved, and so is
    such an embedding: its update would change the other as well, and to untie them means to know what the architecture does with them.
    Raises: FileNotFoundError, ValueError (a base that is one file, an `out` that exists and is not empty or lies in the base, a module
        without a weight, twice or tied, a shape, a bias that the base lacks), before anything is written; ValueError (a merged weight
        that overflows its dtype), and nothing is left.
    """
    out = Path(out)
    updates = check_merge(base, modules, out, saved)
    with atomic_folder(out) as temporary:
        _copy_rest(base.path, temporary)
        for file in base.files:
            tensors, metadata = read_tensors("merge", file)
            for key in tensors.keys() & updates.keys():
                merged = updates[key](tensors[key])
                if not merged.isfinite().all():
                    raise ValueError(
                        f"merge: {key} must be finite in {merged.dtype} once merged, got an overflow or NaN"
                    )
                tensors[key] = merged
            save_file(tensors, temporary / file.name, metadata=metadata or None)
        if base.index:
            shutil.copyfile(base.index, temporary / base.index.name)


def merge_files(path, base, out) -> None:
    """
    `write_merged` for the PEFT adapter folder `path` and the model folder `base`.

    Raises: FileNotFoundError, ValueError (a damaged or unsupported adapter, one made for another head than the base's; as
        `write_merged`), before anything is written.
    """
    file, weights = peft.read(path, "merge"), BaseWeights(base)
    check_stored_bases("merge", file, weights)
    write_merged(weights, file.modules.values(), out, file.saved())


def check_stored_bases(op: str, file: peft.PeftFile, base: BaseWeights) -> None:
    """Raises: ValueError if the base weight of an adapted head is another one than PEFT has stored with the adapter."""
    for name, stored in file.stored_bases().items():
        if not torch.equal(base.load(name).to(stored.dtype), stored):
            raise ValueError(f"{op}: the base weight of {name} must be the one that the adapter stores, got another")


def check_merge(
    base: BaseWeights, modules: Iterable[LoraModule], out: Path, saved: dict[str, Tensor] | None = None
) -> dict:
    """{key: stored tensor → merged tensor}.  Raises: as `write_merged` before it writes."""
    _check_out(base, out)
    return _updates(base, list(modules)) | _whole_tensors(base, saved or {})


def _updates(base: BaseWeights, modules: list[LoraModule]) -> dict:
    """{key: stored tensor → merged tensor}, seen to fit."""
    updates = {}
    keys = base.find([module.name for module in modules])
    for module in modules:
        key = keys[module.name]
        shape = base.shape(module.name, module.fan_in_fan_out)
        expected = module.lora_B.shape[0], module.lora_A.shape[1]
        if shape != expected:
            raise ValueError(f"merge: the base weight of {module.name} must have shape {expected}, got {shape}")
        if base.is_tied(module.name):
            raise ValueError(
                f"merge: {module.name} must have a weight of its own, got one tied to the embedding, {key}"
            )
        if key in updates:
            raise ValueError(f"merge: {module.name} must be the only module of its weight, got {key} twice")
        updates[key] = _weight_update(module, base.is_transposed(key, module.fan_in_fan_out))
        if module.bias is not None:
            bias = f"{key.removesuffix('weight')}bias"
            if bias not in base.entries or base.entries[bias].shape != tuple(module.bias.shape):
                raise ValueError(
                    f"merge: {module.name} must have a bias in the base for lora_B's bias, got no fitting {bias}"
                )
            updates[bias] = lambda tensor, module=module: merged_bias(tensor, module)
    return updates


def _whole_tensors(base: BaseWeights, saved: dict[str, Tensor]) -> dict:
    """{key: stored tensor → trained tensor in the base's dtype}, seen to fit.  Raises: ValueError (none such, tied, another shape)."""
    for key, tensor in saved.items():
        if key.endswith(".weight") and base.is_tied(key.removesuffix(".weight")):
            raise tied_error("merge: modules_to_save", key, "the head or the embedding")
        found = base.entries[key].shape if key in base.entries else None
        if found != tuple(tensor.shape):
            raise ValueError(
                f"merge: the base must hold {key} of shape {tuple(tensor.shape)}, as the adapter does, got {found}"
            )
    return {key: lambda stored, tensor=tensor: tensor.to(stored.dtype) for key, tensor in saved.items()}


def tied_error(subject: str, key: str, other: str) -> ValueError:
    return ValueError(
        f"{subject} must change weights that stand alone, got {key}, which the model ties to {other} when it is loaded "
        "(load the base untied, as with tie_word_embeddings=False, before the adapter is attached)"
    )


def _weight_update(module: LoraModule, transposed: bool):
    def update(stored: Tensor) -> Tensor:
        weight = stored.T if transposed else stored.flatten(1)
        total = merged_weight(weight, module)
        return (total.T if transposed else total).reshape(stored.shape).contiguous()

    return update


def _check_out(base: BaseWeights, out: Path) -> None:
    if not base.path.is_dir():
        raise ValueError(f"merge: base must be a model folder, got the file {str(base.path)!r}")
    check_new_folder("merge", out)
    if out.resolve().is_relative_to(base.path.resolve()):
        raise ValueError(f"merge: out must lie outside the base {str(base.path)!r}, got {str(out)!r}")


def _copy_rest(source: Path, target: Path) -> None:
    """Every visible file that is no weight."""
    for folder, subfolders, names in os.walk(source):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or name.endswith(_LEFT_OUT):
                continue
            copy = target / Path(folder).relative_to(source) / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(folder) / name, copy)
