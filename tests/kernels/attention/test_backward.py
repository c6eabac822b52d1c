"""The gradients of attention: against float64 and PyTorch's own, on every processor's kernel; the log-sum-exp; what never may matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire import ops
from fusewire.kernels.attention import op, reference
from fusewire.kernels.attention.native import FEW_QUERIES
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from tests.effort import examples
from tests.kernels.attention.cases import DTYPES, qkv, stock
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_unbiased, assert_within

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
# (batch, queries, keys, heads, channels, heads of the keys): an odd one, blocks that are full and not, wide heads, groups, two queries, two keys
SHAPES = ((2, 5, 7, 3, 40, 3), (1, 200, 300, 2, 64, 1), (1, 130, 128, 2, 128, 2), (2, 33, 45, 4, 16, 2), (1, 64, 96, 2, 72, 2), (1, 129, 2, 1, 8, 1),
          (1, 2, 160, 1, 256, 1), (1, 40, 40, 1, 512, 1))


def gradients(call, q, k, v, grad):
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    found = torch.autograd.grad(call(*inputs), inputs, grad.to(inputs[0].dtype), allow_unused=True)
    return tuple(torch.zeros_like(x) if one is None else one for x, one in zip(inputs, found))


def masks(kind, batch, queries, keys, heads):
    if kind is None:
        return None
    if kind == "bool":
        visible = torch.rand(1, 1, queries, keys) > 0.3
        visible[..., 0] = True
        return visible
    return torch.randn(batch, heads, queries, keys)


def check(shape, dtype, kind=None, causal=False, scale=None, layouts=None):
    batch, queries, keys, heads, channels, key_heads = shape
    batch *= -(-4096 // (queries * heads * channels))  # the largest of few errors says little
    q, k, v = qkv(batch, queries, keys, heads, channels, dtype, key_heads)
    grad, mask = torch.randn_like(q), masks(kind, batch, queries, keys, heads)
    want = gradients(lambda *x: stock(*x, mask, causal, scale), *(x.double() for x in (q, k, v)), grad)
    plain = gradients(lambda *x: stock(*x, mask, causal, scale, dtype), q, k, v, grad)
    got = gradients(lambda *x: ops.attention(*x, mask=mask, causal=causal, scale=scale), q, k, v, grad)
    for name, one, wanted, of_stock in zip("qkv", got, want, plain):
        assert_close(one, wanted, of_stock, f"d{name} {shape} {dtype} {kind} {causal}")
    if layouts:
        leaves = [layout(x).requires_grad_() for layout, x in zip(layouts, (q, k, v))]
        out = ops.attention(*leaves, mask=mask, causal=causal, scale=scale)
        # float64's gradients are PyTorch's own products, whose order of summation follows the strides
        same = assert_exact if dtype is not torch.float64 else lambda one, whole, context: assert_within(one, whole, 1, context)
        for name, one, whole in zip("qkv", torch.autograd.grad(out, leaves, layouts[3](grad), allow_unused=True), got):
            same(torch.zeros_like(whole) if one is None else one, whole, f"d{name} {' '.join(layout.__name__ for layout in layouts)}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype):
    """head-dim, tail: each shape, and who computed it (silent-off)."""
    check(shape, dtype)
    check(shape, dtype, "additive", scale=0.2)
    check(shape, dtype, "bool")
    if shape[1] == shape[2]:
        check(shape, dtype, causal=True)
    counts = ops.stats()["attention_backward"]
    few = dtype is torch.float32 and shape[1] < FEW_QUERIES
    assert few or counts["cpu" if CPU.loaded and dtype is not torch.float64 else "reference"] >= 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_key(dtype):
    """With one key every weight is 1: q and k do not matter, and v's gradient is the sum of the queries' gradients."""
    q, k, v = qkv(1, 129, 1, 1, 8, dtype)
    grad = torch.randn_like(q)
    q_grad, k_grad, v_grad = gradients(ops.attention, q, k, v, grad)
    rounding = 0 if dtype is torch.float64 else 1e-5  # of two float32 sums whose difference should be 0
    assert q_grad.abs().max() <= rounding + 1e-12 and k_grad.abs().max() <= 20 * rounding + 1e-12
    want = grad.double().sum(1, keepdim=True)
    assert_close(v_grad, want, grad.sum(1, keepdim=True))


@settings(max_examples=examples(200), deadline=None, derandomize=True)
@given(batch=st.integers(1, 2), queries=st.integers(FEW_QUERIES, 70), keys=st.integers(2, 70), groups=st.integers(1, 3), key_heads=st.integers(1, 2),
       channels=st.integers(1, 80), dtype=st.sampled_from(DTYPES), kind=st.sampled_from((None, "bool", "additive")), causal=st.booleans(),
       layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4))
def test_any_shape(batch, queries, keys, groups, key_heads, channels, dtype, kind, causal, layouts):
    """strided-input, strided-grad: any shape and mask keeps the rule, and has the same bits where each argument has a layout of its own."""
    torch.manual_seed(queries * 71 + keys)
    check((batch, queries, keys, groups * key_heads, channels, key_heads), dtype, kind, causal and kind is None, layouts=layouts)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_strided_input(dtype, layout):
    """strided-input, strided-grad, misaligned: the same values in any layout give the same bits."""
    q, k, v = qkv(2, 37, 67, 3, 40, dtype)
    k[1] = k[0]  # so that an expanded layout exists
    grad = torch.randn_like(q)
    out, highest, total = op._softmax(q, k, v, None, False, None)
    call = op._gradients
    want = call(grad, None, q, k, v, out, highest, total, None, False, None)
    for position in range(7):
        tensors = [grad, q, k, v, out, highest, total]
        tensors[position] = layout(tensors[position])
        for got, expected in zip(call(tensors[0], None, *tensors[1:], None, False, None), want):
            assert_exact(got, expected, f"argument {position}")


def test_expanded_gradient():
    """strided-grad: ``.sum().backward()`` hands over a gradient of stride 0."""
    q, k, v = (x.requires_grad_() for x in qkv(1, 20, 30, 2, 16))
    whole = torch.autograd.grad(ops.attention(q, k, v), (q, k, v), torch.ones(1, 20, 2, 16))
    for got, want in zip(torch.autograd.grad(ops.attention(q, k, v).sum(), (q, k, v)), whole):
        assert_exact(got, want)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_batch_coupling_and_nondeterminism(dtype):
    """batch-coupling, nondeterminism: a sample's gradients do not depend on its batch, nor on threads; 20 repeats give the same bits."""
    q, k, v = qkv(3, 70, 100, 2, 64, dtype)
    grad, threads = torch.randn_like(q), torch.get_num_threads()
    want = gradients(ops.attention, q, k, v, grad)
    for got, whole in zip(gradients(ops.attention, q[1:2], k[1:2], v[1:2], grad[1:2]), want):
        assert_exact(got, whole[1:2])
    for n in (*[threads] * 20, 1, 5):
        try:
            torch.set_num_threads(n)
            again = gradients(ops.attention, q, k, v, grad)
        finally:
            torch.set_num_threads(threads)
        for got, whole in zip(again, want):
            assert_exact(got, whole, f"{n} threads")


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("power", (-100, -30, 30))
def test_small_and_large_gradients(dtype, power):
    """A loss scale is a power of two: gradients scale with it exactly, as far as the dtype reaches."""
    if dtype is torch.float16:
        power //= 10
    q, k, v = qkv(1, 40, 50, 2, 32, dtype)
    grad = torch.randn_like(q)
    scaled = gradients(ops.attention, q, k, v, grad * 2.0**power)
    for got, want in zip(scaled, gradients(ops.attention, q, k, v, grad)):
        assert_close(got, want.double() * 2.0**power, want * 2.0**power)


