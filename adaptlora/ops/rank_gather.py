"""Chosen rows of many tensors into new memory: how factors and optimizer state move when ranks change."""

import torch

from . import _backend
from ._library import library, register


def flat_gather_ref(sources, rows, counts) -> list[torch.Tensor]:
    """`rank_gather` in plain torch operations, its row lists end to end."""
    outs = []
    for source, chosen in zip(sources, rows.split(counts), strict=True):
        out = source.new_zeros(len(chosen), source.shape[1])
        kept = chosen >= 0
        out[kept.to(out.device)] = source[chosen[kept].to(source.device)]
        outs.append(out)
    return outs


def rank_gather_ref(sources, rows) -> list[torch.Tensor]:
    """`rank_gather` in plain torch operations."""
    sources, *flat = _flat(sources, rows)
    if not sources:
        return []
    _check_range(sources, *flat)
    return flat_gather_ref(sources, *flat)


def _flat(sources, rows) -> tuple[list, torch.Tensor, list[int]]:
    """Checked sources, their row lists end to end (int64, on the CPU) and the lengths of these."""
    sources, rows = list(sources), list(rows)
    if len(rows) != len(sources):
        raise ValueError(f"rank_gather: rows must be as long as sources, {len(sources)}, got {len(rows)}")
    for i, source in enumerate(sources):
        name = f"rank_gather: sources[{i}]"
        if not isinstance(source, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(source).__name__}")
        if source.layout != torch.strided or source.is_complex():
            raise TypeError(f"{name} must be real and strided, got {source.dtype}, {source.layout}")
        if source.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(source.shape)}")
        if source.device != sources[0].device:
            raise ValueError(f"{name} must be on the device of sources[0], {sources[0].device}, got {source.device}")
    converted = {}
    for i, chosen in enumerate(rows):
        if id(chosen) not in converted:
            converted[id(chosen)] = _indices(i, chosen)
    taken = [converted[id(chosen)] for chosen in rows]
    return (
        sources,
        torch.cat(taken) if taken else torch.empty(0, dtype=torch.int64, device="cpu"),
        [len(chosen) for chosen in taken],
    )


def _indices(i: int, chosen) -> torch.Tensor:
    rule = f"rank_gather: rows[{i}] must be a list, a range or a 1-d tensor of integers"
    try:
        indices = torch.as_tensor(chosen, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{rule}, got {chosen!r}") from error
    if indices.dim() != 1 or (indices.numel() and indices.dtype not in (torch.int32, torch.int64)):
        raise TypeError(f"{rule}, got {indices.dtype} of shape {tuple(indices.shape)}")
    return indices.to(torch.int64)


def _check_range(sources, rows, counts) -> None:
    limits = torch.tensor([source.shape[0] for source in sources], device="cpu")
    owners = torch.arange(len(counts), device="cpu").repeat_interleave(torch.tensor(counts, device="cpu"))
    bad = ((rows < -1) | (rows >= limits[owners])).nonzero()
    if len(bad):
        i, index = int(owners[bad[0, 0]]), int(rows[bad[0, 0]])
        raise ValueError(
            f"rank_gather: rows[{i}] must hold indices from -1 to {int(limits[i]) - 1} (sources[{i}].shape[0] - 1), got {index}"
        )


@register("rank_gather(Tensor[] sources, Tensor rows, SymInt[] counts) -> Tensor[]")
def _rank_gather(sources, rows, counts):
    """`rows`: the row lists end to end, int64 on the CPU; `counts`: their lengths."""
    _check_range(sources, rows, counts)
    # Bytes are copied, whatever they stand for: the device alone decides.
    kernels = _backend.kernels(sources[0].new_empty(0, dtype=torch.float32), "rank_gather") if rows.numel() else None
    return (kernels.rank_gather if kernels else flat_gather_ref)(sources, rows, counts)


@torch.library.register_fake("adaptlora::rank_gather", lib=library)
def _(sources, rows, counts):
    return [source.new_empty(count, source.shape[1]) for source, count in zip(sources, counts, strict=True)]


def _backward(ctx, *grads):
    raise RuntimeError("adaptlora::rank_gather: not differentiable: it moves factors and state, outside of any graph")


torch.library.register_autograd("adaptlora::rank_gather", _backward, lib=library)


def gather_rows(sources: list[torch.Tensor], rows: list[list[int]]) -> list[torch.Tensor]:
    """`rank_gather` for callers that have seen to their sources and lists: of the rules it checks only that of the range."""
    flat = torch.tensor([row for chosen in rows for row in chosen], dtype=torch.int64, device="cpu")
    return torch.ops.adaptlora.rank_gather(sources, flat, [len(chosen) for chosen in rows])


def rank_gather(sources, rows) -> list[torch.Tensor]:
    """
    out_i[j] = source_i[rows_i[j]], or zeros where rows_i[j] = −1, of every tensor in one launch: bit for bit, no arithmetic.

    Args:
        sources: list of (R_i, L_i), any real dtypes, one device, any strides.
        rows: as many lists, ranges or 1-d int64 / int32 tensors of indices in [−1, R_i), in any order, repeated or not; they are
            read on the CPU, and an object given for several sources only once.
    Returns: list of (len(rows_i), L_i), dtype of source_i, contiguous, each in memory of its own.
    Raises: ValueError (lengths, shapes, devices, indices), TypeError (dtype, layout, rows); RuntimeError if differentiated.
    Saved for backward: nothing, there is none.   Deterministic: yes.
    """
    sources, *flat = _flat(sources, rows)
    return torch.ops.adaptlora.rank_gather(sources, *flat) if sources else []
