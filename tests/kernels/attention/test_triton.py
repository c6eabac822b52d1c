"""The attention Triton kernel in the interpreter: blocks, masks, segments, layouts. (TF32, exponentials and speed: tests/gpu.)"""

import pytest
import torch
import torch.nn.functional as F

from fusewire import ops
from fusewire.kernels.attention import reference
from tests.kernels.attention.test_patterns import PATTERNS, dense
from tests.kernels.attention.test_varlen import one_by_one, packed
from tests.kernels.interpreted import DTYPES, in_triton, needs_interpreter, on_reference, unchanged
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_within

pytestmark = needs_interpreter


def qkv(q_tokens, k_tokens, heads, kv_heads, dim, dtype, batch=2):
    return (torch.randn(batch, q_tokens, heads, dim).to(dtype), *(torch.randn(batch, k_tokens, kv_heads, dim).to(dtype) for _ in range(2)))


def sdpa(q, k, v, mask=None, causal=False, scale=None):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, is_causal=causal, scale=scale,
                                          enable_gqa=True).transpose(1, 2)


def check(got, q, k, v, mask=None, causal=False, scale=None, name=""):
    wide = [x.double() for x in (q, k, v)]
    additive = mask if mask is None or mask.dtype is torch.bool else mask.double()
    plain_mask = mask if mask is None or mask.dtype is torch.bool else mask.to(q.dtype)
    assert_close(got, reference.attend(*wide, additive, causal, scale)[0], sdpa(q, k, v, plain_mask, causal, scale), name)


@pytest.mark.parametrize("dtype", DTYPES)
# One query; fewer keys than a block; a tail of queries and keys after whole blocks; a padded head dimension of each kind; grouped queries
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 8), (50, 7, 2, 1, 40), (130, 70, 1, 1, 64), (40, 65, 2, 2, 72), (3, 40, 1, 1, 512)])
def test_values(dtype, shape):
    if shape[-1] == 512 and dtype is torch.float32:
        pytest.skip("float32 heads end at 256")
    q, k, v = qkv(*shape, dtype)
    same = unchanged(q, k, v)
    for causal, scale in ((False, None), (True, 0.3)):
        with in_triton("attention"):
            got = ops.attention(q, k, v, causal=causal, scale=scale)
        check(got, q, k, v, None, causal, scale)
        assert got.is_contiguous()
    same()


@pytest.mark.parametrize("kind", ["bool", "-inf", "additive"])
@pytest.mark.parametrize("shape", [(2, 2, 33, 70), (1, 1, 33, 70), (2, 1, 1, 70), (1, 2, 33, 70)])
def test_mask(kind, shape):
    q, k, v = qkv(33, 70, 2, 2, 32, torch.float32)
    visible = torch.rand(shape) > 0.5
    visible[..., 3] = True
    mask = {"bool": visible, "-inf": torch.zeros(shape).masked_fill(~visible, -torch.inf), "additive": torch.randn(shape)}[kind]
    with in_triton("attention", 2):
        got = ops.attention(q, k, v, mask=mask)
        assert not torch.equal(got, ops.attention(q, k, v))
    check(got, q, k, v, mask)


def test_masked_row():
    """A row that sees nothing gives 0; a row of the finite minimum gives the mean of v."""
    q, k, v = qkv(5, 70, 16, 16, 64, torch.float32)  # the mean is one row for all queries: 2048 values
    visible = torch.ones(1, 1, 5, 70, dtype=torch.bool)
    visible[..., 2, :] = False
    lowest = torch.zeros(1, 1, 5, 70)
    lowest[..., 2, :] = torch.finfo(torch.float32).min
    with in_triton("attention", 3):
        for mask in (visible, torch.zeros(1, 1, 5, 70).masked_fill(~visible, -torch.inf)):
            got = ops.attention(q, k, v, mask=mask)
            assert (got[:, 2] == 0).all() and got.isfinite().all()
        got = ops.attention(q, k, v, mask=lowest)
    check(got, q, k, v, lowest)
    assert_close(got[:, 2], v.double().mean(1), sdpa(q, k, v, lowest)[:, 2])


def test_nan_under_mask():
    q, k, v = qkv(9, 70, 4, 4, 32, torch.float32)
    short = k[:, :50].clone(), v[:, :50].clone()
    k[:, 50:], v[:, 50:] = torch.nan, torch.nan
    mask = (torch.arange(70) < 50).expand(2, 1, 9, 70)
    with in_triton("attention", 2):
        for one in (mask, torch.zeros(2, 1, 1, 70).masked_fill(~mask[:, :, :1], -torch.inf)):
            check(ops.attention(q, k, v, mask=one), q, *short)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(130, 9, 130, 9), (5, 0, 5, 70), (0, 4, 3, 4), (3, 2, 0, 0)])
