"""The dropout mask on a GPU: any tile of it from (seed, row, column) alone, with the bits of `adaptlora.ops._dropout`."""

import torch
import triton
import triton.language as tl

from .launch import launch_on


@triton.jit
def dropout_keep_tile(seed, offs_m, k_start, threshold, BLOCK_K: tl.constexpr):
    """
    keep[m, k] = (word[k & 3] >> 8) >= threshold,   word = Philox4x32-10(counter (k >> 2, m, 0, 0), key seed)

    Args:
        seed: int64 scalar.   offs_m: (BLOCK_M,) rows.   k_start: first column, a multiple of 4.   threshold: p · 2²⁴.
    Returns: int1 (BLOCK_M, BLOCK_K), columns k_start … k_start + BLOCK_K − 1 in order.

    One Philox block makes four neighbouring columns, so the counters are a (BLOCK_M, BLOCK_K / 4) tile.
    """
    # Rows and column blocks meet in the third round: until then each word is as small as what it depends on.
    row = offs_m.to(tl.uint32)[:, None]
    block = ((k_start >> 2) + tl.arange(0, BLOCK_K // 4)).to(tl.uint32)[None, :]
    zero = tl.zeros((1, 1), tl.uint32)
    word0, word1, word2, word3 = tl.philox(seed, block, row, zero, zero)
    least = threshold.to(tl.uint32)
    even = tl.interleave((word0 >> 8) >= least, (word2 >> 8) >= least)
    odd = tl.interleave((word1 >> 8) >= least, (word3 >> 8) >= least)
    return tl.interleave(even, odd)


@triton.jit(do_not_specialize=["M", "K", "threshold"])
def _dropout_keep_kernel(seed_ptr, keep_ptr, M, K, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """keep (M, K) as bytes; one program owns a (BLOCK_M, BLOCK_K) tile."""
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    keep = dropout_keep_tile(tl.load(seed_ptr), offs_m, pid_k * BLOCK_K, threshold, BLOCK_K)
    address = offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(keep_ptr + address, keep.to(tl.int8), mask=(offs_m < M)[:, None] & (offs_k < K)[None, :])


def dropout_keep(seed: torch.Tensor, M: int, K: int, threshold: int) -> torch.Tensor:
    """The whole mask, bool (M, K) on the device of `seed` (0-dim int64): True where x is kept. For tests."""
    keep = torch.empty((M, K), dtype=torch.int8, device=seed.device)
    block_m, block_k = 32, 128
    with launch_on(seed):
        _dropout_keep_kernel[(triton.cdiv(M, block_m), triton.cdiv(K, block_k))](
            seed, keep, M, K, threshold, BLOCK_M=block_m, BLOCK_K=block_k
        )
    return keep.view(torch.bool)
