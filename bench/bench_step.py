"""A whole training step: forward, backward, AdamW; every linear of the blocks adapted, r = 8, float32; random weights.

MiniLM: 8 texts of 64 tokens, 36 modules. SmolLM2-135M: 4 texts of 64 tokens, 210 modules. Who takes part: adaptlora/benchmarks/step.py.

FLOPs of the base products, MiniLM with M = 512 tokens: 4·M·Σ NK = 21.7 G (y and dx). The factors add 6·M·Σ R(K + N) = 1.0 G at
R = 8 and half of it at an average rank of 4; attention 0.9 G. Bytes of the optimizer: 28 per trained number, 9.3 MB at R = 8. SmolLM2 with
M = 256: 108.7 G for the blocks, 29.0 G more for its output layer, the factors 3.8 G.
"""

import pytest

from adaptlora.benchmarks.case import Options
from adaptlora.benchmarks.step import bert_case, causal_case
from adaptlora.benchmarks.timing import default_device


def test_step(measure, quick):
    measure(bert_case("tiny" if quick else "minilm", Options(default_device(), quick=quick)))


def test_step_smollm2(measure, quick):
    if quick:
        pytest.skip("--quick runs a tiny BERT alone")
    measure(causal_case("smollm2", Options(default_device())))
