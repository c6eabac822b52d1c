"""What every op promises, for the gradients of GroupNorm with SiLU by csrc/cuda: any shape, option and layout, registration, what the row leaves to others."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.group_norm_silu import cuda, cuda_backward, reference
from tests.effort import examples
from tests.kernels.group_norm_silu.cases import FORMATS, OPTIONS, call, gradients, inputs, stock, wide
from tests.kernels.group_norm_silu.test_cuda_backward import DTYPES, backward  # noqa: F401  (a fixture)
from tests.layouts import LAYOUTS
from tests.tolerance import assert_exact, assert_within


@settings(max_examples=examples(200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])  # in_cuda: the same for each
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 12), st.lists(st.integers(2, 14), min_size=1, max_size=3), st.sampled_from(DTYPES),
       st.sampled_from(list(OPTIONS)), st.sampled_from(FORMATS), st.sampled_from(LAYOUTS), st.booleans(), st.integers(0, 2**31))
def test_property(backward, batch, groups, per_group, sizes, dtype, options, memory_format, layout, silu, seed):
    """Any shape, options, format and layout of the gradient: dx and each sum are within units of float64's."""
    torch.manual_seed(seed)
    v = inputs((batch, groups * per_group, *sizes), dtype, options, memory_format)
    # no group's deviation is small, which would enlarge every rounding
    v["x"][:, ::per_group][(..., *(0 for _ in sizes))] = 1.5
    v["x"][:, per_group - 1::per_group][(..., *(-1 for _ in sizes))] = -1.5
    grad = torch.randn(v["x"].shape).to(dtype)
    got, plain = backward(v, groups, layout(grad), silu=silu), gradients(stock, v, groups, grad, silu=silu)
    for name, want in gradients(stock, wide(v), groups, grad.double(), silu=silu).items():
        assert_within(got[name], want, 16, f"{name} of {list(v['x'].shape)}", plain[name])
        assert got[name].stride() == v[name].stride() if name == "x" else got[name].is_contiguous()


@pytest.mark.parametrize("memory_format", FORMATS)
def test_bias_without_weight(backward, memory_format):
    """Which eager PyTorch cannot differentiate: a weight of ones gives the same bits."""
    v, grad = inputs((2, 6, 5, 7), torch.float16, "all", memory_format), torch.randn(2, 6, 5, 7)
    v["weight"] = torch.ones_like(v["weight"])
    want = backward(v, 3, grad)
    for name, got in backward({name: tensor for name, tensor in v.items() if name != "weight"}, 3, grad).items():
        assert_exact(got, want[name], name)


@pytest.mark.parametrize("memory_format", (*FORMATS, "permuted"))
@pytest.mark.parametrize("of_x", (False, True))
def test_fake_mismatch(in_cuda, of_x, memory_format):
    """fake-mismatch: opcheck of the CUDA row's own op, contiguous, channels-last and permuted-dense; it means what the reference means, and gives
    [B, C] for a modulation of either shape."""
    v = inputs((2, 6, 5, 7), memory_format="contiguous" if memory_format == "permuted" else memory_format)
    op = torch.ops.fusewire.group_norm_silu_backward_cuda.default
    grads = torch.randn(2, 6, 5, 7), torch.randn(7, 5, 6, 2).permute(3, 2, 1, 0)
    if memory_format == "permuted":
        v["x"] = v["x"].transpose(0, -1).contiguous().transpose(0, -1)
    columns = {name: v[name].reshape(2, 6, 1, 1) for name in ("shift", "scale", "add")}
    for grad, m in zip(grads, (v, columns)):
        for arguments in ((grad, v["x"], 3, v["weight"], v["bias"], 1e-5, m["shift"], m["scale"], m["add"], True, of_x),
                          (grad, v["x"], 2, v["weight"], None, 1e-5, None, m["scale"], None, False, of_x)):
            opcheck(op, arguments)
            for got, want in zip(op(*arguments), reference.group_norm_silu_backward(*arguments), strict=True):
                assert got.shape == want.shape and got.stride() == want.stride()
                assert_within(got, want, 16)


def test_what_it_leaves_to_others(in_cuda, monkeypatch):
    """silent-off: what the row declines, and why; large contiguous samples are Triton's where Triton takes them."""
    def why_not(x, grad=None, weight=None, scale=None):
        return cuda_backward.why_not(x if grad is None else grad, x, 4, weight, None, 1e-5, None, scale, None, True, True)

    x = torch.empty(2, 8, 3, 3)
    assert not why_not(x) and "torch.float64" in why_not(x.double())
    for name, other in (("grad", x.bfloat16()), ("weight", x[0, :, 0, 0].half()), ("scale", x[:, :, 0, 0].double())):
        assert str(other.dtype) in why_not(x, **{name: other}), name
    for channels, dtype, served in ((2048, torch.float32, True), (2052, torch.float32, False), (4104, torch.bfloat16, False)):
        last = torch.empty(1, 2, 2, channels, dtype=dtype).permute(0, 3, 1, 2)
        assert not why_not(last.contiguous()) and (why_not(last) == "") is served
    monkeypatch.setattr(cuda, "MAX_GROUP", 17)
    assert "groups of more than 17 elements" in why_not(x)


def test_backends(in_cuda):
    """Gradients of close come to the CUDA row; exact has stock's, and no kernel."""
    v = inputs((2, 6, 5, 7))
    before = ops.stats()["group_norm_silu_backward"]
    for numerics, calls in (("exact", 0), ("close", 1)):
        with forced("cuda" if calls else None), torch.enable_grad():
            gradients(call, v, 3, torch.randn(2, 6, 5, 7), numerics=numerics)
        assert ops.stats()["group_norm_silu_backward"]["cuda"] == before["cuda"] + calls, numerics
