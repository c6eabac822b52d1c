"""The fused backward of ``close``: gradients against float64, on the backend that should run, and the promises of every kernel."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fusewire.kernels.dispatch import forced
from fusewire.kernels.group_norm_silu import reference
from fusewire.kernels.library import CPU
from tests.effort import examples
from tests.kernels.group_norm_silu.cases import DTYPES, FORMATS, OPTIONS, call, gradients, inputs, served, stock, wide
from tests.kernels.group_norm_silu.test_group_norm_silu import grid
from tests.kernels.isa_levels import run_at
from tests.tolerance import assert_close, assert_exact, assert_within

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
SHAPES = [((1, 3, 5, 7), 1), ((2, 30, 9, 7), 5), ((3, 17, 4, 4), 17), ((3, 40, 33, 37), 4), ((2, 12, 67), 3), ((2, 12, 3, 9, 11), 4),
          ((1, 128, 32, 32), 32), ((1, 3, 300, 300), 1)]  # the last: in 16 bits dh of a group is not kept between its sums and dx


@pytest.mark.parametrize("shape, groups, memory_format", grid(SHAPES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_gradients(dtype, shape, groups, memory_format):
    """tail, silent-off: every gradient, with and without SiLU, is as near to float64's as the rule of close asks."""
    for options in ("plain", "affine", "all"):
        v, grad = inputs(shape, dtype, options, memory_format), torch.randn(shape).to(dtype)
        for silu in (True, False):
            got, plain = gradients(call, v, groups, grad, silu=silu, numerics="close"), gradients(stock, v, groups, grad, silu=silu)
            for name, want in gradients(stock, wide(v), groups, grad.double(), silu=silu).items():
                if name == "x":
                    assert_close(got[name], want, plain[name], f"{options} {silu} {name}")
                    assert got[name].stride() == v["x"].stride()
                else:
                    assert_within(got[name], want, 16, f"{options} {silu} {name}")
    assert served("group_norm_silu_backward") == (6, 0)


@settings(max_examples=examples(200), deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 12), st.lists(st.integers(2, 24), min_size=1, max_size=3), st.sampled_from(list(OPTIONS)),
       st.sampled_from(FORMATS), st.booleans(), st.integers(0, 2**31))
def test_gradients_property(batch, groups, per_group, sizes, options, memory_format, silu, seed):
    """tail: float64, where nothing hides behind rounding."""
    torch.manual_seed(seed)
    v = inputs((batch, groups * per_group, *sizes), torch.float64, options, memory_format)
    grad = torch.randn(v["x"].shape)
    got, want = gradients(call, v, groups, grad, silu=silu, numerics="close"), gradients(stock, v, groups, grad, silu=silu)
    for name in want:
        assert_within(got[name], want[name], 1, name)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("wanted", ("x", "weight", "bias", "shift", "scale", "add"))
