"""The gradients of attention under a block pattern in Triton, in the interpreter: tiles that are skipped, bits of the mixed ones, groups, layouts."""

from __future__ import annotations

import itertools

import pytest
import torch

from fusewire import ops
from fusewire.kernels import tuning
from fusewire.kernels.attention import op, triton_backward
from fusewire.kernels.attention.triton_blocks import tiles_seen
from fusewire.kernels.dispatch import forced
from tests.effort import EFFORT
from tests.kernels.attention.cases import qkv, stock
from tests.kernels.attention.test_patterns import PATTERNS, compiled, dense
from tests.kernels.attention.test_triton_backward import few_queries_too, gradients, in_triton  # noqa: F401 (a fixture)
from tests.kernels.interpreted import DTYPES, needs_interpreter, unchanged
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact

pytestmark = needs_interpreter


def check(q, k, v, grad, pattern, visible, **options):
    """Against float64 under the dense mask, and PyTorch's own attention in the dtype."""
    got = in_triton(lambda *x: ops.attention(*x, pattern=pattern, **options), q, k, v, grad)
    want = gradients(lambda *x: stock(*x, visible), *(x.double() for x in (q, k, v)), grad)
    plain = gradients(lambda *x: stock(*x, visible, dtype=q.dtype), q, k, v, grad)
    for name, one, wanted, of_stock in zip("qkv", got, want, plain):
        assert_close(one, wanted, of_stock, f"d{name}")
    return got


QUICK = [("row", torch.float32), ("documents", torch.bfloat16), ("convolution", torch.float16)]


@pytest.mark.parametrize("name, dtype", [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
                                         for case in itertools.product(PATTERNS, DTYPES)])
def test_values(name, dtype):
    """silent-off, head-dim, tail: what autoregressive models of pictures use, for each sample and head too; grouped queries."""
    function, tokens = PATTERNS[name]
    for channels, key_heads in ((40, 4), (64, 2)) if name == "documents" and EFFORT > 1 else ((40, 2),):
        q, k, v = qkv(2, tokens, tokens, 4, channels, dtype, key_heads)
        grad = torch.randn_like(q)
        same = unchanged(q, k, v, grad)
        check(q, k, v, grad, compiled(name), dense(function, tokens, tokens))
        same()


# Every pair of tiles' sizes that tuning.py chooses anywhere, less than a block of 32 on either side too
@pytest.mark.parametrize("queries, keys", ((16, 16), (16, 32), (32, 16), (32, 32), (64, 32), (32, 64), (128, 64)))
def test_tiles(monkeypatch, queries, keys):
    """tail: 150 queries and 170 keys fill no whole tile; tiles smaller than the pattern's blocks are parts of them."""
    part = tuning.BackwardPart(queries, keys, 4, 1)
    monkeypatch.setattr(triton_backward, "attention_backward_tile", lambda *args: tuning.BackwardTile(part, part, 16, "tf32x3"))
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    visible = (torch.rand(6, 6, generator=generator) < 0.5).repeat_interleave(30, 0).repeat_interleave(30, 1)
    visible &= (torch.rand(180, 180, generator=generator) < 0.8) | (torch.rand(3, 3, generator=generator) < 0.5).repeat_interleave(60, 0).repeat_interleave(60, 1)
    visible[:, 0] = True
    pattern = ops.block_pattern(lambda q, k: visible[q, k], 150, 170)
    q, k, v = qkv(1, 150, 170, 2, 16, torch.float32, 1)
    check(q, k, v, torch.randn_like(q), pattern, visible[None, None, :150, :170])


@pytest.mark.parametrize("dtype, channels", ((torch.float32, 128), (torch.bfloat16, 256)), ids=str)
def test_wide_heads(dtype, channels):
    """head-dim: the widest."""
    q, k, v = qkv(1, 70, 90, 1, channels, dtype)
    pattern = ops.block_pattern(lambda q, k: (k <= q + 20) & (k != 5), 70, 90)
    check(q, k, v, torch.randn_like(q), pattern, pattern.dense())


