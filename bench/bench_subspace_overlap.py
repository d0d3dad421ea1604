"""
subspace_overlap: ‖u_iᵀ U_base‖² of every column of an adapter's basis, NoRM's measure for every c at once, float32.

Bytes: both bases read, m numbers written: 4 (N m + N r + m). FLOPs: 2 N m r, and 2 m r for squares and sums.

Peers: the product, squared and summed, as one writes it, which is what the op does on a CPU; and the released procedure's form, a norm
for each c of its own: as many products as there are columns. There are 4 modules; each is a call.
"""

import pytest
import torch

from adaptlora.benchmarks.accuracy import assert_accurate
from adaptlora.benchmarks.timing import default_device
from adaptlora.benchmarks.work import Work
from adaptlora.ops import subspace_overlap, subspace_overlap_ref

DEVICE = default_device()
MODULES = 4
SIZES = [(576, 16, 256), (1024, 64, 256), (4096, 64, 256)]  # (N, m, r)


def product(U, U_base):
    return (U.mT @ U_base).square().sum(-1)


def one_by_one(U, U_base):
    """φ(c) = ‖U[:, :c]ᵀ U_base‖² of every c, and their differences."""
    sums = torch.stack([torch.linalg.matrix_norm(U[:, :c].mT @ U_base).square() for c in range(1, U.shape[1] + 1)])
    return sums.diff(prepend=sums.new_zeros(1))


@pytest.mark.parametrize(("N", "m", "r"), SIZES, ids=[f"{N}x{m}x{r}" for N, m, r in SIZES])
@torch.no_grad()
def test_overlap(compare, quick, N, m, r):
    if quick and SIZES[0] != (N, m, r):
        pytest.skip("--quick runs the smallest size")
    bases = [
        [torch.linalg.qr(torch.randn(N, columns)).Q.to(DEVICE) for columns in (m, r)]
        for _ in range(2 if quick else MODULES)
    ]
    functions = {"adaptlora": subspace_overlap, "torch, one product": product, "each c of its own": one_by_one}
    for U, U_base in bases:
        exact, plain = subspace_overlap_ref(U.double(), U_base.double()), product(U, U_base)
        for name, function in functions.items():
            found = function(U, U_base)
            # a difference of sums is as exact as the sums are
            triple = (
                (found, exact, plain)
                if function is not one_by_one
                else (found.cumsum(0), exact.cumsum(0), plain.cumsum(0))
            )
            assert_accurate(name, *triple)
    count = len(bases)
    compare(
        f"{count} modules, N = {N}, m = {m}, r = {r}",
        {name: lambda function=f: [function(*pair) for pair in bases] for name, f in functions.items()},
        floor="adaptlora",
        graphs=True,
        rounds=21,
        facts={"modules": count},
        work=Work(4 * count * (N * (m + r) + m), count * (2 * N * m * r + 2 * m * r)),
    )
