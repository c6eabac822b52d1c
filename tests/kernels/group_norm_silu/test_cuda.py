"""The group_norm_silu CUDA kernels with every thread on the CPU (tests/kernels/cuda_on_cpu): values, parts, layouts. (Races and speed: tests/gpu.)"""

import pytest
import torch

from fusewire.kernels.group_norm_silu import cuda
from tests.kernels.group_norm_silu.cases import FORMATS, MANY_CHANNELS, OPTIONS, call, in_format, inputs, stock, wide
from tests.kernels.interpreted import ON_GPU
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tails; a chunk over several channels; one channel a group; groups that whole chunks fill, and a pixel's chunks too; several parts and blocks; five and
# three dimensions
SHAPES = [((1, 3, 5, 7), 1), ((1, 12, 1, 3), 2), ((2, 10, 6, 6), 10), ((1, 32, 8, 8), 4), ((1, 6, 61, 53), 1), ((1, 8, 3, 5, 7), 2), ((2, 12, 67), 3)]


@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(in_cuda, dtype, memory_format, shape, groups):
    """tail: close keeps the rule, in x's memory format."""
    for options in OPTIONS:
        v = inputs(shape, dtype, options, memory_format)
        before = {name: tensor.clone() for name, tensor in v.items()}
        for silu in (True, False):
            with in_cuda("group_norm_silu"):
                got = call(v, groups, silu=silu, numerics="close")
            want = stock(v, groups, silu=silu)
            assert_close(got, stock(wide(v), groups, silu=silu), want, options)
            assert got.stride() == (v["x"] if ON_GPU else want).stride()
        assert all(torch.equal(before[name], v[name]) for name in v)


@pytest.mark.parametrize("dtype, shape, groups", MANY_CHANNELS, ids=str)
def test_many_channels(in_cuda, dtype, shape, groups):
    v = inputs(shape, dtype, "all", "channels_last")
    with in_cuda("group_norm_silu"):
        got = call(v, groups, numerics="close")
    assert_close(got, stock(wide(v), groups), stock(v, groups))


def test_parts_depend_on_the_group_alone():
    """A tile each, 8192 elements in bfloat16, 4096 in float32; from 64 tiles on (256 of a channels-last picture) there are several to a part."""
    assert [cuda.parts_of(320, 32, pixels, False, 2) for pixels in (1, 4096, 65536, 2**20)] == [1, 5, 40, 160]
    assert [cuda.parts_of(128, 32, pixels, False, 4) for pixels in (1, 4096, 65536, 2**20, 2**24)] == [1, 4, 64, 128, 2048]
    assert [cuda.parts_of(320, 32, pixels, True, 2) for pixels in (1, 24, 25, 4096, 2**18)] == [1, 1, 2, 171, 683]
    assert cuda.parts_of(2048, 32, 9, True, 4) == 3  # the large block, whose threads have four pixels each


@pytest.mark.parametrize("options", ("plain", "all"))
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype, outlier", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_parts_of_several_tiles(in_cuda, monkeypatch, dtype, outlier, memory_format, options):
    """cancellation, tail: the first tile's mean is not the part's. A mean of 100 with a deviation of 0.01; the first tile, and it alone, around 0."""
    monkeypatch.setattr(cuda, "FEW", (1, 1))
    shape, groups = (2, 4, 57, 101), 2
    assert cuda.parts_of(4, groups, 57 * 101, memory_format != "contiguous", dtype.itemsize) == 1
    v = inputs(shape, dtype, options, memory_format)
    if dtype is torch.float32:
        v["x"].mul_(0.01).add_(100)
    if outlier:
        v["x"][:, :, :41 if memory_format == "contiguous" else 11] -= 100
    with in_cuda("group_norm_silu"):
        got = call(v, groups, numerics="close")
    assert_close(got, stock(wide(v), groups), stock(v, groups))


def test_few_and_many_parts(in_cuda, monkeypatch):
    """64 parts are put together by every block of the norm, 65 by a kernel of their own."""
    monkeypatch.setattr(cuda, "FEW", (65, 65))
    for parts, pixels in ((64, 64 * 4096), (65, 64 * 4096 + 4)):
        assert cuda.parts_of(1, 1, pixels, False, 4) == parts
        v = inputs((1, 1, 4, pixels // 4), torch.float32)
        with in_cuda("group_norm_silu"):
            got = call(v, 1, numerics="close")
        assert_close(got, stock(wide(v), 1), stock(v, 1))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (2, 16, 8, 8)], ids=str)
def test_strided_input(in_cuda, layout, shape):
    """strided-input, misaligned: the same bits for any layout of a parameter; and of x where it keeps the memory format, copied or not."""
    v = inputs(shape, torch.bfloat16)
    groups = shape[1] // 2
    with in_cuda("group_norm_silu", 1 + len(v)):
        want = call(v, groups, numerics="close")
        for name in v:
            got = call({**v, name: layout(v[name])}, groups, numerics="close")
            if got.stride() == want.stride():
                assert_exact(got, want, name)
            else:
                assert_close(got, stock(wide(v), groups), stock(v, groups), name)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_samples_apart(in_cuda, memory_format):
    """Samples that are dense, but not next to each other nor aligned, are read in place."""
    base = torch.randn(2 * 3 * 8 * 9 * 9 + 1)[1:].view(3, 2, 8 * 9 * 9)[:, 0]
    x = base.view(3, 8, 9, 9) if memory_format == "contiguous" else base.view(3, 9, 9, 8).permute(0, 3, 1, 2)
    with in_cuda("group_norm_silu", 2):
        assert_exact(call({"x": x}, 4, numerics="close"), call({"x": in_format(x.clone(), memory_format)}, 4, numerics="close"))