def test_joint(dtype, lengths):
    t, t2, n, n2 = lengths
    q, k, v = qkv(t, n, 2, 1, 64, dtype)
    q2, k2, v2 = qkv(t2, n2, 2, 1, 64, dtype)
    with in_triton("joint_attention"):
        got = ops.joint_attention(q, k, v, q2, k2, v2)
    whole = [torch.cat(pair, 1) for pair in ((q, q2), (k, k2), (v, v2))]
    assert got[0].shape == q.shape and got[1].shape == q2.shape
    if n + n2:
        check(torch.cat(got, 1), *whole)
    else:
        assert all((x == 0).all() for x in got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", ["qk", "q", "k2", "all"])
def test_norm(dtype, weighted):
    q, k, v = qkv(9, 9, 2, 2, 40, dtype)
    q2, k2, v2 = qkv(4, 4, 2, 2, 40, dtype)
    w = [torch.randn(40).to(dtype) if on else None
         for on in ("q" in weighted or weighted == "all", weighted in ("qk", "all"), weighted == "all", weighted in ("k2", "all"))]
    with in_triton("joint_attention"):
        got = ops.joint_attention(q, k, v, q2, k2, v2, q_weight=w[0], k_weight=w[1], q2_weight=w[2], k2_weight=w[3])
    wide = [None if t is None else t.double() for t in (q, k, v, q2, k2, v2, *w)]
    want = reference.joint_attention(*wide, None, 1e-6)
    normed = [x if weight is None else reference.widen(x, weight, 1e-6).to(dtype) for x, weight in zip((q, k, q2, k2), w)]
    plain = sdpa(torch.cat([normed[0], normed[2]], 1), torch.cat([normed[1], normed[3]], 1), torch.cat([v, v2], 1))
    assert_close(torch.cat(got, 1), torch.cat(want, 1), plain)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(layout):
    q, k, v = qkv(7, 40, 2, 2, 24, torch.bfloat16)
    mask, w = torch.rand(2, 2, 7, 40) > 0.3, torch.randn(24).bfloat16()
    with in_triton("attention", 2):
        plain = ops.attention(q, k, v, mask=mask, q_weight=w, k_weight=w)
        strided = ops.attention(layout(q), layout(k), layout(v), mask=mask.transpose(2, 3).contiguous().transpose(2, 3), q_weight=w, k_weight=w)
    assert_exact(strided, plain)


def test_batch_coupling():
    q, k, v = qkv(9, 70, 2, 2, 16, torch.bfloat16, batch=4)
    with in_triton("attention", 2):
        assert_exact(ops.attention(q, k, v)[2:3], ops.attention(q[2:3], k[2:3], v[2:3]))


def test_log_sum_exp():
    q, k, v = qkv(9, 70, 2, 2, 16, torch.float32)
    visible = torch.rand(2, 1, 9, 70) > 0.5
    visible[0, 0, 4] = False
    with in_triton("attention_softmax"):
        out, lse = ops.attention(q, k, v, mask=visible, return_lse=True)
    check(out, q, k, v, visible)
    logits = (q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1) / 4).masked_fill(~visible, -torch.inf)
    assert torch.allclose(lse.double(), logits.logsumexp(-1), atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)])
def test_empty(shape):
    x = torch.randn(shape)
    with in_triton("attention"):
        assert ops.attention(x, x, x).shape == shape


def test_fp16_overflow():
    """Logits up to 1e5 in float16."""
    q, k, v = qkv(4, 40, 8, 8, 64, torch.float16)
    q, k = q.sign() * 100, k.sign() * 100
    with in_triton("attention"):
        got = ops.attention(q, k, v)
    assert got.isfinite().all()
    assert_close(got, reference.attend(q.double(), k.double(), v.double(), None, False, None)[0], sdpa(q, k, v))


