"""prune(peft_model, …): fewer ranks for an adapter of PEFT's, while it trains or afterwards."""

from ..shear.config import ClipConfig
from ..shear.live import is_peft_model, shear
from ..shear.report import ShearReport


def prune(
    peft_model,
    config=None,
    *,
    target_r: float | None = None,
    budget: int | None = None,
    threshold: float | None = None,
    optimizer=None,
    adapter_name: str | None = None,
) -> ShearReport:
    """
    Take rank vectors out of a LoRA adapter of PEFT's, in place and physically: PEFT's parameters stay the same objects, and their values,
    gradients and optimizer state become smaller. Training, save_pretrained and merging go on with the ranks there are.

    Of 8-bit optimizer state, blocks that vectors share are quantised anew. PEFT's load_adapter wants checkpoints of the ranks there are:
    transformers' load_best_model_at_end fails on one that was written before.

    Args:
        peft_model: PeftModel, its layers PEFT's own or accelerated. Before DistributedDataParallel wraps it, whose reducer holds to
            shapes; of several processes each calls it.
        config: what goes: a `shear` configuration, ClipConfig(…), SVDConfig(…), NoRMConfig(), …
        target_r, budget, threshold: instead of `config`, one of NormAL's amounts: ClipConfig(target_r=…) and so on, which keep the first
            vectors of each module. Adapters that were trained without NormAL's penalty want ClipConfig(target_r=…, sort=True).
        optimizer: that trains the adapter, whichever torch optimizer or wrapper; of vectors that stay (of the clip: all that are left) the
            state stays bit for bit, that of NoRM's and SVD's new vectors starts anew. It must be given where there is one: it would
            keep state of the old shapes. Factors of modules that lose their update leave its groups.
        adapter_name: which adapter (without it: the active one); others stay as they are.
    Returns: `ShearReport`: ranks before and after, scores or singular values of each module.
    Raises: TypeError (no PeftModel, no configuration, an optimizer whose state cannot follow), ValueError (not exactly one of config and
        the amounts; an amount that does not fit; NaN; DoRA and other layers that are no plain LoRA of a linear layer; an adapter
        whose initialisation changed the base weights; an optimizer without its factors); nothing has changed then.
    """
    if not is_peft_model(peft_model):
        raise TypeError(f"prune: peft_model must be a PeftModel, got {type(peft_model).__name__}")
    amounts = {"target_r": target_r, "budget": budget, "threshold": threshold}
    given = [name for name, value in {"config": config, **amounts}.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"prune: exactly one of config, target_r, budget and threshold must be given, got {', '.join(given) or 'none'}"
        )
    config = ClipConfig(**amounts) if config is None else config
    return shear(peft_model, config, optimizer=optimizer, adapter_name=adapter_name)