@needs_library
@pytest.mark.parametrize("value", (torch.inf, torch.nan, 1e-35, 3e38), ids=str)
def test_values_that_do_not_split(value):
    """float32 that has no three parts in bfloat16 goes another way, to the same result; elsewhere nothing changes."""
    q, k, v = qkv(1, 40, 50, 2, 32)
    k[0, 3, 0] = value if value != 1e-35 else k[0, 3, 0] * value
    if value == 1e-35:
        k[:, :, 0] *= value
    grad = torch.randn_like(q)
    want = gradients(lambda *x: stock(*x, dtype=torch.float64), *(x.double() for x in (q, k, v)), grad)
    plain = gradients(lambda *x: stock(*x, dtype=torch.float32), q, k, v, grad)
    got = gradients(ops.attention, q, k, v, grad)
    for one, wanted, of_stock in zip(got, want, plain):
        assert_close(one[:, :, 1], wanted[:, :, 1], of_stock[:, :, 1])  # the other head
        if value == 1e-35:
            assert_close(one, wanted, of_stock)
    assert ops.stats()["attention_backward"]["reference"] == 0


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_library), "reference"])
def test_nan_under_mask(backend):
    """nan-under-mask, masked-row: what is hidden from every query gets the gradient 0, even if it is NaN; a query without keys too."""
    q, k, v = qkv(2, 30, 40, 2, 16)
    k[:, 25:], v[:, 25:] = torch.nan, torch.nan
    mask = torch.ones(1, 1, 30, 40, dtype=torch.bool)
    mask[..., 25:] = False
    mask[:, :, 7] = False
    grad = torch.randn_like(q)
    cut = gradients(lambda *x: ops.attention(*x, mask=mask[..., :25]), q, k[:, :25], v[:, :25], grad)
    with forced(backend):
        q_grad, k_grad, v_grad = gradients(lambda *x: ops.attention(*x, mask=mask), q, k, v, grad)
    assert torch.allclose(q_grad, cut[0], atol=1e-6) and (q_grad[:, 7] == 0).all()
    for whole, part in ((k_grad, cut[1]), (v_grad, cut[2])):
        assert torch.allclose(whole[:, :25], part, atol=1e-6) and (whole[:, 25:] == 0).all()


