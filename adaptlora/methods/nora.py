"""NoRA: an inner pair between frozen outer factors that come from the weight itself.          [NoRA, methods: nested]"""

import dataclasses

import torch
from torch import Tensor, nn

from ..checksums import checksum
from ..config import NoRAConfig
from ..nn import NoRALinear, Outer, dequantised_weight, linear_shape
from .base import Attachment, Method
from .spectral import check_one_name, over_targets, triplets

# An input feature that the calibration hardly used would be blown up without bound when its weighting is undone.
_SMALLEST_WEIGHTING = 1e-3
# Another library's rounding moves a probe by far less, another vector by about as much as there is.
_PROBE_TOLERANCE = 1e-3


def outer_rank(config: NoRAConfig, module: nn.Module) -> int:
    """r_out, or as many as the module has rows or columns."""
    return min(config.r_out, *linear_shape(module))


def mean_activations(model: nn.Module, targets: dict[str, nn.Module], batch, power: float) -> dict[str, Tensor]:
    """
    {module: d (K,)}, d_k the mean over all tokens of |x_k|^power, over the mean of all d_k, and at least 0.001: one forward pass in
    evaluation mode, without gradients. Padding counts as tokens.

    Args: batch: a dict of the model's keyword arguments, a tuple or list of its arguments, or its one argument.
    Raises: ValueError (a module that the batch does not reach, activations that are not finite).
    """
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def observe(name: str):
        def hook(module, arguments, keywords):
            x = torch.atleast_2d((arguments or tuple(keywords.values()))[0].detach()).flatten(0, -2)
            sums[name] = sums.get(name, 0) + x.double().abs().pow(power).sum(0)
            tokens[name] = tokens.get(name, 0) + x.shape[0]

        return hook

    hooks = [module.register_forward_pre_hook(observe(name), with_kwargs=True) for name, module in targets.items()]
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad():
            model.eval()
            if isinstance(batch, (tuple, list)):
                model(*batch)
            elif hasattr(batch, "keys"):
                model(**batch)
            else:
                model(batch)
    finally:
        for module in training:
            module.training = True
        for hook in hooks:
            hook.remove()
    weightings = {}
    for name in targets:
        if name not in sums:
            raise ValueError(f"NoRA: calibration must reach every adapted module, got no activations of {name}")
        mean = sums[name] / tokens[name]
        if not mean.isfinite().all() or not mean.any():
            raise ValueError(
                f"NoRA: activations of {name} must be finite and not all zero, got a mean of {mean.mean()}"
            )
        weightings[name] = (mean / mean.mean()).clamp(min=_SMALLEST_WEIGHTING).float()
    return weightings


