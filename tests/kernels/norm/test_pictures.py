"""layer_norm_2d of pictures whose pixels lie side by side (csrc/cpu/norm_picture_kernels.cpp): the bits of the kernel that reads any other strides."""

from __future__ import annotations

import pytest
import torch

from fusewire import ops
from fusewire.kernels.library import CPU
from tests.kernels.isa_levels import run_at
from tests.kernels.norm.cases import AFFINE, DTYPES, inputs, served
from tests.tolerance import assert_exact

pytestmark = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
# Around the vectors, the chunks and the sums of every dtype and level; below the 16 channels of a pivot
CHANNELS = (1, 3, 15, 16, 17, 40, 63, 65, 130, 300, 1050)
# Less and more than a tile of every dtype, none and some left over; channels that lie 1024 bytes apart
SIZES = ((4, 4), (5, 13), (1, 33), (70, 1), (8, 64))


def pictures(channels: int, height: int, width: int, dtype: torch.dtype, affine: str) -> tuple:
    """x, weight and bias; the means of some pixels are many of their standard deviations."""
    v = inputs(height * width, channels, dtype, "layer-2d", affine)
    x = v["x"].view(2, channels, height, width).clone()
    x[:, :, ::2, ::3] = (x[:, :, ::2, ::3].float() / 64 + 50).to(dtype)
    return x, v["weight"], v["bias"]


@pytest.mark.parametrize("numerics", ("exact", "close"))
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order(dtype, channels, numerics):
    """memory-format, tail: contiguous, channels-last and a view between others, all the same bits."""
    for (height, width), affine in zip(SIZES, (*AFFINE, *AFFINE)):
        x, weight, bias = pictures(channels, height, width, dtype, affine)
        want = ops.layer_norm_2d(x.contiguous(memory_format=torch.channels_last), weight, bias, numerics=numerics)
        got = ops.layer_norm_2d(x, weight, bias, numerics=numerics)
        assert got.is_contiguous()
        assert_exact(got, want, (height, width))
        view = torch.stack([torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)], 2)[:, :, 1]
        assert_exact(ops.layer_norm_2d(view, weight, bias, numerics=numerics), want, (height, width, "view"))
    assert served("layer-2d") == (3 * len(SIZES), 0)


@pytest.mark.parametrize("numerics", ("exact", "close"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours(dtype, numerics):
    """A pixel's result does not depend on those beside it: one whose mean is far off, which is summed once more, and one that is NaN."""
    x, weight, bias = pictures(70, 6, 11, dtype, "weight-bias")
    changed = x.clone()
    changed[0, :16, 2, 3], changed[0, 16:, 2, 3] = 0, 50
    changed[1, :, 4, 5] = torch.nan
    want, got = (ops.layer_norm_2d(t, weight, bias, numerics=numerics) for t in (x, changed))
    assert served("layer-2d") == (2, 0)
    assert got[1, :, 4, 5].isnan().all()
    got[0, :, 2, 3], got[1, :, 4, 5] = want[0, :, 2, 3], want[1, :, 4, 5]
    assert_exact(got, want)


@pytest.mark.parametrize("level", ("base", "avx2", "avx512"))
def test_isa_levels(level):
    run_at(level, __file__, "test_neighbours or (test_order and (65 or 300 or 15))")
