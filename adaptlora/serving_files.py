"""
Adapter folders for servers that read one rank and one scaling for all modules, and for stock PEFT alike.

vLLM 0.30 computes for every module          [vllm/lora/peft_helper.py; LoRALayerWeights.optimize]

    ΔW = s · B A,    s = lora_alpha / r, or lora_alpha / √r with use_rslora,

r and lora_alpha of adapter_config.json, whatever rank_pattern and alpha_pattern say (its issue 59799), and sizes its buffers by
max_lora_rank ≥ r. PEFT takes both from the patterns where they name the module. Files in which s is 1 by either rule, the scaling
being in B, mean the same to both.
"""

from pathlib import Path

from torch import Tensor
from torch.nn.functional import pad as padded

from . import io
from .lora_files import peft, peft_config
from .nora_files import check_finite


def write(adapter, path, *, pad: bool | int, fold_residual: bool) -> None:
    """Write an Adapter as a folder for vLLM; see `Adapter.save`."""
    if adapter.saved:
        raise ValueError(
            'save: modules_to_save must be empty for format="vllm", which loads low-rank factors alone, got '
            f'{list(adapter.saved)} (save(format="merged") writes a whole model)'
        )
    if adapter.config.lora_bias:
        raise ValueError('save: lora_bias must be False for format="vllm", which adds no bias, got True')
    check_finite(adapter)
    factors = io.plain_factors(adapter, fold_residual=fold_residual)
    config = io.peft_description(adapter, {name: lora_A.shape[0] for name, (lora_A, _) in factors.items()})
    scalings = {name: adapter.layers[name].scaling for name in factors}
    _write("save", path, config, factors, scalings, pad)


def export(path, out, *, pad: bool | int = False) -> None:
    """
    Write the PEFT adapter folder `path` as one for vLLM, as `Adapter.save(format="vllm")` does, without its model. The base weight that
    PEFT stores beside the factors of a head is left out: servers have the base.

    Args: out: the folder to write, another one than `path`.   pad: as in `Adapter.save`.
    Raises: FileNotFoundError, ValueError (a damaged or unsupported adapter; modules_to_save or lora_bias; an
        adapted convolution; pad), OSError, before anything is written.
    """
    path, out = Path(path), Path(out)
    if out.resolve() == path.resolve():
        raise ValueError(f"export: out must not be the adapter itself, got {str(out)!r}")
    file = peft.read(path, "export")
    biased = [name for name, module in file.modules.items() if module.bias is not None]
    if biased or file.config.get("lora_bias"):
        raise ValueError(
            f"export: {path}: lora_bias must be false for vLLM, which adds no bias, got biases of {len(biased)} modules"
        )
    if file.saved():
        raise ValueError(
            f"export: {path}: tensors must be lora_A and lora_B for vLLM, which loads no modules_to_save, got {next(iter(file.saved()))!r}"
        )
    for name, keys in file.keys.items():
        shape = tuple(file.tensors[keys["lora_A"]].shape)
        if len(shape) != 2:
            raise ValueError(
                f"export: {path}: {name} must be a linear layer for vLLM, got a convolution with lora_A of shape {shape}"
            )
    factors = {name: (module.lora_A, module.lora_B) for name, module in file.modules.items()}
    scalings = {name: module.scaling for name, module in file.modules.items()}
    _write("export", out, file.config, factors, scalings, pad)


def _write(op: str, path, config: dict, factors: dict, scalings: dict[str, float], pad: bool | int) -> None:
    ranks = {name: lora_A.shape[0] for name, (lora_A, _) in factors.items()}
    r = _common_rank(op, ranks, pad)
    own = {} if pad else peft_config.pattern({name: rank for name, rank in ranks.items() if rank != r}, ranks)
    config = config | {
        "r": r,
        "lora_alpha": r,
        "use_rslora": False,
        "rank_pattern": own,
        "alpha_pattern": own,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    folded = {name: _folded(op, name, *pair, scalings[name], r if pad else 0) for name, pair in factors.items()}
    peft.write_folder(Path(path), config, peft.factor_tensors(folded), {})


def _common_rank(op: str, ranks: dict[str, int], pad: bool | int) -> int:
    """The rank that the file gives for all modules: the largest, or `pad`."""
    name, largest = max(ranks.items(), key=lambda item: item[1])
    if isinstance(pad, bool):
        return largest
    if not isinstance(pad, int) or pad < 1:
        raise ValueError(f"{op}: pad must be True, False or an integer > 0, got {pad!r}")
    if pad < largest:
        raise ValueError(f"{op}: pad must be at least the largest rank, {largest} of {name}, got {pad}")
    return pad


def _folded(op: str, name: str, lora_A: Tensor, lora_B: Tensor, scaling: float, rank: int) -> tuple[Tensor, Tensor]:
    """A and scaling · B, computed in float64 and rounded once to B's dtype, with zeros up to `rank` vectors."""
    lora_A, lora_B = lora_A.detach().cpu(), lora_B.detach().cpu()
    scaled = (lora_B.double() * scaling).to(lora_B.dtype)
    if not scaled.isfinite().all():
        raise ValueError(f"{op}: {name}: scaling · lora_B must be finite in {scaled.dtype}, got an overflow")
    more = max(0, rank - lora_A.shape[0])
    return padded(lora_A, (0, 0, 0, more)).contiguous(), padded(scaled, (0, more)).contiguous()