# Empty sequences of each kind; blocks that end within a sequence and with one; one sequence alone
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [([5, 0, 70, 130, 1], [7, 3, 70, 0, 40]), ([128, 128, 3], None), ([200], None), ([1] * 9, [2] * 9)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_varlen(dtype, lengths, causal):
    q, k, v, *cu = packed(lengths, (4, 2, 40), dtype)
    same = unchanged(q, k, v, *cu)
    with in_triton("attention_varlen"):
        got = ops.attention_varlen(q, k, v, *cu, causal=causal)
    assert_close(got, one_by_one(q, k, v, *cu, causal), one_by_one(q, k, v, *cu, causal, dtype=dtype))
    with in_triton("attention_varlen_softmax"):
        again, lse = ops.attention_varlen(q, k, v, *cu, causal=causal, return_lse=True)
    assert_exact(again, got)
    want = on_reference(lambda: ops.attention_varlen(*(x.double() for x in (q, k, v)), *cu, causal=causal, return_lse=True))[1]
    assert torch.equal(lse == -torch.inf, want == -torch.inf) and torch.allclose(lse.double().clamp(min=-1e3), want.clamp(min=-1e3), atol=1e-5)
    same()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_varlen_strided_input(layout):
    """strided-input, batch-coupling: any layout gives the same bits, and so does a sequence alone."""
    q, k, v, *cu = packed(([9, 30], [40, 7]), (2, 2, 24), torch.bfloat16)
    with in_triton("attention_varlen", 2):
        plain = ops.attention_varlen(q, k, v, *cu)
        assert_exact(ops.attention_varlen(layout(q), layout(k), layout(v), *cu), plain)
    with in_triton("attention"):
        assert_exact(ops.attention(q[None, 9:], k[None, 40:], v[None, 40:])[0], plain[9:])


@pytest.mark.parametrize("lengths", [([0], [0]), ([], []), ([0, 3], [0, 0]), ([0, 0], [3, 2])], ids=str)
def test_varlen_empty(lengths):
    q, k, v, *cu = packed(lengths, (2, 1, 8))
    with in_triton("attention_varlen"):
        out = ops.attention_varlen(q, k, v, *cu)
    assert out.shape == q.shape and (out == 0).all()


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pattern(dtype, name):
    """tail, head-dim: a map for all, and one for each head; with the log-sum-exp."""
    function, tokens = PATTERNS[name]
    tokens = min(tokens, 150)  # for the interpreter
    pattern = ops.block_pattern(function, tokens, tokens, **(dict(batch=2, heads=4) if name == "documents" else {}))
    mask = dense(function, tokens, tokens)
    q, k, v = qkv(tokens, tokens, 4, 2, 40, dtype)
    with in_triton("attention"):
        got = ops.attention(q, k, v, pattern=pattern)
    check(got, q, k, v, mask)
    with in_triton("attention_softmax"):
        again, lse = ops.attention(q, k, v, pattern=pattern, return_lse=True)
    assert_exact(again, got)
    logits = (q.double().transpose(1, 2) @ k.double().repeat_interleave(2, 2).permute(0, 2, 3, 1) * 40**-0.5).masked_fill(~mask, -torch.inf)
    assert torch.allclose(lse.double(), logits.logsumexp(-1), atol=1e-5)


def test_pattern_together_with_the_rest():
    """Tiles never seen, queries that see no key, NaN in hidden keys; mask and causal beside the pattern; a wide head, whose tiles have 16 keys."""
    pattern = ops.block_pattern(lambda q, k: (k >= 70) & (k < 130) & ((q < 40) | (q > 90)), 140, 300)
    visible = pattern.dense()
    for dim in (32, 256):
        q, k, v = qkv(140, 300, 2, 2, dim, torch.float32)
        bad_k, bad_v = k.clone(), v.clone()
        for x in (bad_k, bad_v):
            x[:, :70], x[:, 130:] = torch.nan, torch.nan
        mask = torch.rand(140, 300) > 0.4
        mask[:, 71] = True
        with in_triton("attention", 3):
            plain = ops.attention(q, bad_k, bad_v, pattern=pattern)
            masked = ops.attention(q, bad_k, bad_v, pattern=pattern, mask=mask)
            causal = ops.attention(q, k, v, pattern=pattern, causal=True)
        assert (plain[:, 40:91] == 0).all() and (causal[:, :70] == 0).all() and (causal[:, 91:] != 0).any()
        for got, seen in ((plain, visible), (masked, visible & mask), (causal, visible & torch.ones(140, 300, dtype=torch.bool).tril())):
            rows = seen[0, 0].any(-1)
            assert_within(got[:, rows], reference.attend(q[:, rows].double(), k.double(), v.double(), seen[:, :, rows], False, None)[0], 16)


@pytest.mark.parametrize("tile", [(128, 64), (64, 32), (32, 16), (128, 128)], ids=str)
def test_tiles_that_a_pattern_leaves(tile):
    """What is not listed is not computed: the tiles of each kernel, from the same blocks."""
    from fusewire.kernels.attention.triton_blocks import tiles_seen

    pattern = ops.block_pattern(lambda h, b, q, k: (k <= q) & (q - k < 90 * (h + 1)), 300, 310, batch=2)
    q_tiles, k_tiles = -(-300 // tile[0]), -(-310 // tile[1])
    seen = tiles_seen(pattern.blocks, (q_tiles, tile[0]), (k_tiles, tile[1]))
    known = torch.nn.functional.pad(pattern.blocks != -2, (0, 50, 0, 50))
    for b in range(2):
        for i in range(q_tiles):
            rows = known[b, 0, i * tile[0] // 32:(i + 1) * tile[0] // 32]
            want = [j for j in range(k_tiles) if rows[:, j * tile[1] // 32:max(-(-(j + 1) * tile[1] // 32), 1)].any()]
            assert seen[b, 0, i, :1 + len(want)].tolist() == [len(want), *want] and len(want) <= k_tiles
    assert seen[..., 0].sum() < 0.8 * 2 * q_tiles * k_tiles
