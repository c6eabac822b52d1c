"""The tolerances can fail: each way of rounding that is not to the nearest is told from the one that is."""

from __future__ import annotations

import pytest
import torch

from tests.tolerance import assert_unbiased

INTEGER = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
DTYPES = pytest.mark.parametrize("dtype", INTEGER, ids=str)


def values(ties: bool = False) -> torch.Tensor:
    """2^20 float64 numbers of either sign over four binades; with ``ties`` every second one lies in the middle of two bfloat16 numbers."""
    x = torch.rand(2**20, dtype=torch.float64) + 1
    x = torch.ldexp(x, torch.randint(-2, 2, x.shape)) * torch.randn_like(x).sign()
    return x.float().view(torch.int32).bitwise_and(-(2**15)).view(torch.float32).double() if ties else x


def towards_zero(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The neighbour in ``dtype`` whose magnitude is not greater."""
    nearest = x.to(dtype)
    return (nearest.view(INTEGER[dtype]) - (nearest.double().abs() > x.abs()).to(INTEGER[dtype])).view(dtype)


def next_magnitude(x: torch.Tensor) -> torch.Tensor:
    return (x.view(INTEGER[x.dtype]) + 1).view(x.dtype)


def neighbours(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest number of ``dtype`` that is not above ``x``, and the smallest that is not below."""
    inner = towards_zero(x, dtype)
    outer = torch.where(inner.double() == x, inner, next_magnitude(inner))
    return torch.where(x > 0, inner, outer), torch.where(x > 0, outer, inner)


@DTYPES
def test_rounding_to_nearest_is_unbiased(dtype):
    for x in (values(), values(ties=True))[:2 if dtype is torch.bfloat16 else 1]:
        assert_unbiased(x.to(dtype), x)


@DTYPES
def test_truncation_is_biased(dtype):
    """biased-cast, vacuous: over both signs the errors of truncation cancel, so that their plain mean is 0; it fails all the same."""
    x = values()
    got = towards_zero(x, dtype)
    assert ((got.double() - x) / x.abs()).mean().abs() < 0.02 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="-0[.](49|50)[0-9]* units in the last place away from zero"):
        assert_unbiased(got, x)


@DTYPES
def test_rounding_up_or_down_is_biased(dtype):
    x = values()
    for got, sign in zip(neighbours(x, dtype), "-+", strict=True):
        with pytest.raises(AssertionError, match=rf"[{sign}]0[.](49|50)[0-9]* units in the last place upwards"):
            assert_unbiased(got, x)


def test_rounding_of_ties_is_seen_where_there_are_ties():
    x = values(ties=True)
    below, above = neighbours(x, torch.bfloat16)
    inner = towards_zero(x, torch.bfloat16)
    for tie, direction in ((above, "upwards"), (below, "upwards"), (inner, "away"), (torch.where(x > 0, above, below), "away")):
        got = torch.where((x - below.double()) == (above.double() - x), tie, x.to(torch.bfloat16))
        with pytest.raises(AssertionError, match=rf"0[.]2[45][0-9]* units in the last place {direction}"):
            assert_unbiased(got, x)


@pytest.mark.parametrize("share", (0.1, 0.05))
def test_a_part_that_is_truncated_is_seen(share):
    """As a kernel's tail may be: 0.02 units are a 25th of what truncation loses."""
    x = values()
    cut = int(share * x.numel())
    with pytest.raises(AssertionError, match="away from zero"):
        assert_unbiased(torch.cat([towards_zero(x[:cut], torch.bfloat16), x[cut:].bfloat16()]), x)


def test_what_could_not_fail_is_refused():
    """Few elements, results without rounding, NaN, another shape."""
    x = values()
    exact = x.bfloat16()
    for got, want, words in ((exact[:100], x[:100], "too few"), (exact, exact.double(), "not rounded"), (torch.full_like(x, torch.nan).bfloat16(), x, "nan"),
                             (exact, x[None], "shape")):
        with pytest.raises(AssertionError, match=words):
            assert_unbiased(got, want)


def test_an_element_near_zero():
    """As a sum's has, whose terms were rounded: a million units of its own last place, which say nothing about how the sum is rounded. It is measured by
    ``least`` where that is said, and by its own unit otherwise."""
    x = values()
    x[:2] = 1e-8
    got = x.bfloat16()
    got[:2] = 1e-4
    assert_unbiased(got, x, least=1 / 16)
    with pytest.raises(AssertionError, match="away from zero"):
        assert_unbiased(got, x)
