"""
One LoRA layer over M, K = N, R, dropout and dtype, one axis at a time around a centre; drawn into results/ too.

On a CPU M = 512, K = N = 1024, R = 8, dropout 0.05, float32 is the centre: 2.15 GFLOP of base products, 0.10 of the adapter, 21 MB.
The adapter's share of FLOPs is 1.5 R (1/K + 1/N): 2.3 % at the centre, 9 % at K = N = 256, 38 % at R = 128.
"""

import pytest

from adaptlora.benchmarks.case import NotRun, Options
from adaptlora.benchmarks.layer import sweep, sweep_case, title
from adaptlora.benchmarks.timing import default_device

OPTIONS = {quick: Options(default_device(), quick=quick) for quick in (False, True)}
POINTS = {(title(point), quick): (point, axes) for quick, o in OPTIONS.items() for point, axes in sweep(o).items()}


@pytest.mark.parametrize(("name", "small"), POINTS, ids=[name for name, _ in POINTS])
def test_sweep(measure, quick, name, small):
    if small != quick:
        pytest.skip("the other of --quick's grid and the whole one")
    case = sweep_case(*POINTS[name, small], OPTIONS[quick])
    if isinstance(case, NotRun):
        pytest.skip(case.reason)
    measure(case)