def outer_factors(weight: Tensor, rank: int, weighting: Tensor | None, seed: int) -> Outer:
    """
    W ≈ U diag(S) Vh, of W or of W diag(d) with the weighting undone in Vh: U (N, rank) orthonormal, S (rank,), Vh (rank, K); signs as
    `triplets` chooses them.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if weighting is not None:
        weighting = weighting.to(weight)
        weight = weight * weighting
    outer = triplets(weight, rank, seed)
    return outer if weighting is None else outer._replace(Vh=outer.Vh / weighting)


def probe(outer: Outer) -> Tensor:
    """(2, r_out): projections of one fixed random vector on the outer factors. Other factors, signs or an order of vectors have others."""
    rows = []
    for side in (outer.U.t(), outer.Vh):
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(side.shape[1], generator=generator, dtype=torch.float32, device="cpu")
        rows.append(side.detach().cpu().double() @ vector.double() / side.shape[1] ** 0.5)
    return torch.stack(rows).float()


@dataclasses.dataclass(frozen=True)
class StoredOuter:
    """
    What a file says of outer factors.  path: the file's, for errors.   checksums: of the weights that they belong to.
    outers: themselves, or nothing.   probes: what `probe` gave for those that are not stored.   weightings: d of activation-weighted ones.
    """

    path: str
    checksums: dict[str, str]
    outers: dict[str, Outer]
    probes: dict[str, Tensor]
    weightings: dict[str, Tensor]

    def check_weight(self, name: str, found: str) -> None:
        """Raises: ValueError (another base weight, or a module that the file lacks)."""
        if name not in self.checksums:
            raise ValueError(f"load: {self.path}: its modules must be all that are adapted, got none for {name!r}")
        if found != self.checksums[name]:
            raise ValueError(
                f"load: {self.path}: the base weight of {name} must be the one that the adapter was trained on, SHA-256 "
                f"{self.checksums[name][:12]}…, got {found[:12]}…"
            )

    def check_outer(self, name: str, outer: Outer) -> None:
        """Raises: ValueError (outer factors that came out otherwise than where the file was written)."""
        if name in self.probes:
            expected, found = self.probes[name], probe(outer)
            if expected.shape != found.shape or not (found - expected).norm() <= _PROBE_TOLERANCE * expected.norm():
                raise ValueError(
                    f"load: {self.path}: the outer factors of {name} must come out as where the file was written, and this machine's "
                    "factorization differs; save with save_outer=True there"
                )


class NoRA(Method):
    """The method while it trains: ranks stay what they are."""

    nested = True
    start_fields = Method.start_fields - {"seed"}  # of the outer factors, which no checkpoint holds

    @classmethod
    def parameters(cls, config: NoRAConfig, name: str, module: nn.Module) -> int:
        """2 · r_out · r"""
        return 2 * outer_rank(config, module) * cls.rank_and_scaling(config, name)[0]

    @classmethod
    def build(cls, config: NoRAConfig, attachment: Attachment) -> dict[str, NoRALinear]:
        """Raises: ValueError (a module too small for its rank, calibration missing or superfluous, weights that are not finite)."""
        targets, stored = attachment.targets, attachment.stored
        check_one_name("NoRA", attachment)
        for name, module in targets.items():
            r, most = cls.rank_and_scaling(config, name)[0], outer_rank(config, module)
            if r > most:
                raise ValueError(f"NoRA: r of {name} must be at most its outer rank {most}, got {r}")
        weightings = _weightings(config, attachment) if stored is None else stored.weightings
        for name, weighting in weightings.items():
            K, _ = linear_shape(targets[name])
            if weighting.shape != (K,):
                raise ValueError(f"NoRA: weighting of {name} must have shape ({K},), got {tuple(weighting.shape)}")

        def prepare(name: str) -> tuple[Outer, str]:
            """Outer factors, and what tells later whether a weight is the one that they belong to."""
            weight = dequantised_weight(targets[name])
            digest = checksum(weight)
            if stored is not None:
                stored.check_weight(name, digest)
                if name in stored.outers:
                    return stored.outers[name], digest
            outer = outer_factors(weight, outer_rank(config, targets[name]), weightings.get(name), config.seed)
            if stored is not None:
                stored.check_outer(name, outer)
            return outer, digest

        prepared = over_targets(prepare, attachment)
        generator = torch.Generator().manual_seed(config.seed)
        layers = {}
        for name, module in targets.items():
            r, scaling = cls.rank_and_scaling(config, name)
            outer, weight_checksum = prepared[name]
            layers[name] = NoRALinear(
                module,
                r,
                outer,
                scaling=scaling,
                dropout_p=config.lora_dropout,
                inner_init=config.inner_init,
                residual=config.residual,
                keep_original=config.keep_original,
                generator=generator,
            )
            layers[name].weight_checksum = weight_checksum
            if name in weightings:
                layers[name].weighting = weightings[name].to(layers[name].outer_S)
        return layers

    def summary(self) -> dict:
        """As `Method.summary`, and outer_bytes."""
        buffers = [buffer for layer in self.layers.values() for buffer in (layer.outer_A, layer.outer_B)]
        return super().summary() | {"outer_bytes": sum(buffer.nbytes for buffer in buffers)}


def _weightings(config: NoRAConfig, attachment: Attachment) -> dict[str, Tensor]:
    if config.outer == "weight":
        if attachment.calibration is not None:
            raise ValueError('attach: calibration must be None with outer="weight", got a batch')
        return {}
    if attachment.calibration is None:
        raise ValueError('attach: calibration must be a batch with outer="activation", got None')
    return mean_activations(attachment.model, attachment.targets, attachment.calibration, config.activation_power)
