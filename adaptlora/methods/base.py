"""What a method is: it watches norms, gradients and losses while training and decides ranks. It never touches a kernel."""

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from ..nn import LoraLinear, linear_shape
from ..targets import pattern_value
from .spectral import spectral_starts


class NonFiniteError(ValueError):
    """A loss, or the norms that ranks are decided by, are NaN or infinite: nothing has changed, and training can go on."""


@dataclasses.dataclass(frozen=True)
class Attachment:
    """
    What `attach` gives a method to build its layers from.

    targets: {module name: frozen linear}, in the model's order.   model: with the targets still in it.
    calibration: a batch for methods that look at activations, or None.   progress: called with (modules done, modules in all).
    stored: what a file holds of frozen factors, so that they are not made anew.
    """

    model: nn.Module
    targets: dict[str, nn.Module]
    calibration: object = None
    progress: Callable[[int, int], object] | None = None
    stored: object = None


class Method:
    """
    A method of adapting ranks, and plain LoRA where nothing is overridden.

    `attach` calls `build`, the constructor, and `begin` once the layers are on the model. `Adapter` then calls, in each optimizer step
    and in this order: `penalty` (zero or more times before the backward pass), `before_optimizer_step` and `after_optimizer_step`
    (from each tracked optimizer), `step`. A method that raises in `step` has changed nothing of its own state that `state_dict` does not
    hold: the adapter restores it.

    Attributes: t: optimizer steps made.   t_p, t_c: steps at which a penalty ends and ranks are clipped, where there are such.
        phase: one word for reports.
        start_fields: fields of the configuration that are not read once the layers are made, or that the state holds: a run that goes on
            may have others. What the others are, a checkpoint insists on.
    """

    layer_class = LoraLinear
    nested = False  # whether the pairs lie between frozen factors, so that a plain LoRA pair cannot take their place
    t_p: int | None = None
    t_c: int | None = None
    phase = "fixed"
    start_fields = frozenset({
        "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "modules_to_save", "bias", "lora_bias", "init_lora_weights", "keep_original", "seed",
    })  # fmt: skip

    def __init__(self, config, layers: dict[str, nn.Module]):
        """Raises: ValueError (a configuration that does not fit these modules)."""
        self.config = config
        self.layers = layers
        self.t = 0

    @classmethod
    def build(cls, config, attachment: Attachment) -> dict[str, nn.Module]:
        """The layer for every target; the model and its linears stay as they are.  Raises: ValueError, TypeError."""
        if attachment.calibration is not None:
            raise ValueError(f"attach: calibration must be None for {type(config).__name__}, got a batch")
        generator = torch.Generator().manual_seed(config.seed)
        sizes = {name: cls.rank_and_scaling(config, name) for name in attachment.targets}
        starts = {}
        if config.init_lora_weights != "kaiming":
            active = {name: (cls.first_rank(config, r), scaling) for name, (r, scaling) in sizes.items()}
            starts = spectral_starts(config, attachment, active)
        layers = {}
        for name, module in attachment.targets.items():
            r, scaling = sizes[name]
            layers[name] = cls.layer_class(
                module,
                cls.first_rank(config, r),
                capacity=r,
                scaling=scaling,
                dropout_p=config.lora_dropout,
                generator=generator,
            )
            layers[name].lora_A.requires_grad_(not config.freeze_A)
            if starts:
                layers[name].start_at(*starts.pop(name), keep_original=config.keep_original)
        return layers

    @staticmethod
    def rank_and_scaling(config, name: str) -> tuple[int, float]:
        r = pattern_value(config.rank_pattern, name, config.r)
        return r, config.scaling(r, pattern_value(config.alpha_pattern, name, config.lora_alpha))

    @classmethod
    def parameters(cls, config, name: str, module: nn.Module) -> int:
        """Numbers that train in one module at its largest rank."""
        K, N = linear_shape(module)
        return cls.rank_and_scaling(config, name)[0] * (N if config.freeze_A else K + N)

    @staticmethod
    def first_rank(config, r: int) -> int:
        """The active rank at the start of a module whose largest rank is r."""
        return r

    def begin(self) -> None:
        """
        The layers are about to run: base weights become W − ΔW_0 where they have such. All are held beside until every layer has
        succeeded, keep_original or not.  Raises: what fails; nothing has changed then.
        """
        layers = list(self._residual_layers())
        try:
            for layer in layers:
                layer.apply_residual(release=False)
        except BaseException:
            for layer in layers:
                layer.restore_base()
            raise
        for layer in layers:
            layer.release_original()

    def end(self) -> None:
        """The layers are taken off the model: its linears must be what they were before `begin`."""
        for layer in self._residual_layers():
            layer.restore_base()

    def _residual_layers(self):
        return (layer for layer in self.layers.values() if layer.residual is not None)

    def needs_optimizer(self) -> bool:
        """Whether this or a later `step` shrinks vectors or changes ranks, and so needs a tracked optimizer."""
        return False

    def may_change(self) -> bool:
        """
        Whether the next `step` decides on ranks, or on vectors that it masks. Several processes then decide together, so that all must
        say the same.
        """
        return False

    def awaits_clip(self) -> bool:
        """Whether the rank change that the configuration asks for is still to come."""
        return False

    def writes_before_change(self) -> bool:
        """Whether the next `step` writes to factors and may then change ranks: what the adapter must be able to undo."""
        return False

    def needs_loss(self) -> bool:
        """Whether the next `step` decides by the task loss."""
        return False

    def penalty(self) -> torch.Tensor | None:
        """Term to add to the task loss now, a 0-dim tensor with gradient; None for nothing."""
        return None

    def before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A tracked optimizer is about to use the gradients."""

    def after_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A tracked optimizer has stepped; the gradients that it used are still there."""

    def step(self, loss: float | None, optimizers: list[torch.optim.Optimizer]) -> dict[str, int] | None:
        """Advance by one optimizer step; the new rank of every module if ranks change now, else None."""
        self.t += 1
        return None

    def changed(self, ranks: dict[str, int]) -> None:
        """The ranks that `step` returned are in force."""

    def unchanged(self) -> None:
        """`step` returned None, and all processes agree: what it decided and left undone until then."""

    def masked(self) -> dict[str, list[int]]:
        """Vectors that `unchanged` will mask, of modules that have such: what several processes must agree on."""
        return {}

    @property
    def orders(self) -> dict[str, list[int]]:
        """
        Of the ranks that `step` returned: where the vectors that stay are not a module's first, the permutation of its vectors that makes
        them the first. Held in `step_state`, so that one process can decide for all.
        """
        return {}

    @property
    def parks(self) -> bool:
        """Whether vectors that a rank change takes out may come back."""
        return False

    def final_ranks(self) -> dict[str, int]:
        """What the modules keep when what is parked goes for good."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def set_rank(self, rank: int | None) -> None:
        """Evaluate with another rank than that of all vectors.  Raises: ValueError (a rank, or a method without a choice)."""
        raise ValueError(f"set_rank: the adapter must be DyLoRA's, got {type(self.config).__name__}")

    def compacted(self) -> None:
        """What was parked is gone for good: ranks stay what they are from now on."""

    def check_ranks(self, ranks: dict[str, int]) -> None:
        """Raises: ValueError if ranks from outside (a file) do not suit the configuration."""

    def start_from(self, ranks: dict[str, int]) -> None:
        """The modules were given these ranks, and other factors, from outside."""

    def largest_ranks(self) -> dict[str, int]:
        """What every module may grow to, where vectors are parked."""
        return {}

    def scaling(self, name: str, layer: nn.Module, rank: int) -> float:
        """The module's scaling after a change to `rank`."""
        return layer.scaling

    def summary(self) -> dict:
        """
        What `Adapter.summary` says beyond the sizes that all methods have. residual_error: where ΔW_0 is taken out of base weights,
        of the modules' ‖round(W − ΔW_0) − (W − ΔW_0)‖ / ‖W‖ the largest, 0 where no weight was rewritten.
        """
        errors = [layer.rounding_error for layer in self._residual_layers()]
        return {"residual_error": max(errors)} if errors else {}

    def log_values(self) -> dict[str, float]:
        """Numbers for a training log, beyond ranks, norms and sizes."""
        return {}

    def history(self) -> dict | None:
        """What ranks there were over the steps, as JSON; None if they change once at most."""
        return None

    def state_dict(self) -> dict:
        """JSON: numbers, strings, lists and dicts of them."""
        return {"t": self.t}

    def step_state(self) -> dict:
        """The part of `state_dict` that `step` changes: `load_state_dict` of it undoes a step that failed."""
        return self.state_dict()

    def check_state(self, state: dict) -> None:
        """Raises: ValueError if a state with the right entries cannot be this method's."""

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)
