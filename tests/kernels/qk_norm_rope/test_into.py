"""ops.qk_norm_into by itself: the bits of qk_norm_rope, written where they are to be and nowhere else, whatever is special about the call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fusewire import ops
from fusewire.kernels.library import CPU
from tests.tolerance import assert_close, assert_exact, assert_unbiased

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
every_numerics = pytest.mark.parametrize("numerics", ("exact", "close"))


def heads(batch=2, tokens=3, count=2, dim=40, dtype=torch.float32):
    return torch.randn(batch, tokens, count, dim).to(dtype)


def into(q, k, q_weight=None, k_weight=None, **options):
    """The heads of q and k in the middle of longer buffers, whose other heads keep their values."""
    joint = [torch.full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), 7.0, dtype=x.dtype) for x in (q, k)]
    middle = [x[:, 2:-1] for x in joint]
    ops.qk_norm_into(q, k, q_weight, k_weight, *middle, **options)
    assert all((x[:, :2] == 7).all() and (x[:, -1:] == 7).all() for x in joint)
    return middle


@every_numerics
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", (1, 5, 40, 63, 72, 80, 96, 160, 256, 1027))
def test_head_dim(dim, dtype, numerics):
    """head-dim, tail, alias, silent-off: heads of any length; what is read keeps its bits; the library serves it."""
    q, k, weight = heads(dim=dim, dtype=dtype), heads(dim=dim, dtype=dtype), torch.randn(dim).to(dtype)
    copies = [x.clone() for x in (q, k, weight)]
    for norm in ("rms", "layer"):
        options = dict(norm=norm, numerics=numerics) | (dict(q_bias=weight, k_bias=weight) if norm == "layer" else {})
        for got, want in zip(into(q, k, weight, weight, **options), ops.qk_norm_rope(q, k, weight, weight, **options), strict=True):
            assert_exact(got, want, norm)
    assert all(torch.equal(x, copy) for x, copy in zip((q, k, weight), copies))
    assert ops.stats()["qk_norm_into"]["cpu" if CPU.loaded else "reference"] >= 1


@pytest.mark.parametrize("shape", ((0, 3, 2, 8), (1, 0, 2, 8), (1, 3, 0, 8)), ids=str)
def test_empty(shape):
    """Forwards and backwards."""
    q = torch.randn(shape, requires_grad=True)
    out = [torch.zeros(shape) for _ in range(2)]
    ops.qk_norm_into(q, q, torch.ones(8), None, *out)
    (out[0].sum() + out[1].sum()).backward()
    assert q.grad.shape == shape


@every_numerics
def test_fp16_overflow(numerics):
    q = torch.where(torch.arange(64) % 2 == 0, 1000.0, -1000.0).to(torch.float16).expand(1, 2, 3, 64)
    for got in into(q, q, numerics=numerics):
        assert_exact(got, q.sign())


@pytest.mark.parametrize("eps", (1e-5, 1e-6))
def test_eps(eps):
    """Of the size of the squares of what is normalised."""
    q = heads(dim=64) * 1e-3
    want = q.double() * (q.double().square().mean(-1, keepdim=True) + eps).rsqrt()
    for got in into(q, q, eps=eps, numerics="close"):
        assert torch.allclose(got.double(), want, rtol=1e-6, atol=0)


@every_numerics
@pytest.mark.parametrize("written", (False, True), ids=("new", "into"))
def test_cancellation(written, numerics):
    """Layer norm of heads of mean 100 and deviation 0.01, new or written into a buffer."""
    q, ones = 100 + 0.01 * heads(dim=128), torch.ones(128)
    options = dict(q_bias=0 * ones, k_bias=0 * ones, norm="layer", numerics=numerics)
    got = into(q, q, ones, ones, **options) if written else ops.qk_norm_rope(q, q, ones, ones, **options)
    for x in got:
        assert_close(x, F.layer_norm(q.double(), (128,), eps=1e-6), F.layer_norm(q, (128,), eps=1e-6))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_biased_cast(dtype):
    """The mean signed error of 2^19 results is within 0.02 units in the last place."""
    q, angle = heads(2, 256, 8, 64, dtype), torch.randn(256, 32)
    for rope in (None, (angle.cos(), angle.sin())):
        want = ops.qk_norm_rope(q.double(), q.double(), rope=rope, numerics="close")
        for got, exact in zip(into(q, q, rope=rope, numerics="close"), want):
            assert_unbiased(got, exact)


@every_numerics
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_coupling(dtype, numerics):
    """batch-coupling, nondeterminism: a sample alone has the bits that it has among 8; so have 20 repeats, and any number of threads."""
    q, k, weight = heads(8, 17, 5, 64, dtype), heads(8, 17, 2, 64, dtype), torch.randn(64).to(dtype)
    want, threads = into(q, k, weight, weight, numerics=numerics), torch.get_num_threads()
    for got, together in zip(into(q[5:6], k[5:6], weight, weight, numerics=numerics), want):
        assert_exact(got, together[5:6])
    try:
        for repeat in range(20):
            torch.set_num_threads((threads, 1, 3)[repeat % 3])
            for got, first in zip(into(q, k, weight, weight, numerics=numerics), want):
                assert_exact(got, first)
    finally:
        torch.set_num_threads(threads)


@every_numerics
def test_strided_grad(numerics):
    """Expanded and transposed gradients of the buffers have the bits of contiguous ones."""
    q, k, weight = heads().requires_grad_(), heads().requires_grad_(), torch.randn(40, requires_grad=True)
    out = into(q, k, weight, weight, numerics=numerics)
    for grads in ([torch.ones(()).expand(x.shape) for x in out], [torch.randn_like(x.transpose(1, 3)).transpose(1, 3) for x in out]):
        mine, dense = (torch.autograd.grad(out, (q, k, weight), given, retain_graph=True) for given in (grads, [grad.contiguous() for grad in grads]))
        for got, want in zip(mine, dense, strict=True):
            assert_exact(got, want)
            assert got.any()
