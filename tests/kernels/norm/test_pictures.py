"""layer_norm_2d of pictures whose pixels lie side by side (csrc/cpu/norm_picture*_kernels.cpp): the bits of the kernel that reads any other strides, and
gradients of the same accuracy."""

from __future__ import annotations

import pytest
import torch

from fusewire import ops
from fusewire.kernels.library import CPU
from tests.kernels.isa_levels import run_at
from tests.kernels.norm.cases import AFFINE, DTYPES, inputs, served, terms, true, wide
from tests.tolerance import assert_exact, assert_within

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


def gradients(v: dict, grad: torch.Tensor, function=ops.layer_norm_2d, **options) -> tuple[torch.Tensor, ...]:
    these = {name: None if t is None else t.detach().requires_grad_() for name, t in v.items()}
    return torch.autograd.grad(function(*these.values(), **options), [t for t in these.values() if t is not None], grad)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype, channels):
    """memory-format, tail, strided-grad: as near to float64 as those of channels-last pictures have to be, and the bits of a view between others."""
    for (height, width), affine in zip(SIZES, (*AFFINE, *AFFINE)):
        v = inputs(height * width, channels, dtype, "layer-2d", affine)
        v["x"] = v["x"].view(2, channels, height, width)
        v["x"][:, :1], v["x"][:, 1:2] = 2, -1  # no pixel's deviation is small against its values
        grad = torch.randn(v["x"].shape).to(dtype)
        want = gradients(wide(v), grad.double(), lambda x, weight, bias: true("layer-2d", {"x": x, "weight": weight, "bias": bias}))
        got, last = gradients(v, grad, numerics="close"), gradients({**v, "x": v["x"].contiguous(memory_format=torch.channels_last)}, grad, numerics="close")
        assert got[0].is_contiguous() and last[0].is_contiguous(memory_format=torch.channels_last)
        between = [torch.stack([torch.full_like(t, torch.nan), t, torch.full_like(t, torch.nan)], 2)[:, :, 1] for t in (v["x"], grad)]
        view = gradients({**v, "x": between[0]}, between[1], numerics="close")
        turned = gradients({**v, "x": v["x"].mT.contiguous().mT}, grad.mT.contiguous().mT, numerics="close")
        for name, *found, expected, plain in zip(("x", "weight", "bias"), got, view, turned, want, last, strict=False):
            assert_within(found[0], expected, 8, f"{name} {height} x {width}", plain, terms("layer-2d", v, grad, 1e-6)[name])
            assert_exact(found[1], found[0], (name, "view"))
            assert_exact(found[2], found[0], (name, "turned"))
    assert served("layer-2d", "_backward") == (4 * len(SIZES), 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_neighbours(dtype):
    """batch-coupling, nondeterminism: dx of a pixel does not depend on those beside it, nor its bits or those of the sums on the number of threads."""
    v, threads = dict(zip(("x", "weight", "bias"), pictures(70, 23, 31, dtype, "weight-bias"))), torch.get_num_threads()
    grad = torch.randn(v["x"].shape).to(dtype)
    want = gradients(v, grad, numerics="close")
    changed = v["x"].clone()
    changed[1, :, 22, 30] = torch.nan
    got = gradients({**v, "x": changed}, grad, numerics="close")[0]
    assert got[1, :, 22, 30].isnan().all()
    got[1, :, 22, 30] = want[0][1, :, 22, 30]
    assert_exact(got, want[0])
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert all(map(torch.equal, gradients(v, grad, numerics="close"), want)), n
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_gradient_alone(dtype):
    """Each gradient has the bits that it has beside the others."""
    v = dict(zip(("x", "weight", "bias"), pictures(17, 9, 5, dtype, "weight-bias")))
    grad = torch.randn(v["x"].shape).to(dtype)
    for name, want in zip(v, gradients(v, grad, numerics="close")):
        leaf = v[name].detach().requires_grad_()
        assert_exact(torch.autograd.grad(ops.layer_norm_2d(**{**v, name: leaf}, numerics="close"), leaf, grad)[0], want, name)
    assert served("layer-2d", "_backward") == (4, 0)


@pytest.mark.parametrize("level", ("base", "avx2", "avx512"))
def test_isa_levels(level):
    run_at(level, __file__, "test_neighbours or (test_order and (65 or 300 or 15)) or (test_gradients and (65 or 300)) or test_one_gradient_alone")