def test_lowest_finite_mask():
    """A row of float32's lowest number counts all its keys alike, backwards too."""
    q, k, v = qkv(1, 20, 24, 1, 16)
    mask = torch.zeros(1, 1, 20, 24)
    mask[:, :, 4] = torch.finfo(torch.float32).min
    grad = torch.randn_like(q)
    _, _, v_grad = gradients(lambda *x: ops.attention(*x, mask=mask), q, k, v, grad * (torch.arange(20) == 4)[None, :, None, None])
    assert torch.allclose(v_grad, (grad[:, 4:5] / 24).expand_as(v_grad), atol=1e-6)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_library), "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_sum_exp(dtype, backend):
    q, k, v = qkv(2, 37, 90, 4, 24, dtype, 2)
    mask = torch.randn(2, 1, 37, 90)
    mask[:, :, 5] = -torch.inf
    with forced(backend):
        out, lse = ops.attention(q, k, v, mask=mask, return_lse=True)
        assert_exact(out, ops.attention(q, k, v, mask=mask))
    keys = k.double().repeat_interleave(2, dim=2)
    want = torch.logsumexp(torch.einsum("bqhd,bkhd->bhqk", q.double(), keys) * 24**-0.5 + mask, -1)
    assert lse.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert (lse[:, :, 5] == -torch.inf).all()
    seen = torch.arange(37) != 5
    # bfloat16: where vdpbf16ps multiplies, the weights are summed as they enter the product, rounded, so that they add up to 1
    allowed = {torch.float64: 1e-12, torch.bfloat16: 1e-3}.get(dtype, 1e-5)
    assert (lse[:, :, seen] - want[:, :, seen]).abs().max() < allowed


@pytest.mark.parametrize("keys", (90, 300))  # in float32 all of them in one block, and not
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_log_sum_exp(dtype, keys):
    """silent-off: alone, and together with that of the output."""
    q, k, v = qkv(2, 64, keys, 4, 24, dtype)

    def plain(q, k, v):
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * 24**-0.5
        return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v), torch.logsumexp(logits, -1)

    for weight in (0.0, 1.0):  # of the output
        grads = weight * torch.randn(2, 64, 4, 24).to(dtype), torch.randn(2, 4, 64)

        def found(call, *inputs):
            inputs = [x.detach().clone().requires_grad_() for x in inputs]
            out = call(*inputs)
            return torch.autograd.grad(out, inputs, [grad.to(one.dtype) for grad, one in zip(grads, out)])

        want = found(plain, *(x.double() for x in (q, k, v)))
        for name, one, true, stock_one in zip("qkv", found(lambda *x: ops.attention(*x, return_lse=True), q, k, v), want, found(plain, q, k, v), strict=True):
            assert_close(one, true, stock_one, f"d{name}, output's {weight}")
    counts = ops.stats()["attention_backward"]
    assert counts["cpu" if CPU.loaded and dtype is not torch.float64 else "reference"] == 2


def test_parts_of_a_sequence_put_together():
    """What the log-sum-exp is for: attention over two parts of the keys, weighted, is attention over all; and it has a gradient."""
    q, k, v = (x.requires_grad_() for x in qkv(1, 20, 50, 2, 16))
    (one, a), (two, b) = (ops.attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(30), slice(30, None)))
    total = torch.logaddexp(a, b)
    weight = [torch.exp(x - total).transpose(1, 2).unsqueeze(-1) for x in (a, b)]
    whole = one * weight[0] + two * weight[1]
    grad = torch.randn_like(whole)
    assert torch.allclose(whole, ops.attention(q, k, v), atol=1e-6)
    for got, want in zip(torch.autograd.grad(whole, (q, k, v), grad), torch.autograd.grad(ops.attention(q, k, v), (q, k, v), grad)):
        assert torch.allclose(got, want, atol=2e-6)


