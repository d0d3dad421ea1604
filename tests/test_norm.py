"""NoRM's choice against dense arithmetic written out, module by module."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptlora import NoRMConfig
from adaptlora.lora_files import LoraModule
from adaptlora.shear.methods import method_for
from adaptlora.shear.norm import candidates, expected_overlap, official_overlap

N, K, R = 60, 40, 10


def trained(N=N, K=K, R=R, dtype=torch.float64, **fields) -> tuple[LoraModule, torch.Tensor]:
    """A module and its base weight, whose leading directions the update shares in part, as a trained one's."""
    W = torch.randn(N, K, dtype=dtype) + 6 * torch.outer(torch.randn(N, dtype=dtype), torch.randn(K, dtype=dtype))
    B = torch.randn(N, R, dtype=dtype)
    B[:, 0] = 3 * W[:, 0]
    fields = {"scaling": 2.0} | fields
    return LoraModule("m", torch.randn(R, K, dtype=dtype), B, **fields), W


def shear(module, W, **config):
    return method_for(NoRMConfig(base_svd="exact", **config)).module(module, lambda: W)


def delta(sheared) -> torch.Tensor:
    return sheared.module.lora_B @ sheared.module.lora_A


def leading(matrix: torch.Tensor, c: int) -> torch.Tensor:
    """The best rank-c approximation."""
    U, S, Vh = torch.linalg.svd(matrix)
    return (U[:, :c] * S[:c]) @ Vh[:c]


def test_candidates():
    assert candidates(64, 0.1, 1) == [6, 12, 19, 25, 32, 38, 44, 51, 57, 64]
    assert candidates(8, 0.1, 1) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert candidates(64, 0.1, 5) == [32, 38, 44, 51, 57, 64]
    assert candidates(100, 0.29, 1) == [29, 58, 87, 100]
    assert candidates(1, 0.1, 1) == [1] and candidates(2, 0.3, 0) == [1, 2] and candidates(5, 1.0, 1) == [5]


def test_candidates_are_those_of_the_released_arithmetic():
    for r in range(1, 200):
        released = {max(1, int(r * (0.1 * i))) for i in range(1, 10)} | {r}
        assert candidates(r, 0.1, 1) == sorted(released)


def phi_expected(B, A, W, r) -> list[float]:
    """The equation, with dense matrices and one c after the other."""
    U = torch.linalg.svd(B @ A).U
    U_W = torch.linalg.svd(W).U[:, :r]
    values = []
    for c in range(1, r + 1):
        inside = (U[:, :c].mT @ U_W).square().sum().item()
        values.append((inside + (r - c) * (r - inside) / (len(W) - c)) / r)
    return values


@pytest.mark.parametrize("search", ["expected", "min"])
def test_search(search):
    module, W = trained()
    phi = phi_expected(module.lora_B, module.lora_A, W, R)
    sheared = shear(module, W, search=search)
    torch.testing.assert_close(torch.tensor(sheared.facts["phi"]), torch.tensor(phi))
    best = (max if search == "expected" else min)(phi)
    assert sheared.facts["c"] == phi.index(best) + 1 == sheared.rank < R and sheared.rank_before == R
    torch.testing.assert_close(delta(sheared), leading(module.lora_B @ module.lora_A, sheared.rank))
    assert sheared.module.scaling == 1.0


def test_expected_is_the_mean_over_random_directions():
    """r − c directions drawn at random beside the c kept ones: what rounding noise does in the released code."""
    module, W = trained()
    U, U_W = torch.linalg.svd(module.lora_B @ module.lora_A).U, torch.linalg.svd(W).U[:, :R]
    phi = shear(module, W).facts["phi"]
    for c in (1, 3, 7):
        kept, draws = U[:, :c], []
        for _ in range(4000):
            noise = torch.randn(N, R - c, dtype=torch.float64)
            noise = torch.linalg.qr(noise - kept @ (kept.mT @ noise)).Q
            draws.append(((kept.mT @ U_W).square().sum() + (noise.mT @ U_W).square().sum()) / R)
        draws = torch.stack(draws)
        assert abs(draws.mean() - phi[c - 1]) < 4 * draws.std() / math.sqrt(len(draws))


