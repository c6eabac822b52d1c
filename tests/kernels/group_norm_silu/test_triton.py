"""The group_norm_silu Triton kernels in the interpreter: indexing, masks, parts, layouts, forward and backward. (Races and speed: tests/gpu.)"""

import pytest
import torch

from fusewire.kernels.dispatch import forced
from fusewire.kernels.group_norm_silu import triton_kernel
from fusewire.kernels.tuning import GroupTile, cuda_arch, group_tile
from tests.kernels.group_norm_silu.cases import FORMATS, call, gradients, inputs, stock, wide
from tests.kernels.interpreted import DTYPES, ON_GPU, in_triton, needs_interpreter, unchanged
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_within

pytestmark = needs_interpreter
# Tails; one channel a group; more than one part a group with a last one that is not full; five and three dimensions
SHAPES = [((1, 3, 5, 7), 1), ((2, 10, 6, 6), 10), ((1, 6, 41, 53), 1), ((1, 8, 3, 5, 7), 2), ((2, 12, 67), 3)]


@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype, memory_format, shape, groups):
    for options, silu in (("plain", False), ("affine", True), ("all", True)):
        v = inputs(shape, dtype, options, memory_format)
        check = unchanged(*v.values())
        with in_triton("group_norm_silu"):
            got = call(v, groups, silu=silu, numerics="close")
        check()
        want = stock(v, groups, silu=silu)
        assert_close(got, stock(wide(v), groups, silu=silu), want, options)
        assert got.stride() == (v["x"] if ON_GPU else want).stride()  # on a GPU PyTorch gives a contiguous picture whatever it gets


@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_gradients(dtype, memory_format, shape, groups):
    v, grad = inputs(shape, dtype, "all", memory_format), torch.randn(shape).to(dtype)
    for silu in (True, False):
        with forced("triton"):
            got = gradients(call, v, groups, grad, silu=silu, numerics="close")
        plain = gradients(stock, v, groups, grad, silu=silu)
        for name, want in gradients(stock, wide(v), groups, grad.double(), silu=silu).items():
            if name == "x":
                assert_close(got[name], want, plain[name], name)
                assert got[name].stride() == v["x"].stride()
            else:
                assert_within(got[name], want, 16, name)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_parts_of_several_blocks(memory_format, monkeypatch):
    """As of large groups: programs that walk over several blocks, the last ones over fewer, the last block not full, each with a mean of its own."""
    monkeypatch.setattr(triton_kernel, "group_tile", lambda elements, arch: GroupTile(64, 3, 1))
    v, grad = inputs((2, 6, 23, 19), torch.float32, "all", memory_format), torch.randn(2, 6, 23, 19)
    v["x"] = v["x"] + torch.linspace(-8, 8, 23)[:, None]
    with forced("triton"):
        got = call(v, 2, numerics="close")
        found = gradients(call, v, 2, grad, numerics="close")
    assert_close(got, stock(wide(v), 2), stock(v, 2))
    plain = gradients(stock, v, 2, grad)
    for name, want in gradients(stock, wide(v), 2, grad.double()).items():
        assert_close(found[name], want, plain[name], name) if name == "x" else assert_within(found[name], want, 16, name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(layout):
    """strided-input, misaligned: one argument at a time, in any layout."""
    v = inputs((2, 6, 5, 7), torch.bfloat16)
    with in_triton("group_norm_silu", 6):
        for name in v:
            strided = {**v, name: layout(v[name])}
            got = call(strided, 3, numerics="close")
            assert_within(got, stock(wide(v), 3), 4) if name == "x" else assert_exact(got, call_contiguous(v), name)


def call_contiguous(v):
    with forced("triton"), torch.no_grad():
        return triton_kernel.group_norm_silu(v["x"], 3, v["weight"], v["bias"], 1e-5, v["shift"], v["scale"], v["add"], True, False)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_batch_coupling(memory_format):
    v = inputs((5, 6, 9, 9), memory_format=memory_format)
    with in_triton("group_norm_silu", 2):
        whole = call(v, 3, numerics="close")
        assert_exact(call({name: t if t.dim() == 1 else t[3:4] for name, t in v.items()}, 3, numerics="close"), whole[3:4])


@pytest.mark.parametrize("memory_format", FORMATS)
def test_cancellation(memory_format):
    """Mean 100, deviation 0.01, over several parts: a one-pass variance would be off by an order of magnitude."""
    v = inputs((1, 6, 41, 53), options="plain", memory_format=memory_format)
    v["x"] = 100 + 0.01 * v["x"]
    with in_triton("group_norm_silu"):
        got = call(v, 1, silu=False, numerics="close")
    plain = stock({"x": v["x"].contiguous()}, 1, silu=False)
    assert_close(got, stock(wide(v), 1, silu=False), plain)


def test_fp16_overflow():
    v = inputs((1, 8, 9, 9), torch.float16, "affine")
    v["x"] = torch.where(torch.rand(1, 8, 9, 9) > 0.5, 1000.0, -1000.0).half()
    with in_triton("group_norm_silu"):
        assert torch.isfinite(call(v, 2, numerics="close")).all()


@pytest.mark.parametrize("shape", ((0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3)), ids=str)
def test_empty(shape):
    v = inputs(shape)
    with forced("triton"):
        for name, gradient in gradients(call, v, 2, torch.randn(shape), numerics="close").items():
            assert gradient.shape == v[name].shape and not gradient.any()


def test_eps():
    v = inputs((1, 4, 6, 6), options="plain")
    v["x"] = v["x"] * 1e-4
    for eps in (1e-5, 1e-6):
        with in_triton("group_norm_silu"):
            assert_close(call(v, 2, eps=eps, numerics="close"), stock(wide(v), 2, eps), stock(v, 2, eps))


def test_parts_depend_on_the_group_alone():
    """Never on the batch or a timing, and no more than 128."""
    for elements in (1, 35, 4096, 4097, 262144, 2**30):
        tile = group_tile(elements, cuda_arch(9, 0))
        assert -(-elements // (tile.block * tile.steps)) <= 128 and 1 <= tile.warps <= 8
