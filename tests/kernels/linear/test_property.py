"""Linear layers for any shape, epilogue and layout: exact is stock's, and in close the error of every element is bounded."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire import ops
from fusewire.kernels.library import CPU
from fusewire.kernels.linear import reference
from tests.effort import examples
from tests.kernels.linear.served import BELOW_AVX2, close, in_float64, layer, stock
from tests.kernels.linear.test_backward import ACTIVATIONS, FAST, LAYOUT, gradients, inputs, served, serves
from tests.kernels.linear.test_linear import DTYPES
from tests.tolerance import assert_exact, assert_within


@settings(max_examples=examples(250), deadline=None)
@given(st.integers(1, 2), st.integers(1, 50), st.integers(1, 150), st.integers(1, 150), st.sampled_from(DTYPES),
       st.sampled_from(("none", "gelu_tanh", "gelu", "silu", "gate")), st.booleans(), LAYOUT, LAYOUT,
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


@BELOW_AVX2
@settings(max_examples=examples(200), deadline=None)
@given(st.integers(1, 2), st.integers(1, 60), st.integers(1, 90), st.integers(1, 90), st.sampled_from(FAST), st.sampled_from(ACTIVATIONS), st.booleans(),
       st.tuples(LAYOUT, LAYOUT, LAYOUT), st.integers(0, 2**31))
def test_gradients_property(batch, tokens, inner, outer, dtype, activation, bias, layouts, seed):
    """tail: of any layer with an activation, in any layout."""
    torch.manual_seed(seed)
    v = inputs(batch, tokens, inner, outer, dtype, bias=bias)
    v["grad"] = v["grad"] / max(outer, batch * tokens)**0.5  # no gradient grows with the terms of its sum
    want = gradients({name: t if t is None else t.double() for name, t in v.items()}, activation, reference.linear)
    plain = gradients(v, activation, reference.linear)
    laid = {**v, **{name: layout(v[name]) for layout, name in zip(layouts, ("x", "weight", "grad"))}}
    before = served()
    for these in (v, laid):
        for name, got in gradients(these, activation).items():
            assert_within(got, want[name], 8 if dtype is torch.float32 else 2, name, plain[name])
    calls = 2 * serves(v, "cpu")
    assert served() == ((before[0] + calls, before[1]) if CPU.loaded else (before[0], before[1] + calls))
