"""The sampler step's Triton kernel in the interpreter: bits of the eager chain, layouts, the step counter on the device."""

import pytest
import torch

from fusewire import ops
from tests.kernels.interpreted import DTYPES, in_triton, needs_interpreter, on_reference, unchanged
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact

pytestmark = needs_interpreter
TABLE = ops.flow_euler_table(torch.linspace(1, 0, 6), [4.5, 3.0, 1.0, 7.25, 2.0]).to(torch.get_default_device())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3), (1, 4, 6, 5), (3, 2, 8, 16), (1, 1500)])
@pytest.mark.parametrize("guided", ["none", "one tensor", "two tensors"])
def test_values(dtype, shape, guided):
    """tail: the last shape is a block of 1024 and a part of one."""
    sample, cond, uncond = torch.randn(shape), torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    args = {"none": (cond, None), "one tensor": (torch.cat([uncond, cond]), None), "two tensors": (cond, uncond)}[guided]
    check = unchanged(sample, cond, uncond)
    for step in (0, torch.tensor(3)):
        call = lambda numerics: ops.sampler_step(sample, args[0], TABLE, step, uncond=args[1], numerics=numerics)  # noqa: E731
        with in_triton("flow_euler_step", 2):
            exact, close = call("exact"), call("close")
        plain = on_reference(lambda: call("exact"))
        assert_exact(exact, plain)
        wide = None if args[1] is None else args[1].double()
        want = on_reference(lambda: ops.sampler_step(sample.double(), args[0].double(), TABLE, step, uncond=wide, numerics="close"))
        assert_close(close, want, plain)
    check()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(layout):
    sample, output = torch.randn(1, 3, 4, 5), torch.randn(2, 3, 4, 5).bfloat16()
    with in_triton("flow_euler_step", 2):
        plain = ops.sampler_step(sample, output, TABLE, 1)
        strided = ops.sampler_step(layout(sample), layout(output), TABLE, 1)
    assert_exact(strided, plain)
    assert strided.is_contiguous()  # as its fake kernel says


def test_counter_outside_the_table():
    sample = torch.randn(1, 8)
    for step in (5, -1):
        with in_triton("flow_euler_step"):
            assert ops.sampler_step(sample, sample, TABLE, torch.tensor(step)).isnan().all()


def test_empty():
    sample = torch.randn(0, 4, 2)
    with in_triton("flow_euler_step"):
        assert ops.sampler_step(sample, sample, TABLE, 0).shape == sample.shape


def test_batch_coupling():
    sample, output = torch.randn(4, 3, 40), torch.randn(4, 3, 40)
    with in_triton("flow_euler_step", 2):
        assert_exact(ops.sampler_step(sample, output, TABLE, 2)[1:2], ops.sampler_step(sample[1:2], output[1:2], TABLE, 2))