def test_gradcheck_and_second_derivatives():
    q, k, v = (x.requires_grad_() for x in qkv(1, 3, 4, 4, 3, torch.float64, 2))
    assert torch.autograd.gradcheck(lambda *x: ops.attention(*x, return_lse=True), (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *x: ops.attention(*x, return_lse=True), (q, k, v))


@pytest.mark.parametrize("permuted", (False, True))
def test_fake_mismatch(permuted):
    """fake-mismatch: opcheck of both ops, on contiguous and permuted inputs; a training step in one graph."""
    q, k, v = qkv(2, 5, 6, 2, 8)
    if permuted:
        q, k, v = (x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for x in (q, k, v))
    out, highest, total = op._softmax(q, k, v, None, False, 0.5)
    torch.library.opcheck(torch.ops.fusewire.attention_softmax.default, (q.requires_grad_(), k, v, None, False, None))
    torch.library.opcheck(torch.ops.fusewire.attention_backward.default, (
        torch.randn_like(out), torch.randn_like(total), q.detach(), k, v, out, highest, total, None, False, 0.5))
    compiled = torch.compile(lambda q, k, v: ops.attention(q, k, v) * 2, fullgraph=True, backend="aot_eager")
    assert_exact(torch.autograd.grad(compiled(q, k, v).sum(), q)[0], torch.autograd.grad((ops.attention(q, k, v) * 2).sum(), q)[0])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_biased_cast(dtype):
    """biased-cast: over 2^20 elements of each gradient the mean signed error is within 0.02 units in the last place."""
    q, k, v = qkv(16, 128, 128, 8, 64, dtype)
    grad = torch.randn_like(q)
    want = gradients(stock, *(x.double() for x in (q, k, v)), grad)
    for name, one, wanted in zip("qkv", gradients(ops.attention, q, k, v, grad), want):
        assert_unbiased(one, wanted, f"d{name}", least=1 / 16)


def test_joint_gradients():
    """The gradients of both streams, with norms, against one sequence."""
    tensors = [x.requires_grad_() for x in (*qkv(2, 20, 20, 2, 16), *qkv(2, 7, 7, 2, 16))]
    weights = [torch.rand(16).requires_grad_() for _ in range(4)]
    grads = torch.randn(2, 20, 2, 16), torch.randn(2, 7, 2, 16)
    got = torch.autograd.grad(ops.joint_attention(*tensors, **dict(zip(("q_weight", "k_weight", "q2_weight", "k2_weight"), weights))),
                              tensors + weights, grads)
    wide = [x.detach().double().requires_grad_() for x in tensors + weights]
    q, k, v, q2, k2, v2, a, b, c, d = wide
    want = torch.autograd.grad(reference.joint_attention(q, k, v, q2, k2, v2, a, b, c, d, None, 1e-6), wide, [g.double() for g in grads])
    for one, wanted in zip(got, want):
        assert torch.allclose(one.double(), wanted, atol=1e-5, rtol=1e-5)
    assert CPU.loaded is (ops.stats()["attention_backward"]["reference"] == 0)


@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 8), (2, 0, 4, 2, 8), (2, 4, 0, 2, 8)], ids=str)
def test_empty(shape):
    """empty: gradients of zero size, and zeros where there is no key."""
    q, k, v = qkv(*shape)
    for x, got in zip((q, k, v), gradients(ops.attention, q, k, v, torch.randn_like(q))):
        assert got.shape == x.shape and (got == 0).all()


def test_alias():
    """alias: inputs keep their bits, the gradients share no memory."""
    q, k, v = qkv(1, 20, 20, 2, 16)
    before, grad = [x.clone() for x in (q, k, v)], torch.randn(1, 20, 2, 16)
    got = gradients(ops.attention, q, k, v, grad)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before))
    assert len({x.untyped_storage().data_ptr() for x in (q, k, v, grad, *got)}) == 7


@pytest.mark.parametrize("queries", (3, 40))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_no_keys(dtype, queries):
    """empty: queries that see nothing get zeros, what is not there a gradient of its own shape."""
    q, k, v = (torch.randn(1, tokens, 2, 8).to(dtype).requires_grad_() for tokens in (queries, 0, 0))
    for tensor, gradient in zip((q, k, v), torch.autograd.grad(ops.attention(q, k, v).sum(), (q, k, v))):
        assert gradient.shape == tensor.shape and not gradient.any()
