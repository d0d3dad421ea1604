"""AdaptedLinear: what layers over one frozen linear base and one trained pair share."""

import torch
from torch import nn

from ..ops._checks import check_dropout, check_finite_number
from ..ops._library import accumulation_dtype
from ..ranks import RankedPair
from .frozen import is_conv1d, is_linear, is_quantised, is_sharded, keep_unpacked, linear_shape


class AdaptedLinear(nn.Module):
    """
    y = base_layer(x) + scaling · drop(x) A_effᵀ B_effᵀ for the effective factors that a subclass makes of its pair.

    A subclass's constructor calls `_train(pair)` last: until then the base is as it was.
    Raises: TypeError (base_layer of another kind or dtype), ValueError (scaling, dropout_p).
    """

    def __init__(self, base_layer: nn.Module, *, scaling: float, dropout_p: float):
        super().__init__()
        op = type(self).__name__
        if not is_linear(base_layer):
            raise TypeError(
                f"{op}: base_layer must be nn.Linear, Conv1D or a quantised linear of bitsandbytes or torchao, "
                f"got {type(base_layer).__name__}"
            )
        if not (is_quantised(base_layer) or base_layer.weight.is_floating_point()):
            raise TypeError(f"{op}: base_layer.weight must be floating-point, got {base_layer.weight.dtype}")
        check_finite_number(op, "scaling", scaling)
        check_dropout(op, dropout_p)
        self.in_features, self.out_features = linear_shape(base_layer)
        self.base_layer = base_layer
        self.scaling = scaling
        self.dropout_p = dropout_p
        self.fan_in_fan_out = is_conv1d(base_layer)
        self.register_parameter("lora_bias", None)

    def add_lora_bias(self) -> None:
        """Train a bias of B too: `lora_bias` (N,), zero at the start, in the factors' dtype."""
        like = {"dtype": self.factor_dtype, "device": self.weight.device}
        self.lora_bias = nn.Parameter(torch.zeros(self.out_features, **like))

    def _train(self, pair: RankedPair) -> None:
        self.pair = pair
        self.base_layer.requires_grad_(False)
        keep_unpacked(self.base_layer)

    @property
    def factor_dtype(self) -> torch.dtype:
        """dtype that new factors get: float64 for a float64 base, else float32."""
        return accumulation_dtype(self.weight.dtype)

    @property
    def lora_A(self) -> nn.Parameter:
        """The pair's first factor, rank-major: (R, K), or what a subclass says."""
        return self.pair.lora_A

    @property
    def lora_B(self) -> nn.Parameter:
        """The pair's second factor, (N, R) or what a subclass says; rank-major: its transpose is contiguous."""
        return self.pair.lora_B

    @property
    def rank(self) -> int:
        return self.pair.rank

    @property
    def weight(self) -> torch.Tensor:
        """The base's parameter as it is: (N, K), (K, N) for Conv1D, or packed. Code around a model reads its dtype and device."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def track(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimizer's state follow the pair's rank, and tell the layer of its steps. Held weakly."""
        self.pair.track(optimizer)

    def effective_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(A_eff (R, K), B_eff (N, R)), detached: scaling · B_eff A_eff is what the layer adds to its base's weight."""
        raise NotImplementedError

    @torch.no_grad()
    def set_factors(self, lora_A: torch.Tensor, lora_B: torch.Tensor) -> None:
        """The pair (R, ·), (·, R) of plain factors of the rank that it has: what the layer adds is scaling · B A then."""
        self.lora_A.copy_(lora_A)
        self.lora_B.copy_(lora_B)

    def residual_factors(self, scaling: float | None = None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """
        (A_0 (q, K), B_0 (N, q)), rank-major and detached: scaling · B_0 A_0, today's scaling without one, is taken out of the base's
        weight; None where nothing is.  Raises: ValueError (a scaling of 0).
        """
        return None

    @property
    def residual(self) -> tuple[int, float] | None:
        """(rank, scaling) of what is taken out of the base's weight; None where nothing is."""
        return None

    def start_state(self) -> dict:
        """What a start with vectors of the base's own weight leaves, beside the factors; {} for none."""
        return {}

    def check_start(self, state: dict) -> None:
        """Raises: ValueError if `state` cannot take the place of the layer's own `start_state()`."""
        if state:
            raise ValueError(f"what was taken out of the base must be nothing, got {sorted(state)}")

    def take_start(self, state: dict) -> None:
        """Inverse of `start_state`; an applied residual follows.  Raises: as `check_start`; nothing has changed then."""
        self.check_start(state)

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """
        W + scaling · B_eff A_eff, computed in float32 (float64 for float64) and rounded once; shape and dtype of `weight`.

        Raises: ValueError (a quantised base, or a sharded one).
        """
        if is_sharded(self.base_layer):
            raise ValueError(
                "merge: base_layer must not be sharded, got one of FSDP's or of DTensors: save the adapter, and merge it into a model that "
                "is whole"
            )
        if is_quantised(self.base_layer):
            kind = type(self.weight if type(self.base_layer) is nn.Linear else self.base_layer).__name__
            raise ValueError(f"merge: base_layer must not be quantised, got {kind}: dequantise first")
        lora_A, lora_B = self.effective_factors()
        return self._shifted(lora_A, lora_B, self.scaling).to(self.weight.dtype)

    def merged_parameters(self) -> dict[str, torch.Tensor]:
        """
        {"weight": `merged_weight`}, and with a lora_bias {"bias": bias + scaling · lora_bias}, computed and rounded likewise.

        Raises: ValueError (as `merged_weight`; a lora_bias and a base without a bias).
        """
        merged = {"weight": self.merged_weight()}
        if self.lora_bias is not None:
            if self.bias is None:
                raise ValueError(f"merge: base_layer must have a bias for lora_bias, got none in {self.base_layer}")
            acc = accumulation_dtype(self.lora_bias.dtype)
            total = torch.add(self.bias.to(acc), self.lora_bias.detach().to(acc), alpha=self.scaling)
            merged["bias"] = total.to(self.bias.dtype)
        return merged

    def _shifted(self, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
        """W + scaling · B A, oriented like `weight`, in the accumulation dtype of the factors."""
        acc = accumulation_dtype(lora_B.dtype)
        delta = scaling * (lora_B.to(acc) @ lora_A.to(acc))
        if self.fan_in_fan_out:
            delta = delta.t()
        return self.weight.to(acc) + delta

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scaling={self.scaling}, dropout_p={self.dropout_p}"
