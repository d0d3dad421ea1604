"""
low_rank_svd: U, S, Vh of B A of the modules of one block, from the factors, float32: `adaptlora.benchmarks.svd`.

Bytes and FLOPs: `benchmarks.work.low_rank_svd`: factors read, triplets written; 4 R² (K + N) FLOPs. The SVD of the (N, K) product has
about 20 N K min(N, K): 10⁴ times as many at K = N = 384, R = 8.
"""

import pytest

from adaptlora.benchmarks.svd import low_rank_case
from adaptlora.benchmarks.timing import default_device


@pytest.mark.parametrize("R", [8, 64])
@pytest.mark.parametrize("model", ["tiny", "minilm", "smollm2"])
def test_svd(measure, quick, model, R):
    if quick != (model == "tiny"):
        pytest.skip("the tiny model is --quick's")
    measure(low_rank_case(model, R, default_device()))
