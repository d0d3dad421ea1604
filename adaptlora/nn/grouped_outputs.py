"""What layers of one group compute at once, and what must be the same when each of them asks for its part."""

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .lora_group import LoraGroup
from .lora_linear import LoraLinear

# Of x on a CPU, from which on a group computes at once. Of three layers of width 384, forward and backward, 512 tokens took 6 to 14 % less;
# with 4 to 32 the checks cost what the op saves.
FEWEST_TOKENS = 256

# Looked up once: what follows runs for every layer and forward pass, and is all that a group costs.
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transforms, _tracing = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
_grad_enabled, _inference_mode, _autocast = (
    torch.is_grad_enabled,
    torch.is_inference_mode_enabled,
    torch.is_autocast_enabled,
)


def _function_modes_but_devices() -> bool:
    """torch.set_default_device and `with torch.device(…)` are modes too, which change no op of ours."""
    return _function_modes() and any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def _layer_state(layer: LoraLinear) -> tuple | None:
    """
    All that y depends on beside x, but for values that somebody changed behind autograd's back; None for a layer that must compute alone:
    its weight is no plain parameter, as under FSDP, a tensor does not tell that it was written to, or a hook of the old kind reads its node
    of the graph.
    """
    if layer._backward_hooks and not layer._is_full_backward_hook:
        return None
    modules = layer._modules
    base, pair = modules["base_layer"]._parameters, modules["pair"]._parameters  # past nn.Module.__getattr__
    weight, bias, lora_bias = base.get("weight"), base.get("bias"), layer._parameters["lora_bias"]
    lora_A, lora_B = pair["lora_A"], pair["lora_B"]
    if type(weight) is not nn.Parameter or weight.is_inference() or lora_A.is_inference() or lora_B.is_inference():
        return None
    return (
        # what a group's layers have in common comes first
        layer.dropout_p if layer.training else 0.0,
        weight.dtype,
        weight.device,
        layer.scaling,
        lora_A.size(0),
        weight.data_ptr(),
        weight._version,
        bias is None or (bias.data_ptr(), bias._version),
        id(lora_A),
        lora_A.data_ptr(),
        lora_A._version,
        lora_A.requires_grad,
        id(lora_B),
        lora_B.data_ptr(),
        lora_B._version,
        lora_B.requires_grad,
        lora_bias is None or (id(lora_bias), lora_bias.data_ptr(), lora_bias._version, lora_bias.requires_grad),
    )


def x_state(x: torch.Tensor) -> tuple | None:
    """
    What decides how y is made of this x, its values included; None where every layer must compute alone.

    That is: under hooks for what autograd saves, for activation checkpointing compares what forward and recomputation save; where modes,
    transforms or traces see the ops one by one; for inference tensors, which do not tell that they were written to; and on devices without
    kernels.
    """
    if (
        type(x) is not torch.Tensor
        or not (x.is_cpu or x.is_cuda)
        or x.is_inference()
        or _saved_tensors_hooks(False) is not None
        or _dispatch_modes()
        or _function_modes_but_devices()
        or _transforms() is not None
        or _tracing() is not None
        or forward_ad._current_level >= 0
    ):
        return None
    kind = "cpu" if x.is_cpu else "cuda"
    autocast = torch.get_autocast_dtype(kind) if _autocast(kind) else None
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    return x._version, x.requires_grad, _grad_enabled(), _inference_mode(), stream, autocast


class Group:
    """Layers that were called one after the other with one x."""

    def __init__(self, layers: list[LoraLinear]):
        self.layers = layers
        self.together = LoraGroup(layers)
        self.wasted = 0

    def pays(self, x: torch.Tensor) -> bool:
        """Whether x is large enough for the op to save more than the checks cost."""
        return type(x) is not torch.Tensor or not x.is_cpu or x.numel() >= FEWEST_TOKENS * self.layers[0].in_features

    def compute(self, x: torch.Tensor, epoch: int) -> "Pending | None":
        """All outputs for x; None where the layers must compute alone, or where the first one has something to say against x."""
        of_x = x_state(x)
        if of_x is None:
            return None
        states = [_layer_state(layer) for layer in self.layers]
        if None in states or any(state[:3] != states[0][:3] for state in states):
            return None
        dropout_p, dtype, device = states[0][:3]
        if dropout_p and not _grad_enabled():
            return None  # a checkpoint may run the layers again, one by one, and must find the masks that each of them drew
        if x.device != device or (x.dtype != dtype and of_x[-1] is None):
            return None
        if x.dim() == 0 or x.shape[-1] != self.layers[0].in_features:
            return None
        return Pending(self, x, of_x, states, self.together.forward(x), epoch)


class Pending:
    """What a group computed for members that are yet to be called."""

    def __init__(self, group: Group, x, of_x: tuple, states: list[tuple], outputs: list[torch.Tensor], epoch: int):
        self.group, self.x, self.of_x, self.states, self.epoch = group, x, of_x, states, epoch
        self.outputs = outputs[::-1]

    def take(self, layer: LoraLinear, x: torch.Tensor, epoch: int) -> torch.Tensor | None:
        """y, once, for the member whose turn it is, if it would compute just this; else None."""
        i = len(self.states) - len(self.outputs)
        same = (
            self.group.layers[i] is layer
            and x is self.x
            and epoch == self.epoch
            and x_state(x) == self.of_x
            and _layer_state(layer) == self.states[i]
        )
        return self.outputs.pop() if same else None
