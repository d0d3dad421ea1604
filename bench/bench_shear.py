"""NoRM on modules of real shapes, float32: adaptlora beside the released procedure, which is 11 full SVDs of N × K numbers a module.

FLOPs a module, N = K, l = r + 16 columns of the sketch: ours 11 products with W or Wᵀ, 22 N² l, and O(N l²); theirs 11 SVDs of about
20 N³ each. At N = 1024 and r = 64 that is 1.9 against 236 GFLOP, at N = 4096 30 against 15,000. Predicted: the ratio of these, 125 and
500, times what products run faster than SVDs (2 to 4).
Floor: ours, so that the ratio of the other row says how many times faster ours is.
"""

import pytest
import torch
from released_norm import released_candidate, released_search

from adaptlora import NoRMConfig
from adaptlora.lora_files import LoraModule
from adaptlora.pool import over
from adaptlora.shear.methods import method_for

SMOLLM2 = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]


def modules(shapes, r: int) -> list[tuple[LoraModule, torch.Tensor]]:
    """Updates that share directions with base weights whose spectra decay as trained ones do."""
    torch.manual_seed(0)
    made = []
    for i, (N, K) in enumerate(shapes):
        W = torch.randn(N, K) / K**0.5
        for scale in (8.0, 4.0, 2.0, 1.0):
            columns = max(1, int(8 / scale) ** 2)
            W += scale * (torch.randn(N, columns) @ torch.randn(columns, K)) / (N * K) ** 0.5
        made.append((LoraModule(str(i), torch.randn(r, K) / K**0.5, (W @ torch.randn(K, r)) / K**0.5, 1.0), W))
    return made


def ours(made) -> list[int]:
    method = method_for(NoRMConfig())
    weights = {module.name: W for module, W in made}
    found = {m.name: s for m, s in over(lambda m: method.module(m, lambda: weights[m.name]), [m for m, _ in made])}
    return [found[module.name] for module, _ in made]


def theirs(made) -> list[int]:
    return [released_search(module.lora_A, module.lora_B, W)[0] for module, W in made]


def check(made) -> None:
    """Ours against dense float64 arithmetic."""
    module, W = made[0]
    sheared = ours(made[:1])[0]
    U, S, Vh = torch.linalg.svd(module.lora_B.double() @ module.lora_A.double())
    c = sheared.rank
    kept = sheared.module.lora_B @ sheared.module.lora_A
    torch.testing.assert_close(kept.double(), (U[:, :c] * S[:c]) @ Vh[:c], rtol=0, atol=1e-5 * S[0].item())
    r, N = module.lora_A.shape[0], len(W)
    q = (U[:, :r].mT @ torch.linalg.svd(W.double()).U[:, :r]).square().sum(1)
    inside = q[:c].sum().item()
    exact = (inside + (r - c) * (r - inside) / (N - c)) / r
    assert abs(sheared.facts["phi"][c - 1] - exact) < 5e-3, (sheared.facts["phi"][c - 1], exact)


@pytest.mark.parametrize(
    ("case", "shapes", "r", "rounds"),
    [("24 modules 1024×1024", [(1024, 1024)] * 24, 64, 3), ("three blocks of SmolLM2-135M", SMOLLM2 * 3, 64, 3)],
    ids=["1024", "smollm2"],
)
def test_norm(compare, quick, case, shapes, r, rounds):
    if quick:
        shapes, r = [(N // 8, K // 8) for N, K in shapes[:3]], r // 8
    made = modules(shapes, r)
    check(made)
    ours(made)
    providers = {"adaptlora": lambda: ours(made), "as released": lambda: theirs(made)}
    compare(f"NoRM, {case}, r = {r}", providers, floor="adaptlora", rounds=rounds, warmup=0)


def test_a_large_module(compare, quick):
    """The released procedure's eleven SVDs take a quarter of an hour: the base's and one candidate's are timed, 2 of the 11."""
    N = 512 if quick else 4096
    made = modules([(N, N)], 64)
    module, W = made[0]
    ours(made)

    def part():
        torch.linalg.svd(W, full_matrices=False)
        released_candidate(module.lora_B @ module.lora_A, 64, 32, torch.Generator().manual_seed(0))

    providers = {"adaptlora": lambda: ours(made), "as released, 2 SVDs of 11": part}
    compare(f"NoRM, one module {N}×{N}, r = 64", providers, floor="adaptlora", rounds=1, warmup=0)


def test_all_of_smollm2(compare, quick):
    """All 210 modules with base subspaces, weights in memory."""
    made = modules(SMOLLM2 * (1 if quick else 30), 32)
    made = [(LoraModule(str(i), m.lora_A, m.lora_B, 1.0), W) for i, (m, W) in enumerate(made)]
    compare(
        f"NoRM, {len(made)} modules of SmolLM2-135M, r = 32",
        {"adaptlora": lambda: ours(made)},
        floor="adaptlora",
        rounds=3,
        warmup=0,
    )
