"""The tolerance rule must reject what it exists to reject: mutations of a right result, in every dtype."""

import math

import numerics
import pytest
import torch
import torch.nn.functional as F
from numerics import FLOOR, assert_accurate, assert_all_accurate, errors, laid_out


@pytest.fixture(params=FLOOR, ids=str)
def results(request):
    """(a right result, the exact one, eager's) of a product; the right one is eager's on permuted summands."""
    x, weight = torch.randn(96, 130).to(request.param), torch.randn(160, 130).to(request.param)
    order = torch.randperm(130)
    exact = F.linear(x.double(), weight.double())
    return F.linear(x[:, order], weight[:, order]), exact, F.linear(x, weight)


def one_element(out):
    out[17, 33] += out.float().pow(2).mean().sqrt()


def one_not_a_number(out):
    out[17, 33] = math.nan


def one_infinite(out):
    out[17, 33] = math.inf


def one_row_missing(out):
    out[17] = 0


def last_column_missing(out):
    out[:, -1] = 0


def zeroed(out):
    out.zero_()


def negated(out):
    out.neg_()


def two_percent_larger(out):
    out.mul_(1.02)


def rows_swapped(out):
    out[[3, 4]] = out[[4, 3]]


MUTATIONS = [
    one_element,
    one_not_a_number,
    one_infinite,
    one_row_missing,
    last_column_missing,
    zeroed,
    negated,
    two_percent_larger,
    rows_swapped,
]


def test_right_result_passes(results):
    assert_accurate("y", *results)


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_mutation_fails(results, mutate):
    out, exact, eager = results
    mutate(out)
    with pytest.raises(AssertionError, match="y: error"):
        assert_accurate("y", out, exact, eager)


def test_broken_eager_excuses_nothing(results):
    out, exact, eager = results
    eager[0, 0] = math.nan
    with pytest.raises(AssertionError, match="y: error"):
        assert_accurate("y", out, exact, eager)


@pytest.mark.parametrize(
    "change", [lambda out: out[:-1], lambda out: out.unsqueeze(0), lambda out: out.to(torch.complex64)]
)
def test_other_shape_or_dtype_fails(results, change):
    out, exact, eager = results
    with pytest.raises(AssertionError, match=r"shape|dtype"):
        assert_accurate("y", change(out), exact, eager)


def test_exact_result_must_be_float64():
    y = torch.ones(3)
    with pytest.raises(AssertionError, match="must be float64"):
        assert_accurate("y", y, y, y)


def test_missing_gradient_fails():
    y = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_all_accurate({"y": y}, {"y": y, "dx": y}, {"y": y, "dx": y})
    with pytest.raises(AssertionError, match="dx: error"):
        assert_all_accurate({"y": y, "dx": 0 * y}, {"y": y, "dx": y}, {"y": y, "dx": y})


def test_errors_worked_by_hand():
    exact = torch.tensor([3.0, 0.0, -4.0], dtype=torch.float64)
    out = torch.tensor([3.0, 1.0, -4.0])
    assert errors(out, exact) == [1 / 5, 1 / 4]
    assert errors(out, torch.zeros(3, dtype=torch.float64)) == [26**0.5, 4.0]
    assert errors(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64)) == [0.0, 0.0]


def test_zero_result_admits_only_the_floor():
    exact = torch.zeros(3, dtype=torch.float64)
    assert_accurate("dA", torch.zeros(3), exact, torch.zeros(3))
    with pytest.raises(AssertionError, match="dA: error"):
        assert_accurate("dA", torch.full((3,), 1e-5), exact, torch.zeros(3))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded", "strided"])
def test_laid_out_keeps_values(layout):
    values = torch.randn(3, 5, 7)
    view = laid_out(values, layout)
    assert torch.equal(view, values)
    assert view.is_contiguous() == (layout == "contiguous")


def test_unknown_layout():
    with pytest.raises(ValueError, match="unknown layout 'diagonal'"):
        numerics.laid_out(torch.ones(2, 2), "diagonal")
