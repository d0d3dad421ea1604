"""
Where a LoRA layer's time goes on a CPU: PEFT's, operator by operator, and each of our kernels'.

    python bench/cpu_breakdown.py [--threads 1]

M = 512, r = 8, float32, dropout 0.05. PEFT's operators are torch's profiler's self times in parts of the frozen layer's step. Kernels are
timed in turn, each after a product that empties the caches, as in a model: medians.
"""

import argparse
import statistics
import time
from collections import defaultdict

import torch
from torch import nn

from adaptlora.benchmarks.layer import SCALING, R, copy_of, our_layer, peft_layer, step
from adaptlora.ops import _backend
from adaptlora.ops._dropout import threshold
from adaptlora.ranks import RankedPair, commit_ranks

M, P = 512, 0.05
# The operators of PEFT's layer, by what they are for; the shape of the first operand tells the base's products from the skinny ones.
KINDS = {
    "aten::bernoulli_": "drawing the mask",
    "aten::mul": "multiplying by the mask and by lora_alpha / r",
    "aten::div_": "multiplying by the mask and by lora_alpha / r",
    "aten::add": "adding the update to y, the update's dx to dx",
    "aten::add_": "adding the update to y, the update's dx to dx",
}


def in_turn(runs: dict, rounds: int, before=lambda: None) -> dict[str, float]:
    """Median microseconds of each."""
    samples = defaultdict(list)
    for _ in range(rounds):
        for name, run in runs.items():
            before()
            start = time.perf_counter()
            run()
            samples[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in samples.items()}


def peft_by_operator(K: int, N: int, rounds: int = 30) -> None:
    base = nn.Linear(K, N).requires_grad_(False)
    x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, N)
    layer = peft_layer(base=copy_of(base), lora_A=torch.randn(R, K), lora_B=torch.randn(N, R), p=P)
    times = in_turn({"frozen": lambda: step(base, x, dy), "PEFT": lambda: step(layer, x, dy)}, rounds)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, acc_events=True
    ) as profile:
        for _ in range(rounds):
            step(layer, x, dy)
    kinds = defaultdict(float)
    for event in profile.key_averages(group_by_input_shape=True):
        kind = KINDS.get(event.key)
        if event.key in ("aten::mm", "aten::addmm"):
            skinny = any(R in shape for shape in event.input_shapes)
            kind = "skinny products" if skinny else "the two base products"
        if kind:
            kinds[kind] += event.self_cpu_time_total / rounds / times["frozen"]
    print(f"\nPEFT {K}×{N}: {times['PEFT'] / times['frozen']:.2f} of the frozen layer's step")
    for kind, part in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"  {part:5.2f}  {kind}")


def kernels(K: int, N: int, rounds: int = 200) -> None:
    C = _backend.extension()
    x, dy, W = torch.randn(M, K), torch.randn(M, N), torch.randn(N, K)
    A, B, y = torch.randn(R, K), torch.randn(R, N).t(), torch.zeros(M, N)
    seed = torch.tensor(7)
    runs = {"dropout_keep": lambda: C.dropout_keep(seed, M, K, threshold(P))}
    for name, options in (("", (0.0, 0, None)), (", dropout", (P, threshold(P), seed))):
        S = C.lora_delta_(y.clone(), x, A, B, None, 1.0, *options)
        runs[f"lora_delta_{name}"] = lambda o=options: C.lora_delta_(y, x, A, B, None, 1.0, *o)
        for need, gradients in (((1, 1, 1), "dx dA dB"), ((1, 0, 0), "dx"), ((0, 1, 0), "dA"), ((0, 0, 1), "dB")):
            wanted = (*map(bool, need), False)
            runs[f"lora_delta_backward {gradients}{name}"] = lambda o=options, s=S, w=wanted: C.lora_delta_backward(
                dy, x, s, A, B, None, 1.0, *o, *w
            )
    print(f"\nkernels {K}×{N}, µs")
    for name, microseconds in in_turn(runs, rounds, before=lambda: dy @ W).items():
        print(f"  {microseconds:8.0f}  {name}")


def one_token(K: int, N: int, rounds: int = 200) -> None:
    """What a call costs besides arithmetic: a layer's step with M = 1."""
    base = nn.Linear(K, N).requires_grad_(False)
    layer = our_layer(copy_of(base), torch.randn(R, K), torch.randn(N, R), P)
    x, dy = torch.randn(1, K, requires_grad=True), torch.randn(1, N)
    big, W = torch.randn(M, K), base.weight
    runs = {"frozen": lambda: step(base, x, dy), "adaptlora": lambda: step(layer, x, dy)}
    print(f"\none token through {K}×{N}, forward and backward, µs")
    for name, microseconds in in_turn(runs, rounds, before=lambda: big @ W.t()).items():
        print(f"  {microseconds:8.0f}  {name}")


def rank_change(modules: int = 210, K: int = 576, N: int = 576) -> None:
    pairs = {str(i): RankedPair(K, N, R) for i in range(modules)}
    optimizer = torch.optim.AdamW([p for pair in pairs.values() for p in pair.parameters()])
    for pair in pairs.values():
        pair.track(optimizer)
        for p in pair.parameters():
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    ranks = {name: 3 + i % 3 for i, name in enumerate(pairs)}
    change = in_turn(
        {"": lambda: commit_ranks(pairs, ranks, compact=True)},
        11,
        before=lambda: commit_ranks(pairs, dict.fromkeys(pairs, R)),
    )[""]
    print(f"\nrank change of {modules} modules with AdamW's state: {change / 1e3:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} thread(s), {_backend.extension().isa()}, r = {R}, lora_alpha = {SCALING * R:g}")
    for K, N in ((384, 384), (576, 1536)):
        peft_by_operator(K, N)
        kernels(K, N)
    one_token(384, 384)
    rank_change()


if __name__ == "__main__":
    main()
