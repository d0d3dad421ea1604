"""A rank change of every module of a model, r = 8 to ranks that average 4, with AdamW's moments: what is counted and who takes part is in
adaptlora/benchmarks/rank_change.py. As a part of a training step: bench_step_parts.py."""

import pytest

from adaptlora.benchmarks.rank_change import change_case
from adaptlora.benchmarks.timing import default_device


@pytest.mark.parametrize("model", ["minilm", "smollm2"])
def test_change(measure, quick, model):
    if quick and model != "minilm":
        pytest.skip("--quick runs MiniLM alone")
    measure(change_case(model, default_device()))
