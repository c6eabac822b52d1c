"""Attention for any shape, mask and layout: the error of every element, and the same bits as for contiguous tensors."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire import ops
from fusewire.kernels.library import CPU
from tests.effort import examples
from tests.kernels.attention.cases import DTYPES, qkv, stock
from tests.layouts import LAYOUTS
from tests.tolerance import assert_exact, assert_within

LAYOUT = st.sampled_from(LAYOUTS)


@settings(max_examples=examples(250), deadline=None)
@given(st.integers(1, 2), st.integers(1, 70), st.integers(1, 150), st.sampled_from((1, 2, 3)), st.sampled_from((1, 2)), st.integers(1, 96),
       st.sampled_from(DTYPES), st.sampled_from(("none", "causal", "bool", "added")), st.floats(0.05, 4), st.tuples(LAYOUT, LAYOUT, LAYOUT),
       st.integers(0, 2**31))
def test_property(batch, queries, keys, key_heads, group, channels, dtype, kind, spread, layouts, seed):
    torch.manual_seed(seed)
    q, k, v = qkv(batch, queries, keys, key_heads * group, channels, dtype, key_heads)
    q = q * spread
    mask = {"bool": torch.rand(batch, 1, queries, keys) > 0.3, "added": torch.randn(1, key_heads * group, queries, keys).to(dtype)}.get(kind)
    if kind == "bool":
        mask[..., 0] = True
    got = ops.attention(q, k, v, mask=mask, causal=kind == "causal")
    plain = stock(q, k, v, mask, kind == "causal", dtype=dtype)
    assert_within(got, stock(q, k, v, mask, kind == "causal"), 8 * max(1.0, spread), plain=plain)
    laid = [layout(x) for layout, x in zip(layouts, (q, k, v))]
    before = ops.stats()["attention"]["cpu"]
    again = ops.attention(*laid, mask=mask, causal=kind == "causal")
    assert_exact(again, got, " ".join(layout.__name__ for layout in layouts))
    assert (ops.stats()["attention"]["cpu"] > before) is CPU.loaded
