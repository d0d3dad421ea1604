"""What the state of known optimizers looks like: which dimension runs over the ranks, and how packed numbers are read and written."""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

RANK_DIM = {"lora_A": 0, "lora_B": 1, "lora_E": 0}
PARAMETER = "parameter"


@dataclasses.dataclass(frozen=True)
class Rows:
    """
    A state tensor whose dimension `dim` runs over the ranks, one entry for each.

    fresh: what a rank that was never there begins with: a number, the name of an option of its parameter group, or "parameter" for
        the factor's own values, of which the state is a copy or a mean (slow weights, say).
    """

    dim: int
    fresh: float | str = 0.0


@dataclasses.dataclass(frozen=True)
class Packed:
    """
    A state whose numbers are stored packed (quantised blocks, say), under one or several keys of the parameter's state.

    unpack(state, key): the numbers, a floating-point tensor whose dimension `dim` runs over the ranks.
    pack(state, key, numbers): {key: tensor}, new entries of `state` for numbers of another rank (0 is one). Neither changes `state`.
    keys: the entries that hold the numbers. The layout says None of those that have no key of their own in it.
    """

    dim: int
    unpack: Callable[[dict, str], torch.Tensor]
    pack: Callable[[dict, str, torch.Tensor], dict[str, torch.Tensor]]
    keys: tuple[str, ...]


ELEMENTWISE = {factor: Rows(dim) for factor, dim in RANK_DIM.items()}
COPY = {factor: Rows(dim, fresh=PARAMETER) for factor, dim in RANK_DIM.items()}
# Lookahead's slow weights, by the names its versions have for them; timm's keeps them in the state of the optimizer inside.
SLOW_WEIGHTS = {
    "lookahead_slow_buff", "slow_buffer", "slow_param", "slow_params", "slow_weight", "slow_weights", "cached_params"
}  # fmt: skip


def adafactor(factor: str, key: str, value, shape):
    """torch's and transformers' Adafactor: means of squared gradients, of each row and each column of the factor."""
    if key in ("row_var", "exp_avg_sq_row"):
        return 0 if RANK_DIM[factor] == 0 else None
    if key in ("col_var", "exp_avg_sq_col"):
        return None if RANK_DIM[factor] == 0 else value.dim() - 1
    return NotImplemented


def rprop(factor: str, key: str, value, shape):
    return Rows(RANK_DIM[factor], fresh="lr") if key == "step_size" else NotImplemented


def adagrad(factor: str, key: str, value, shape):
    return Rows(RANK_DIM[factor], fresh="initial_accumulator_value") if key == "sum" else NotImplemented


def copies(*keys: str) -> Callable:
    """Layout of an optimizer that keeps a copy, or a mean, of the parameter itself under these keys."""

    def layout(factor: str, key: str, value, shape):
        return COPY[factor] if key in keys else NotImplemented

    return layout


def dequantise(codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, block: int) -> torch.Tensor:
    """table[code] · scale of its block, float32: codes (n,) uint8, scale (⌈n / block⌉,), table (256,) or (16,)."""
    return table[codes.long()] * scale.repeat_interleave(block)[: len(codes)]