def test_int32_stride(in_cuda):
    """int32-stride: three samples 2^30 elements apart (memory that is never touched in between)."""
    far = torch.as_strided(torch.empty(2**31 + 64, dtype=torch.bfloat16), (3, 4, 2, 4), (2**30, 8, 4, 1))
    v = inputs((3, 4, 2, 4), torch.bfloat16)
    far.copy_(v["x"])
    with in_cuda("group_norm_silu", 2):
        assert_exact(call({**v, "x": far}, 2, numerics="close"), call(v, 2, numerics="close"))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_batch_coupling(in_cuda, memory_format):
    v = inputs((5, 6, 41, 53), memory_format=memory_format)
    with in_cuda("group_norm_silu", 2):
        whole = call(v, 1, numerics="close")
        assert_exact(call({name: t if t.dim() == 1 else t[3:4] for name, t in v.items()}, 1, numerics="close"), whole[3:4])


@pytest.mark.parametrize("memory_format", FORMATS)
def test_nondeterminism(in_cuda, cuda_machine, memory_format):
    """Threads, warps and blocks in the opposite order: a barrier that is missing would give other bits."""
    v = inputs((2, 24, 23, 19), memory_format=memory_format)
    with in_cuda("group_norm_silu", 2):
        forward = call(v, 3, numerics="close")
        cuda_machine.reverse(True)
        try:
            backward = call(v, 3, numerics="close")
        finally:
            cuda_machine.reverse(False)
    assert_exact(forward, backward)


@pytest.mark.parametrize("outlier", (False, True), ids=("plain", "outlier"))
@pytest.mark.parametrize("memory_format", FORMATS)
def test_cancellation(in_cuda, memory_format, outlier):
    """Mean 100, deviation 0.01, over several parts; and with a first value, about which sums are taken, far from all others."""
    v = inputs((1, 6, 61, 53), options="plain", memory_format=memory_format)
    v["x"] = 100 + 0.01 * v["x"]
    if outlier:
        v["x"][0, 0, 0, 0] = 101
    with in_cuda("group_norm_silu"):
        got = call(v, 1, silu=False, numerics="close")
    want = stock(wide(v), 1, silu=False)
    assert ((got - want).abs().max() / want.abs().max()) <= 1e-5
    assert_close(got, want, stock({"x": v["x"].contiguous()}, 1, silu=False))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_fp16_overflow(in_cuda, memory_format):
    v = inputs((1, 8, 9, 9), torch.float16, "affine", memory_format)
    v["x"] = torch.where(torch.rand_like(v["x"]) > 0.5, 1000.0, -1000.0).half()
    with in_cuda("group_norm_silu"):
        assert torch.isfinite(call(v, 2, numerics="close")).all()


@pytest.mark.parametrize("shape", ((0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3)), ids=str)
def test_empty(in_cuda, shape):
    with in_cuda("group_norm_silu"):
        assert call(inputs(shape), 2, numerics="close").shape == shape


@pytest.mark.parametrize("memory_format", FORMATS)
def test_eps(in_cuda, memory_format):
    v = inputs((1, 4, 6, 6), options="plain", memory_format=memory_format)
    v["x"] = v["x"] * 1e-4
    for eps in (1e-5, 1e-6):
        with in_cuda("group_norm_silu"):
            assert_close(call(v, 2, eps=eps, numerics="close"), stock(wide(v), 2, eps), stock(v, 2, eps))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_special_values(in_cuda, memory_format):
    """A NaN reaches its group, and no other; so does an infinity."""
    v = inputs((2, 6, 5, 7), options="affine", memory_format=memory_format)
    v["x"][0, 1, 2, 3], v["x"][1, 5, 0, 0] = torch.nan, torch.inf
    with in_cuda("group_norm_silu"):
        got = call(v, 3, numerics="close")
    assert got.isnan().reshape(2, 3, -1).all(2).tolist() == [[True, False, False], [False, False, True]]
    assert got.isnan().reshape(2, 3, -1).any(2).tolist() == [[True, False, False], [False, False, True]]


def test_what_it_leaves_to_others(in_cuda):
    for channels, dtype, served in ((2048, torch.float32, True), (2052, torch.float32, False), (4104, torch.bfloat16, False)):
        for memory_format in FORMATS:
            v = inputs((1, channels, 2, 2), dtype, "plain", memory_format)
            assert bool(cuda.why_not(v["x"], 4, None, None, 1e-5, None, None, None, True, False)) is (memory_format == "channels_last" and not served)
    assert cuda.why_not(v["x"], 4, None, None, 1e-5, None, None, None, True, True) == "numerics='exact' keeps PyTorch's own norm"
