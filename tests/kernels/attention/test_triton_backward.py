"""The Triton kernels of attention's gradients in the interpreter: blocks, masks, groups, layouts. (Precision of the products and speed: tests/gpu.)"""

import pytest
import torch

from fusewire import ops
from fusewire.kernels.attention import native, op, reference, triton_limits, varlen
from fusewire.kernels.dispatch import forced
from tests.kernels.attention.cases import qkv, stock
from tests.kernels.attention.test_varlen import packed
from tests.kernels.interpreted import DTYPES, ON_GPU, needs_interpreter, unchanged
from tests.layouts import LAYOUTS
from tests.tolerance import MEAN_FACTOR, assert_close, assert_exact, assert_within, errors, rounding_noise

pytestmark = needs_interpreter


@pytest.fixture(autouse=True)
def few_queries_too(monkeypatch):
    """On the CPU, where the interpreter runs, few float32 queries would be recomputed."""
    monkeypatch.setattr(native, "FEW_QUERIES", 0)


def gradients(call, q, k, v, grad):
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(call(*inputs), inputs, grad.to(inputs[0].dtype))


def in_triton(call, q, k, v, grad, calls="attention_backward"):
    """The gradients, which the row must have served."""
    before = ops.stats()[calls]["triton"]
    with forced("triton"):
        found = gradients(call, q, k, v, grad)
    assert ops.stats()[calls]["triton"] == before + 1
    assert all(x.is_contiguous() for x in found)
    return found


def magnitudes(q, k, v, grad, mask, causal, scale):
    """For each number of the three gradients the sum of the magnitudes of what is added to it; zeros where heads are grouped or there is a mask."""
    if mask is not None or q.shape[2] != k.shape[2]:
        return [torch.zeros_like(x) for x in (q, k, v)]
    q, k, v, grad = (x.double().transpose(1, 2) for x in (q, k, v, grad))
    scale = scale or q.shape[-1]**-0.5
    logits = q @ k.mT * scale
    if causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril(), -torch.inf)
    weights, along = logits.softmax(-1), grad @ v.mT
    slopes = weights * (along.abs() + (weights * along).sum(-1, keepdim=True).abs()) * scale
    return [x.transpose(1, 2) for x in (slopes @ k.abs(), slopes.mT @ q.abs(), weights.mT @ grad.abs())]


def check(q, k, v, grad, mask=None, causal=False, scale=None, context=""):
    """Against float64, and PyTorch's own attention in the dtype."""
    got = in_triton(lambda *x: ops.attention(*x, mask=mask, causal=causal, scale=scale), q, k, v, grad)
    want = gradients(lambda *x: stock(*x, mask, causal, scale), *(x.double() for x in (q, k, v)), grad)
    plain = gradients(lambda *x: stock(*x, mask, causal, scale, q.dtype), q, k, v, grad)
    for name, one, wanted, of_stock, added in zip("qkv", got, want, plain, magnitudes(q, k, v, grad, mask, causal, scale)):
        if not ON_GPU and q.dtype is torch.float32 and q.shape[1] < 16:
            # The interpreter multiplies and adds in two roundings, and its products are numpy's: PyTorch's may sum so few rows in much shorter chains
            assert_within(one, wanted, 4, f"d{name} {context}", of_stock, added[None])
            assert errors(one, wanted)[1] <= MEAN_FACTOR * errors(of_stock, wanted)[1] + rounding_noise(wanted, one.dtype).mean().item(), (name, context)
        else:
            assert_close(one, wanted, of_stock, f"d{name} {context}")
    return got