def test_one_gradient_alone(wanted, memory_format):
    v = inputs((2, 6, 5, 7), torch.float64, "all", memory_format)
    v[wanted].requires_grad_()
    got = torch.autograd.grad(call(v, 3, numerics="close").square().sum(), v[wanted])[0]
    # torch 2.13's own channels-last backward ends the process where x needs no gradient
    want = torch.autograd.grad(stock({**v, "x": v["x"].contiguous()}, 3).square().sum(), v[wanted])[0]
    assert_within(got, want, 1)
    assert CPU.loaded is (served("group_norm_silu_backward") == (1, 0))


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("wanted", (("weight",), ("bias",), ("weight", "bias")), ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_alone_in_exact(dtype, wanted, backend):
    """Channels-last pictures that want no gradient: where F.group_norm ends the process, the gradients are those beside one of x; forwards stock's bits."""
    if backend == "cpu" and not CPU.loaded:
        pytest.skip(CPU.reason)
    v = inputs((2, 6, 5, 7), dtype, "affine", "channels_last")
    with torch.no_grad():
        plain = stock(v, 3)
    for name in wanted:
        v[name].requires_grad_()
    with forced("reference") if backend == "reference" else contextlib.nullcontext():
        out = call(v, 3, numerics="exact")
        got = torch.autograd.grad(out.square().sum(), [v[name] for name in wanted])
    assert_exact(out.detach(), plain)
    assert served("group_norm_silu") == ((1, 0) if backend == "cpu" else (0, 1))
    v["x"].requires_grad_()
    for one, want in zip(got, torch.autograd.grad(stock(v, 3).square().sum(), [*(v[name] for name in wanted), v["x"]])):
        assert_exact(one, want)


@pytest.mark.parametrize("per_pixel", (False, True), ids=("[B, C]", "[B, C, 1, 1]"))
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("of_x", (False, True))
def test_reference_agrees(of_x, memory_format, per_pixel):
    """The reference row of the backward means the same as the kernel, and gives [B, C] for a modulation of either shape."""
    v, grad = inputs((2, 6, 5, 7), torch.float64, "all", memory_format), torch.randn(2, 6, 5, 7).double()
    v |= {name: v[name].view(2, 6, 1, 1) if per_pixel else v[name].view(2, 6) for name in ("shift", "scale", "add")}
    arguments = (grad, v["x"], 3, v["weight"], v["bias"], 1e-5, v["shift"], v["scale"], v["add"], True, of_x)
    for got, want in zip(torch.ops.fusewire.group_norm_silu_backward(*arguments), reference.group_norm_silu_backward(*arguments), strict=True):
        assert got.shape == want.shape and got.stride() == want.stride()
        assert_within(got, want, 1)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_grad(dtype, memory_format):
    """strided-grad: an expanded, a transposed and an offset grad_out give the bits of the contiguous one."""
    v = inputs((2, 6, 5, 7), dtype, "all", memory_format)
    for grad in (torch.ones((), dtype=dtype).expand(2, 6, 5, 7), torch.randn(7, 5, 6, 2).to(dtype).permute(3, 2, 1, 0),
                 torch.randn(2 * 6 * 5 * 7 + 1).to(dtype)[1:].view(2, 6, 5, 7)):
        got, want = gradients(call, v, 3, grad, numerics="close"), gradients(call, v, 3, grad.contiguous(), numerics="close")
        for name in v:
            assert_exact(got[name], want[name], name)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_batch_coupling_and_threads(dtype, memory_format):
    """batch-coupling, nondeterminism: dx of a sample alone is that among 8; repeats and any number of threads give the same bits everywhere."""
    v, grad, threads = inputs((8, 24, 20, 33), dtype, "all", memory_format), torch.randn(8, 24, 20, 33), torch.get_num_threads()
    want = gradients(call, v, 4, grad, numerics="close")
    alone = gradients(call, {name: t if t.dim() == 1 else t[5:6] for name, t in v.items()}, 4, grad[5:6], numerics="close")
    for name in ("x", "shift", "scale", "add"):
        assert_exact(alone[name], want[name][5:6], name)
    try:
        for n in (1, 2, 5, threads):
            torch.set_num_threads(n)
            assert all(torch.equal(got, want[name]) for name, got in gradients(call, v, 4, grad, numerics="close").items()), n
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_cancellation(memory_format):
    """cancellation: mean 100, standard deviation 0.01."""
    v, grad = inputs((1, 16, 24, 24), options="plain", memory_format=memory_format), torch.randn(1, 16, 24, 24)
    v["x"] = 100 + 0.01 * v["x"]
    got, want = gradients(call, v, 4, grad, numerics="close")["x"], gradients(stock, wide(v), 4, grad.double())["x"]
    assert ((got - want).abs().max() / want.abs().max()) <= 1e-4


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("of_x", (False, True))
def test_fake_mismatch(of_x, memory_format):
    """fake-mismatch: opcheck of the backward's registration, contiguous, channels-last and with a transposed gradient."""
    v, op = inputs((2, 6, 5, 7), memory_format=memory_format), torch.ops.fusewire.group_norm_silu_backward.default
    for grad in (torch.randn(2, 6, 5, 7), torch.randn(7, 5, 6, 2).permute(3, 2, 1, 0)):
        opcheck(op, (grad, v["x"], 3, v["weight"], v["bias"], 1e-5, v["shift"], v["scale"], v["add"], True, of_x))
        opcheck(op, (grad, v["x"], 3, None, None, 1e-5, None, None, None, False, of_x))


@pytest.mark.parametrize("level", ("base", "avx2", pytest.param("avx512", marks=pytest.mark.slow)))  # no level of these kernels is above it
def test_every_isa_level(level):
    run_at(level, __file__, "test_one_gradient_alone or test_reference_agrees or (test_gradients and 30x9x7 and float32)")


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("silu", (True, False))
@needs_library
def test_sums_over_many_pixels(silu, memory_format):
    """wide-accumulate: in float32 the gradients of shift and scale, of 256 channels, are as near to float64's as the rule of close asks."""
    shape = (1, 256, 64, 64)
    v, grad = inputs(shape, torch.float32, "all", memory_format), torch.randn(shape)
    got, plain, want = gradients(call, v, 32, grad, silu=silu, numerics="close"), gradients(stock, v, 32, grad, silu=silu), gradients(stock, wide(v), 32, grad.double(), silu=silu)
    for name in ("x", "shift", "scale", "weight", "bias"):
        assert_close(got[name], want[name], plain[name], name)
    assert served("group_norm_silu_backward") == (1, 0)
