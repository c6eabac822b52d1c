"""Linear layers for any shape, epilogue and layout: exact is stock's, and in close the error of every element is bounded."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire import ops
from tests.effort import examples
from tests.kernels.linear.served import close
from tests.kernels.linear.test_linear import DTYPES, in_float64, layer, stock
from tests.layouts import LAYOUTS
from tests.tolerance import assert_exact, assert_within


@settings(max_examples=examples(250), deadline=None)
@given(st.integers(1, 2), st.integers(1, 50), st.integers(1, 150), st.integers(1, 150), st.sampled_from(DTYPES),
       st.sampled_from(("none", "gelu_tanh", "gelu", "silu", "gate")), st.booleans(), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS),
       st.integers(0, 2**31))
def test_property(batch, tokens, inner, outer, dtype, epilogue, bias, x_layout, weight_layout, seed):
    torch.manual_seed(seed)
    x, weight, b = layer((batch, tokens, inner), outer, dtype, bias)
    gated = epilogue == "gate"
    activation = "none" if gated else epilogue
    gate, residual = (torch.randn(batch, 1, outer).to(dtype), torch.randn(batch, tokens, outer).to(dtype)) if gated else (None, None)
    options = {"activation": None if activation == "none" else activation, "gate": gate, "residual": residual}
    plain = stock(x, weight, b, activation, gate, residual)
    assert_exact(ops.linear(x, weight, b, **options), plain)
    want = in_float64(x, weight, b, activation, gate, residual)
    assert_within(close(x, weight, b, **options), want, 8)
    assert_within(close(x_layout(x), weight_layout(weight), b, **options), want, 8, f"{x_layout.__name__} {weight_layout.__name__}")
