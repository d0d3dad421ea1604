"""Counter-based dropout: one definition of the mask for every kernel, tiling and backend.

Element (m, k) of x (M, K) is kept when the top 24 bits of its Philox4x32-10 word reach `threshold(p)`. The word is lane
k & 3 of the block with counter (k >> 2, m, 0, 0) and key (low, high) of the 64-bit seed, so that any tile of the mask can be
regenerated without the rest and nothing (M, K) is ever stored.      [Salmon et al., SC 2011]
"""

import torch

_ROUND = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_BITS = 24


def threshold(p: float) -> int:
    """Smallest kept value of a 24-bit word: P(word < threshold) = p to within 2⁻²⁵."""
    return round(p * (1 << _BITS))


def new_seed(device: torch.device) -> torch.Tensor:
    """0-dim int64 seed from torch's default generator of `device`: `torch.manual_seed` and checkpointing reproduce it."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def as_seed(op: str, seed, device: torch.device) -> torch.Tensor:
    """`seed` (int, 0-dim int64 tensor or None for a new one) as the 0-dim int64 tensor that the kernels take."""
    if seed is None:
        return new_seed(device)
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"{op}: seed must fit in 64 bits with a sign, got {seed}")
        return torch.tensor(seed, dtype=torch.int64, device=device)
    if not isinstance(seed, torch.Tensor) or seed.dtype != torch.int64 or seed.dim() != 0:
        raise TypeError(f"{op}: seed must be an int or a 0-dim int64 tensor, got {seed!r}")
    if seed.device != device:
        raise ValueError(f"{op}: seed must be on the device of x, {device}, got {seed.device}")
    return seed


def _multiply(word: torch.Tensor, by: int) -> tuple[torch.Tensor, torch.Tensor]:
    # int64 wraps modulo 2⁶⁴, so that both halves of the unsigned product can be cut out of it.
    product = word * by
    return (product >> 32) & _LOW, product & _LOW


def philox(counter: list[torch.Tensor], seed: torch.Tensor) -> list[torch.Tensor]:
    """Philox4x32-10 of four int64 counters holding 32-bit words (any common shape); returns four such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        hi0, lo0 = _multiply(c0, _ROUND[0])
        hi1, lo1 = _multiply(c2, _ROUND[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return [c0, c1, c2, c3]


def dropout_keep_ref(seed: torch.Tensor, M: int, K: int, p: float) -> torch.Tensor:
    """The mask: bool (M, K) on the seed's device, True where x is kept."""
    blocks = (K + 3) // 4
    row = torch.arange(M, dtype=torch.int64, device=seed.device)[:, None].expand(M, blocks)
    block = torch.arange(blocks, dtype=torch.int64, device=seed.device)[None, :].expand(M, blocks)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device).expand(M, blocks)
    words = torch.stack(philox([block, row, zero, zero], seed), dim=-1).reshape(M, blocks * 4)[:, :K]
    return (words >> (32 - _BITS)) >= threshold(p)
