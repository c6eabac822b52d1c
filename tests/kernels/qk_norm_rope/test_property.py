"""QK norm and rotary embedding for any shape, option and layout: exact has the reference's bits, in close the error of every element is bounded."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from tests.effort import examples
from tests.kernels.qk_norm_rope.test_qk_norm_rope import DTYPES, heads, tables
from tests.layouts import LAYOUTS
from tests.tolerance import assert_exact, assert_within


@settings(max_examples=examples(250), deadline=None)
@given(st.integers(1, 2), st.integers(1, 20), st.integers(1, 5), st.integers(1, 3), st.integers(1, 70), st.sampled_from(DTYPES), st.booleans(),
       st.booleans(), st.sampled_from(("rms", "torch_rms")), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS), st.integers(0, 2**31))
def test_property(batch, tokens, q_heads, k_heads, half, dtype, weighted, rotated, norm, q_layout, k_layout, seed):
    torch.manual_seed(seed)
    dim = 2 * half if rotated else half
    q, k = heads(batch, tokens, q_heads, dim, dtype), heads(batch, tokens, k_heads, dim, dtype)
    weights = torch.randn(2, dim).to(dtype).unbind() if weighted else (None, None)
    options = {"rope": tables(tokens, dim) if rotated else None, "norm": norm}
    before = ops.stats()["qk_norm_rope"]["cpu"]
    exact = ops.qk_norm_rope(q_layout(q), k_layout(k), *weights, **options)
    close = ops.qk_norm_rope(q_layout(q), k_layout(k), *weights, numerics="close", **options)
    assert not CPU.loaded or ops.stats()["qk_norm_rope"]["cpu"] == before + 2
    with forced("reference"):
        plain = ops.qk_norm_rope(q, k, *weights, **options)
        wide = (None if w is None else w.double() for w in weights)
        want = ops.qk_norm_rope(q.double(), k.double(), *wide, numerics="close", **options)
    for a, b in zip(exact, plain, strict=True):
        assert_exact(a, b)
    for a, b in zip(close, want, strict=True):
        assert_within(a, b, 4)


@settings(max_examples=examples(250), deadline=None)
@given(st.integers(1, 2), st.integers(1, 20), st.integers(0, 9), st.integers(1, 4), st.integers(1, 40), st.sampled_from(DTYPES), st.booleans(),
       st.booleans(), st.sampled_from(("exact", "close")), st.sampled_from(LAYOUTS), st.booleans(), st.integers(0, 2**31))
def test_property_of_into(batch, tokens, before, heads_, half, dtype, weighted, rotated, numerics, layout, heads_first, seed):
    """Into slices of joint buffers, from any layout: the bits of ``qk_norm_rope``, and not an element beside them."""
    torch.manual_seed(seed)
    dim = 2 * half if rotated else half
    q, k = (heads(batch, tokens, heads_, dim, dtype) for _ in range(2))
    weights = torch.randn(2, dim).to(dtype).unbind() if weighted else (None, None)
    options = {"rope": tables(tokens, dim) if rotated else None, "numerics": numerics}
    shape = (batch, heads_, before + tokens, dim) if heads_first else (batch, before + tokens, heads_, dim)
    joint = [torch.full(shape, torch.inf, dtype=dtype) for _ in range(2)]
    views = [b.transpose(1, 2) if heads_first else b for b in joint]
    ops.qk_norm_into(layout(q), layout(k), *weights, *(b[:, before:] for b in views), **options)
    assert not CPU.loaded or ops.stats()["qk_norm_into"]["reference"] == 0
    for view, want in zip(views, ops.qk_norm_rope(q, k, *weights, **options), strict=True):
        assert_exact(view[:, before:], want)
        assert (view[:, :before] == torch.inf).all()
