"""The rule itself: what holds, and above all what does not."""

import math

import pytest
import torch

from fusewire.parity import verdict
from fusewire.parity.verdict import measure, psnr
from tests import tolerance


def sides(dtype=torch.float32):
    """(stock, true): a float64 value and its computation in ``dtype`` with a visible error."""
    true = torch.randn(4, 33, dtype=torch.float64)
    return (true.to(dtype).float() * (1 + 1e-3)).to(dtype), true


def test_factors_are_those_of_the_test_suite():
    assert (verdict.MAX_FACTOR, verdict.MEAN_FACTOR, verdict.FLOAT64) == (tolerance.MAX_FACTOR, tolerance.MEAN_FACTOR, tolerance.FLOAT64)


@pytest.mark.parametrize("exact", [True, False])
def test_stock_itself_holds(exact):
    stock, true = sides()
    found = measure([stock.clone()], [stock], [true], exact)
    assert found.holds and found.equal and found.mismatch == 0 and found.max_error == found.stock_max_error > 0


def test_one_bit_breaks_exact_but_not_close():
    stock, true = sides()
    got = stock.clone()
    got[0, 0] = torch.nextafter(got[0, 0], torch.tensor(torch.inf))
    exact, close = (measure([got], [stock], [true], rule) for rule in (True, False))
    assert not exact.holds and "torch.equal" in exact.reason and exact.mismatch == pytest.approx(1 / 132)
    assert close.holds and not close.equal


@pytest.mark.parametrize("error, holds", [(1e-15, True), (1e-9, False)])
def test_float64_has_a_bound_though_stock_is_the_truth(error, holds):
    _, true = sides()
    assert measure([true * (1 + error)], [true], [true], False).holds is holds


@pytest.mark.parametrize("factor, holds", [(1.4, True), (1.6, False), (2.1, False)])
def test_close_bounds_the_mean_error(factor, holds):
    stock, true = sides()
    got = (true + factor * (stock.double() - true)).float()
    assert measure([got], [stock], [true], exact=False).holds is holds


def test_close_bounds_the_largest_error():
    stock, true = sides()
    got = stock.clone()
    got[1, 2] = (true[1, 2] + 2.5 * (stock.double() - true).abs().max()).float()
    found = measure([got], [stock], [true], exact=False)
    assert not found.holds and "maximum" in found.reason and "mean" not in found.reason


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_fails(exact, value):
    stock, true = sides()
    got = stock.clone()
    got[0, 0] = value
    assert not measure([got], [stock], [true], exact).holds


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t.double(), lambda t: t.bfloat16()])
def test_another_shape_or_dtype_fails(change):
    stock, true = sides()
    found = measure([change(stock)], [stock], [true], exact=False)
    assert not found.holds and "outputs are" in found.reason


def test_a_missing_output_fails():
    stock, true = sides()
    assert not measure([stock], [stock, stock], [true, true], exact=False).holds
    assert not measure([], [], [], exact=False).holds


def test_each_output_is_judged_alone():
    """A small output that is all wrong is not hidden behind a large one that is right."""
    stock, true = sides()
    small, small_true = stock[:1] * 1e-6, true[:1] * 1e-6
    assert not measure([stock, small * 2], [stock, small], [true, small_true], exact=False).holds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    true = torch.randn(5, 63, dtype=torch.float64)
    stock = true.to(dtype)
    assert measure([stock], [stock], [true], exact=False).holds
    assert not measure([stock * 1.1], [stock], [true], exact=False).holds


def test_psnr():
    picture = torch.full((3, 8, 8), 0.5)
    assert psnr(picture, picture) == math.inf
    assert psnr(picture + 0.1, picture) == pytest.approx(20.0, abs=1e-3)
    assert math.isnan(psnr(picture * math.nan, picture))
