"""PEFT's LoRA layers of linear bases, with a forward pass of this package's ops. `accelerate` gives a layer its class here and back."""

import math

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import nn

from ..nn import is_conv1d, is_linear, is_quantised
from ..ops import lora_delta_, lora_linear
from ..ops._checks import FLOATS
from ..ops.lora_delta import as_2d, autocasts

_PLAIN = (torch.Tensor, nn.Parameter)


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module runs more, or other code, than its class's forward."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in vars(module)
    )


def layer_obstacle(layer) -> str | None:
    """Why another forward in the layer's class would not be called; None where it is."""
    if "forward" in vars(layer):
        return "its forward was replaced on the instance"
    if isinstance(layer.get_base_layer(), nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads the weight of its out_proj and never calls it"
    return None


def adapter_obstacle(layer, adapter: str) -> str | None:
    """Why PEFT's own forward runs while `adapter`, one that the layer has, is active; None where the ops do."""
    if adapter in layer.lora_variant:
        return f"adapter {adapter!r} is a variant of LoRA, {type(layer.lora_variant[adapter]).__name__}"
    parts = (
        ("lora_A", layer.lora_A[adapter], (nn.Linear,)),
        ("lora_B", layer.lora_B[adapter], (nn.Linear,)),
        ("lora_dropout", layer.lora_dropout[adapter], (nn.Identity, nn.Dropout)),
    )
    for name, part, kinds in parts:
        if type(part) not in kinds:
            return f"{name} of adapter {adapter!r} is {type(part).__name__}, not {kinds[-1].__name__}"
        if hooked(part):
            return f"{name} of adapter {adapter!r} has hooks, or a forward of its own"
        weight = getattr(part, "weight", None)
        if weight is not None and (type(weight) not in _PLAIN or weight.dtype not in FLOATS):
            return f"{name} of adapter {adapter!r} holds {type(weight).__name__} of {weight.dtype}"
    if layer.lora_A[adapter].bias is not None:
        return f"lora_A of adapter {adapter!r} has a bias"
    dropout = layer.lora_dropout[adapter]
    if type(dropout) is nn.Dropout and (dropout.inplace or not 0 <= dropout.p < 1):
        return f"lora_dropout of adapter {adapter!r} is {dropout}"
    scaling = layer.scaling[adapter]
    number = scaling.dim() == 0 if isinstance(scaling, torch.Tensor) else isinstance(scaling, (int, float))
    if not number or (not isinstance(scaling, torch.Tensor) and not math.isfinite(scaling)):
        return f"scaling of adapter {adapter!r} is {scaling!r}"
    return None


def _left_to_torch(x) -> bool:
    """
    Calls of which somebody else makes something: programs that must run without this package, derivatives that the ops do not have.
    """
    if type(x) not in _PLAIN or x.dim() == 0:
        return True
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return (
        torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or nn.modules.module._has_any_global_hook()
    )


def _compute_dtype(x: torch.Tensor, tensor: torch.Tensor) -> torch.dtype:
    """dtype in which torch's linear of x would use `tensor`."""
    if autocasts(x) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return tensor.dtype


def _frozen(base: nn.Module) -> bool:
    return not torch.is_grad_enabled() or not (
        base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    )


class _Accelerated:
    """Before PEFT's class in the order of resolution: the same attributes and the same results, from other kernels."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """
        y = base_layer(x) + Σ scaling · (drop(x) Aᵀ Bᵀ + b) over the active adapters that the layer has; b with lora_bias.

        Args:
            x: (..., K).   Any other argument, as `adapter_names`, goes with x to PEFT's forward.
        Returns: y (..., N) of the dtype of base_layer(x). Sums over K and R in fp32; PEFT's forward rounds after each product.
        Raises: what PEFT's forward raises, which runs wherever the ops do not: `adapter_obstacle`, merged or disabled adapters,
            dtypes that do not fit, torch.func's transforms, forward-mode derivatives, export. RuntimeError (second derivatives).
        """
        if not isinstance(
            self, _Accelerated
        ):  # kept as a bound method, as by accelerate's hooks, from before `restore`
            return type(self).forward(self, x, *args, **kwargs)
        adapters = [] if args or kwargs else self._active(x)
        if not adapters:
            return super().forward(x, *args, **kwargs)
        if len(adapters) == 1 and self._one_product(x):
            base, tokens = self.base_layer, x
            weight = base.weight.t() if is_conv1d(base) else base.weight
            y = lora_linear(x, weight, base.bias, **self._operands(adapters[0], _compute_dtype(x, x)))
            dtype = y.dtype
        else:
            y, tokens = self._base_result(x)
            dtype = y.dtype
            if not autocasts(x):
                common = torch.promote_types(tokens.dtype, dtype)
                y, tokens = y.to(common), tokens.to(common)
            for adapter in adapters:
                y = lora_delta_(y, tokens, **self._operands(adapter, y.dtype))
        for adapter in adapters:
            bias = self.lora_B[adapter].bias
            if bias is not None:
                y = y + self.scaling[adapter] * bias
        y = y.to(dtype)
        return y if tokens.dim() == x.dim() else y.view(*x.shape[:-1], y.shape[-1])

    def _get_name(self) -> str:
        # What code that looks for PEFT's layers in a repr knows.
        return type(self).__name__.removeprefix("Accelerated")

    def extra_repr(self) -> str:
        return "accelerated"

    def _active(self, x) -> list[str]:
        """Active adapters that the layer has; none where one of them, or x, is for PEFT's forward."""
        if self.disable_adapters or self.merged or _left_to_torch(x):
            return []
        adapters = [adapter for adapter in self.active_adapters if adapter in self.lora_A]
        for adapter in adapters:
            if adapter_obstacle(self, adapter) is not None or not self._takes(x, adapter):
                return []
        return adapters

    def _takes(self, x: torch.Tensor, adapter: str) -> bool:
        """Whether the ops compute with x and the adapter's factors as they are, which PEFT may cast first."""
        lora_A, lora_B, dtype = self.lora_A[adapter].weight, self.lora_B[adapter].weight, _compute_dtype(x, x)
        for factor in (lora_A, lora_B):
            if factor.device != x.device or factor.dtype not in (dtype, torch.float32):
                return False
        if x.shape[-1] != lora_A.shape[1]:
            return False
        return x.dtype == lora_A.dtype or self.cast_input_dtype_enabled or autocasts(x)

    def _one_product(self, x: torch.Tensor) -> bool:
        """Whether the base is a frozen matrix, which `lora_linear` multiplies along with an adapter."""
        base = self.base_layer
        if hooked(base) or not is_linear(base) or is_quantised(base) or type(base.weight) not in _PLAIN:
            return False
        used = [base.weight] if base.bias is None else [base.weight, base.bias]
        return _frozen(base) and all(
            t.device == x.device and _compute_dtype(x, t) == _compute_dtype(x, x) for t in used
        )

    def _base_result(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(y of the base that may be written to, x), in two dimensions where the base is known, else as the base takes it."""
        base = self.base_layer
        if hooked(base) or not is_linear(base):
            # Others may hold the result, or have it saved for their backward pass.
            return base(x).clone(), x
        # bitsandbytes makes y of a longer x a view that nobody may change in place.
        tokens = as_2d(x)
        return base(tokens), tokens

    def _operands(self, adapter: str, dtype: torch.dtype) -> dict:
        """The adapter's as keyword arguments of an op whose x is of `dtype`."""
        lora_A, lora_B = (
            part[adapter].weight if part[adapter].weight.dtype == dtype else part[adapter].weight.float()
            for part in (self.lora_A, self.lora_B)
        )
        dropout, scaling = self.lora_dropout[adapter], self.scaling[adapter]
        dropout_p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        operands = {"lora_A": lora_A, "lora_B": lora_B, "dropout_p": dropout_p}
        if isinstance(scaling, torch.Tensor):
            return {**operands, "rank_scale": scaling.to(lora_A).expand(lora_A.shape[0])}
        return {**operands, "scaling": float(scaling)}


class AcceleratedLinear(_Accelerated, Linear):
    __doc__ = _Accelerated.forward.__doc__


class AcceleratedTorchaoLoraLinear(_Accelerated, TorchaoLoraLinear):
    __doc__ = _Accelerated.forward.__doc__


CLASSES = {Linear: AcceleratedLinear, TorchaoLoraLinear: AcceleratedTorchaoLoraLinear}
