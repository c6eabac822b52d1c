"""fusewire.ops.attention_varlen: packed sequences of different lengths against PyTorch's attention of each in float64; the contract of every op."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire import ops
from fusewire.kernels.attention import native, varlen
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from tests.effort import examples
from tests.kernels.attention.cases import DTYPES, stock
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_unbiased, assert_within

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
BACKENDS = [pytest.param("cpu", marks=needs_library), "reference"]

# (queries of each sequence, keys of each). Blocks are 32 or 48 queries, and 128 or 256 keys
LENGTHS = [
    ([63, 1, 130], None),                      # odd lengths, one token, several blocks; self-attention
    ([40, 0, 33, 0], [70, 5, 0, 0]),           # keys without a query, queries without a key, neither
    ([129, 65], [65, 300]),                    # cross attention: fewer keys than queries, and more
    ([8] * 30, [9] * 30),                      # many short ones, whose float32 gradients are the reference's
    ([200], None),                             # one alone
]
# (heads, heads of the keys, channels): an odd number, groups, more than one panel
HEADS = [(3, 3, 40), (4, 2, 64), (2, 1, 160)]


def boundaries(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)


def packed(lengths, heads, dtype=torch.float32):
    """q, k, v, cu_seqlens_q, cu_seqlens_k."""
    queries, keys = lengths[0], lengths[1] or lengths[0]
    (h, key_heads, channels) = heads
    make = lambda total, n: torch.randn(total, n, channels).to(dtype)
    return make(sum(queries), h), make(sum(keys), key_heads), make(sum(keys), key_heads), boundaries(queries), boundaries(keys)


def one_by_one(q, k, v, cu_q, cu_k, causal=False, scale=None, dtype=torch.float64):
    """PyTorch's attention of each sequence, in ``dtype``; zeros where it has no key."""
    parts = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]):
        one = [x[s:e][None] for x, s, e in ((q, a, b), (k, c, d), (v, c, d))]
        empty = one[0].numel() == 0 or one[1].numel() == 0
        parts.append((0 * one[0].to(dtype) if empty else stock(*one, causal=causal, scale=scale, dtype=dtype))[0])
    return torch.cat(parts) if parts else 0 * q.to(dtype)


def gradients(call, q, k, v, grad):
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    found = torch.autograd.grad(call(*inputs), inputs, grad.to(inputs[0].dtype), allow_unused=True)
    return tuple(torch.zeros_like(x) if one is None else one for x, one in zip(inputs, found))


