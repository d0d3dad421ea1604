"""What the tests of adaptlora._C compare with: the equations of a layer in float64 torch and an independent Philox."""

import functools

import numpy as np
import pytest
import torch

FLOAT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = 0x1234_5678_9ABC_DEF1
SCALING = 0.75


def philox4x32_10(counter, key):
    """counter: four uint64 arrays holding 32-bit values, key: two ints -> four such arrays [Salmon et al., 2011]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    for _ in range(10):
        p0 = c0 * np.uint64(0xD2511F53)
        p1 = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


@functools.cache
def dropout_bits(seed, M, K):
    """(M, K) uint64: the 32 random bits of every element."""
    column, row = np.meshgrid(np.arange((K + 3) // 4, dtype=np.uint64), np.arange(M, dtype=np.uint64))
    zero = np.zeros_like(row)
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    return np.stack(philox4x32_10((column, row, zero, zero), key), axis=-1).reshape(M, -1)[:, :K]


def threshold_of(p):
    return round(p * 2**24)


def keep_mask(seed, M, K, threshold):
    return torch.from_numpy((dropout_bits(seed, M, K) >> np.uint64(8)) >= threshold)


def reference(x, weight, bias, A, B, E, p, seed, dy, dtype=torch.float64):
    """y, S and all gradients as the equations say, in `dtype`."""
    x, weight, A, B, dy = (t.to(dtype) for t in (x, weight, A, B, dy))
    E = torch.ones(len(A), dtype=dtype) if E is None else E.to(dtype)
    e = SCALING * E
    mask = keep_mask(seed, *x.shape, threshold_of(p)) if p > 0 else torch.ones_like(x, dtype=torch.bool)
    xd = torch.where(mask, x / (1 - p), 0)
    S = xd @ A.T
    y = x @ weight.T + (S * e) @ B.T
    if bias is not None:
        y = y + bias.to(dtype)
    dS = (dy @ B) * e
    G = dy.T @ S
    return {
        "y": y,
        "S": S,
        "dx": dy @ weight + torch.where(mask, dS @ A / (1 - p), 0),
        "dA": dS.T @ xd,
        "dB": G * e,
        "dE": SCALING * (G * B).sum(0),
    }


def references(*args):
    """(exact, eager): float64, and what torch makes of it in the dtypes of the kernels' results, S and dS in float32."""
    exact, in_float32 = reference(*args), reference(*args, dtype=torch.float32)
    x, A, B, E = (args[i] for i in (0, 3, 4, 5))
    in_x_dtype = in_float32 if x.dtype == torch.float32 else reference(*args, dtype=x.dtype)
    dtypes = {"S": torch.float32, "dA": A.dtype, "dB": B.dtype, "dE": torch.float32 if E is None else E.dtype}
    eager = {name: in_x_dtype[name] for name in ("y", "dx")}
    return exact, eager | {name: in_float32[name].to(dtype) for name, dtype in dtypes.items()}


def inputs(M, K, N, R, dtype=torch.float32, factor_dtype=None, p=0.0, bias=True, rank_scale=True):
    """The arguments of `reference`."""
    g = torch.Generator().manual_seed(M + 7 * K + 13 * N + 31 * R)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    factor_dtype = factor_dtype or dtype
    A = (normal(R, K) / K**0.5).to(factor_dtype)
    B = normal(R, N).to(factor_dtype).t()
    E = normal(R).to(factor_dtype) if rank_scale else None
    b = normal(N).to(dtype) if bias else None
    weight = (normal(N, K) / K**0.5).to(dtype)
    return normal(M, K).to(dtype), weight, b, A, B, E, p, SEED, normal(M, N).to(dtype)


@pytest.fixture(autouse=True)
def thread_count_restored(poisoned):
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