def test_a_prefix_sum_alone_would_always_keep_everything():
    module, W = trained()
    U, U_W = torch.linalg.svd(module.lora_B @ module.lora_A).U, torch.linalg.svd(W).U[:, :R]
    prefix = (U[:, :R].mT @ U_W).square().sum(1).cumsum(0)
    assert prefix.argmax() == R - 1 and shear(module, W).facts["c"] < R


def released(x, y, W, tau=0.1, seed=0):
    """The released search in its own order of operations: for each candidate a sketch, and a full SVD of the dense result."""
    generator = torch.Generator().manual_seed(seed)
    r = x.shape[0]
    U_W = torch.linalg.svd(W, full_matrices=False).U[:, :r]
    phi = {}
    for c in [*sorted({max(1, int(r * tau * s)) for s in range(1, 10)}), r]:
        product = y @ x
        if c < r:
            Q, _ = torch.linalg.qr(product @ torch.randn(product.shape[1], c, generator=generator).to(product))
            U_hat, S, Vt = torch.linalg.svd(Q.T @ product, full_matrices=False)
            product = (Q @ U_hat @ torch.diag(S)) @ Vt
        U = torch.linalg.svd(product, full_matrices=False).U[:, :r]
        phi[c] = torch.linalg.matrix_norm(U.T @ U_W).item() ** 2 / r
    return phi


def test_official_search_agrees_with_the_released_arithmetic():
    """
    What c singular directions contribute is the same; the r − c others are null directions of a rank-c matrix, of which LAPACK gives any.
    """
    module, W = trained()
    theirs = released(module.lora_A, module.lora_B, W)
    ours = shear(module, W, search="official").facts
    assert ours["candidates"] == list(theirs)
    assert [phi is not None for phi in ours["phi"]] == [c in theirs for c in range(1, R + 1)]
    U_W = torch.linalg.svd(W).U[:, :R]
    generator = torch.Generator().manual_seed(0)
    for c, phi in theirs.items():
        assert 0 <= ours["phi"][c - 1] <= 1
        sketch = torch.randn(K, c, generator=generator).to(W) if c < R else torch.eye(K, dtype=W.dtype)
        Q = torch.linalg.qr(module.lora_B @ module.lora_A @ sketch).Q[:, :c]
        known = (Q.mT @ U_W).square().sum().item() / R
        # The rest of either is at most R − c directions.
        assert (
            known - 1e-9 <= min(phi, ours["phi"][c - 1]) and max(phi, ours["phi"][c - 1]) <= known + (R - c) / R + 1e-9
        )
    torch.testing.assert_close(ours["phi"][R - 1], theirs[R])


