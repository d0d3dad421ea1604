"""What a training log says of an adapter."""

import torch

from .ops import rank_norms


def log_values(adapter, *, modules: bool = False) -> dict[str, float]:
    """
    Numbers for a training log, named with slashes as TensorBoard groups them.

    Args:
        modules: also every module's rank, as rank/module/<name>.
    Returns: rank/average, rank/min, rank/max; adapter/norm_A, adapter/norm_B (Frobenius, over all modules, of the vectors that train);
        adapter/parameters, adapter/bytes, adapter/optimizer_bytes (as `Adapter.summary` counts them); and what the method has to say:
        adapter/penalty for NormAL, adapter/budget for La-LoRA, both for AdaLoRA.
    """
    summary = adapter.summary()
    ranks = summary["ranks"]
    layers = adapter.layers.values()
    with torch.no_grad():
        norms = rank_norms([layer.lora_A for layer in layers], [layer.lora_B for layer in layers])
        # A model may be spread over devices.
        norm_A, norm_B = (
            float(torch.linalg.vector_norm(torch.cat([n.to(of_modules[0].device) for n in of_modules])))
            for of_modules in norms
        )
    values = {
        "rank/average": summary["average_rank"],
        "rank/min": min(ranks.values()),
        "rank/max": max(ranks.values()),
        "adapter/parameters": summary["adapter_parameters"],
        "adapter/bytes": summary["adapter_bytes"],
        "adapter/optimizer_bytes": summary["optimizer_bytes"],
        "adapter/norm_A": norm_A,
        "adapter/norm_B": norm_B,
    }
    values |= {f"adapter/{name}": value for name, value in adapter.method.log_values().items()}
    if modules:
        values |= {f"rank/module/{name}": rank for name, rank in ranks.items()}
    return values