def quantise(numbers: torch.Tensor, table: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Codes (n,) uint8 of the nearest entries of the ascending `table`, and the scale of every block: the least that holds all of the
    block between its entries. Numbers that were dequantised in these blocks get the codes that they had.
    """
    n = len(numbers)
    blocks = F.pad(numbers.float(), (0, -n % block)).view(-1, block)
    # 0 / 0 where the table has no negative entry
    negative = (blocks.amin(1).clamp(max=0) / table[0]).nan_to_num(nan=0.0)
    scale = torch.maximum(blocks.amax(1) / table[-1], negative)
    scaled = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2, out_int32=True)
    return codes.to(torch.uint8).flatten()[:n], scale


_BITSANDBYTES_BLOCK = 256
_BITSANDBYTES_TABLES = ("qmap1", "qmap2", "absmax1", "absmax2", "unorm_vec", "gnorm_vec")


def _row_major(state: torch.Tensor) -> torch.Tensor:
    """
    A bitsandbytes state in the order in which its parameter's elements lie, which the step makes row-major. Its GPU kernels go by
    memory alone, whatever strides the state was given with; on a CPU the strides count.
    """
    if state.device.type == "cpu":
        return state.contiguous()
    return state.as_strided(state.shape, torch.empty(state.shape, device="meta").stride())


def _bitsandbytes_unpack(state: dict, key: str) -> torch.Tensor:
    value = _row_major(state[key])
    if value.dtype != torch.uint8:
        return value
    table, scales = state[f"qmap{key[-1]}"], state[f"absmax{key[-1]}"]
    if scales.dim() == 1:
        return dequantise(value.flatten(), scales, table, _BITSANDBYTES_BLOCK).view(value.shape)
    parts = [dequantise(v.flatten(), s, table, _BITSANDBYTES_BLOCK) for v, s in zip(value, scales, strict=True)]
    return torch.stack(parts).view(value.shape)


def _bitsandbytes_pack(state: dict, key: str, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    if state[key].dtype != torch.uint8:
        return {key: numbers.clone(memory_format=torch.contiguous_format)}
    scales = f"absmax{key[-1]}"
    parts = [numbers] if state[scales].dim() == 1 else numbers
    packed = [quantise(part.flatten(), state[f"qmap{key[-1]}"], _BITSANDBYTES_BLOCK) for part in parts]
    codes, scale = (torch.stack(tensors) for tensors in zip(*packed, strict=True))
    return {key: codes.view(numbers.shape), scales: scale.view(*state[scales].shape[:-1], -1)}


def bitsandbytes(factor: str, key: str, value, shape):
    """
    Its state1 and state2 are shaped like the parameter (AdEMAMix: two of it stacked), float32 or, of parameters from min_8bit_size on,
    8-bit in blocks of 256 elements. A rank change keeps the kind. Ranks are whole blocks of lora_A where 256 divides K, and of lora_B
    never: it lies row-major there.
    """
    if key in _BITSANDBYTES_TABLES:
        return None
    if key not in ("state1", "state2"):
        return NotImplemented
    keys = (key, f"absmax{key[-1]}") if value.dtype == torch.uint8 else (key,)
    return Packed(value.dim() - 2 + RANK_DIM[factor], _bitsandbytes_unpack, _bitsandbytes_pack, keys)


def _torchao_unpack(state: dict, key: str) -> torch.Tensor:
    return state[key].dequantize()


def _torchao_pack(state: dict, key: str, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    value = state[key]
    block, dtype = value.block_size, value.dtype
    if numbers.numel() == 0 or numbers.numel() % block:
        return {key: numbers.to(dtype, memory_format=torch.contiguous_format, copy=True)}
    if not hasattr(value, "qmap"):
        return {key: type(value).zeros(numbers.shape, block, value.device, dtype).copy_(numbers)}
    codes, scale = quantise(numbers.flatten(), value.qmap, block)
    if len(value.qmap) == 16:
        packed = codes[::2] << 4 | codes[1::2]
        return {key: type(value)(packed, scale, value.qmap, value.signed, numbers.shape, dtype)}
    return {key: type(value)(codes.view(numbers.shape), scale, value.qmap, value.signed, dtype)}


def torchao(factor: str, key: str, value, shape):
    """
    8-bit, 4-bit and float8 state is a tensor subclass whose blocks must divide the parameter: where they do not after a rank change
    the state is kept in the dtype it stands for, as torchao itself does, and stays so.
    """
    if hasattr(value, "dequantize") and hasattr(value, "block_size"):
        return Packed(RANK_DIM[factor], _torchao_unpack, _torchao_pack, (key,))
    return NotImplemented


@dataclasses.dataclass(frozen=True)
class Refused:
    """An optimizer whose state can follow no rank change, because `reason`."""

    reason: str


_SHARED_Z = Refused("it keeps copies of the parameters among the state of the optimizer inside")
_SCHEDULE_FREE = [
    f"{name}ScheduleFree{kind}" for name in ("AdamW", "RAdam", "SGD") for kind in ("", "Closure", "Paper", "Reference")
]
_MADGRAD = [(package, "MADGRAD") for package in ("madgrad", "timm", "torch_optimizer", "pytorch_optimizer")]

# By package and class name, so that the packages stay optional.
BUILT_IN = {
    ("torch", "Adafactor"): adafactor,
    ("transformers", "Adafactor"): adafactor,
    ("torch", "Rprop"): rprop,
    ("torch", "Adagrad"): adagrad,
    ("torch", "ASGD"): copies("ax"),
    **{("schedulefree", name): copies("x", "y", "z") for name in _SCHEDULE_FREE},
    **{("pytorch_optimizer", f"ScheduleFree{name}"): copies("z") for name in ("AdamW", "RAdam", "SGD")},
    **{place: copies("x0") for place in (*_MADGRAD, ("madgrad", "MirrorMADGRAD"))},
    ("bitsandbytes", "Optimizer8bit"): bitsandbytes,
    ("torchao", "_AdamBase"): torchao,
    ("pytorch_optimizer", "ScheduleFreeWrapper"): copies("z"),
    ("schedulefree", "ScheduleFreeWrapper"): _SHARED_Z,
    ("schedulefree", "ScheduleFreeWrapperReference"): _SHARED_Z,
    ("torch", "LBFGS"): Refused("it keeps flat vectors over all parameters"),
    ("torchao", "CPUOffloadOptimizer"): Refused("it keeps a copy of every parameter and an optimizer for each"),
    ("lomo_optim", "AdaLomo"): Refused("it keeps its state outside `state`"),
}
