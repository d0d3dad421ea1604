"""ResidualLinear: a layer whose first update may come out of its base's own weight, so that it starts as what its base computed."""

import math

import torch
from torch import nn

from .adapted_linear import AdaptedLinear
from .frozen import is_quantised, is_sharded


class ResidualLinear(AdaptedLinear):
    """
    y = base_layer(x) + scaling · drop(x) A_effᵀ B_effᵀ, where base_layer's weight becomes W − ΔW_0 by `apply_residual`.

    ΔW_0 = scaling_0 · B_0 A_0 is what a subclass says in `_taken`: of fixed rank and scaling, whatever the pair's become.

    Args:
        base_layer, scaling, dropout_p: as for `AdaptedLinear`.
        keep_original: `restore_base()` puts back the very parameter that was there; False frees it and adds ΔW_0 back instead, which
            rounds once more.
    Attributes:
        rounding_error: ‖round(W − ΔW_0) − (W − ΔW_0)‖_F / ‖W‖_F of the base's dtype while the residual is applied, else 0.
    """

    def __init__(self, base_layer: nn.Module, *, scaling: float, dropout_p: float, keep_original: bool = True):
        super().__init__(base_layer, scaling=scaling, dropout_p=dropout_p)
        self.keep_original = keep_original
        self.rounding_error = 0.0
        self._original: tuple[nn.Parameter, ...] = ()  # not registered: it belongs to the base, or to no one
        self._in_weight = self._as_correction = False  # where an applied residual is

    def _taken(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """(A_0 (q, K), B_0 (N, q), scaling_0), rank-major and detached; None for a layer that takes nothing out of its base."""
        raise NotImplementedError

    def _operands_changed(self) -> None:
        """What the layer runs with beside its factors is another one now."""

    @property
    def residual(self) -> tuple[int, float] | None:
        taken = self._taken()
        return None if taken is None else (taken[0].shape[0], taken[2])

    def residual_factors(self, scaling: float | None = None) -> tuple[torch.Tensor, torch.Tensor] | None:
        taken = self._taken()
        if taken is None:
            return None
        A_0, B_0, own = taken
        scaling = self.scaling if scaling is None else scaling
        if scaling == own:
            return A_0, B_0
        if not scaling:
            raise ValueError(f"{type(self).__name__}: scaling must not be 0 for scaling · B_0 A_0 to be ΔW_0, got 0")
        return A_0, (B_0.t() * (own / scaling)).t()

    def _correction(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """−ΔW_0 as rank vectors (q, K) and (q, N) to put behind those of a quantised base's adapter; None where there are none."""
        if not self._as_correction:
            return None
        A_0, B_0 = self.residual_factors()
        return A_0, -B_0.t()

    @torch.no_grad()
    def apply_residual(self, *, release: bool = True) -> None:
        """
        Make the base W − ΔW_0, so that the layer computes what its base did. Nothing to do without a residual, or a second time.

        A float base gets a new frozen parameter, computed in the dtype of B_0 A_0 and rounded once to its own; modules that share
        the old one keep it. A quantised base is not written to: −ΔW_0 runs with the adapter, as more rank vectors.
        release=False: the old one stays until `release_original()`, so that `restore_base` is exact while other layers may still fail.
        Raises: ValueError (W − ΔW_0 is not finite in the base's dtype); nothing has changed then.
        """
        taken = self._taken()
        if taken is None or self._in_weight or self._as_correction:
            return
        if is_quantised(self.base_layer):
            self._as_correction = True
            self._operands_changed()
            return
        A_0, B_0, scaling = taken
        exact = self._shifted(A_0, B_0, -scaling)
        rounded = exact.to(self.weight.dtype)
        size = self.weight.to(exact.dtype).norm().item()
        error = (rounded.to(exact.dtype) - exact).norm().item()
        if not math.isfinite(error):
            raise ValueError(
                f"{type(self).__name__}: W − ΔW_0 must be finite in {rounded.dtype}, got an overflow or NaN"
            )
        self.rounding_error = error / size if size else 0.0
        self._put_weight(nn.Parameter(rounded, requires_grad=False), keep=self.keep_original or not release)
        self._in_weight = True

    def release_original(self) -> None:
        """Free the original parameter if keep_original is False."""
        if not self.keep_original:
            self._original = ()

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
            self._operands_changed()
        if not self._in_weight:
            return
        now = {"device": self.weight.device, "dtype": self.weight.dtype}
        if self._original:
            (original,) = self._original
        else:
            total = self._shifted(*self._taken())
            original = nn.Parameter(total.to(self.weight.dtype), requires_grad=False)
        self._put_weight(original, keep=False)
        self.base_layer.to(**now)  # moves the parameter itself, as the model's own moves would have
        self._in_weight, self.rounding_error = False, 0.0

    def _check_whole(self) -> None:
        """Raises: ValueError if the base's weight was rewritten, and sharded since: FSDP keeps what it was given."""
        if self._in_weight and is_sharded(self.base_layer):
            raise ValueError(
                f"{type(self).__name__}: base_layer must not be sharded while W − ΔW_0 is its weight, for W to come back, got one of "
                "FSDP's or of DTensors: save the adapter and load it on a model that is whole"
            )

    @torch.no_grad()
    def _replace_taken(self, buffers: list[torch.Tensor], others: list[torch.Tensor]) -> None:
        """Other values for the buffers that `_taken` reads; an applied residual follows them.  Raises: ValueError, before any change."""
        self._check_whole()
        applied = self._in_weight or self._as_correction
        self.restore_base()
        for own, other in zip(buffers, others, strict=True):
            own.copy_(other)
        if applied:
            self.apply_residual()

    def _put_weight(self, parameter: nn.Parameter, *, keep: bool) -> None:
        self._original = (self.base_layer.weight,) if keep else ()
        self.base_layer.weight = parameter