def test_official_repeats_with_the_same_seed_and_depends_on_it():
    module, W = trained(dtype=torch.float32)
    runs = [shear(module, W, search="official", seed=seed).facts["phi"] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert all(shear(module, W, seed=seed).facts["c"] == shear(module, W).facts["c"] for seed in range(5))


def test_official_overlap_of_a_whole_update_is_exact():
    module, W = trained()
    product = module.lora_B @ module.lora_A
    U_W = torch.linalg.svd(W).U[:, :R]
    phi = official_overlap(product, U_W, R, R, torch.Generator())
    assert math.isclose(phi, (torch.linalg.svd(product).U[:, :R].mT @ U_W).square().sum().item() / R)


def test_minor_components():
    module, W = trained()
    sheared = shear(module, W, components="minor")
    U, S, Vh = torch.linalg.svd(module.lora_B @ module.lora_A)
    c = sheared.rank
    torch.testing.assert_close(delta(sheared), (U[:, R - c : R] * S[R - c : R]) @ Vh[R - c : R])
    U_W = torch.linalg.svd(W).U[:, :R]
    for c in range(1, R + 1):
        inside = (U[:, R - c : R].mT @ U_W).square().sum().item()
        assert math.isclose(sheared.facts["phi"][c - 1], (inside + (R - c) * (R - inside) / (N - c)) / R)


def test_pca_components():
    module, W = trained()
    sheared = shear(module, W, components="pca")
    product = module.lora_B @ module.lora_A
    axes = torch.linalg.svd(product - product.mean(0)).Vh[: sheared.rank]
    torch.testing.assert_close(delta(sheared), product @ axes.mT @ axes)
    whole = shear(module, W, components="pca", tau=1.0)
    torch.testing.assert_close(delta(whole), product)


@pytest.mark.parametrize("components", ["major", "minor", "pca"])
@pytest.mark.parametrize("metric", ["l2", "cos"])
def test_other_metrics(metric, components):
    module, W = trained()
    facts = [shear(module, W, metric=metric, components=components, tau=c / R, start=1).facts for c in (1, 4)]
    for c in (1, 4, R):
        kept = shear(module, W, components=components, metric=metric, tau=1.0 if c == R else c / R)
        method = method_for(NoRMConfig(base_svd="exact", components=components, metric=metric))
        update = delta(cut(method, module, W, c))
        value = {
            "l2": -torch.linalg.matrix_norm(update - W).item(),
            "cos": ((update * W).sum() / torch.linalg.matrix_norm(update) / torch.linalg.matrix_norm(W)).item(),
        }[metric]
        assert math.isclose(kept.facts["phi"][c - 1], value, rel_tol=1e-9) and facts[0]["phi"] == facts[1]["phi"]
    best = max(facts[0]["phi"])
    assert shear(module, W, metric=metric, components=components).facts["c"] == facts[0]["phi"].index(best) + 1


def cut(method, module, W, c):
    """What `method` keeps if it has to keep c components."""
    whole = method_for(dataclasses.replace(method.config, tau=1.0)).module(module, lambda: W).module
    return dataclasses.replace(
        method.module(module, lambda: W),
        module=dataclasses.replace(whole, lora_A=whole.lora_A[:c], lora_B=whole.lora_B[:, :c]),
    )


def test_keep_scaling_and_bias():
    bias = torch.randn(N, dtype=torch.float64)
    module, W = trained(bias=bias)
    dropped, kept = shear(module, W), shear(module, W, keep_scaling=True)
    assert (dropped.module.scaling, kept.module.scaling) == (1.0, 2.0)
    torch.testing.assert_close(delta(dropped), delta(kept))
    # The bias of lora_B acts as before.
    torch.testing.assert_close(dropped.module.scaling * dropped.module.bias, 2.0 * bias)
    assert torch.equal(kept.module.bias, bias)


def test_amplification():
    module, W = trained()
    facts = shear(module, W, amplification=True, metric="l2").facts
    update = 2.0 * module.lora_B @ module.lora_A
    U, _, Vh = torch.linalg.svd(update)
    U_W, _, Vh_W = torch.linalg.svd(W)
    norm = torch.linalg.matrix_norm
    expected = norm(update) / norm(U[:, :R].mT @ W @ Vh[:R].mT), norm(W) / norm(U_W[:, :R].mT @ update @ Vh_W[:R].mT)
    torch.testing.assert_close(facts["amplification"], expected[0].item())
    torch.testing.assert_close(facts["reverse_amplification"], expected[1].item())


def test_zero_vectors_are_not_counted_as_directions():
    module, W = trained()
    module.lora_A[6:] = 0
    module.lora_B[:, 6:] = 0
    phi = shear(module, W).facts["phi"]
    assert phi[5] == phi[6] == phi[R - 1]
    assert shear(module, W, tau=0.9).rank == 6, "c = 9 ties with c = 10; only six components are there to keep"


def test_a_bias_without_an_update_stays():
    bias = torch.randn(N, dtype=torch.float64)
    module, W = trained(bias=bias)
    sheared = shear(dataclasses.replace(module, lora_B=torch.zeros(N, R, dtype=torch.float64)), W)
    assert sheared.rank == 1 and not delta(sheared).any()
    torch.testing.assert_close(sheared.module.scaling * sheared.module.bias, 2.0 * bias)


def test_a_zero_update_is_gone():
    module, W = trained()
    sheared = shear(dataclasses.replace(module, lora_B=torch.zeros(N, R, dtype=torch.float64)), W)
    assert sheared.rank == 0 and sheared.facts["c"] == 1
    assert math.isclose(sheared.facts["phi"][0], R / N)


@pytest.mark.parametrize(("N", "K", "R"), [(5, 40, 10), (40, 5, 10), (5, 4, 10), (10, 40, 10), (1, 1, 1)])
def test_more_rank_than_rows_or_columns(N, K, R):
    module, W = trained(N, K, R)
    sheared = shear(module, W)
    assert 1 <= sheared.rank <= min(N, K, R) and all(0 <= phi <= 1 + 1e-12 for phi in sheared.facts["phi"])
    torch.testing.assert_close(delta(sheared), leading(module.lora_B @ module.lora_A, sheared.rank))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 12), st.integers(0, 100))
