"""Groups, split reductions, ranks up to 256 and far addresses: the Triton kernels behind the ops, against float64."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_accurate
from test_lora_group import assert_right as assert_group_right
from test_lora_group import group, group_cases, name_of, samples_of

from adaptlora.kernels import launch, lora_group, lora_linear, partials
from adaptlora.ops import _backend
from adaptlora.ops import lora_group as lora_group_op

INTERPRETED = _backend.interpreting()
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; test_triton_interpret.py runs these in the interpreter", allow_module_level=True)
    pytestmark = pytest.mark.gpu

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
poisoned = pytest.mark.usefixtures("poisoned")
QKV = ({"N": 50, "R": 13}, {"N": 20, "R": 33}, {"N": 31, "R": 1, "rank_scale": False})
CASES = [case for case in group_cases() if case[0].dtype != FP64]


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setenv("ADAPTLORA_BACKEND", "triton")


def on_device(x, weights, biases, lora_As, lora_Bs, *, rank_scales=None, **options):
    """`lora_group` on the device that has the kernels, for operands and results on the CPU."""

    def moved(tensors):
        return None if tensors is None else [t if t is None else t.to(DEVICE) for t in tensors]

    lists = [moved(tensors) for tensors in (weights, biases, lora_As, lora_Bs)]
    ys = lora_group_op(x.to(DEVICE), *lists, rank_scales=moved(rank_scales), **options)
    return [y.cpu() for y in ys]


def assert_right(case, samples=None) -> None:
    # Tiles enter the matrix units in the dtype of x, so that this dtype's rounding counts for fp32 factors too.
    assert_group_right(samples or samples_of(case), case[0].p, on_device, precision=case[0].dtype)


@poisoned
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_groups(case):
    assert_right(case)


@poisoned
# Drawn alike in every run; after the eleventh they only vary it, at a second or two in the interpreter each.
@settings(max_examples=11, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 90),
    K=st.integers(1, 90),
    members=st.lists(st.fixed_dictionaries({"N": st.integers(1, 90), "R": st.integers(0, 40)}), min_size=1, max_size=4),
    dtype=st.sampled_from([FP32, BF16]),
    layout=st.sampled_from(["contiguous", "padded", "transposed"]),
    p=st.sampled_from([0.0, 0.3]),
)
def test_any_group(batch, K, members, dtype, layout, p):
    torch.manual_seed(0)
    assert_right(group(*members, batch=(batch,), K=K, dtype=dtype, x=layout, p=p))


@poisoned
@pytest.mark.parametrize(
    "case",
    [group(*QKV, batch=(130,), K=150, p=0.3), group({"R": 8}, batch=(520,), N=200, K=190, dtype=BF16)],
    ids=name_of,
)
def test_split_reductions_sum_to_the_same(case, monkeypatch):
    """Every reduction in as many parts as its steps allow, then in one."""
    calls = []
    monkeypatch.setattr(launch, "PARTIALS_SHARE", 1e6)
    for module in ("lora_shrink", "lora_da", "lora_ds_db"):
        monkeypatch.setattr(
            f"adaptlora.kernels.{module}.sum_partials", lambda *jobs: (calls.extend(jobs), partials.sum_partials(*jobs))
        )
    assert_right(case)
    assert calls and min(part.shape[0] for part, _ in calls) > 1
    calls.clear()
    monkeypatch.setattr(launch, "PARTIALS_SHARE", 0.0)
    assert_right(case)
    # Only G, whose parts are blocks of rows whatever the share, is left to sum.
    assert all(part.shape[1:] == out.shape for part, out in calls)


@poisoned
@pytest.mark.parametrize("R", [129, 256])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_large_ranks(R, dtype):
    assert_right(group({"R": R}, {"R": 3}, batch=(40,), K=70, N=34, dtype=dtype, p=0.3))


@pytest.mark.parametrize("module", ["lora_shrink", "lora_da", "lora_ds_db"])
def test_an_unsplit_reduction_launches_no_sum(module, monkeypatch):
    launched = []
    monkeypatch.setattr(f"adaptlora.kernels.{module}.sum_partials", lambda *jobs: launched.append(jobs))
    assert_right(group({"R": 5}, batch=(30,), dtype=BF16))
    assert not launched


def far_rows(rows: int, columns: int, dtype) -> torch.Tensor:
    """(rows, columns) whose rows are 2³⁰ elements apart, in memory that is only touched where there are elements."""
    step = 2**30
    storage = torch.UntypedStorage(((rows - 1) * step + columns) * dtype.itemsize)
    far = torch.empty(0, dtype=dtype).set_(storage, 0, (rows, columns), (step, 1))
    return far.copy_(torch.randn(rows, columns))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU would really hold the memory between the rows")
def test_offsets_beyond_32_bits():
    """Row 3 of x and of dy lies 3 · 2³⁰ elements from row 0."""
    M, K, N, R = 4, 48, 32, 5
    x, dy = far_rows(M, K, BF16), far_rows(M, N, BF16)
    weight, A, B = torch.randn(N, K).to(BF16), torch.randn(R, K), torch.randn(R, N).t()
    results = []
    for rows, grads in ((x, dy), (x.contiguous(), dy.contiguous())):
        y, s = lora_linear.lora_linear(rows, weight, None, A, B, None, 0.5, 0.0, 0, None)
        dx, dA, dB, _ = lora_linear.lora_linear_backward(
            grads, rows, weight, s, A, B, None, 0.5, 0.0, 0, None, True, True, True, False
        )
        results.append({"y": y, "S": s, "dx": dx, "dA": dA, "dB": dB})
    for name, far in results[0].items():
        near = results[1][name]
        assert_accurate(name, far, near.double(), near, precision=BF16)


def test_a_dropped_mask_is_noticed():
    case = group({"R": 5}, {"R": 3}, batch=(40,), p=0.3)
    samples = samples_of(case)

    def without_dropout(*operands, **options):
        return on_device(*operands, **(options | {"dropout_p": 0.0}))

    assert_group_right(samples, 0.3, on_device)
    with pytest.raises(AssertionError):
        assert_group_right(samples, 0.3, without_dropout)


def test_masks_of_the_modules_are_independent():
    """Each module's S is that of the module alone with its own seed."""
    x, seeds = torch.randn(33, 50, device=DEVICE), [torch.tensor(s, device=DEVICE) for s in (3, 4)]
    A, B, W = (
        torch.randn(5, 50, device=DEVICE),
        torch.randn(5, 20, device=DEVICE).t(),
        torch.zeros(20, 50, device=DEVICE),
    )
    least = 1 << 22
    _, both = lora_group.lora_group(x, [W] * 2, [None] * 2, [A] * 2, [B] * 2, [None] * 2, [1.0] * 2, 0.25, least, seeds)
    for i, seed in enumerate(seeds):
        _, alone = lora_linear.lora_linear(x, W, None, A, B, None, 1.0, 0.25, least, seed)
        torch.testing.assert_close(both[:, 5 * i : 5 * i + 5], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(both[:, :5], both[:, 5:])
