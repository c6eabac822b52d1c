"""ops.sampler_step, what every op promises: far strides, unbiased rounding, the same bits again, gradients of any layout."""

from __future__ import annotations

import pytest
import torch

from fusewire import ops
from fusewire.kernels.library import CPU
from fusewire.kernels.sampler_step import reference
from tests.tolerance import assert_close, assert_exact, assert_unbiased

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
TABLE = ops.flow_euler_table(torch.tensor([1.0, 0.7, 0.0]), 4.5)


@needs_library
@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_int32_stride(numerics):
    """Three rows 2^30 elements apart (memory that is never touched in between)."""
    far = torch.as_strided(torch.empty(2**31 + 64, dtype=torch.bfloat16), (3, 40), (2**30, 1))
    sample, output, uncond = (torch.randn(3, 40).to(torch.bfloat16) for _ in range(3))
    given = {"sample": sample, "model_output": output, "uncond": uncond}
    want = ops.sampler_step(**given, table=TABLE, step=0, numerics=numerics)
    for name, near in given.items():
        far.copy_(near)
        assert_exact(ops.sampler_step(**{**given, name: far}, table=TABLE, step=0, numerics=numerics), want, name)
    assert ops.stats()["flow_euler_step"]["cpu"] == 4


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_biased_cast(dtype):
    """The mean signed error of 2^20 results is within 0.02 units in the last place. (exact has stock's error, and its bits.)"""
    sign = torch.randn(1, 2**20).sign()
    sample, output = (sign * (1.25 + torch.rand(1, 2**20) / 4)).to(dtype), (-sign * torch.rand(1, 2**20) / 2).to(dtype)
    table = ops.flow_euler_table(torch.tensor([1.0, 0.7, 0.0]))
    got = ops.sampler_step(sample, output, table, 0, numerics="close")
    want = sample.double() + table[0, 0] * output.double()
    assert 1 < want.abs().min() and want.abs().max() < 2
    assert_unbiased(got, want)


def test_fp16_overflow():
    """Guidance makes 1.8e5 of a difference of 4e4, the step's 0.3 of that is a float16 again; exact has stock's infinity."""
    cond, uncond, sample = (torch.full((1, 33), value, dtype=torch.float16) for value in (2e4, -2e4, 1e4))
    got = ops.sampler_step(sample, cond, TABLE, 0, uncond=uncond, numerics="close")
    want = sample.double() + TABLE[0, 0] * (uncond.double() + TABLE[0, 1] * (cond.double() - uncond.double()))
    assert want.abs().max() < 6e4 and got.isfinite().all()
    assert_close(got, want, want.half())
    exact = ops.sampler_step(sample, cond, TABLE, 0, uncond=uncond)
    assert exact.isinf().all()
    assert_exact(exact, reference.flow_euler_step(sample, cond, uncond, TABLE, 0, None, True))
    assert ops.stats()["flow_euler_step"]["cpu" if CPU.loaded else "reference"] == 2


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nondeterminism(dtype, numerics):
    """20 repeats and any number of threads give the same bits."""
    sample, output = torch.randn(2, 4, 128, 65).to(dtype), torch.randn(4, 4, 128, 65).to(dtype)
    want, threads = ops.sampler_step(sample, output, TABLE, 1, numerics=numerics), torch.get_num_threads()
    for _ in range(20):
        assert_exact(ops.sampler_step(sample, output, TABLE, 1, numerics=numerics), want)
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert_exact(ops.sampler_step(sample, output, TABLE, 1, numerics=numerics), want, f"{n} threads")
    finally:
        torch.set_num_threads(threads)


def test_strided_grad():
    """Expanded and transposed gradients give the reference's, bit for bit."""
    sample, output = torch.randn(2, 3, 5, requires_grad=True), torch.randn(4, 3, 5, requires_grad=True)
    got, want = ops.sampler_step(sample, output, TABLE, 0), reference.flow_euler_step(sample, output, None, TABLE, 0, None, True)
    for grad in (torch.ones(()).expand(2, 3, 5), torch.randn(5, 3, 2).permute(2, 1, 0)):
        mine, theirs = (torch.autograd.grad(out, (sample, output), grad, retain_graph=True) for out in (got, want))
        for a, b in zip(mine, theirs):
            assert_exact(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast(dtype):
    """autocast: sums and products of latents are none of its concern, here as in stock; forward and backward."""
    sample, output = torch.randn(2, 3, 5).to(dtype).requires_grad_(), torch.randn(2, 3, 5).to(dtype).requires_grad_()
    plain = ops.sampler_step(sample, output, TABLE, 0)
    with torch.autocast("cpu", torch.bfloat16):
        under = ops.sampler_step(sample, output, TABLE, 0)
    assert_exact(under, plain)
    under.sum().backward()
    assert sample.grad.dtype is output.grad.dtype is dtype and output.grad.abs().sum() > 0
