"""What ops.joint_attention and ops.attention_varlen promise by themselves, beyond what they share with attention."""

from __future__ import annotations

import pytest
import torch

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from tests.kernels.attention.cases import DTYPES, qkv, stock, stock_joint
from tests.tolerance import assert_close, assert_exact

BACKENDS = [pytest.param("cpu", marks=pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")), "reference"]
NORMS = ("q_weight", "k_weight", "q2_weight", "k2_weight")


def weights(dim, dtype=torch.float32):
    return {name: torch.rand(dim).to(dtype) + 0.5 for name in NORMS}


def far_and_near(*shape):
    """Three tokens 2^30 elements apart (memory that is never touched in between), and the same side by side."""
    far = torch.as_strided(torch.empty(2**31 + 64, dtype=torch.bfloat16), shape, (1,) * (len(shape) - 3) + (2**30, 8, 1))
    near = torch.randn(shape).to(torch.bfloat16)
    far.copy_(near)
    return far, near


@pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
def test_int32_stride_of_either_stream():
    """int32-stride: of the first, of the second, of both."""
    far, near = far_and_near(1, 3, 1, 8)
    want = ops.joint_attention(*(near,) * 6)
    for streams in ((far,) * 3 + (near,) * 3, (near,) * 3 + (far,) * 3, (far,) * 6):
        for got, one in zip(ops.joint_attention(*streams), want):
            assert_exact(got, one)
    assert ops.stats()["joint_attention"]["cpu"] == 4


@pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
def test_int32_stride_of_packed_sequences():
    far, near = far_and_near(3, 1, 8)
    boundaries = torch.tensor([0, 1, 3], dtype=torch.int32)
    assert_exact(ops.attention_varlen(far, far, far, boundaries), ops.attention_varlen(near, near, near, boundaries))
    assert ops.stats()["attention_varlen"]["cpu"] == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_grad_of_two_streams(dtype):
    """strided-grad: expanded and transposed gradients of both results have the bits of contiguous ones."""
    leaves = [x.requires_grad_() for tokens in (40, 9) for x in qkv(2, tokens, tokens, 2, 24, dtype)]
    out = ops.joint_attention(*leaves, **weights(24, dtype))
    for grads in ([torch.ones((), dtype=dtype).expand(x.shape) for x in out], [torch.randn_like(x.transpose(1, 3)).transpose(1, 3) for x in out]):
        mine, dense = (torch.autograd.grad(out, leaves, given, retain_graph=True) for given in (grads, [grad.contiguous() for grad in grads]))
        for got, want in zip(mine, dense, strict=True):
            assert_exact(got, want)
        assert any(got.any() for got in mine)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8)], ids=str)
def test_empty_streams(shape, backend):
    """empty: a zero in each dimension of both streams; forwards and backwards."""
    leaves = [torch.randn(shape, requires_grad=True) for _ in range(6)]
    with forced(backend):
        out = ops.joint_attention(*leaves)
    assert all(part.shape == shape for part in out)
    sum(part.sum() for part in out).backward()
    assert all(x.grad is None or x.grad.shape == shape for x in leaves)


@pytest.mark.parametrize("normed", (False, True), ids=("plain", "normed"))
def test_fp16_overflow_of_two_streams(normed):
    """fp16-overflow: +-1000, whose squares and products leave float16."""
    streams = [qkv(2, tokens, tokens, 4, 64, torch.float16) for tokens in (40, 17)]
    streams = [(q.sign() * 1000, k.sign() * 1000, v) for q, k, v in streams]
    given = weights(64, torch.float16) if normed else {}
    got = torch.cat(ops.joint_attention(*streams[0], *streams[1], **given), 1)
    assert got.isfinite().all()
    if normed:
        assert_close(got, stock_joint(streams, given), stock_joint(streams, given, dtype=torch.float16))


def test_fp16_overflow_of_packed_sequences():
    """fp16-overflow: logits of 1e5, in each of two sequences."""
    q, k = (torch.full((60, 4, 64), 40, dtype=torch.float16) for _ in range(2))
    v, boundaries = torch.randn(60, 4, 64).half(), (0, 23, 60)
    got = ops.attention_varlen(q, k, v, torch.tensor(boundaries, dtype=torch.int32), scale=1.0)
    for a, b in zip(boundaries, boundaries[1:]):
        one = [x[None, a:b] for x in (q, k, v)]
        assert_close(got[None, a:b], stock(*one, scale=1.0), stock(*one, scale=1.0, dtype=torch.float16))


@pytest.mark.parametrize("eps", (1e-6, 1e-3))
def test_eps_of_two_streams(eps):
    """eps: inside the root, of each stream's norms; the squares are as small as it is."""
    streams, given = [tuple(x * s for x, s in zip(qkv(2, tokens, tokens, 2, 40), (1e-2, 1e-2, 1))) for tokens in (30, 9)], weights(40)
    got = torch.cat(ops.joint_attention(*streams[0], *streams[1], **given, eps=eps), 1)
    assert_close(got, stock_joint(streams, given, eps), stock_joint(streams, given, eps, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alias_of_two_streams(dtype):
    """alias: inputs keep their bits, the results share no memory with them or with each other."""
    given = [x for tokens in (20, 9) for x in qkv(1, tokens, tokens, 2, 16, dtype)]
    before, out = [x.clone() for x in given], ops.joint_attention(*given, **weights(16, dtype))
    assert all(torch.equal(x, y) for x, y in zip(given, before))
    places = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in (*given, *out)]
    assert all(a[1] <= b[0] for a, b in zip(sorted(places), sorted(places)[1:]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_ignored_in_packed_sequences(dtype):
    """mask-ignored: other boundaries, or causal, give something else; a boundary beside a token moves only what it is between."""
    q, k, v = (torch.randn(30, 2, 16).to(dtype) for _ in range(3))
    whole, cut, moved = (torch.tensor(b, dtype=torch.int32) for b in ([0, 30], [0, 12, 20, 30], [0, 13, 20, 30]))
    found = [ops.attention_varlen(q, k, v, boundaries) for boundaries in (whole, cut, moved)]
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1][:20], found[2][:20])
    assert_exact(found[1][20:], found[2][20:])
    assert not torch.equal(ops.attention_varlen(q, k, v, cut, causal=True), found[1])
