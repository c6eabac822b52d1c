"""The sampler's step for any shape, guidance and layout: exact has the bits of the stock chain, in close the error of every element is bounded."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from tests.effort import examples
from tests.layouts import LAYOUTS
from tests.tolerance import assert_exact, assert_within

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@settings(max_examples=examples(250), deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.sampled_from(DTYPES), st.sampled_from(("none", "one tensor", "two tensors")),
       st.floats(0, 15), st.integers(0, 4), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS), st.integers(0, 2**31))
def test_property(shape, dtype, guided, guidance, step, sample_layout, output_layout, seed):
    torch.manual_seed(seed)
    table = ops.flow_euler_table(torch.linspace(1, 0, 6), guidance)
    sample, cond, uncond = (torch.randn(shape).to(dtype) for _ in range(3))
    output, beside = {"none": (cond, None), "one tensor": (torch.cat([uncond, cond]), None), "two tensors": (cond, uncond)}[guided]

    def call(numerics, *tensors):
        return ops.sampler_step(tensors[0], tensors[1], table, step, uncond=tensors[2], numerics=numerics)

    laid = sample_layout(sample), output_layout(output), None if beside is None else output_layout(beside)
    before = ops.stats()["flow_euler_step"]["cpu"]
    exact, close = call("exact", *laid), call("close", *laid)
    assert not CPU.loaded or ops.stats()["flow_euler_step"]["cpu"] == before + 2
    with forced("reference"):
        assert_exact(exact, call("exact", sample, output, beside))
        want = call("close", *(None if t is None else t.double() for t in (sample, output, beside)))
    assert_within(close, want, 2 + guidance)  # float32 rounds the guided difference as well
