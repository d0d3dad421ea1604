"""
rank_gather: the rows that a rank change moves, factors and AdamW's two moments of every module of a model, float32, from r = 8 to ranks
that average 4, each keeping other vectors.

Bytes: what stays is read and written, 24 for each number of a factor that stays; no FLOPs. MiniLM: 4.0 MB, SmolLM2-135M: 29 MB.

Peers: `index_select`, tensor by tensor, with indices that are there already: along the rows of rank-major memory, and along the columns
of a B (N, r) as PEFT has it. What is timed is the gather alone; a rank change with all that is checked and reassigned is in
bench_step_parts.py and cost_growth.py.
"""

import pytest
import torch

from adaptlora.benchmarks import work
from adaptlora.benchmarks.models import MODELS, R
from adaptlora.benchmarks.penalty import factors
from adaptlora.benchmarks.rank_change import target_ranks
from adaptlora.benchmarks.timing import default_device
from adaptlora.ops import rank_gather, rank_gather_ref

STATES = 3  # a factor and its two moments


def kept_rows(modules: int) -> list[torch.Tensor]:
    """For each module which of its vectors stay, in ascending order: 4 in the mean, 2 to 6."""
    generator = torch.Generator().manual_seed(0)
    ranks = target_ranks(range(modules)).values()
    return [torch.randperm(R, generator=generator)[:rank].sort().values for rank in ranks]


def select_rows(sources, rows):
    return [source.index_select(0, chosen) for source, chosen in zip(sources, rows, strict=True)]


def select_columns(sources, rows):
    """The first half of the sources are A's (r, K), the second B's (N, r)."""
    half = len(sources) // 2
    pairs = list(zip(sources, rows, strict=True))
    return [s.index_select(0, r) for s, r in pairs[:half]] + [s.index_select(1, r) for s, r in pairs[half:]]


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_gather(compare, quick, model):
    if quick != (model == "tiny"):
        pytest.skip("the tiny model is --quick's")
    lora_As, lora_Bs = factors(model, default_device(), rank_major=True)
    chosen = kept_rows(len(lora_As))
    sides = [[f.detach().clone() for f in lora_As for _ in range(STATES)]]
    sides.append([f.detach().t().clone(memory_format=torch.contiguous_format) for f in lora_Bs for _ in range(STATES)])
    sources = [*sides[0], *sides[1]]
    as_peft = [*sides[0], *(rows.t().contiguous() for rows in sides[1])]
    rows = [r for r in chosen for _ in range(STATES)] * 2
    indices = [r.to(default_device()) for r in rows]  # where index_select wants them; rank_gather reads them on the CPU
    operands = {
        "adaptlora": (rank_gather, sources, rows),
        "index_select, rank-major": (select_rows, sources, indices),
        "index_select, B as in PEFT": (select_columns, as_peft, indices),
    }
    expected = rank_gather_ref(sources, rows)
    for name, (gather, of, taken) in operands.items():
        found = gather(of, taken)
        half = len(found) // 2
        if of is as_peft:
            found = [*found[:half], *(columns.t() for columns in found[half:])]
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True)), name
    kept = sum(f.numel() for f in expected) // STATES
    compare(
        f"{MODELS[model].title}: rows of factors and moments",
        {name: lambda o=operand: o[0](*o[1:]) for name, operand in operands.items()},
        floor="adaptlora",
        rounds=101,
        facts={"modules": len(chosen), "R": R, "tensors": len(sources)},
        work=work.rank_change(kept),
    )
