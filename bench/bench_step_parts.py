"""What adaptive rank adds to a training step, as a part of that step: the penalty with its gradient, the proximal step, a rank change.

The rank change takes every module from r = 8 to ranks that average 4, with its gradients and AdamW's state, and frees the rest.
Bytes that these must move: adaptlora/benchmarks/work.py.
"""

import pytest

from adaptlora.benchmarks.models import MODELS, Ours, batch_for, build, fill, normal, shared_copy
from adaptlora.benchmarks.penalty import our_shrink
from adaptlora.benchmarks.rank_change import RankChange, target_ranks
from adaptlora.benchmarks.timing import default_device


def penalty(trained: Ours):
    def run():
        trained.optimizer.zero_grad()
        trained.adapter.penalty().backward()

    return run


@pytest.mark.parametrize("name", ["tiny", "minilm", "smollm2"])
def test_parts(compare, quick, name):
    if quick != (name == "tiny"):
        pytest.skip("--quick runs a tiny BERT alone")
    dims = MODELS[name]
    model = build(name).to(default_device())
    batch = batch_for(name, dims.texts, dims.tokens, default_device())
    trained = {kind: Ours(shared_copy(model), normal(0.1, kind, model=name)) for kind in ("gradient", "proximal")}
    changing = Ours(shared_copy(model), normal(0.1, "gradient", model=name))
    for each in (*trained.values(), changing):
        fill(each)
        each.step(batch)  # AdamW has state from here on
    ranks = target_ranks(changing.adapter.layers)
    pairs = {path: layer.pair for path, layer in changing.adapter.layers.items()}
    change = RankChange(pairs, changing.optimizer, ranks)
    change()
    for path, pair in pairs.items():
        assert pair.rank == pair.capacity == ranks[path]
        assert all(len(rows) == ranks[path] for rows in change.rows(path))
    layers = trained["proximal"].adapter.layers.values()
    factors = [layer.lora_A for layer in layers], [layer.lora_B for layer in layers]
    compare(
        name,
        {
            "the step, NormAL, dropout 0.1": lambda: trained["gradient"].step(batch),
            "penalty and its gradient": penalty(trained["gradient"]),
            "proximal step": lambda: our_shrink(*factors),
            "rank change of every module": change,
        },
        floor="the step, NormAL, dropout 0.1",
        rounds=11,
        facts={"texts": dims.texts, "tokens": dims.tokens, "modules": len(ranks)},
    )
