"""The QK-norm and RoPE Triton kernel in the interpreter: indexing, masks, layouts, outputs inside a joint buffer, rounding."""

import pytest
import torch

from fusewire import ops
from fusewire.kernels.qk_norm_rope import reference
from tests.kernels.interpreted import DTYPES, in_triton, needs_interpreter, on_reference, unchanged
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact

pytestmark = needs_interpreter
DIMS = [8, 64, 72]  # less than a vector of some types; whole vectors; no power of two


def inputs(dim, dtype, tokens=5, heads=(3, 2)):
    q, k = (torch.randn(2, tokens, h, dim).to(dtype) for h in heads)
    angle = torch.randn(tokens, dim // 2)
    return q, k, (angle.cos(), angle.sin())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("norm", ["rms", "torch_rms"])
@pytest.mark.parametrize("rotated", [False, True])
def test_values(dtype, dim, norm, rotated):
    q, k, rope = inputs(dim, dtype)
    rope = rope if rotated else None
    weights = [(None, None), (torch.randn(dim).to(dtype), torch.randn(dim).to(dtype))]
    if norm == "rms":
        weights.append((torch.randn(dim), None))  # a float32 weight gives float32
    for pair in weights:
        check = unchanged(q, k)
        with in_triton("qk_norm_rope", 2):
            exact, close = (ops.qk_norm_rope(q, k, *pair, rope=rope, norm=norm, numerics=numerics) for numerics in ("exact", "close"))
        check()
        plain = on_reference(lambda: ops.qk_norm_rope(q, k, *pair, rope=rope, norm=norm))
        for i, x in enumerate((q, k)):
            assert_exact(exact[i], plain[i])
            wide = [None if t is None else t.double() for t in (pair[i], *(rope or (None, None)))]
            want = reference.qk_norm_one(x.double(), *wide, 1e-6, reference.RMS, False)
            assert_close(close[i], want, plain[i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_rotation_alone(dtype, dim):
    """tail: without a norm, and with tables for a part of the head; 10 and 20 rows fill no block."""
    q, k, rope = inputs(dim, dtype)
    for tables in (rope, tuple(table[:, :3] for table in rope)):
        with in_triton("qk_norm_rope", 2):
            exact, close = (ops.qk_norm_rope(q, k, rope=tables, norm="none", numerics=numerics) for numerics in ("exact", "close"))
        for got, got_close, want in zip(exact, close, on_reference(lambda: ops.qk_norm_rope(q, k, rope=tables, norm="none"))):
            assert_exact(got, want)
            assert_exact(got_close, want)
    q_out = torch.full((2, 5, 3, 2 * dim), torch.nan).to(dtype)[..., 1:dim + 1]
    with in_triton("qk_norm_into"):
        ops.qk_norm_into(q, k, None, None, q_out, k, rope=rope, norm="none")
    assert_exact(q_out, on_reference(lambda: ops.qk_norm_rope(q, q, rope=rope, norm="none"))[0])


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(layout, numerics):
    q, k, rope = inputs(32, torch.bfloat16)
    w = torch.randn(32).bfloat16()
    with in_triton("qk_norm_rope", 2):
        plain = ops.qk_norm_rope(q, k, w, w, rope=rope, numerics=numerics)
        strided = ops.qk_norm_rope(layout(q), layout(k), layout(w), w, rope=[layout(t) for t in rope], numerics=numerics)
    for got, want in zip(strided, plain):
        assert_exact(got, want)


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("norm", ["rms", "torch_rms"])
@pytest.mark.parametrize("dim", [32, 40])
def test_into_joint_buffer(numerics, norm, dim):
    q, k, _ = inputs(dim, torch.bfloat16, heads=(2, 2))
    w = torch.randn(dim).bfloat16()
    joint = torch.full((2, 9, 2, 2 * dim + 1), torch.nan).bfloat16()
    for tokens, start in ((slice(0, 5), dim), (slice(2, 7), dim + 1)):  # k at an odd element: no vector fits
        q_out, k_out = joint[:, tokens, :, :dim], joint[:, tokens, :, start:start + dim]
        untouched, version = joint.isnan(), joint._version
        untouched[:, tokens, :, :dim] = False
        untouched[:, tokens, :, start:start + dim] = False
        with in_triton("qk_norm_into"):
            ops.qk_norm_into(q, k, w, w, q_out, k_out, numerics=numerics, norm=norm)
        with in_triton("qk_norm_rope"):
            want = ops.qk_norm_rope(q, k, w, w, numerics=numerics, norm=norm)
        assert_exact(q_out, want[0])
        assert_exact(k_out, want[1])
        assert joint._version > version
        assert torch.equal(joint.isnan(), untouched)
        joint.fill_(torch.nan)


def test_in_place():
    q, k, rope = inputs(32, torch.float32)
    with in_triton("qk_norm_rope"):
        want = ops.qk_norm_rope(q, k, rope=rope, numerics="close")
    with in_triton("qk_norm_into"):
        ops.qk_norm_into(q, k, None, None, q, k, rope=rope, numerics="close")
    assert_exact(q, want[0])
    assert_exact(k, want[1])


def test_other_lengths():
    """q and k of other lengths and heads, where there is no rotation; rows that fill no block, and more than one block."""
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 70, 3, 16)
    with in_triton("qk_norm_rope"):
        got = ops.qk_norm_rope(q, k, numerics="exact")
    for one, x in zip(got, (q, k)):
        assert_exact(one, reference.qk_norm_one(x, None, None, None, 1e-6, reference.RMS, True))


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)])
def test_empty(shape):
    q = torch.randn(shape)
    with in_triton("qk_norm_rope"):
        assert all(x.shape == shape for x in ops.qk_norm_rope(q, q, numerics="close"))


def test_fp16_overflow():
    q = torch.full((1, 1, 1, 64), 1000.0, dtype=torch.float16)
    with in_triton("qk_norm_rope"):
        assert (ops.qk_norm_rope(q, -q, numerics="close")[0] == 1).all()
