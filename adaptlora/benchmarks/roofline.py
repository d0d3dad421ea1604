"""The limits of this machine, measured in the run that uses them, and how near a time is to them.

Roofline time of a `Work` = max(bytes / bandwidth, FLOPs / peak); a provider's share of it = roofline time / its time.

Bandwidth is measured for memory of several sizes, as the best of four streams, since each counts what it must read and write and none is
the fastest everywhere: a copy, a triad a + s·b → c, a dot product (reads alone) and a scaling in place. A case takes the figure of its own
footprint, between two sizes interpolated: what fits into a cache is held to that cache's speed, not to the memory's. Peak is the best of
square products, by dtype. Both are with the threads that torch has then; a share above 1 means that something else ran on the machine
while they were measured. On a GPU they are replays of CUDA graphs that find the cache cold; the launch of one is in them, so that the
figures of a few MiB are those of launches, as the times of cases of that size are.
"""

import bisect
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .timing import Timer
from .work import Work

MIB = 2**20
SIZES = tuple(MIB * 2**i for i in range(10))  # 1 MiB … 512 MiB
QUICK_SIZES = (MIB, 64 * MIB)
EDGES, QUICK_EDGES = (512, 1024, 2048), (512,)
GPU_EDGES = (2048, 4096, 8192)


@dataclass
class Limits:
    """
    bandwidth: bytes a second by footprint, ascending.   peak: FLOPs a second by dtype ("float32").
    cache: bytes of the last-level cache, None where unknown, and on a GPU, where every call finds it cold.
    not_measured: {dtype: why}.   not_captured: why streams or products were timed without a CUDA graph.
    """

    bandwidth: dict[int, float]
    peak: dict[str, float]
    threads: int
    cache: int | None = None
    not_measured: dict[str, str] = field(default_factory=dict)
    not_captured: dict[str, str] = field(default_factory=dict)

    def bandwidth_at(self, footprint: int) -> float:
        """Bytes a second for memory of that size: interpolated in both logarithms, the last figure beyond the ends."""
        sizes = list(self.bandwidth)
        i = bisect.bisect_left(sizes, footprint)
        if i == 0 or i == len(sizes):
            return self.bandwidth[sizes[min(i, len(sizes) - 1)]]
        low, high = sizes[i - 1], sizes[i]
        part = math.log(footprint / low) / math.log(high / low)
        return self.bandwidth[low] ** (1 - part) * self.bandwidth[high] ** part

    def times(self, work: Work) -> dict[str, float | None]:
        """Seconds that its bytes and its FLOPs take at least; None for FLOPs in a dtype whose peak is not known."""
        peak = self.peak.get(dtype_name(work.dtype))
        flops = None if work.flops and peak is None else work.flops / peak if work.flops else 0.0
        return {"memory": work.bytes / self.bandwidth_at(work.touched), "compute": flops}

    def seconds(self, work: Work) -> float | None:
        """Roofline time; None where the peak of its dtype is not known."""
        times = self.times(work)
        return None if times["compute"] is None else max(times.values())

    def describe(self, work: Work, seconds: float) -> dict:
        """What a measured time of that work means: rates, roofline time in ms, share of it, and which limit it is."""
        rates = {"gb_per_s": round(work.bytes / seconds / 1e9, 3), "gflop_per_s": round(work.flops / seconds / 1e9, 3)}
        counted = {"bytes": work.bytes, "flops": work.flops, "footprint": work.touched, **rates}
        least = self.seconds(work)
        if least is None:
            return counted
        times = self.times(work)
        bound = max(times, key=times.get)
        if bound == "memory" and self.cache is not None and work.touched <= self.cache:
            bound = "cache"
        return counted | {"roofline_ms": 1e3 * least, "roofline_share": round(least / seconds, 4), "bound": bound}

    def content(self) -> dict:
        """As it is written to JSON: GB/s by MiB, GFLOP/s by dtype."""
        return {
            "threads": self.threads,
            "gb_per_s_by_mib": {f"{size / MIB:g}": round(rate / 1e9, 2) for size, rate in self.bandwidth.items()},
            "gflop_per_s": {dtype: round(rate / 1e9, 1) for dtype, rate in self.peak.items()},
            "last_level_cache_mib": None if self.cache is None else self.cache / MIB,
            "not_measured": self.not_measured,
            **({"not_captured": self.not_captured} if self.not_captured else {}),
        }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bf16_unusable(device: torch.device) -> str | None:
    """Why bf16 is not measured on a device; None where it has instructions for it."""
    if device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return None
    return "this processor has no bf16 instructions"


def last_level_cache(device: torch.device) -> int | None:
    """Bytes of the largest cache of the first core, as Linux tells; None on a GPU, whose timer clears the cache before each call."""
    if device.type == "cuda":
        return None
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes), default=None)


def measure(timer: Timer, *, quick: bool = False) -> Limits:
    """The limits of the timer's device with torch's present threads. About 5 s on a CPU, 0.2 s when `quick`."""
    gpu = timer.device.type == "cuda"
    limits = Limits({}, {}, torch.get_num_threads(), last_level_cache(timer.device))
    for size in QUICK_SIZES if quick else SIZES:
        limits.bandwidth[size] = _bandwidth(timer, size, 3 if quick else max(5, min(50, 64 * MIB // size)))
    edges = QUICK_EDGES if quick else GPU_EDGES if gpu else EDGES
    reason = bf16_unusable(timer.device)
    if reason:
        limits.not_measured["bfloat16"] = reason
    for dtype in (torch.float32, *([] if reason else [torch.bfloat16])):
        limits.peak[dtype_name(dtype)] = max(_gemm_rate(timer, edge, dtype, 3 if quick else 7) for edge in edges)
    limits.not_captured = dict(getattr(timer, "not_captured", {}))
    return limits


def _best(timer: Timer, run, repeats: int) -> float:
    run = timer.ready("limits", run)
    run()
    return min(timer.seconds(run) for _ in range(repeats))


def _bandwidth(timer: Timer, size: int, repeats: int) -> float:
    """Bytes a second of the fastest stream over `size` bytes of float32."""
    rates = []
    for arrays in (1, 2, 3):
        tensors = [torch.ones(size // 4 // arrays, device=timer.device) for _ in range(arrays)]
        held = sum(t.nbytes for t in tensors)
        match tensors:
            case [a]:
                streams = [(2 * held, lambda a=a: a.mul_(1.0))]
            case [a, b]:
                streams = [(held, lambda a=a, b=b: b.copy_(a)), (held, lambda a=a, b=b: torch.dot(a, b))]
            case [a, b, c]:
                streams = [(held, lambda a=a, b=b, c=c: torch.add(a, b, alpha=2.0, out=c))]
        rates += [moved / _best(timer, run, repeats) for moved, run in streams]
    return max(rates)


def _gemm_rate(timer: Timer, edge: int, dtype: torch.dtype, repeats: int) -> float:
    """FLOPs a second of an edge × edge product."""
    a, b = (torch.randn(edge, edge, device=timer.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * edge**3 / _best(timer, lambda: torch.mm(a, b, out=out), repeats)
