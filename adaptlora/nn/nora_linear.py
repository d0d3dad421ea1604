"""NoRALinear: an inner pair trained between frozen outer factors of the base's own weight, at the cost of its inner rank."""

import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..ops._checks import check_finite, check_tensor
from ..ranks import RankedPair
from .composed import ComposedFactors, compose
from .frozen import adapted
from .residual import ResidualLinear

OP = "NoRALinear"
INNER_INITS = ("sigma", "kaiming", "orthogonal")


class Outer(NamedTuple):
    """W ≈ U diag(S) Vh: U (N, r_out), S (r_out,) ≥ 0 in falling order, Vh (r_out, K); nothing need be orthonormal."""

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor


def nora_serial_ref(x, weight, bias, lora_A, lora_B, Vh, U, scaling) -> torch.Tensor:
    """
    y = x Wᵀ + bias + scaling · (((x Vhᵀ) A'ᵀ) B'ᵀ) Uᵀ, factor by factor in plain torch operations: the definition.  [NoRA]

    Args:
        x: (..., K).   weight: (N, K).   bias: (N,) or None.   lora_A: A' (r, r_out).   lora_B: B' (r_out, r).
        Vh: (r_out, K).   U: (N, r_out).   The four factors are of one dtype, that of x or a wider one.
    Returns: y (..., N), dtype of x.
    """
    y = F.linear(x, weight, bias)
    return (y + scaling * (x.to(Vh.dtype) @ Vh.t() @ lora_A.t() @ lora_B.t() @ U.t())).to(y.dtype)


def _check_outer(outer, K: int, N: int) -> None:
    if not isinstance(outer, Outer):
        raise TypeError(f"{OP}: outer must be an Outer(U, S, Vh), got {type(outer).__name__}")
    for name, tensor, dims in zip(Outer._fields, outer, (2, 1, 2), strict=True):
        check_tensor(OP, f"outer.{name}", tensor, dims)
    r_out = outer.S.shape[0]
    for name, rule, shape in (("U", "(N, r_out)", (N, r_out)), ("Vh", "(r_out, K)", (r_out, K))):
        got = tuple(getattr(outer, name).shape)
        if got != shape:
            raise ValueError(f"{OP}: outer.{name} must have shape {rule}={shape} for this base and S, got {got}")
    for name, tensor in outer._asdict().items():
        check_finite(OP, f"outer.{name}", tensor)
    if (outer.S < 0).any():
        raise ValueError(f"{OP}: outer.S must be ≥ 0, got {outer.S.min().item()}")


