"""fusewire.ops.attention under a block pattern: what autoregressive models of pictures use, against PyTorch's attention under the dense mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire import ops
from fusewire.kernels.attention import op
from fusewire.kernels.attention.native import FEW_QUERIES
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from tests.effort import examples
from tests.kernels.attention.cases import DTYPES, qkv, stock
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_within

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
BACKENDS = [pytest.param("cpu", marks=needs_library), "reference"]
TEXT, SIDE = 24, 14  # of the pictures below: tokens of text, then SIDE rows of SIDE tokens

SCALE_OF = torch.arange(10).repeat_interleave(torch.tensor([1, 2, 3, 4, 5, 6, 8, 10, 13, 16]) ** 2)


def scales(q, k):
    """VAR: a token sees its own scale and those before it. Tian et al. (2024)."""
    return SCALE_OF[q] >= SCALE_OF[k]


def prefix(q, k):
    """A text that all see, then one token after another."""
    return (k < TEXT) | (k <= q)


def row(q, k):
    """DALL-E, Ramesh et al. (2021): the text, and what came before in the last SIDE tokens."""
    return (k <= q) & ((k < TEXT) | (q - k <= SIDE))


def column(q, k):
    """DALL-E: the text, and what came before in the same column."""
    return (k <= q) & ((k < TEXT) | ((q - k) % SIDE == 0))


def convolution(q, k):
    """DALL-E: the text, and what came before within a window around the token."""
    q_row, k_row, q_column, k_column = (q - TEXT) // SIDE, (k - TEXT) // SIDE, (q - TEXT) % SIDE, (k - TEXT) % SIDE
    return (k <= q) & ((k < TEXT) | ((q_row - k_row < 5) & ((q_column - k_column).abs() < 6)))


def documents(b, h, q, k):
    """Another window for each head, another length for each sample."""
    return ((q - k).abs() <= 20 * h + 3) & (k < 180 - 50 * b) | (k == 0)


# (function, tokens)
PATTERNS = {"scales": (scales, len(SCALE_OF)), "prefix": (prefix, 220), "row": (row, 220), "column": (column, 220), "convolution": (convolution, 220),
            "documents": (documents, 200)}


def compiled(name, batch=2, heads=4):
    function, tokens = PATTERNS[name]
    return ops.block_pattern(function, tokens, tokens, **(dict(batch=batch, heads=heads) if name == "documents" else {}))


def dense(function, queries, keys, batch=2, heads=4):
    """The mask [B or 1, H or 1, Tq, Tk], computed apart from ``block_pattern``."""
    q, k = torch.arange(queries)[:, None], torch.arange(keys)[None]
    if function is documents:
        return function(torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None, None], q, k)
    return function(q, k)[None, None]


def gradients(call, q, k, v, grad):
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(call(*inputs), inputs, grad.to(inputs[0].dtype))


def served(backend, op="attention", calls=1):
    """Whether ``backend`` served so many calls, and no other any."""
    counts = ops.stats()[op]
    return counts[backend] == calls == sum(counts.values())


@pytest.mark.parametrize("name", PATTERNS)
def test_the_map(name):
    """The blocks stand for the function, and leave out what they can."""
    function, tokens = PATTERNS[name]
    pattern, mask = compiled(name), dense(function, tokens, tokens)
    assert torch.equal(pattern.dense(), mask)
    for b, h in ((0, 0), (-1, -1)):
        for i in range(-(-tokens // 32)):
            for j in range(-(-tokens // 32)):
                block = mask[b, h, 32 * i:32 * i + 32, 32 * j:32 * j + 32]
                assert (pattern.blocks[b, h, i, j] == -2) == (not block.any()) and (pattern.blocks[b, h, i, j] == -1) == block.all()
    assert "% of the blocks computed" in repr(pattern) and 0.1 < pattern.computed() < 0.9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels, key_heads", [(64, 2), (40, 4)])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, name, channels, key_heads, backend):
    """silent-off, head-dim, tail: forwards, with the log-sum-exp."""
    function, tokens = PATTERNS[name]
    pattern, mask = compiled(name), dense(function, tokens, tokens)
    q, k, v = qkv(2, tokens, tokens, 4, channels, dtype, key_heads)
    with forced(backend):
        got = ops.attention(q, k, v, pattern=pattern)
        again, lse = ops.attention(q, k, v, pattern=pattern, return_lse=True)
    assert served(backend) and served(backend, "attention_softmax")
    want, plain = stock(q, k, v, mask), stock(q, k, v, mask, dtype=dtype)
    assert_close(got, want, plain)
    assert_close(again, want, plain)
    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double().repeat_interleave(4 // key_heads, 2)) * channels**-0.5
    # bfloat16: where vdpbf16ps multiplies, the weights are summed as they enter the product, rounded, so that they add up to 1
    assert (lse - logits.masked_fill(~mask, -torch.inf).logsumexp(-1)).abs().max() < {torch.float64: 1e-12, torch.bfloat16: 2e-3}.get(dtype, 1e-5)


@pytest.mark.parametrize("channels, key_heads", [(64, 2), (40, 4)])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_against_float64(dtype, name, channels, key_heads):
    function, tokens = PATTERNS[name]
    pattern, mask = compiled(name), dense(function, tokens, tokens)
    q, k, v = qkv(2, tokens, tokens, 4, channels, dtype, key_heads)
    grad = torch.randn_like(q)
    want = gradients(lambda *x: stock(*x, mask), *(x.double() for x in (q, k, v)), grad)
    plain = gradients(lambda *x: stock(*x, mask, dtype=dtype), q, k, v, grad)
    got = gradients(lambda *x: ops.attention(*x, pattern=pattern), q, k, v, grad)
    for which, one, wanted, of_stock in zip("qkv", got, want, plain):
        assert_close(one, wanted, of_stock, f"d{which}")
    assert served("cpu" if CPU.loaded and dtype is not torch.float64 else "reference", "attention_backward") or not CPU.loaded
    assert served("cpu" if CPU.loaded else "reference", "attention_softmax")


@pytest.mark.parametrize("queries", (1, FEW_QUERIES - 1))
def test_a_query_that_sees_one_key(queries):
    """cancellation: its output is that key's value, whatever it asks: the gradient of q is 0, not what rounding leaves of a difference."""
    pattern = ops.block_pattern(lambda b, h, q, k: k == 0, queries, 307)
    q, k, v = qkv(1, queries, 307, 1, 78, torch.float32)
    grad = torch.randn_like(q)
    assert_exact(gradients(lambda *x: ops.attention(*x, pattern=pattern), q, k, v, grad)[0], torch.zeros_like(q))
    assert served("cpu" if CPU.loaded else "reference", "attention_softmax")