@pytest.mark.parametrize("kind", ("mask", "additive", "causal"))
def test_together_with_the_rest(kind):
    """A key is seen that pattern, mask and causal all let through: as under one mask of them all."""
    q, k, v = qkv(2, 80, 80, 2, 24)
    pattern = ops.block_pattern(lambda q, k: (q // 40 == k // 40) | (k < 3), 80, 80)
    mask = {"mask": torch.rand(1, 1, 80, 80) < 0.7, "additive": torch.randn(2, 1, 80, 80)}.get(kind)
    if kind == "mask":
        mask[..., 0] = True
    visible = pattern.dense() & torch.ones(80, 80, dtype=torch.bool).tril() if kind == "causal" else pattern.dense()
    visible = mask.masked_fill(~visible, -torch.inf) if kind == "additive" else visible & mask if kind == "mask" else visible
    grad = torch.randn_like(q)
    got = check(q, k, v, grad, pattern, visible, mask=mask, causal=kind == "causal")
    assert not torch.equal(got[1], in_triton(lambda *x: ops.attention(*x, pattern=pattern), q, k, v, grad)[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_hidden_never_matters(dtype):
    """nan-under-mask, masked-row: NaN in keys that no query sees reaches nothing; they, and queries without keys, have gradients of 0."""
    hidden = lambda x: (x >= 40) & (x < 90) | (x > 150)  # noqa: E731
    pattern = ops.block_pattern(lambda q, k: ~hidden(k) & ~hidden(q) & ((q - k).abs() < 60), 190, 170)
    q, k, v = qkv(1, 190, 170, 2, 32, dtype)
    grad, unseen, empty = torch.randn_like(q), hidden(torch.arange(170)), hidden(torch.arange(190))
    bad_k, bad_v = (x.masked_fill(unseen[:, None, None], torch.nan) for x in (k, v))
    call = lambda *x: ops.attention(*x, pattern=pattern)  # noqa: E731
    for got, want in zip(in_triton(call, q, bad_k, bad_v, grad), in_triton(call, q, k, v, grad)):
        assert_exact(got, want)
        assert (got[:, empty if got.shape[1] == 190 else unseen] == 0).all()


def test_a_pattern_that_hides_everything():
    q, k, v = qkv(1, 40, 50, 1, 16)
    for grad in in_triton(lambda *x: ops.attention(*x, pattern=ops.block_pattern(lambda q, k: (q < 0) & (k < 0), 40, 50)), q, k, v, torch.randn_like(q)):
        assert (grad == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(layout):
    """strided-input, strided-grad, misaligned: the same values in any layout give the same bits, with the gradient of the log-sum-exp."""
    q, k, v = qkv(2, 70, 70, 2, 24, torch.bfloat16)
    k[1] = k[0]  # so that an expanded layout exists
    pattern, grad = compiled_prefix(), torch.randn_like(q)
    with forced("triton"), torch.no_grad():
        out, highest, total = op._softmax(q, k, v, None, False, None, pattern.blocks, pattern.words)
        tensors = (grad, torch.randn_like(highest), q, k, v, out, highest, total)
        rest = (None, False, None, pattern.blocks, pattern.words)
        want = op._gradients(*tensors, *rest)
        for got, one in zip(op._gradients(*(layout(x) for x in tensors), *rest), want):
            assert_exact(got, one)


def compiled_prefix():
    return ops.block_pattern(lambda q, k: (k < 20) | (k <= q), 70, 70)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_batch_coupling(dtype):
    q, k, v = qkv(3, 70, 70, 2, 32, dtype)
    grad, call = torch.randn_like(q), lambda *x: ops.attention(*x, pattern=compiled_prefix())
    want = in_triton(call, q, k, v, grad)
    for got, whole in zip(in_triton(call, q[1:2], k[1:2], v[1:2], grad[1:2]), want):
        assert_exact(got, whole[1:2])


def test_tiles_that_a_pattern_leaves():
    """For each tile of keys the tiles of queries that see some of it, of the blocks of the pattern that are not empty: whole ones and parts of them."""
    pattern = ops.block_pattern(lambda q, k: (k // 64 == q // 64) & (k != 70) | (k == 130), 192, 150)
    known = (pattern.blocks[0, 0] != -2).repeat_interleave(32, 0).repeat_interleave(32, 1)
    for queries, keys in ((16, 16), (64, 32), (32, 64), (16, 64)):
        q_tiles, k_tiles = 192 // queries, -(-150 // keys)
        found = tiles_seen(pattern.blocks, (q_tiles, queries), (k_tiles, keys), turned=True)
        assert found.shape == (1, 1, k_tiles, 1 + q_tiles)
        shown = torch.nn.functional.pad(known, (0, 32))[:, :k_tiles * keys].unflatten(1, (-1, keys)).unflatten(0, (-1, queries)).any(3).any(1)
        for row, wanted in zip(found[0, 0], shown.T, strict=True):
            assert row[1:1 + row[0]].tolist() == wanted.nonzero().flatten().tolist(), (queries, keys)
