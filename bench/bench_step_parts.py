"""What adaptive rank adds to a training step, as a part of that step: the penalty with its gradient, the proximal step, a rank change.

The rank change takes every module from r = 8 to ranks that average 4, with its gradients and AdamW's state, and frees the rest.
Bytes it must move: read and write the kept half of the factors and of two moments, 24 bytes for each kept number: 4.0 MB for
MiniLM, 29 MB for SmolLM2-135M. The penalty: see bench_rank_penalty.py.
"""

import pytest
from providers import TARGET, Ours, R, batch_for, fill, load, normal, shared_copy

from adaptlora.ops import rank_shrink_
from adaptlora.ranks import commit_ranks

STEP = 1e-6


class RankChange:
    """Every module to its rank in `ranks`; `prepare`, which is not timed, brings all back to r = 8."""

    def __init__(self, trained: Ours, ranks: dict[str, int]):
        self.pairs = {name: layer.pair for name, layer in trained.adapter.layers.items()}
        self.ranks = ranks

    def prepare(self) -> None:
        commit_ranks(self.pairs, dict.fromkeys(self.pairs, R))

    def __call__(self) -> None:
        commit_ranks(self.pairs, self.ranks, compact=True)
        pair = next(iter(self.pairs.values()))
        (optimizer,) = pair.optimizers
        assert pair.rank == pair.capacity == optimizer.state[pair.lora_A]["exp_avg"].shape[0]


def penalty(trained: Ours):
    def run():
        trained.optimizer.zero_grad()
        trained.adapter.penalty().backward()

    return run


@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_parts(compare, quick, name):
    if quick and name != "minilm":
        pytest.skip("--quick runs MiniLM alone")
    texts, tokens = {"minilm": (2, 16) if quick else (8, 64), "smollm2": (4, 64)}[name]
    model = load(name)
    batch = batch_for(name, texts, tokens)
    trained = {kind: Ours(shared_copy(model), normal(0.1, kind, model=name)) for kind in ("gradient", "proximal")}
    changing = Ours(shared_copy(model), normal(0.1, "gradient", model=name))
    for each in (*trained.values(), changing):
        fill(each)
        each.step(batch)  # AdamW has state from here on
    names = list(changing.adapter.layers)
    ranks = {name: TARGET + (1 if i % 2 else -1) * (i // 2 % 3) for i, name in enumerate(names)}
    assert sum(ranks.values()) == TARGET * len(ranks)
    factors = [
        [layer.lora_A for layer in trained["proximal"].adapter.layers.values()],
        [layer.lora_B for layer in trained["proximal"].adapter.layers.values()],
    ]
    providers = {
        "the step, NormAL, dropout 0.1": lambda: trained["gradient"].step(batch),
        "penalty and its gradient": penalty(trained["gradient"]),
        "proximal step": lambda: rank_shrink_(*factors, STEP),
        "rank change of every module": RankChange(changing, ranks),
    }
    compare(
        name,
        providers,
        floor="the step, NormAL, dropout 0.1",
        rounds=11,
        facts={"texts": texts, "tokens": tokens, "modules": len(ranks)},
    )
