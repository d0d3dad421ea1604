"""Starts from singular triplets of the base weight: PiSSA's leading ones, MiLoRA's trailing ones, NoRA's outer factors."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..nn import Outer, dequantised_weight, linear_shape
from ..ops import randomized_svd
from ..pool import over

# Iterations stop at the tolerance of `randomized_svd`; a flat spectrum, as of a random weight, takes more than its default.
_ITERATIONS = 16


def check_one_name(op: str, attachment) -> None:
    """Raises: ValueError if a target has a second name in the model, where it would run without its adapter on a rewritten weight."""
    names = {name: module for name, module in attachment.model.named_modules(remove_duplicate=False)}
    for name, module in attachment.targets.items():
        others = [other for other, found in names.items() if found is module and other != name]
        if others:
            raise ValueError(f"{op}: a module whose weight is rewritten must have one name, got {name} and {others}")


def over_targets(function: Callable, attachment) -> dict:
    """{module name: function(module name)}, several at once on a CPU; the attachment's progress is told."""
    targets, results = attachment.targets, {}
    on_cpu = all(module.weight.device.type == "cpu" for module in targets.values())
    for name, result in over(function, targets, None if on_cpu else 1):
        results[name] = result
        if attachment.progress is not None:
            attachment.progress(len(results), len(targets))
    return results


def triplets(weight: Tensor, rank: int, seed: int, **options) -> Outer:
    """
    W ≈ U diag(S) Vh of float32 or float64 W by `randomized_svd`. The sign of each pair of vectors is that in which the largest element
    of u is positive, whichever library factorizes.
    """
    U, S, Vh, _ = randomized_svd([weight], rank, seed=seed, **options)[0]
    signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    signs = torch.where(signs == 0, 1, signs)
    return Outer(U * signs, S, Vh * signs.t())


def spectral_starts(config, attachment, sizes: dict[str, tuple[int, float]]) -> dict[str, tuple[Tensor, Tensor]]:
    """
    {module: (A_0 (r, K), B_0 (N, r))} with scaling · B_0 A_0 = Σ σ_i u_i v_iᵀ over the r leading triplets of W ("pissa") or the r
    trailing ones ("milora"), the largest first: A_0 = √(σ/scaling) vᵀ, B_0 = u √(σ/scaling).   [PiSSA, arXiv:2404.02948, eq. 2–4;
    MiLoRA, arXiv:2406.09044, eq. 4–7]  Where W has a lower rank, so that σ = 0, both factors are zero and neither has a gradient.

    Args: sizes: {module: (r, scaling)}.
    Raises: ValueError (r above min(N, K), a module of two names, weights that are not finite or not whole).
    """
    check_one_name(f"init_lora_weights={config.init_lora_weights!r}", attachment)
    for name, module in attachment.targets.items():
        r, most = sizes[name][0], min(linear_shape(module))
        if r > most:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r}: r of {name} must be at most the {most} triplets of its weight, got {r}"
            )

    def start(name: str) -> tuple[Tensor, Tensor]:
        weight = dequantised_weight(attachment.targets[name])
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        r, scaling = sizes[name]
        if config.init_lora_weights == "pissa":
            U, S, Vh = triplets(weight, r, config.seed, n_iter=_ITERATIONS)
        else:
            U, S, Vh = triplets(weight, min(weight.shape), config.seed)
            U, S, Vh = U[:, -r:], S[-r:], Vh[-r:]
        root = (S / scaling).sqrt()
        return root[:, None] * Vh, U * root

    return over_targets(start, attachment)