class NoRALinear(ResidualLinear):
    """
    y = base_layer(x) + scaling · drop(x) (A' Vh)ᵀ (U B')ᵀ          [NoRA: nested low-rank adaptation]

    A' and B' train; the outer factors are buffers, outer_A = Vh and outer_B = Uᵀ. What runs is a LoRA layer of rank r with the factors
    A_eff = A' Vh and B_eff = U B': these are composed once per optimizer step, see `forget_composed`.

    Args:
        base_layer: as for `LoraLinear`.
        r: rank of the inner pair, 0 ≤ r ≤ r_out.
        outer: factors of the base's weight; copied, in float32 (float64 for a float64 base).
        scaling: number; fixed where a residual applies.   dropout_p: probability in [0, 1), while training.
        inner_init: "sigma": A' = the first r rows of diag(√S), B' = the first r columns, so that ΔW_0 = scaling · Σ_{i≤r} S_i u_i v_iᵀ.
            "kaiming": A' ~ U(−1/√r_out, 1/√r_out), B' = 0.   "orthogonal": A' of random orthonormal rows, B' = 0.
        residual: with "sigma", `apply_residual()` makes the base W − ΔW_0; the constructor does not call it.
        keep_original: see `ResidualLinear`.
        generator: CPU generator of what is random in A'.
    lora_A is A' (r, r_out) and lora_B is B' (r_out, r).
    Attributes: weighting: (K,) what W's columns were weighted with for `outer`, or None.
    Raises: TypeError (base_layer, outer), ValueError (r, shapes or values of outer, inner_init, scaling, dropout_p).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        outer: Outer,
        *,
        scaling=1.0,
        dropout_p=0.0,
        inner_init="sigma",
        residual=True,
        keep_original=True,
        generator=None,
    ):
        super().__init__(base_layer, scaling=scaling, dropout_p=dropout_p, keep_original=keep_original)
        _check_outer(outer, self.in_features, self.out_features)
        r_out = outer.S.shape[0]
        if inner_init not in INNER_INITS:
            raise ValueError(f"{OP}: inner_init must be one of {', '.join(INNER_INITS)}, got {inner_init!r}")
        if not 0 <= r <= r_out:
            raise ValueError(f"{OP}: r must be in [0, r_out={r_out}], got {r}")
        like = {"dtype": self.factor_dtype, "device": self.weight.device}
        for name, rows in (("outer_A", outer.Vh), ("outer_B", outer.U.t()), ("outer_S", outer.S)):
            self.register_buffer(name, rows.detach().to(**like, copy=True, memory_format=torch.contiguous_format))
        self.has_residual = residual and inner_init == "sigma"
        self._composed = ComposedFactors()
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None  # inner factors as they were composed last
        self._followed = weakref.WeakSet()  # optimizers that tell when they step
        self.register_buffer("weighting", None)
        # "kaiming" is what a pair draws.
        drawn = generator if inner_init == "kaiming" else torch.Generator()
        pair = RankedPair(r_out, r_out, r, generator=drawn, **like)
        with torch.no_grad():
            if inner_init == "sigma":
                pair.lora_A.copy_(self.outer_S.sqrt().diag()[:r])
                pair.lora_B.copy_(pair.lora_A.t())
            elif inner_init == "orthogonal":
                rows = torch.empty(r, r_out, dtype=like["dtype"], device="cpu")
                pair.lora_A.copy_(nn.init.orthogonal_(rows, generator=generator))
        self._inner_r = r
        self._train(pair)

    @property
    def outer(self) -> Outer:
        """The outer factors, of the base's weight as it was given; views."""
        return Outer(self.outer_B.t(), self.outer_S, self.outer_A)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lora_A, lora_B = self._factors()
        dropout_p = self.dropout_p if self.training else 0.0
        return adapted(self.base_layer, x, lora_A, lora_B, scaling=self.scaling, dropout_p=dropout_p)

    def _operands(self) -> tuple[torch.Tensor, ...]:
        return self.lora_A, self.lora_B, self.outer_A, self.outer_B

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer runs with: (A_eff, B_eff), behind it a quantised base's correction."""
        if torch.compiler.is_compiling():
            return compose(*self._operands(), self._correction())
        return self._composed.get(self._operands(), self._correction, keep=self._unchanged())

    def _unchanged(self) -> bool:
        """
        Whether composed factors may be kept. Fused and quantising optimizers, and writes through `.data`, do not show in what torch counts:
        on a CPU the inner factors' values are compared, which costs less than composing; elsewhere that would wait for the device, so
        that they are kept only while a tracked optimizer tells when it steps, and for graphs alone.
        """
        inner = (self.lora_A.detach(), self.lora_B.detach())
        if any(torch._C._functorch.is_functorch_wrapped_tensor(factor) for factor in inner):
            return False
        if self.weight.device.type != "cpu":
            return bool(self._followed) and torch.is_grad_enabled()
        seen = self._seen
        if seen is None or not all(a.shape == b.shape and a.equal(b) for a, b in zip(seen, inner, strict=True)):
            self.forget_composed()
            self._seen = tuple(factor.clone() for factor in inner)
        return True

    def track(self, optimizer: torch.optim.Optimizer) -> None:
        super().track(optimizer)
        if optimizer not in self._followed:
            self._followed.add(optimizer)
            reference = weakref.ref(self)

            def forget(*_):
                layer = reference()
                if layer is not None:
                    layer.forget_composed()

            optimizer.register_step_post_hook(forget)

    def forget_composed(self) -> None:
        """Drop the composed factors; a tracked optimizer does it after each of its steps."""
        self._composed.forget()

    def __getstate__(self):
        # An optimizer belongs to the original.
        return {**self.__dict__, "_followed": None}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._followed = weakref.WeakSet()

    def effective_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return compose(*self._operands())

    def _taken(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        if not self.has_residual:
            return None
        root = self.outer_S[: self._inner_r].sqrt()[:, None]
        return root * self.outer_A[: self._inner_r], (root * self.outer_B[: self._inner_r]).t(), self.scaling

    def _operands_changed(self) -> None:
        self.forget_composed()

    def _differs(self, outer: Outer) -> bool:
        return not all(torch.equal(own, other.to(own)) for own, other in zip(self.outer, outer, strict=True))

    def check_outer(self, outer: Outer) -> None:
        """Raises: TypeError, ValueError if `outer` cannot take the place of the layer's own."""
        _check_outer(outer, self.in_features, self.out_features)
        if outer.S.shape != self.outer_S.shape:
            raise ValueError(f"{OP}: outer.S must have shape {tuple(self.outer_S.shape)}, got {tuple(outer.S.shape)}")
        if self._differs(outer):
            self._check_whole()

    def take_outer(self, outer: Outer) -> None:
        """
        Other outer factors of the same base weight in the place of these, of the same shapes; an applied residual follows them.

        Raises: TypeError, ValueError (another shape, values that are not finite); nothing has changed then.
        """
        self.check_outer(outer)
        if self._differs(outer):
            self._replace_taken(list(self.outer), list(outer))

    def _apply(self, fn, recurse=True):
        self.forget_composed()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r_out={self.outer_A.shape[0]}, residual={self.has_residual}"
