"""Attention for any shape, mask and layout: the error of every element, and the same bits as for contiguous tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire import ops
from fusewire.kernels.library import CPU
from tests.effort import examples
from tests.kernels.attention.cases import DTYPES, qkv, stock, stock_joint
from tests.layouts import LAYOUTS
from tests.tolerance import assert_exact, assert_within

LAYOUT = st.sampled_from(LAYOUTS)
WEIGHTS = ("q_weight", "k_weight", "q2_weight", "k2_weight")


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


@pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
@settings(max_examples=examples(200), deadline=None)
@given(st.integers(1, 2), st.tuples(st.integers(1, 50), st.integers(1, 70)), st.tuples(st.integers(0, 40), st.integers(0, 60)),
       st.sampled_from((1, 2, 3)), st.sampled_from((1, 2)), st.integers(1, 96), st.sampled_from(DTYPES), st.sets(st.sampled_from(WEIGHTS)),
       st.sampled_from((1e-6, 1e-2)), st.floats(0.05, 4), st.lists(LAYOUT, min_size=10, max_size=10), st.integers(0, 2**31))
def test_joint_property(batch, lengths, lengths2, key_heads, group, channels, dtype, normed, eps, spread, layouts, seed):
    """Two streams of any lengths, the second perhaps empty, any of the four tensors normalised."""
    torch.manual_seed(seed)
    streams = [qkv(batch, *both, key_heads * group, channels, dtype, key_heads) for both in (lengths, lengths2)]
    streams = [(q * spread, k, v) for q, k, v in streams]
    weights = {name: torch.rand(channels).to(dtype) + 0.5 for name in WEIGHTS if name in normed}
    got = ops.joint_attention(*streams[0], *streams[1], **weights, eps=eps)
    assert [part.shape for part in got] == [q.shape for q, _, _ in streams]
    want, plain = stock_joint(streams, weights, eps), stock_joint(streams, weights, eps, dtype)
    assert_within(torch.cat(got, 1), want, 8 * max(1.0, spread), plain=plain)
    laid = [layout(x) for layout, x in zip(layouts, (*streams[0], *streams[1]))]
    laid_weights = {name: layout(weights[name]) for layout, name in zip(layouts[6:], WEIGHTS) if name in weights}
    for part, again in zip(got, ops.joint_attention(*laid, **laid_weights, eps=eps)):
        assert_exact(again, part, " ".join(layout.__name__ for layout in layouts))
    assert ops.stats()["joint_attention"]["reference"] == 0
