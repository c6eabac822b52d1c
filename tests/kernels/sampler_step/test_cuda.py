"""The sampler step's CUDA kernel with every thread on the CPU (tests/kernels/cuda_on_cpu): bits of the eager chain, layouts, the step on the device."""

import pytest
import torch

from fusewire import ops
from fusewire.kernels.dispatch import forced
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TABLE = ops.flow_euler_table(torch.linspace(1, 0, 6), [4.5, 3.0, 1.0, 7.25, 2.0]).to(torch.get_default_device())


@pytest.mark.parametrize("shape", [(2, 3), (1, 4, 6, 5), (3, 2, 8, 16), (1, 3, 2, 37, 41)], ids=str)
@pytest.mark.parametrize("sample_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(in_cuda, dtype, sample_dtype, shape):
    """tail: exact gives stock's bits, close keeps the rule, whatever the two dtypes; with and without guidance, from one tensor and from two."""
    sample, cond, uncond = torch.randn(shape).to(sample_dtype), torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    before = sample.clone(), cond.clone(), uncond.clone()
    for output, other in ((cond, None), (torch.cat([uncond, cond]), None), (cond, uncond)):
        wide = None if other is None else other.double()
        for step in (0, torch.tensor(3)):
            with in_cuda("flow_euler_step", 2):
                exact, close = (ops.sampler_step(sample, output, TABLE, step, uncond=other, numerics=numerics) for numerics in ("exact", "close"))
            with forced("reference"):
                plain = ops.sampler_step(sample, output, TABLE, step, uncond=other)
                want = ops.sampler_step(sample.double(), output.double(), TABLE, step, uncond=wide, numerics="close")
            assert_exact(exact, plain)
            assert_close(close, want, plain)
    assert torch.equal(sample, before[0]) and torch.equal(cond, before[1]) and torch.equal(uncond, before[2])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(in_cuda, layout):
    """strided-input, misaligned: the same bits for any layout; the result is contiguous."""
    for shape in ((1, 3, 4, 5), (2, 2, 8, 16)):
        sample, output = torch.randn(shape), torch.randn(2 * shape[0], *shape[1:]).bfloat16()
        with in_cuda("flow_euler_step", 4):
            want = ops.sampler_step(sample, output, TABLE, 1)
            for got in (ops.sampler_step(layout(sample), output, TABLE, 1), ops.sampler_step(sample, layout(output), TABLE, 1),
                        ops.sampler_step(layout(sample), layout(output), layout(TABLE), 1)):
                assert_exact(got, want)
                assert got.is_contiguous()


def test_int32_stride(in_cuda):
    """int32-stride: three rows 2^30 elements apart (memory that is never touched in between)."""
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    far = torch.as_strided(base, (3, 8), (2**30, 1))
    x = torch.randn(3, 8).bfloat16()
    far.copy_(x)
    with in_cuda("flow_euler_step", 2):
        assert_exact(ops.sampler_step(far, far, TABLE, 1), ops.sampler_step(x, x, TABLE, 1))


def test_counter_outside_the_table(in_cuda):
    """NaN, not what lies beside the table; the guidance too is not read."""
    sample = torch.randn(1, 8)
    for step in (5, -1):
        with in_cuda("flow_euler_step", 2):
            assert ops.sampler_step(sample, sample, TABLE, torch.tensor(step)).isnan().all()
            assert ops.sampler_step(sample, sample.repeat(2, 1), TABLE, torch.tensor(step), numerics="close").isnan().all()


def test_empty(in_cuda):
    sample = torch.randn(0, 4, 2)
    with in_cuda("flow_euler_step"):
        assert ops.sampler_step(sample, sample, TABLE, 0).shape == sample.shape


def test_batch_coupling(in_cuda):
    sample, output = torch.randn(4, 3, 40), torch.randn(4, 3, 40)
    with in_cuda("flow_euler_step", 2):
        assert_exact(ops.sampler_step(sample, output, TABLE, 2)[1:2], ops.sampler_step(sample[1:2], output[1:2], TABLE, 2))


def test_many_blocks(in_cuda):
    """Runs of more than a block, the last of which is not full, one after the other."""
    sample = torch.randn(3, 2, 5000)[:, 1]
    with in_cuda("flow_euler_step"):
        got = ops.sampler_step(sample, sample.half(), TABLE, 2)
    with forced("reference"):
        assert_exact(got, ops.sampler_step(sample, sample.half(), TABLE, 2))


def test_nine_dimensions_are_left_to_others():
    x = torch.randn((1,) * 8 + (3,))
    said = {choice.backend: choice.reason for choice in ops.backends("sampler_step", x, x, TABLE, 0)}
    assert said["cuda"]