@settings(max_examples=examples(200), deadline=None)
@given(st.integers(1, 2), st.integers(1, 170), st.integers(1, 400), st.sampled_from((1, 2)), st.sampled_from((1, 2)), st.integers(1, 80),
       st.sampled_from(DTYPES), st.integers(1, 70), st.floats(0, 1), st.sampled_from(("", "causal", "mask", "additive")), st.booleans(),
       st.tuples(*[st.sampled_from(LAYOUTS)] * 3), st.integers(0, 2**31))
def test_property(batch, queries, keys, key_heads, group, channels, dtype, grain, share, kind, each, layouts, seed):
    """Any map of blocks, whole and pierced, with a mask and causal too: every element, forwards and backwards; the same bits for any layout."""
    torch.manual_seed(seed)
    heads = key_heads * group
    shape = (batch, heads) if each else (1, 1)
    coarse, fine = torch.rand(*shape, queries // grain + 1, keys // grain + 1) < share, torch.rand(*shape, queries, keys) < 0.9
    whole = torch.rand(*shape, queries // 64 + 1, keys // 64 + 1) < 0.5

    def function(b, h, q, k):
        return coarse[b, h, q // grain, k // grain] & (fine[b, h, q, k] | whole[b, h, q // 64, k // 64]) | (k == 0)

    pattern = ops.block_pattern(function, queries, keys, batch=shape[0], heads=shape[1])
    mask = {"mask": torch.rand(1, 1, queries, keys) < 0.7, "additive": torch.randn(batch, 1, queries, keys)}.get(kind)
    if kind == "mask":
        mask[..., 0] = True
    visible = pattern.dense() & (torch.ones(queries, keys, dtype=torch.bool).tril() if kind == "causal" else True)
    visible = visible & mask if kind == "mask" else visible
    whole_mask = mask.double().masked_fill(~visible, -torch.inf) if kind == "additive" else visible
    q, k, v = qkv(batch, queries, keys, heads, channels, dtype, key_heads)
    before = {name: ops.stats()[name]["cpu"] for name in ("attention", "attention_backward")}
    call = lambda *x: ops.attention(*x, pattern=pattern, mask=mask, causal=kind == "causal")
    got = call(q, k, v)
    assert_within(got, stock(q, k, v, whole_mask), 8, plain=stock(q, k, v, whole_mask, dtype=dtype))
    assert_exact(call(*(layout(x) for layout, x in zip(layouts, (q, k, v)))), got)
    assert ops.stats()["attention"]["cpu"] - before["attention"] == 2 * CPU.loaded
    grad = torch.randn_like(q)
    want = gradients(lambda *x: stock(*x, whole_mask), *(x.double() for x in (q, k, v)), grad)
    plain = gradients(lambda *x: stock(*x, whole_mask, dtype=dtype), q, k, v, grad)
    for name, one, wanted, of_stock in zip("qkv", gradients(call, q, k, v, grad), want, plain):
        # A sum over queries, which is 0 for a single key: its rounding grows with the root of their number
        assert_within(one, wanted, 8 + 4 * (group * queries) ** 0.5, f"d{name}", of_stock)
    fused = CPU.loaded and dtype is not torch.float64 and (dtype is not torch.float32 or queries >= FEW_QUERIES)
    assert ops.stats()["attention_backward"]["cpu"] - before["attention_backward"] == fused


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_together_with_the_rest(dtype):
    """A key is seen that pattern, mask and causal all let through, after the norm of q and k: as under one mask of them all."""
    q, k, v = qkv(2, 150, 150, 4, 40, dtype)
    pattern = ops.block_pattern(lambda q, k: (q // 40 == k // 40) | (k < 3), 150, 150)
    mask = torch.rand(2, 4, 150, 150) > 0.3
    mask[..., 0] = True
    weights = [torch.rand(40).to(dtype) + 0.5 for _ in range(2)]
    everything = mask & pattern.dense() & torch.ones(150, 150, dtype=torch.bool).tril()
    call = lambda **rest: ops.attention(q, k, v, q_weight=weights[0], k_weight=weights[1], **rest)
    got, want = call(pattern=pattern, mask=mask, causal=True), call(mask=everything)
    assert_within(got, want.double(), 4)
    assert served("cpu" if CPU.loaded else "reference", calls=2)
    for hidden in (dict(pattern=pattern, mask=mask), dict(pattern=pattern, causal=True), dict(mask=mask, causal=True)):
        assert not torch.equal(call(**hidden), want)  # mask-ignored


@needs_library
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_what_is_hidden_never_matters(dtype):
    """nan-under-mask, masked-row: NaN in keys that no query sees; queries that see no key give 0, a log-sum-exp of -inf and gradients of 0."""
    hidden = lambda x: (x >= 40) & (x < 90) | (x > 250)
    pattern = ops.block_pattern(lambda q, k: ~hidden(k) & ~hidden(q) & ((q - k).abs() < 100), 290, 270)
    q, k, v = qkv(1, 290, 270, 2, 32, dtype)
    grad, unseen = torch.randn_like(q), hidden(torch.arange(270))
    bad_k, bad_v = (x.masked_fill(unseen[:, None, None], torch.nan) for x in (k, v))
    call = lambda *x: ops.attention(*x, pattern=pattern)
    got, lse = ops.attention(q, bad_k, bad_v, pattern=pattern, return_lse=True)
    wide = [x.double() for x in (q, k, v)]
    assert_close(got, call(*wide), call(q, k, v))  # (NaN does not split into parts for the tiles: another kernel's bits)
    empty = hidden(torch.arange(290))
    assert (got[:, empty] == 0).all() and (got[:, ~empty] != 0).all() and (lse[..., empty] == -torch.inf).all() and lse[..., ~empty].isfinite().all()
    for a, want, plain in zip(gradients(call, q, bad_k, bad_v, grad), gradients(call, *wide, grad), gradients(call, q, k, v, grad)):
        assert_close(a, want, plain)
        assert (a[:, empty if a.shape[1] == 290 else unseen] == 0).all()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nondeterminism_and_batch_coupling(dtype):
    """nondeterminism, batch-coupling: any number of threads, and a sample alone, give the same bits."""
    pattern, threads = compiled("convolution"), torch.get_num_threads()
    q, k, v = qkv(3, 220, 220, 2, 64, dtype)
    grad = torch.randn_like(q)
    call = lambda *x: ops.attention(*x, pattern=pattern)
    whole = call(q, k, v), *gradients(call, q, k, v, grad)
    for n in (threads, 1, 5):
        try:
            torch.set_num_threads(n)
            again = call(q, k, v), *gradients(call, q, k, v, grad)
        finally:
            torch.set_num_threads(threads)
        for a, b in zip(again, whole):
            assert_exact(a, b, f"{n} threads")
    if dtype is not torch.float64:  # whose gradients are PyTorch's products
        for a, b in zip((call(q[1:2], k[1:2], v[1:2]), *gradients(call, q[1:2], k[1:2], v[1:2], grad[1:2])), whole):
            assert_exact(a, b[1:2])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_long_keys(dtype):
    """More keys than are packed at a time, the first and the last of them hidden."""
    pattern = ops.block_pattern(lambda q, k: (k > 900) & (k < 15000) & ((k // 100) % 7 == q // 30), 60, 16000)
    q, k, v = qkv(1, 60, 16000, 2, 64, dtype)
    with forced("cpu"):
        got = ops.attention(q, k, v, pattern=pattern)
    assert_close(got, stock(q, k, v, pattern.dense()), stock(q, k, v, pattern.dense(), dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty(lengths, backend):
    """empty: no query, no key; and a pattern that hides everything."""
    q, k, v = qkv(2, *lengths, 2, 8)
    with forced(backend):
        out = ops.attention(q, k, v, pattern=ops.block_pattern(prefix, *lengths))
        assert out.shape == q.shape and (out == 0).all()
        x = torch.randn(1, 40, 2, 8)
        assert (ops.attention(x, x, x, pattern=ops.block_pattern(lambda q, k: (q < 0) & (k < 0), 40, 40)) == 0).all()
    assert served(backend, calls=2)


def test_pattern_in_pieces(monkeypatch):
    """The function is asked about some queries at a time: the pieces are one map."""
    from fusewire.kernels.attention import patterns

    whole = compiled("scales")
    monkeypatch.setattr(patterns, "_AT_ONCE", 1)
    pieces = compiled("scales")
    assert torch.equal(pieces.blocks, whole.blocks) and torch.equal(pieces.words, whole.words)


def test_gradcheck():
    pattern = ops.block_pattern(lambda q, k: (k <= q) & (k != 1) | (k == 0) & (q == 1), 4, 5)
    inputs = tuple(x.requires_grad_() for x in qkv(1, 4, 5, 4, 3, torch.float64, 2))
    assert torch.autograd.gradcheck(lambda *x: ops.attention(*x, pattern=pattern, return_lse=True), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: ops.attention(*x, pattern=pattern), inputs)


@pytest.mark.parametrize("permuted", (False, True))
def test_fake_mismatch(permuted):
    """fake-mismatch: opcheck on contiguous and permuted inputs; a training step in one graph."""
    q, k, v = qkv(2, 40, 50, 2, 8)
    if permuted:
        q, k, v = (x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for x in (q, k, v))
    pattern = ops.block_pattern(prefix, 40, 50)
    rest = (None, False, None, pattern.blocks, pattern.words)
    out, highest, total = op._softmax(q, k, v, *rest)
    torch.library.opcheck(torch.ops.fusewire.attention_backward.default, (torch.randn_like(out), None, q, k, v, out, highest, total, *rest))
    q.requires_grad_()
    torch.library.opcheck(torch.ops.fusewire.attention_softmax.default, (q, k, v, *rest))
    torch.library.opcheck(torch.ops.fusewire.attention.default, (q, k, v, None, None, None, False, None, 1e-6, pattern.blocks, pattern.words))
    call = lambda q, k, v: ops.attention(q, k, v, pattern=pattern) * 2
    traced = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_exact(torch.autograd.grad(traced(q, k, v).sum(), q)[0], torch.autograd.grad(call(q, k, v).sum(), q)[0])


Q, PATTERN = torch.zeros(2, 4, 3, 8), ops.block_pattern(prefix, 4, 4)


@pytest.mark.parametrize("error, words, call", [
    (TypeError, r"pattern is a function; it should be what fusewire.ops.block_pattern\(function, 4, 4\) gives",
     lambda: ops.attention(Q, Q, Q, pattern=prefix)),
    (ValueError, "pattern is for 4 queries and 4 keys; it should be for 3 and 4", lambda: ops.attention(Q[:, :3], Q, Q, pattern=PATTERN)),
    (ValueError, "pattern has batch=3 and heads=1", lambda: ops.attention(Q, Q, Q, pattern=ops.block_pattern(documents, 4, 4, batch=3))),
    (ValueError, "pattern has batch=1 and heads=2", lambda: ops.attention(Q, Q, Q, pattern=ops.block_pattern(documents, 4, 4, heads=2))),
    (ValueError, r"pattern is on meta; it should be on cpu, where q is: pattern.to\('cpu'\)",
     lambda: ops.attention(Q, Q, Q, pattern=PATTERN.to("meta"))),
    (TypeError, "function is a int", lambda: ops.block_pattern(3, 4, 4)),
    (TypeError, r"function takes \(q\); it should take", lambda: ops.block_pattern(lambda q: q > 0, 4, 4)),
    (TypeError, "function gave a tensor of torch.int64; it should give a torch.Tensor of bool", lambda: ops.block_pattern(lambda q, k: q - k, 4, 4)),
    (TypeError, "function gave a bool", lambda: ops.block_pattern(lambda q, k: True, 4, 4)),
    (ValueError, r"function gave shape \[3\]; it should give one that broadcasts to \[1, 1, 4, 4\]",
     lambda: ops.block_pattern(lambda q, k: torch.ones(3, dtype=torch.bool), 4, 4)),
    (ValueError, "q_len is -1", lambda: ops.block_pattern(prefix, -1, 4)),
    (ValueError, "heads is 0", lambda: ops.block_pattern(documents, 4, 4, heads=0)),
    (ValueError, "batch is 2 and heads is 1; for a function of", lambda: ops.block_pattern(prefix, 4, 4, batch=2)),
], ids=lambda value: value if isinstance(value, str) else None)
def test_bad_input(error, words, call):
    with pytest.raises(error, match=words):
        call()