@pytest.mark.parametrize("causal", (False, True))
# (batch, queries, keys, heads, channels, heads of the keys): fewer than a block of either; tails of both after whole blocks; a padded head dimension of
# each kind; grouped queries; the widest
@pytest.mark.parametrize("shape", [(4, 5, 7, 8, 40, 8), (1, 140, 70, 2, 64, 1), (2, 70, 140, 2, 16, 2), (1, 128, 64, 2, 72, 2), (1, 90, 90, 3, 128, 1),
                                   (1, 33, 40, 1, 256, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype, shape, causal):
    """head-dim, tail: each shape, with and without causal, and a scale."""
    if dtype is torch.float32 and shape[4] > 128:
        pytest.skip("float32's gradients end at 128 channels")
    q, k, v = qkv(*shape[:5], dtype, shape[5])
    grad = torch.randn_like(q)
    same = unchanged(q, k, v, grad)
    check(q, k, v, grad, causal=causal, scale=0.2 if causal else None)
    same()


@pytest.mark.parametrize("kind", ("bool", "-inf", "additive"))
@pytest.mark.parametrize("shape", [(2, 2, 70, 90), (1, 1, 70, 90), (2, 1, 1, 90), (1, 2, 70, 90)], ids=str)
def test_mask(kind, shape):
    q, k, v = qkv(2, 70, 90, 2, 32)
    visible = torch.rand(shape) > 0.5
    visible[..., 3] = True
    mask = {"bool": visible, "-inf": torch.zeros(shape).masked_fill(~visible, -torch.inf), "additive": torch.randn(shape)}[kind]
    grad = torch.randn_like(q)
    got = check(q, k, v, grad, mask)
    assert not torch.equal(got[0], in_triton(ops.attention, q, k, v, grad)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_dtypes(dtype):
    """A mask in q's dtype, read by columns; grouped queries with a mask for each head; causal beside it."""
    q, k, v = qkv(1, 70, 70, 4, 32, dtype, 2)
    mask = torch.randn(1, 4, 70, 70).to(dtype).transpose(2, 3)
    grad = torch.randn_like(q)
    check(q, k, v, grad, mask)
    got = in_triton(lambda *x: ops.attention(*x, mask=mask, causal=True), q, k, v, grad)
    both = mask.masked_fill(torch.ones(70, 70, dtype=torch.bool).triu(1), -torch.inf)
    for one, other in zip(got, in_triton(lambda *x: ops.attention(*x, mask=both), q, k, v, grad)):
        # On a GPU these are two kernels, in which products and sums are fused differently
        assert_within(one, other, 4) if one.is_cuda else assert_exact(one, other)


def test_masked_row_and_nan_under_mask():
    """masked-row, nan-under-mask: a query without keys has the gradient 0; so have keys that no query sees, even NaN, and they reach nothing."""
    q, k, v = qkv(2, 70, 110, 2, 32)
    k[:, 90:], v[:, 90:] = torch.nan, torch.nan
    mask = (torch.arange(110) < 90).expand(1, 1, 70, 110).clone()
    mask[:, :, 7] = False
    grad = torch.randn_like(q)
    for one in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        cut = in_triton(lambda *x: ops.attention(*x, mask=one[..., :90]), q, k[:, :90], v[:, :90], grad)
        q_grad, k_grad, v_grad = in_triton(lambda *x: ops.attention(*x, mask=one), q, k, v, grad)
        assert (q_grad[:, 7] == 0).all() and q_grad.isfinite().all()
        for whole, part in ((q_grad, cut[0]), (k_grad[:, :90], cut[1]), (v_grad[:, :90], cut[2])):
            assert_exact(whole, part)
        assert (k_grad[:, 90:] == 0).all() and (v_grad[:, 90:] == 0).all()


@pytest.mark.parametrize("lowest", (torch.finfo(torch.float32).min, -1e9, -1e4))
def test_rows_of_low_numbers(lowest):
    """A mask that hides by a large finite number: a row of it alone counts its keys by what is left of their logits, backwards as forwards."""
    q, k, v = qkv(1, 20, 40, 8, 16)
    mask = torch.zeros(1, 1, 20, 40)
    mask[:, :, 4], mask[:, :, 5, 20:] = lowest, lowest
    grad = torch.randn_like(q)
    got = in_triton(lambda *x: ops.attention(*x, mask=mask), q, k, v, grad)
    with forced("reference"):  # (PyTorch's own gradients take a log-sum-exp, which has lost the number of keys)
        want = gradients(lambda *x: ops.attention(*x, mask=mask.double()), *(x.double() for x in (q, k, v)), grad)
        plain = gradients(lambda *x: ops.attention(*x, mask=mask), q, k, v, grad)
    for one, wanted, of_reference in zip(got, want, plain):
        assert_close(one, wanted, of_reference)
    ones = torch.ones(1, 20, 8, 1).expand(1, 20, 8, 16)
    _, _, v_grad = in_triton(lambda *x: ops.attention(*x, mask=mask), q, k, v, ones)
    assert torch.allclose(v_grad.sum(1), torch.full((1, 8, 16), 20.0), rtol=1e-5)  # the weights of each query add up to 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(layout):
    """strided-input, strided-grad, misaligned: the same values in any layout give the same bits."""
    q, k, v = qkv(2, 37, 70, 2, 24, torch.bfloat16)
    k[1] = k[0]  # so that an expanded layout exists
    grad, mask = torch.randn_like(q), torch.rand(2, 2, 37, 70) > 0.3
    with forced("triton"), torch.no_grad():
        out, highest, total = op._softmax(q, k, v, mask, False, None)
        lse_grad = torch.randn_like(highest)
        tensors = (grad, lse_grad, q, k, v, out, highest, total, mask)
        want = op._gradients(*tensors, False, None)
        for got, one in zip(op._gradients(*(layout(x) for x in tensors), False, None), want):
            assert_exact(got, one)


def test_expanded_gradient():
    """strided-grad: ``.sum().backward()`` hands over a gradient of stride 0."""
    q, k, v = qkv(1, 20, 30, 2, 16)
    whole = in_triton(ops.attention, q, k, v, torch.ones(1, 20, 2, 16))
    for got, want in zip(in_triton(ops.attention, q, k, v, torch.ones(()).expand(1, 20, 2, 16)), whole):
        assert_exact(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_coupling(dtype):
    q, k, v = qkv(3, 70, 90, 2, 32, dtype)
    grad = torch.randn_like(q)
    want = in_triton(ops.attention, q, k, v, grad)
    for got, whole in zip(in_triton(ops.attention, q[1:2], k[1:2], v[1:2], grad[1:2]), want):
        assert_exact(got, whole[1:2])


def test_log_sum_exp():
    """The gradient of the log-sum-exp: parts of the keys that were attended to apart, put together."""
    q, k, v = qkv(1, 40, 60, 2, 16)
    grad = torch.randn_like(q)

    def parts(q, k, v):
        (one, a), (two, b) = (ops.attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(30), slice(30, None)))
        total = torch.logaddexp(a, b)
        return sum(x * torch.exp(lse - total).transpose(1, 2).unsqueeze(-1) for x, lse in ((one, a), (two, b)))

    with forced("triton"):
        got = gradients(parts, q, k, v, grad)
    assert ops.stats()["attention_backward"]["triton"] == 2
    want = gradients(stock, *(x.double() for x in (q, k, v)), grad)
    for one, wanted in zip(got, want):
        assert torch.allclose(one.double(), wanted, atol=2e-6)


def test_the_forward_kernels_number_comes_back():
    """What the forward kernel subtracted from its logits, in base 2 and float32, the gradients' kernels subtract again, to the last bit."""
    from fusewire.kernels.attention import triton_backward, triton_kernel

    subtracted = torch.cat([torch.randn(512) * 10.0**power for power in range(-3, 30, 4)])
    highest = (subtracted.double() * triton_kernel.LN2.value).view(1, 1, -1)
    base, x = torch.empty(subtracted.shape), torch.zeros(1, len(subtracted), 1, 16)
    rows = torch.empty(2, len(subtracted))
    args = (*(value for t in (x, x) for value in (t, *t.stride())), *(value for t in (highest, highest) for value in (t, *t.stride())), None, 0, 0, 0)
    triton_backward.delta_kernel[(len(subtracted) // 64,)](*args, base, *rows, len(subtracted) // 64, len(subtracted), 1, ROWS=64, DIM=16, BLOCK_D=16, UNIT=1)
    assert_exact(base, subtracted)


def test_other_kernels_numbers():
    """Gradients after the reference's and the CPU kernels' forward, whose two numbers were rounded otherwise; and after a log-sum-exp with a total of 1."""
    q, k, v = qkv(1, 40, 60, 2, 32)
    grad = torch.randn_like(q)
    want = gradients(stock, *(x.double() for x in (q, k, v)), grad)
    plain = gradients(lambda *x: stock(*x, dtype=torch.float32), q, k, v, grad)
    with torch.no_grad():
        out, highest, total = reference.attention_softmax(q, k, v, None, False, None)
        with forced("triton"):
            for numbers in ((highest, total), (highest + total.log(), torch.ones_like(total))):
                got = op._gradients(grad, None, q, k, v, out, *numbers, None, False, None)
                for one, wanted, of_stock in zip(got, want, plain):
                    assert_close(one, wanted, of_stock)


def test_limits():
    q = torch.randn(1, 4, 1, 16)
    rows = torch.zeros(1, 1, 4, dtype=torch.float64)
    with forced("triton"):
        def why_not(q, scale=None):
            return triton_limits.why_not_backward(q, None, q, q, q, q, rows, rows, None, False, scale)
        assert why_not(q) == ""
        assert "not positive" in why_not(q, scale=-1.0)
        assert "float64" in why_not(q.double())
        assert "empty" in why_not(q[:0]) and "empty" in why_not(q[:, :, :0])
        assert why_not(torch.zeros(1, 4, 1, 128)) == why_not(torch.zeros(1, 4, 1, 256, dtype=torch.bfloat16)) == ""
        assert "gradients are served up to 128 in torch.float32" in why_not(torch.zeros(1, 4, 1, 129))
        assert "1 to 256 are served in torch.float32" in why_not(torch.zeros(1, 4, 1, 257))
        assert "gradients are served up to 256 in torch.bfloat16" in why_not(torch.zeros(1, 4, 1, 257, dtype=torch.bfloat16))
    if not ON_GPU:
        assert why_not(q)


# Empty sequences of each kind; blocks that end within a sequence and with one; one sequence alone. The dtype that `make test` takes, with causal or
# without by turns (of the first: both)
LENGTHS = ((torch.float32, ([5, 0, 70, 130, 1], [7, 3, 70, 0, 40])), (torch.bfloat16, ([128, 64, 3], None)), (torch.float32, ([140], None)),
           (torch.bfloat16, ([1] * 4, [2] * 4)))


@pytest.mark.parametrize("dtype, lengths, causal", [
    pytest.param(dtype, lengths, causal, marks=() if dtype is often and causal is bool(i % 2) or i == 0 and dtype is often else pytest.mark.slow,
                 id=f"{dtype}-{lengths}-{causal}")
    for i, (often, lengths) in enumerate(LENGTHS) for dtype in DTYPES[:2] for causal in (False, True)])
def test_varlen(dtype, lengths, causal):
    """Each sequence as if alone: the bits of ``attention``; what has no partner has the gradient 0."""
    q, k, v, cu_q, cu_k = packed(lengths, (4, 2, 40), dtype)
    grad = torch.randn_like(q)
    same = unchanged(q, k, v, grad, cu_q, cu_k)
    got = in_triton(lambda *x: ops.attention_varlen(*x, cu_q, cu_k, causal=causal), q, k, v, grad, "attention_varlen_backward")
    for (a, b), (c, d) in zip(zip(cu_q.tolist(), cu_q.tolist()[1:]), zip(cu_k.tolist(), cu_k.tolist()[1:])):
        parts = got[0][a:b], got[1][c:d], got[2][c:d]
        if a == b or c == d:
            assert all((part == 0).all() for part in parts)
            continue
        alone = in_triton(lambda *x: ops.attention(*x, causal=causal), q[None, a:b], k[None, c:d], v[None, c:d], grad[None, a:b])
        for part, one in zip(parts, alone):
            assert_exact(part, one[0])
    same()


def test_varlen_strided_input():
    """strided-input, with the gradient of the log-sum-exp."""
    q, k, v, *cu = packed(([9, 30], [40, 7]), (2, 2, 24), torch.bfloat16)
    with forced("triton"), torch.no_grad():
        out, highest, total = varlen._softmax(q, k, v, *cu, False, None)
        tensors = (torch.randn_like(q), torch.randn_like(highest), q, k, v, out, highest, total)
        want = varlen._gradients(*tensors, *cu, False, None)
        for layout in LAYOUTS:
            for got, one in zip(varlen._gradients(*(layout(x) for x in tensors), *cu, False, None), want):
                assert_exact(got, one)
