"""NoRALinear: an inner pair trained between frozen outer factors of the base's own weight, at the cost of its inner rank."""

import math
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..ops._checks import check_finite, check_tensor
from ..ranks import RankedPair
from .adapted_linear import AdaptedLinear
from .composed import ComposedFactors, compose
from .frozen import adapted, is_quantised, is_sharded

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


class NoRALinear(AdaptedLinear):
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
        keep_original: `restore_base()` puts back the very parameter that was there; False frees it and adds ΔW_0 back instead, which
            rounds once more.
        generator: CPU generator of what is random in A'.
    lora_A is A' (r, r_out) and lora_B is B' (r_out, r).
    Attributes: weighting: (K,) what W's columns were weighted with for `outer`, or None.
        rounding_error: ‖round(W − ΔW_0) − (W − ΔW_0)‖_F / ‖W‖_F of the base's dtype while the residual is applied, else 0.
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
        super().__init__(base_layer, scaling=scaling, dropout_p=dropout_p)
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
        self.keep_original = keep_original
        self.rounding_error = 0.0
        self._original: tuple[nn.Parameter, ...] = ()  # not registered: it belongs to the base, or to no one
        self._in_weight = self._as_correction = False  # where an applied residual is
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

    def residual_factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(A_0 (r, K), B_0 (N, r)), rank-major and detached, with ΔW_0 = scaling · B_0 A_0; None where no residual applies."""
        if not self.has_residual:
            return None
        root = self.outer_S[: self._inner_r].sqrt()[:, None]
        return root * self.outer_A[: self._inner_r], (root * self.outer_B[: self._inner_r]).t()

    def _correction(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """−ΔW_0 as rank vectors to put behind the composed ones."""
        if not self._as_correction:
            return None
        A_0, B_0 = self.residual_factors()
        return A_0, -B_0.t()

    @torch.no_grad()
    def apply_residual(self) -> None:
        """
        Make the base W − ΔW_0, so that the layer computes what its base did. Nothing to do without a residual, or a second time.

        A float base gets a new frozen parameter, computed in the outer factors' dtype and rounded once to its own; modules that share
        the old one keep it. A quantised base is not written to: −ΔW_0 runs with the adapter, as r more rank vectors.
        Raises: ValueError (W − ΔW_0 is not finite in the base's dtype); nothing has changed then.
        """
        if not self.has_residual or self._in_weight or self._as_correction:
            return
        if is_quantised(self.base_layer):
            self._as_correction = True
            self.forget_composed()
            return
        exact = self._shifted(*self.residual_factors(), -self.scaling)
        rounded = exact.to(self.weight.dtype)
        size = self.weight.to(exact.dtype).norm().item()
        error = (rounded.to(exact.dtype) - exact).norm().item()
        if not math.isfinite(error):
            raise ValueError(f"{OP}: W − ΔW_0 must be finite in {rounded.dtype}, got an overflow or NaN")
        self.rounding_error = error / size if size else 0.0
        self._put_weight(nn.Parameter(rounded, requires_grad=False), keep=self.keep_original)
        self._in_weight = True

    @torch.no_grad()
    def restore_base(self) -> None:
        """
        Undo `apply_residual`: the original parameter, tied to whatever it was tied to and moved to where the base is now; or with
        keep_original=False a new one, (W − ΔW_0) + ΔW_0 rounded once more.

        Raises: ValueError (W − ΔW_0 was sharded since); nothing has changed then.
        """
        self._check_whole()
        if self._as_correction:
            self._as_correction = False
            self.forget_composed()
        if not self._in_weight:
            return
        now = {"device": self.weight.device, "dtype": self.weight.dtype}
        if self._original:
            (original,) = self._original
        else:
            total = self._shifted(*self.residual_factors(), self.scaling)
            original = nn.Parameter(total.to(self.weight.dtype), requires_grad=False)
        self._put_weight(original, keep=False)
        self.base_layer.to(**now)  # moves the parameter itself, as the model's own moves would have
        self._in_weight, self.rounding_error = False, 0.0

    def _check_whole(self) -> None:
        """Raises: ValueError if the base's weight was rewritten, and sharded since: FSDP keeps what it was given."""
        if self._in_weight and is_sharded(self.base_layer):
            raise ValueError(
                f"{OP}: base_layer must not be sharded while W − ΔW_0 is its weight, for W to come back, got one of FSDP's or of DTensors: "
                "save the adapter and load it on a model that is whole"
            )

    def _differs(self, outer: Outer) -> bool:
        return not all(torch.equal(own, other.to(own)) for own, other in zip(self.outer, outer, strict=True))

    def check_outer(self, outer: Outer) -> None:
        """Raises: TypeError, ValueError if `outer` cannot take the place of the layer's own."""
        _check_outer(outer, self.in_features, self.out_features)
        if outer.S.shape != self.outer_S.shape:
            raise ValueError(f"{OP}: outer.S must have shape {tuple(self.outer_S.shape)}, got {tuple(outer.S.shape)}")
        if self._differs(outer):
            self._check_whole()

    @property
    def residual(self) -> tuple[int, float] | None:
        """(rank, scaling) of ΔW_0 where it is taken out of the base; None where nothing is."""
        return (self._inner_r, self.scaling) if self.has_residual else None

    def take_outer(self, outer: Outer) -> None:
        """
        Other outer factors of the same base weight in the place of these, of the same shapes; an applied residual follows them.

        Raises: TypeError, ValueError (another shape, values that are not finite); nothing has changed then.
        """
        self.check_outer(outer)
        if not self._differs(outer):
            return
        applied = self._in_weight or self._as_correction
        self.restore_base()
        for own, other in zip(self.outer, outer, strict=True):
            own.copy_(other)
        if applied:
            self.apply_residual()

    def _put_weight(self, parameter: nn.Parameter, *, keep: bool) -> None:
        self._original = (self.base_layer.weight,) if keep else ()
        self.base_layer.weight = parameter

    def _apply(self, fn, recurse=True):
        self.forget_composed()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r_out={self.outer_A.shape[0]}, residual={self.has_residual}"
