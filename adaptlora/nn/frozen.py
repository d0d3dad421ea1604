"""What a layer may adapt: a frozen linear base, plain or quantised, and the low-rank term on either."""

import copy

import torch
from torch import nn

from ..ops import lora_delta_, lora_linear
from ..ops.lora_delta import as_2d


def is_conv1d(module: nn.Module) -> bool:
    # transformers' Conv1D is a linear layer that stores its weight as (K, N); known by name so that transformers stays optional.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _of_package(cls: type, package: str) -> bool:
    return cls.__module__.split(".")[0] == package


def _bitsandbytes_class(module: nn.Module) -> str | None:
    """Known by name, so that bitsandbytes stays optional; Linear4bit has subclasses for its formats."""
    for cls in type(module).__mro__:
        if cls.__name__ in ("Linear4bit", "Linear8bitLt") and _of_package(cls, "bitsandbytes"):
            return cls.__name__
    return None


def is_quantised(module: nn.Module) -> bool:
    """Whether the module is bitsandbytes' Linear4bit or Linear8bitLt, or an nn.Linear whose weight is a tensor subclass of torchao."""
    if type(module) is nn.Linear:
        # The usual types first: dynamo knows no module of theirs.
        kind = type(module.weight)
        return kind is not nn.Parameter and kind is not torch.Tensor and _of_package(kind, "torchao")
    return _bitsandbytes_class(module) is not None


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP holds the module's weights, of which it may have put parts together for now, or they are DTensors of another engine."""
    # The names by which they are known without importing torch.distributed.tensor, which takes seconds.
    return getattr(module, "_is_fsdp_managed_module", False) or hasattr(module.weight, "full_tensor")


def is_linear(module: nn.Module) -> bool:
    """Whether a layer can wrap the module: nn.Linear itself, transformers' Conv1D, or a linear that `is_quantised`.

    Other subclasses of nn.Linear are not: nn.MultiheadAttention never calls its out_proj, for one.
    """
    return type(module) is nn.Linear or is_conv1d(module) or is_quantised(module)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(K, N) of a module that `is_linear` accepts."""
    if is_conv1d(module):
        return tuple(module.weight.shape)
    # Not the weight's shape: bitsandbytes packs it.
    return module.in_features, module.out_features


def _unpacked(weight: torch.Tensor, state) -> tuple[torch.Tensor, object]:
    """A 4-bit weight and its state in the layout in which it was quantised; the module's own stay as they are."""
    if not getattr(state, "packing_format_for_cpu", False):
        return weight, state
    from bitsandbytes import functional

    return functional._convert_weight_packed_for_cpu_inverse(weight, copy.copy(state))


def keep_unpacked(module: nn.Module) -> None:
    """
    Keep a 4-bit weight in the layout in which it was quantised, to which it goes back if need be.

    On CPUs with bfloat16 instructions bitsandbytes packs it anew in the first evaluation, for a product that rounds to bfloat16 and that no
    gradient passes: after an evaluation the model could not be trained.
    """
    if _bitsandbytes_class(module) == "Linear4bit":
        module.support_avx512bf16_for_cpu = False
        module.weight.data, module.weight.quant_state = _unpacked(module.weight.data, module.weight.quant_state)


@torch.no_grad()
def dequantised_weight(module: nn.Module) -> torch.Tensor:
    """
    (N, K) weight of a module that `is_linear` accepts: float32 where it is quantised, else a view of the weight in its own dtype.

    Raises: ValueError (a weight that is sharded; a bitsandbytes linear that no move to a device has quantised yet).
    """
    if is_sharded(module):
        raise ValueError(
            "dequantised_weight: module must not be sharded, got one of FSDP's or of DTensors: what is made from whole weights "
            "must be made before fully_shard"
        )
    weight = module.weight.detach()
    if is_conv1d(module):
        return weight.t()
    if not is_quantised(module):
        return weight
    if type(module) is nn.Linear:
        return weight.dequantize().float()
    if weight.is_floating_point():
        raise ValueError(
            f"dequantised_weight: module must be quantised, got a {weight.dtype} weight: move it to a device"
        )
    from bitsandbytes import functional

    if _bitsandbytes_class(module) == "Linear4bit":
        return functional.dequantize_4bit(*_unpacked(weight, module.weight.quant_state)).float()
    # The first forward pass moves the scales from the weight to the state.
    scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    return functional.int8_vectorwise_dequant(weight, scales)


def adapted(
    base_layer: nn.Module, x: torch.Tensor, lora_A, lora_B, *, scaling: float, dropout_p: float, rank_scale=None
) -> torch.Tensor:
    """
    y = base_layer(x) + scaling · drop(x) Aᵀ diag(E) Bᵀ          [LoRA, arXiv:2106.09685, eq. 3]

    Args:
        base_layer: a module that `is_linear` accepts, frozen. Plain: one `lora_linear`; quantised: its own y, then `lora_delta_`.
        x: (..., K).   lora_A: (R, K).   lora_B: (N, R).   dtypes as in `lora_linear`, or for a quantised base as in `lora_delta_`.
        scaling, dropout_p, rank_scale (E): as in `lora_linear`.
    Returns: y (..., N) of the dtype that the base returns, under autocast too.
    Raises: as these ops.
    """
    options = {"scaling": scaling, "rank_scale": rank_scale, "dropout_p": dropout_p}
    if is_quantised(base_layer):
        # In two dimensions: bitsandbytes makes y of a longer x a view that nobody may change in place.
        tokens = as_2d(x)
        y = lora_delta_(base_layer(tokens), tokens, lora_A, lora_B, **options)
        return y.view(*x.shape[:-1], y.shape[-1])
    weight = base_layer.weight.t() if is_conv1d(base_layer) else base_layer.weight
    return lora_linear(x, weight, base_layer.bias, lora_A, lora_B, **options)