def served(backend, op="attention_varlen", calls=1):
    """Whether ``backend`` served so many calls, and no other any."""
    counts = ops.stats()[op]
    return counts[backend] == calls == sum(counts.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=["self", "empty", "cross", "short", "one"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, lengths, heads, causal, backend):
    """head-dim, tail, silent-off: forwards."""
    q, k, v, *cu = packed(lengths, heads, dtype)
    for scale in (None, 0.3):
        with forced(backend):
            got = ops.attention_varlen(q, k, v, *cu, causal=causal, scale=scale)
        assert_close(got, one_by_one(q, k, v, *cu, causal, scale), one_by_one(q, k, v, *cu, causal, scale, dtype))
    assert served(backend, calls=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=["self", "empty", "cross", "short", "one"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_against_float64(dtype, lengths, heads, causal, backend):
    q, k, v, *cu = packed(lengths, heads, dtype)
    grad = torch.randn_like(q)
    want = gradients(lambda *x: one_by_one(*x, *cu, causal), *(x.double() for x in (q, k, v)), grad)
    plain = gradients(lambda *x: one_by_one(*x, *cu, causal, dtype=dtype), q, k, v, grad)
    with forced(None if dtype is torch.float64 else backend):
        got = gradients(lambda *x: ops.attention_varlen(*x, *cu, causal=causal), q, k, v, grad)
    for name, one, wanted, of_stock in zip("qkv", got, want, plain):
        if backend == "reference" and dtype is torch.float32:  # PyTorch's own sums over the same numbers in two orders: who errs more is chance
            assert_within(one, wanted, 8, f"d{name}", of_stock)
        else:
            assert_close(one, wanted, of_stock, f"d{name}")
    if dtype is torch.float64:  # a kernel forwards, the reference's formula backwards
        assert served("cpu" if CPU.loaded else "reference", "attention_varlen_softmax")
        assert served("reference", "attention_varlen_backward") or not CPU.loaded
    else:  # the reference is differentiated by PyTorch
        differentiated = backend == "reference" or dtype is torch.float32 and lengths[0][0] < native.FEW_QUERIES
        assert served(backend, "attention_varlen_softmax") and served("cpu", "attention_varlen_backward", 0 if differentiated else 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_sum_exp(dtype, backend):
    """masked-row: -inf, and zeros, for the queries of a sequence without keys."""
    q, k, v, *cu = packed(([20, 7, 33], [30, 0, 90]), (4, 2, 24), dtype)
    with forced(backend):
        out, lse = ops.attention_varlen(q, k, v, *cu, return_lse=True)
    assert served(backend, "attention_varlen_softmax")
    assert lse.shape == (4, 60) and lse.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert (lse[:, 20:27] == -torch.inf).all() and (out[20:27] == 0).all()
    for queries, keys in ((slice(20), slice(30)), (slice(27, 60), slice(30, 120))):
        logits = torch.einsum("qhd,khd->hqk", q[queries].double(), k[keys].double().repeat_interleave(2, 1)) * 24**-0.5
        # bfloat16: where vdpbf16ps multiplies, the weights are summed as they enter the product, rounded, so that they add up to 1
        assert (lse[:, queries] - logits.logsumexp(-1)).abs().max() < {torch.float64: 1e-12, torch.bfloat16: 1e-3}.get(dtype, 1e-5)


def test_one_query():
    """One query a sequence: PyTorch multiplies matrix by vector in many partial sums, which a tile's one long chain could not match."""
    q, k, v, *cu = packed(([1] * 50, [65] * 50), (8, 8, 64))
    assert_close(ops.attention_varlen(q, k, v, *cu), one_by_one(q, k, v, *cu), one_by_one(q, k, v, *cu, dtype=torch.float32))
    assert served("cpu" if CPU.loaded else "reference")


def test_gradient_of_the_log_sum_exp():
    q, k, v, *cu = packed(([20, 0, 40], [30, 4, 17]), (4, 2, 24))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    weight = torch.randn(4, 60)
    def of_both(inputs):
        out, lse = ops.attention_varlen(*inputs, *cu, return_lse=True)
        return torch.autograd.grad((lse[:, lse[0].isfinite()] * weight[:, lse[0].isfinite()]).sum() + out.sum(), inputs)

    got = of_both(inputs)
    assert served("cpu" if CPU.loaded else "reference", "attention_varlen_backward", CPU.loaded)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    with forced("reference"):
        want = of_both(wide)
    assert all((b != 0).any() and torch.allclose(a.double(), b, atol=1e-5) for a, b in zip(got, want))


@settings(max_examples=examples(220), deadline=None)
@given(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 90)), min_size=1, max_size=5), st.sampled_from((1, 2)), st.integers(1, 3),
       st.integers(1, 80), st.sampled_from(DTYPES), st.booleans(), st.tuples(*[st.sampled_from(LAYOUTS)] * 3), st.integers(0, 2**31))
def test_property(lengths, key_heads, group, channels, dtype, causal, layouts, seed):
    """Any lengths and layouts: the error of every element, forwards and backwards, and the same bits as for contiguous tensors."""
    torch.manual_seed(seed)
    q, k, v, *cu = packed(tuple(map(list, zip(*lengths))), (key_heads * group, key_heads, channels), dtype)
    before = {op: ops.stats()[op]["cpu"] for op in ("attention_varlen", "attention_varlen_backward")}
    got = ops.attention_varlen(q, k, v, *cu, causal=causal)
    assert_within(got, one_by_one(q, k, v, *cu, causal), 8, plain=one_by_one(q, k, v, *cu, causal, dtype=dtype))
    assert_exact(ops.attention_varlen(*(layout(x) for layout, x in zip(layouts, (q, k, v))), *cu, causal=causal), got)
    assert ops.stats()["attention_varlen"]["cpu"] - before["attention_varlen"] == 2 * CPU.loaded
    grad = torch.randn_like(q)
    want = gradients(lambda *x: one_by_one(*x, *cu, causal), *(x.double() for x in (q, k, v)), grad)
    plain = gradients(lambda *x: one_by_one(*x, *cu, causal, dtype=dtype), q, k, v, grad)
    for name, one, wanted, of_stock in zip("qkv", gradients(lambda *x: ops.attention_varlen(*x, *cu, causal=causal), q, k, v, grad), want, plain):
        # A sum over queries, which is 0 for a single key: its rounding grows with the root of their number
        assert_within(one, wanted, 8 + 4 * (group * max(queries for queries, _ in lengths)) ** 0.5, f"d{name}", of_stock)
    few = dtype is torch.float32 and q.shape[0] < native.FEW_QUERIES * len(lengths)
    fused = CPU.loaded and dtype is not torch.float64 and not few and q.numel() > 0 and k.numel() > 0
    assert ops.stats()["attention_varlen_backward"]["cpu"] - before["attention_varlen_backward"] == fused


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_strided_input(dtype, layout):
    """strided-input, strided-grad, misaligned: the same values in any layout give the same bits, one argument at a time."""
    q, k, v, *cu = packed(([37, 20], [50, 9]), (3, 3, 40), dtype)
    k[1:] = k[0]  # so that an expanded layout exists
    grad = torch.randn_like(q)
    out, highest, total = varlen._softmax(q, k, v, *cu, False, None)
    want = varlen._gradients(grad, None, q, k, v, out, highest, total, *cu, False, None)
    for position in range(9):
        tensors = [grad, q, k, v, out, highest, total, *cu]
        tensors[position] = layout(tensors[position]) if position < 7 else torch.stack([tensors[position]] * 2, 1)[:, 1]
        for got, expected in zip(varlen._gradients(tensors[0], None, *tensors[1:], False, None), want):
            assert_exact(got, expected, f"argument {position}")
        for got, expected in zip(varlen._softmax(*tensors[1:4], *tensors[7:], False, None), (out, highest, total)):
            assert_exact(got, expected, f"argument {position}")


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_coupling_and_nondeterminism(dtype):
    """batch-coupling, nondeterminism: a sequence alone has the bits that it has packed, and so has its gradient; nothing depends on threads."""
    q, k, v, *cu = packed(([70, 100, 31], None), (2, 1, 64), dtype)
    grad, threads = torch.randn_like(q), torch.get_num_threads()
    for causal in (False, True):
        packed_call = lambda *x: ops.attention_varlen(*x, *cu, causal=causal)
        whole = packed_call(q, k, v), *gradients(packed_call, q, k, v, grad)
        part = slice(70, 170)
        alone = [x[part] for x in (q, k, v)]
        assert_exact(ops.attention(*(x[None] for x in alone), causal=causal)[0], whole[0][part])
        call = lambda *x: ops.attention(*(y[None] for y in x), causal=causal)[0]
        # (float64's gradients are PyTorch's own products, which follow the number of threads and the shape on some processors)
        equal = assert_exact if dtype is not torch.float64 else lambda got, want, context="": assert_within(got, want, 1, context)
        for got, want in zip(gradients(call, *alone, grad[part]), whole[1:]):
            equal(got, want[part])
        for n in (*[threads] * 5, 1, 5):
            try:
                torch.set_num_threads(n)
                again = packed_call(q, k, v), *gradients(packed_call, q, k, v, grad)
            finally:
                torch.set_num_threads(threads)
            for check, got, want in zip((assert_exact, *[assert_exact if n == threads else equal] * 3), again, whole, strict=True):
                check(got, want, f"{n} threads")


@needs_library
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_nan_under_mask(dtype):
    """nan-under-mask: NaN in one sequence leaves the others' bits as they were, both ways; so it does in keys after the last query's, if causal."""
    q, k, v, *cu = packed(([40, 50], [60, 70]), (2, 2, 32), dtype)
    grad = torch.randn_like(q)
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[40:60], bad_v[40:60] = torch.nan, torch.nan
    for causal, same in ((False, slice(40, 90)), (True, slice(0, 90))):
        call = lambda *x: ops.attention_varlen(*x, *cu, causal=causal)
        assert_exact(call(q, bad_k, bad_v)[same], call(q, k, v)[same])
        got, want = gradients(call, q, bad_k, bad_v, grad), gradients(call, q, k, v, grad)
        assert_exact(got[0][same], want[0][same])
        for a, b in zip(got[1:], want[1:]):
            assert_exact(a[60:], b[60:])
            if causal:
                assert_exact(a, b)
                assert (a[40:60] == 0).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("causal", (False, True))
def test_biased_cast(dtype, causal):
    """biased-cast: over 2^20 elements, of either sign or all between 1 and 2, the mean signed error is within 0.02 units in the last place."""
    q, k, v, *cu = packed(([100, 28] * 8, None), (16, 16, 64), dtype)
    for v in (v, v.abs().frac() + 1):
        assert_unbiased(ops.attention_varlen(q, k, v, *cu, causal=causal), one_by_one(q, k, v, *cu, causal), least=1 / 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [([0], [0]), ([], []), ([0, 3], [0, 0]), ([0, 0], [3, 2])], ids=str)
def test_empty(lengths, backend):
    """empty: no token, no sequence, no key at all, no query at all; forwards and backwards."""
    q, k, v, *cu = packed(lengths, (2, 1, 8))
    with forced(backend):
        out = ops.attention_varlen(q, k, v, *cu)
    assert served(backend) and out.shape == q.shape and (out == 0).all()
    for x, got in zip((q, k, v), gradients(lambda *x: ops.attention_varlen(*x, *cu), q, k, v, torch.randn_like(q))):
        assert got.shape == x.shape and (got == 0).all()


def test_alias():
    """alias: inputs keep their bits, what comes back shares no memory."""
    q, k, v, *cu = packed(([20, 5], None), (2, 2, 16))
    before = [x.clone() for x in (q, k, v, *cu)]
    out, lse = ops.attention_varlen(q, k, v, *cu, return_lse=True)
    grads = gradients(lambda *x: ops.attention_varlen(*x, *cu), q, k, v, torch.randn_like(q))
    assert all(torch.equal(a, b) for a, b in zip((q, k, v, *cu), before))
    assert len({x.untyped_storage().data_ptr() for x in (q, k, v, out, lse, *grads)}) == 8


def test_gradcheck():
    q, k, v, *cu = packed(([2, 0, 3], [3, 1, 1]), (4, 2, 3), torch.float64)
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    for causal in (False, True):
        call = lambda *x: ops.attention_varlen(*x, *cu, causal=causal, return_lse=True)
        out, lse = call(*inputs)
        finite = lse.isfinite()
        assert torch.autograd.gradcheck(lambda *x: (call(*x)[0], call(*x)[1][finite]), inputs)
        assert torch.autograd.gradgradcheck(lambda *x: call(*x)[0], inputs)


@pytest.mark.parametrize("permuted", (False, True))
def test_fake_mismatch(permuted):
    """fake-mismatch: opcheck on contiguous and permuted inputs; a training step in one graph."""
    q, k, v, *cu = packed(([30, 4], [26, 40]), (2, 2, 8))
    if permuted:
        q, k, v = (x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (q, k, v))
    out, highest, total = varlen._softmax(q, k, v, *cu, True, None)
    torch.library.opcheck(torch.ops.fusewire.attention_varlen_backward.default, (
        torch.randn_like(out), torch.randn_like(total), q, k, v, out, highest, total, *cu, True, None))
    q.requires_grad_()
    torch.library.opcheck(torch.ops.fusewire.attention_varlen.default, (q, k, v, *cu, True, 0.5))
    torch.library.opcheck(torch.ops.fusewire.attention_varlen_softmax.default, (q, k, v, *cu, False, None))
    call = lambda q, k, v: ops.attention_varlen(q, k, v, *cu, causal=True) * 2
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_exact(torch.autograd.grad(compiled(q, k, v).sum(), q)[0], torch.autograd.grad(call(q, k, v).sum(), q)[0])
    with torch.no_grad():
        assert_exact(compiled(q, k, v), call(q, k, v))


def test_autocast():
    q, k, v, *cu = packed(([20, 10], None), (2, 2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attention_varlen(q, k, v, *cu)
    assert_exact(out, ops.attention_varlen(*(x.to(torch.bfloat16) for x in (q, k, v)), *cu))


Q, KV, CU = torch.zeros(5, 4, 8), torch.zeros(7, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
CU_K = torch.tensor([0, 2, 7], dtype=torch.int32)


@pytest.mark.parametrize("error, words, arguments", [
    (ValueError, r"q has shape \[1, 5, 4, 8\]; it should be \[total, H, D\]", dict(q=Q[None])),
    (ValueError, "k has shape", dict(k=KV[..., :4])),
    (ValueError, "k has shape", dict(k=KV[:, :0], v=KV[:, :0])),
    (ValueError, "v has shape", dict(v=KV[:5])),
    (TypeError, "k has dtype", dict(k=KV.double())),
    (TypeError, "q has dtype torch.int32", dict(q=Q.int())),
    (ValueError, "v is on meta", dict(v=KV.to("meta"))),
    (TypeError, "cu_seqlens_q is a list", dict(cu_seqlens_q=[0, 5])),
    (TypeError, r"cu_seqlens_q has dtype torch.int64; it should be torch.int32: cu_seqlens_q.to\(torch.int32\)", dict(cu_seqlens_q=CU.long())),
    (ValueError, "cu_seqlens_q has shape", dict(cu_seqlens_q=CU[None])),
    (ValueError, "cu_seqlens_q begins with 1; it should begin with 0", dict(cu_seqlens_q=CU + torch.tensor([1, 0, 0], dtype=torch.int32))),
    (ValueError, "cu_seqlens_q ends with 6; it should end with 5, the number of tokens of q",
     dict(cu_seqlens_q=CU + torch.tensor([0, 0, 1], dtype=torch.int32))),
    (ValueError, "cu_seqlens_k decreases from 9 to 7 at index 2", dict(cu_seqlens_k=CU_K + torch.tensor([0, 7, 0], dtype=torch.int32))),
    (ValueError, "cu_seqlens_k has 2 elements; it should have 3", dict(cu_seqlens_k=CU_K[::2])),
    (ValueError, "cu_seqlens_q ends with 5; it should end with 7|cu_seqlens_k ends with 5; it should end with 7", dict(cu_seqlens_k=None)),
    (ValueError, "cu_seqlens_k is on meta", dict(cu_seqlens_k=CU_K.to("meta"))),
    (ValueError, "scale is", dict(scale=float("inf"))),
], ids=lambda value: value if isinstance(value, str) else None)
def test_bad_input(error, words, arguments):
    with pytest.raises(error, match=words):
        ops.attention_varlen(**{**dict(q=Q, k=KV, v=KV, cu_seqlens_q=CU, cu_seqlens_k=CU_K), **arguments})


@needs_library
@pytest.mark.parametrize("bad", [[1, 2, 5], [0, 6, 5], [0, 2, 4], [0, 2, 2**30]], ids=str)
def test_the_kernel_looks_again(bad):
    """What is traced is checked in the kernel: nothing is read or written out of bounds."""
    with pytest.raises(RuntimeError, match="cu_seqlens_q should begin with 0, never decrease, and end with 5"):
        torch.ops.fusewire.attention_varlen(Q, KV, KV, torch.tensor(bad, dtype=torch.int32), CU_K, False, None)
