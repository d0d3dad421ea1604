"""NormAL's penalty over all modules of a model with its gradient, and the proximal step, float32, r = 8.

What is counted and who takes part: adaptlora/benchmarks/penalty.py. There is no base product here: the floor moves the bytes that must be
moved over one flat buffer.
"""

import pytest

from adaptlora.benchmarks.penalty import penalty_case, shrink_case
from adaptlora.benchmarks.timing import default_device


@pytest.mark.parametrize("model", ["minilm", "smollm2"])
def test_penalty(measure, model):
    measure(penalty_case(model, default_device()))


@pytest.mark.parametrize("model", ["minilm", "smollm2"])
def test_shrink(measure, model):
    measure(shrink_case(model, default_device()))
