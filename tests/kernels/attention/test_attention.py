"""fusewire.ops.attention and joint_attention against PyTorch's attention in float64."""

from __future__ import annotations


import pytest
import torch

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU, cpu_isa
from tests.kernels.attention.cases import DTYPES, qkv, stock, stock_joint, stock_norm
from tests.tolerance import assert_close, assert_unbiased

BACKENDS = [pytest.param("cpu", marks=pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")), "reference"]

# (B, Tq, Tk, H, D). Blocks are 48 queries and 256 keys, tiles 6 rows by 16 to 64 columns: the sizes lie on, below and above each.
# Where there are few queries or channels, batch and heads make up for it: a comparison of two maxima needs thousands of values.
SHAPES = [
    (4, 63, 63, 1, 64),     # odd everything, one block
    (2, 1, 1, 2, 40),       # one query, one key (the result is v itself); 40 channels: half a vector over
    (1, 129, 65, 2, 72),    # cross attention, one column more than a tile
    (1, 65, 129, 1, 80),    # 80 channels: a whole tile of columns and a quarter
    (1, 49, 300, 3, 160),   # two and a half tiles of columns; a second block of keys
    (1, 50, 1100, 1, 512),  # several super-blocks of keys in both float32 and bf16; logits summed in pieces
    (8, 33, 257, 1, 8),     # fewer channels than a vector; one key in the second block
    (8, 7, 64, 5, 7),       # odd number of channels: half a bf16 pair is padding
    (1, 100, 154, 2, 128),
    (1, 48, 256, 1, 256),   # exactly one block
]


def mask_of(kind, shape, dtype):
    batch, queries, keys, heads, _ = shape
    if kind == "bool":
        mask = torch.rand(batch, 1, queries, keys) > 0.3
        mask[..., 0] = True
        return mask
    return torch.randn(1, heads, queries, keys).to(dtype) if kind == "added" else None


def ran(backend, op="attention"):
    counts = ops.stats()[op]
    return counts[backend] > 0 and sum(counts.values()) == counts[backend]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "added"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, shape, kind, backend):
    """head-dim, tail, cross attention and every kind of mask."""
    q, k, v = qkv(*shape, dtype)
    mask, causal = mask_of(kind, shape, dtype), kind == "causal"
    with forced(backend):
        got = ops.attention(q, k, v, mask=mask, causal=causal)
    assert ran(backend)
    assert_close(got, stock(q, k, v, mask, causal), stock(q, k, v, mask, causal, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [1, 63, 64, 65, 129])
@pytest.mark.parametrize("queries", [1, 15, 16, 63, 64, 65, 129])
def test_tail(queries, keys, dtype):
    q, k, v = qkv(4, queries, keys, 8, 64, dtype)  # one query: 2048 values
    assert_close(ops.attention(q, k, v), stock(q, k, v), stock(q, k, v, dtype=dtype))


@pytest.mark.parametrize("keys", [65, 6500])
@pytest.mark.parametrize("lengths", [20, 60, 200])
@pytest.mark.parametrize("direction", [-1, 1], ids=["opposed", "alike"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_vectors(dtype, direction, lengths, keys):
    """Every key points along every query, or against it, and |q| |k| times the scale is 2^lengths as a weight: what bounds the logits lies at
    them, or so far above that the weights vanish. 6500 keys are more than are packed at a time; the later ones are longer."""
    q, k, v = qkv(2, 40, keys, 2, 64)
    along = torch.nn.functional.normalize(torch.randn(64), dim=0) * (8 * lengths * 0.6931) ** 0.5
    grows = torch.linspace(0.8, 1.0, keys)[:, None, None]
    q, k, v = (0.3 * q + along).to(dtype), (grows * (0.3 * k + direction * along)).to(dtype), v.to(dtype)
    assert_close(ops.attention(q, k, v), stock(q, k, v), stock(q, k, v, dtype=dtype))
    assert CPU.loaded is (ops.stats()["attention"]["cpu"] > 0)


@pytest.mark.parametrize("keys", [65, 700])
def test_one_query(keys):
    """One query in float32, over thousands of heads: PyTorch multiplies matrix by vector in many partial sums, which a tile's one long chain could not match."""
    for _ in range(12 if keys < 100 else 2):
        q, k, v = qkv(64, 1, keys, 8, 64)
        assert_close(ops.attention(q, k, v), stock(q, k, v), stock(q, k, v, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_long_sums(dtype):
    """Weights that are nearly alike, values with a mean: sums over all keys grow with their number, and so would the error of one long chain."""
    q, k, v = qkv(1, 96, 1178, 8, 64, dtype)
    q, v = q * 0.05, v * 0.5 + 1
    with forced("cpu" if CPU.loaded else None):
        got = ops.attention(q, k, v)
    assert_close(got, stock(q, k, v), stock(q, k, v, dtype=dtype))


@pytest.mark.parametrize("scale", [None, 0.3, 0.0, -0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(dtype, scale):
    q, k, v = qkv(4, 20, 75, 2, 24, dtype)
    assert_close(ops.attention(q, k, v, scale=scale), stock(q, k, v, scale=scale), stock(q, k, v, scale=scale, dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_heads(dtype, backend):
    q, k, v = qkv(2, 30, 70, 6, 16, dtype, key_heads=2)
    with forced(backend):
        got = ops.attention(q, k, v, causal=True)
    assert_close(got, stock(q, k, v, causal=True), stock(q, k, v, causal=True, dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(dtype, backend):
    """RMS norm of q and k on the way in: no more rounding than norm and attention in turn; eps matters where x is small."""
    q, k, v = qkv(2, 50, 70, 2, 40, dtype)
    q = q * 1e-2
    weights = [torch.rand(40).to(dtype) + 0.5 for _ in range(2)]
    for eps in (1e-6, 1e-3):
        with forced(backend):
            got = ops.attention(q, k, v, q_weight=weights[0], k_weight=weights[1], eps=eps)
        wide = stock(stock_norm(q, weights[0], eps), stock_norm(k, weights[1], eps), v)
        plain = stock(stock_norm(q, weights[0], eps, dtype), stock_norm(k, weights[1], eps, dtype), v, dtype=dtype)
        assert_close(got, wide, plain)
    assert ran(backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("lengths", [((63, 63), (17, 17)), ((1, 1), (1, 1)), ((40, 60), (9, 300)), ((49, 49), (0, 0)), ((0, 0), (5, 5))], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_joint(dtype, lengths, norm, backend):
    """Two streams are one sequence; the boundary falls inside a block, a tile and a bf16 pair."""
    q, k, v = qkv(4, *lengths[0], 4, 64, dtype)
    q2, k2, v2 = qkv(4, *lengths[1], 4, 64, dtype)
    weights = {name: torch.rand(64).to(dtype) + 0.5 for name in ("q_weight", "k_weight", "q2_weight", "k2_weight")} if norm else {}
    with forced(backend):
        got = ops.joint_attention(q, k, v, q2, k2, v2, **weights)
    assert ran(backend, "joint_attention")
    assert got[0].shape == q.shape and got[1].shape == q2.shape
    streams = (q, k, v), (q2, k2, v2)
    assert_close(torch.cat(got, dim=1), stock_joint(streams, weights), stock_joint(streams, weights, dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_nan_under_mask(dtype, masked, backend):
    """nan-under-mask: poisoned padding gives what the cut tensors give; a poisoned key reaches only the queries that attend to it."""
    q, k, v = qkv(2, 60, 90, 2, 40, dtype)
    k[:, 70:], v[:, 70:] = torch.nan, torch.nan
    keep = (torch.arange(90) < 70)[None, None, None]
    mask = keep if masked else torch.zeros(1, 1, 1, 90).masked_fill(~keep, -torch.inf)
    want = stock(q, k[:, :70], v[:, :70])
    with forced(backend):
        got = ops.attention(q, k, v, mask=mask)
    assert_close(got, want, stock(q, k[:, :70], v[:, :70], dtype=dtype))
    if backend == "reference":  # whose products give NaN to every query where some query sees one
        return

    q, k, v = qkv(1, 60, 60, 1, 40, dtype)
    want, plain = stock(q, k, v, causal=True), stock(q, k, v, causal=True, dtype=dtype)
    v[:, 37, :, 3], v[:, 51, :, 5] = torch.nan, torch.inf
    got = ops.attention(q, k, v, causal=True)
    assert got[:, 37:, :, 3].isnan().all() and (got[:, 51:, :, 5] == torch.inf).all()
    bad = got.isfinite().logical_not()
    assert bad.sum() == (60 - 37) + (60 - 51)
    assert_close(got.masked_fill(bad, 0), want.masked_fill(bad, 0), plain.masked_fill(bad, 0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_row(dtype, backend):
    """masked-row: no key left gives 0; the finite minimum everywhere takes all logits to one value, which gives the mean of v."""
    q, k, v = qkv(4, 10, 300, 16, 64, dtype)
    hidden = torch.zeros(1, 1, 10, 300, dtype=torch.bool)
    hidden[:, :, 3], hidden[:, :, 7] = True, True
    lowest = torch.zeros(1, 1, 10, 300, dtype=dtype)
    lowest[:, :, 5] = torch.finfo(dtype).min
    with forced(backend):
        for mask in (~hidden, torch.zeros(1, 1, 10, 300, dtype=dtype).masked_fill(hidden, -torch.inf)):
            got = ops.attention(q, k, v, mask=mask)
            assert (got[:, [3, 7]] == 0).all() and got.isfinite().all() and (got[:, [0, 9]] != 0).any()
        got = ops.attention(q, k, v, mask=lowest)
    # A mean is the same for every query: the 4096 values of row 5 that the maxima are taken over come from batch, heads and channels
    want, plain = stock(q, k, v, lowest), stock(q, k, v, lowest, dtype=dtype)
    assert_close(got[:, 5], want[:, 5], plain[:, 5], "lowest row")
    assert_close(got, want, plain)
    if dtype is not torch.float16:  # -65504 leaves the logits their differences, even in float32
        assert_close(got[:, 5], v.double().mean(1), plain[:, 5], "mean")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_ignored(dtype):
    q, k, v = qkv(1, 20, 30, 1, 16, dtype)
    plain = ops.attention(q, k, v)
    mask = torch.ones(20, 30, dtype=torch.bool)
    assert torch.equal(ops.attention(q, k, v, mask=mask), ops.attention(q, k, v, mask=torch.zeros(20, 30)))
    mask[:, 4] = False
    assert not torch.equal(ops.attention(q, k, v, mask=mask), plain)
    assert not torch.equal(ops.attention(q, k, v, causal=True), plain)


def test_fp16_overflow():
    """fp16-overflow: inputs of +-1000 and logits of 1e5 stay finite."""
    q, k, v = qkv(4, 40, 80, 8, 64, torch.float16)
    big = torch.where(q > 0, 1000.0, -1000.0).to(torch.float16), torch.where(k > 0, 1000.0, -1000.0).to(torch.float16)
    assert ops.attention(*big, v).isfinite().all()
    q, k = torch.full_like(q, 40), torch.full_like(k, 40)
    assert (q[0, 0, 0].double() @ k[0, 0, 0].double()) > 1e5
    assert_close(ops.attention(q, k, v, scale=1.0), stock(q, k, v, scale=1.0), stock(q, k, v, scale=1.0, dtype=torch.float16))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_biased_cast(dtype):
    """biased-cast: over 2^20 elements, of either sign or all between 1 and 2, the mean signed error is within 0.02 units in the last place."""
    q, k, v = qkv(1, 2048, 17, 8, 64, dtype)
    for v in (v, v.abs().frac() + 1):
        assert_unbiased(ops.attention(q, k, v), stock(q, k, v), least=1 / 16)


@pytest.mark.parametrize("norm", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_joint_biased_cast(dtype, norm):
    """biased-cast: over 2^20 elements of both streams, in the same way."""
    streams = [qkv(16, tokens, tokens, 8, 64, dtype) for tokens in (100, 28)]
    weights = {name: torch.rand(64).to(dtype) + 0.5 for name in ("q_weight", "k_weight", "q2_weight", "k2_weight")} if norm else {}
    for both in (streams, [(q, k, v.abs().frac() + 1) for q, k, v in streams]):
        assert_unbiased(torch.cat(ops.joint_attention(*both[0], *both[1], **weights), 1), stock_joint(both, weights), least=1 / 16)