def test_overlap_is_a_share(N, K, R, seed):
    torch.manual_seed(seed)
    U, U_W = (torch.linalg.qr(torch.randn(N, min(N, K, R), dtype=torch.float64)).Q for _ in range(2))
    phi = expected_overlap((U.mT @ U_W).square().sum(1), R, N, U_W.shape[1])
    assert len(phi) == R and all(-1e-12 <= value <= 1 + 1e-12 for value in phi)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_stay_and_the_randomized_base_chooses_alike(dtype):
    module, W = trained()
    module = dataclasses.replace(module, lora_A=module.lora_A.to(dtype), lora_B=module.lora_B.to(dtype))
    exact = shear(module, W.to(dtype))
    randomized = method_for(NoRMConfig()).module(module, lambda: W.to(dtype))
    assert randomized.module.lora_A.dtype == randomized.module.lora_B.dtype == dtype
    assert randomized.facts["c"] == exact.facts["c"] and randomized.facts["base_residual"] > 0
    phi = torch.tensor([exact.facts["phi"], randomized.facts["phi"]])
    torch.testing.assert_close(phi[0], phi[1], rtol=0, atol=5e-3)


BAD = [
    ({"search": "best"}, r"NoRMConfig: search must be one of expected, official, min, got 'best'"),
    ({"components": "all"}, "components must be one of major, minor, pca, got 'all'"),
    ({"metric": "l1"}, "metric must be one of subspace, l2, cos, got 'l1'"),
    ({"base_svd": "fast"}, "base_svd must be one of randomized, exact, got 'fast'"),
    ({"tau": 0}, r"tau must be in \[0.001, 1\], got 0"),
    ({"start": -1}, "start must be an integer ≥ 0, got -1"),
    ({"seed": 1.5}, "seed must be an integer of 64 bits, got 1.5"),
    ({"search": "official", "metric": "l2"}, 'search "official" must go with components "major"'),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[str(next(iter(fields))) for fields, _ in BAD])
def test_bad_configuration(fields, message):
    with pytest.raises(ValueError, match=message):
        NoRMConfig(**fields)


def test_values_that_are_not_finite():
    module, W = trained()
    W[0, 0] = math.nan
    for fields in (
        {},
        {"metric": "cos"},
        {"metric": "l2", "search": "min"},
        {"search": "official"},
        {"base_svd": "exact"},
    ):
        with pytest.raises(ValueError, match="shear: the base weight of m must be finite, got 1 NaN"):
            method_for(NoRMConfig(**fields)).module(module, lambda: W)
    module.lora_A[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"low_rank_svd: lora_As\[0\] must be finite"):
        shear(module, W)
