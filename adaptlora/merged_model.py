"""A model on whose weights an adapter is merged, as the folder that its own library loads without adaptlora or PEFT."""

import copy
import re
from pathlib import Path

from torch import nn

from .distributed.sharding import is_sharded
from .files import atomic_folder, check_new_folder
from .finetune._extras import need
from .merging import tied_error
from .nn import is_quantised
from .nora_files import check_finite

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)[KMGT]B")
_SUBJECT = 'save: format="merged"'


def write(adapter, path, *, originals: dict[str, nn.Module], max_shard_size: int | str) -> None:
    """
    Write an Adapter's model, merged; see `Adapter.save`.

    Args: originals: {module name: what stood in the place of each of modules_to_save}.
    """
    path = Path(path)
    adapter.check_trainable("save")
    check_new_folder("save", path)
    _check_size(max_shard_size)
    check_finite(adapter)
    _check_plain(adapter.model)
    _check_ties(adapter, originals)
    model = _merged_copy(adapter)
    with atomic_folder(path) as temporary:
        _save(model, temporary, max_shard_size)


def _check_size(size) -> None:
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if not (float(found[1]) * 1000 >= 1 if found else type(size) is int and size > 0):
        raise ValueError(f'save: max_shard_size must be an integer > 0 or text as "5GB", got {size!r}')


def _check_plain(model: nn.Module) -> None:
    """Raises: ValueError if weights are packed, or spread over processes."""
    quantised = next((name for name, module in model.named_modules() if is_quantised(module)), None)
    if quantised is not None or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            'save: format="merged" must have a base that is not quantised, since rounding it again would lose the update, got '
            f"{quantised or type(model.hf_quantizer).__name__}: save the adapter, load the base in 16 or 32 bits, and "
            'adaptlora.load(base, path).save(out, format="merged")'
        )
    for name, tensor in model.state_dict().items():
        if is_sharded(tensor):
            raise ValueError(f'save: format="merged" must have whole weights, got {name} sharded by FSDP')


def _check_ties(adapter, originals: dict[str, nn.Module]) -> None:
    """Raises: ValueError if a weight that changes is tied to one that does not: loading would tie them again."""
    changed = {f"{name}.weight": layer.base_layer.weight for name, layer in adapter.layers.items()}
    changed |= {f"{name}.bias": layer.bias for name, layer in adapter.layers.items() if layer.lora_bias is not None}
    for name, module in originals.items():
        changed |= {f"{name}.{key}": parameter for key, parameter in module.named_parameters()}
    places = {tensor.data_ptr(): key for key, tensor in changed.items() if tensor is not None and tensor.numel()}
    for key, parameter in adapter.model.named_parameters(remove_duplicate=False):
        name = key.replace(".base_layer.", ".")
        tied = places.get(parameter.data_ptr(), name)
        if tied != name:
            raise tied_error(_SUBJECT, tied, name)
    # transformers' own list, also of weights that a method has put others in the place of.
    for target, source in getattr(adapter.model, "all_tied_weights_keys", {}).items():
        if target in changed or source in changed:
            raise tied_error(_SUBJECT, *(target, source) if target in changed else (source, target))


def _merged_copy(adapter) -> nn.Module:
    """The plain model with merged weights, of which only those are memory of its own."""
    model = adapter.model
    memo = {id(tensor): tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    for name, layer in adapter.layers.items():
        plain, merged = copy.copy(layer.base_layer), layer.merged_parameters()
        for key, values in merged.items():
            if not values.isfinite().all():
                raise ValueError(f"save: {name}.{key} must be finite in {values.dtype} once merged, got an overflow")
            merged[key] = nn.Parameter(values, requires_grad=False)
        plain._parameters = plain._parameters | merged
        memo[id(layer)] = plain
    return copy.deepcopy(model, memo)


def _of(model: nn.Module, package: str, base: str) -> bool:
    """Known by name, so that the packages stay optional."""
    return any(cls.__name__ == base and cls.__module__.split(".")[0] == package for cls in type(model).__mro__)


def _save(model: nn.Module, folder: Path, max_shard_size: int | str) -> None:
    if _of(model, "transformers", "PreTrainedModel") or _of(model, "diffusers", "ModelMixin"):
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return
    hub = need("huggingface_hub", 'save(format="merged")')
    hub.save_torch_state_dict(model.state_dict(), folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
