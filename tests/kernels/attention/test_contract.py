"""What every op of the project promises, for attention: layouts, batches, threads, gradients, tracing, errors."""

from __future__ import annotations

import pytest
import torch

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from tests.kernels.attention.cases import DTYPES, qkv, stock, stock_joint
from tests.layouts import LAYOUTS, one_at_a_time
from tests.tolerance import assert_exact

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_input(dtype, layout):
    """strided-input, misaligned: the same values in any layout give the same bits, one argument at a time."""
    q, k, v = qkv(2, 51, 67, 3, 40, dtype)
    arguments = {"q": q, "k": k, "v": v, "mask": torch.randn(2, 3, 51, 67).to(dtype), "q_weight": torch.rand(40).to(dtype),
                 "k_weight": torch.rand(40).to(dtype)}
    for name, laid, plain in one_at_a_time(arguments, layout):
        assert_exact(ops.attention(**laid), ops.attention(**plain), name)
    joint = {**{name: arguments[name] for name in ("q", "k", "v")}, **dict(zip(("q2", "k2", "v2"), qkv(2, 5, 9, 3, 40, dtype)))}
    for name, laid, plain in one_at_a_time(joint, layout):
        for got, expected in zip(ops.joint_attention(**laid), ops.joint_attention(**plain), strict=True):
            assert_exact(got, expected, name)
    assert CPU.loaded is (ops.stats()["attention"]["reference"] == 0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_boolean_mask(layout):
    q, k, v = qkv(2, 51, 67, 3, 40)
    mask = torch.rand(2, 1, 51, 67) > 0.5
    want = ops.attention(q, k, v, mask=mask)
    strided = layout(mask.float()).bool() if layout.__name__ in ("sliced", "offset_by_one", "step_two", "packed_third") else layout(mask)
    if layout.__name__ == "step_two":
        strided = torch.stack([mask, ~mask], dim=-1)[..., 0]
    assert_exact(ops.attention(q, k, v, mask=strided), want)
    assert_exact(ops.attention(q, k, v, mask=strided.expand(2, 3, 51, 67)), want)


@needs_library
def test_int32_stride():
    """int32-stride: three tokens 2^30 elements apart (memory that is never touched in between)."""
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    far = torch.as_strided(base, (1, 3, 1, 8), (1, 2**30, 8, 1))
    near = torch.randn(1, 3, 1, 8).to(torch.bfloat16)
    far.copy_(near)
    assert_exact(ops.attention(far, far, far), ops.attention(near, near, near))
    assert ops.stats()["attention"]["cpu"] == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_coupling(dtype):
    """batch-coupling: a sample alone equals the sample in a batch of 8; so do the queries of one block and those of a longer call."""
    q, k, v = qkv(8, 100, 300, 2, 64, dtype)
    whole = ops.attention(q, k, v)
    assert_exact(ops.attention(q[5:6], k[5:6], v[5:6]), whole[5:6])
    assert_exact(ops.attention(q[:, :48], k, v), whole[:, :48])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nondeterminism(dtype):
    """nondeterminism: 20 repeats and any number of threads give the same bits."""
    q, k, v = qkv(1, 200, 300, 3, 64, dtype)
    want, threads = ops.attention(q, k, v, causal=True), torch.get_num_threads()
    for _ in range(20):
        assert_exact(ops.attention(q, k, v, causal=True), want)
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert_exact(ops.attention(q, k, v, causal=True), want, f"{n} threads")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_sum_exp(dtype):
    """strided-input, misaligned, batch-coupling, nondeterminism, alias, autocast: of the second result too."""
    q, k, v = qkv(4, 51, 67, 3, 40, dtype)
    def lse_of(q, k, v):
        return ops.attention(q, k, v, return_lse=True)[1]

    want, threads = lse_of(q, k, v), torch.get_num_threads()
    assert want.is_contiguous() and want.untyped_storage().data_ptr() not in {x.untyped_storage().data_ptr() for x in (q, k, v)}
    for layout in LAYOUTS:
        if layout.__name__ != "expanded":
            assert_exact(lse_of(layout(q), layout(k), layout(v)), want, layout.__name__)
    assert_exact(lse_of(q[2:3], k[2:3], v[2:3]), want[2:3])
    assert_exact(lse_of(q[:, :48], k, v), want[:, :, :48])
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert_exact(lse_of(q, k, v), want, f"{n} threads")
    finally:
        torch.set_num_threads(threads)
    with torch.autocast("cpu", torch.bfloat16):
        under = lse_of(q, k, v)
    assert_exact(under, want if dtype is torch.float64 else lse_of(*(x.to(torch.bfloat16) for x in (q, k, v))))
    assert (lse_of(q, k[:, :0], v[:, :0]) == -torch.inf).all() and lse_of(q[:, :0], k, v).shape == (4, 3, 0)
    assert not CPU.loaded or ops.stats()["attention_softmax"]["cpu"] > 0


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_library), "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 8), (2, 0, 4, 2, 8), (2, 4, 0, 2, 8), (2, 4, 4, 0, 8)], ids=str)
def test_empty(shape, dtype, backend):
    """empty: zero size in each dimension, forward and backward; without any key the result is 0."""
    q, k, v = (x.requires_grad_() for x in qkv(*shape, dtype))
    with forced(backend):
        out = ops.attention(q, k, v)
    assert out.shape == q.shape and (out == 0).all()
    if out.requires_grad:
        out.sum().backward()
        assert all(x.grad is None or (x.grad.shape == x.shape and (x.grad == 0).all()) for x in (q, k, v))


@pytest.mark.on_reference
def test_empty_head_dimension_falls_back():
    q, k, v = qkv(1, 3, 5, 1, 0)
    assert ops.attention(q, k, v).shape == (1, 3, 1, 0)
    q, k, v = qkv(1, 3, 5, 1, 520)
    got = ops.attention(q, k, v)
    assert torch.allclose(got.double(), stock(q, k, v), atol=1e-6)
    assert ops.stats()["attention"]["reference"] == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alias(dtype):
    """alias: inputs keep their bits."""
    q, k, v = qkv(1, 20, 30, 2, 16, dtype)
    before = [x.clone() for x in (q, k, v)]
    out = ops.attention(q, k, v, q_weight=torch.rand(16), k_weight=torch.rand(16))
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before))
    assert out.untyped_storage().data_ptr() not in {x.untyped_storage().data_ptr() for x in (q, k, v)}


def test_gradcheck():
    """Exact gradients in float64 of every differentiable argument, from expanded gradients too (strided-grad)."""
    q, k, v = (x.requires_grad_() for x in qkv(1, 3, 4, 2, 3, torch.float64))
    weights = [torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    mask = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    mask[..., 1, :] = -torch.inf  # a row without keys: finite gradients
    added = torch.randn(1, 1, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v, a, b: ops.attention(q, k, v, mask=mask, q_weight=a, k_weight=b), (q, k, v, *weights[:2]))
    assert torch.autograd.gradcheck(lambda q, k, v, m: ops.attention(q, k, v, mask=m, causal=True), (q, k, v, added))
    q2, k2, v2 = (x.requires_grad_() for x in qkv(1, 2, 3, 2, 3, torch.float64))
    def joint(q, k, v, q2, k2, v2, *w):
        return ops.joint_attention(q, k, v, q2, k2, v2, **dict(zip(("q_weight", "k_weight", "q2_weight", "k2_weight"), w)))

    assert torch.autograd.gradcheck(joint, (q, k, v, q2, k2, v2, *weights))
    assert torch.autograd.gradgradcheck(joint, (q, k, v, q2, k2, v2, *weights), atol=1e-4, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda q, k, v: ops.attention(q, k, v, causal=True), (q, k, v))
    ops.attention(q, k, v).sum().backward()
    grads = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    out = ops.attention(q, k, v)
    out.backward(torch.ones_like(out).permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0))
    assert all(torch.equal(x.grad, grad) for x, grad in zip((q, k, v), grads))


@pytest.mark.parametrize("permuted", [False, True])
def test_fake_mismatch(permuted):
    """fake-mismatch: opcheck on contiguous and permuted inputs; one graph without a break."""
    q, k, v = qkv(2, 5, 6, 2, 8)
    if permuted:
        q, k, v = (x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for x in (q, k, v))
    arguments = (q.requires_grad_(), k, v, None, torch.rand(8), None, False, None, 1e-6)
    torch.library.opcheck(torch.ops.fusewire.attention.default, arguments)
    torch.library.opcheck(torch.ops.fusewire.joint_attention.default, (q, k, v, k, k, v, None, torch.rand(8), None, None, 0.5, 1e-6))
    mask = torch.rand(5, 6) > 0.2
    compiled = torch.compile(lambda q, k, v: ops.attention(q, k, v, mask=mask) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), ops.attention(q, k, v, mask=mask) + 1)


def test_autocast():
    """autocast: as PyTorch's attention, results in autocast's dtype, gradients in the inputs'."""
    q, k, v = (x.requires_grad_() for x in qkv(1, 20, 30, 2, 16))
    v_half = v.detach().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out, mixed = ops.attention(q, k, v), ops.attention(q, k, v_half)
        assert stock(q, k, v, dtype=torch.float32).dtype is out.dtype is mixed.dtype is torch.bfloat16
    assert_exact(out, ops.attention(*(x.to(torch.bfloat16) for x in (q, k, v))))
    out.float().sum().backward()
    assert q.grad.dtype is torch.float32 and v.grad.abs().sum() > 0
    assert ops.attention(q, k, v).dtype is torch.float32


def test_autocast_of_two_streams():
    """autocast: as attention, over both streams; the norms' float32 weights stay float32."""
    streams, weight = [x.requires_grad_() for x in (*qkv(1, 20, 30, 2, 16), *qkv(1, 5, 7, 2, 16))], torch.rand(16)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.joint_attention(*streams, q_weight=weight)
        want = stock_joint((streams[:3], streams[3:]), {}, dtype=torch.float32)
        assert {part.dtype for part in (*out, want)} == {torch.bfloat16}
    for got, want in zip(out, ops.joint_attention(*(x.to(torch.bfloat16) for x in streams), q_weight=weight), strict=True):
        assert_exact(got, want)
    (out[0].float().sum() + out[1].float().sum()).backward()
    assert all(x.grad.dtype is torch.float32 and x.grad.any() for x in streams)


Q, K, V = torch.zeros(2, 4, 3, 8), torch.zeros(2, 6, 3, 8), torch.zeros(2, 6, 3, 8)


@pytest.mark.parametrize("error, words, arguments", [
    (ValueError, "q has shape", dict(q=Q[0])),
    (ValueError, "k has shape", dict(k=K[:1])),
    (ValueError, "k has shape", dict(k=K[:, :, :2])),
    (ValueError, "k has shape", dict(k=K[..., :4])),
    (ValueError, "v has shape", dict(v=V[:, :5])),
    (TypeError, "q has dtype", dict(q=Q.int())),
    (TypeError, "k has dtype", dict(k=K.double())),
    (TypeError, "v is a list", dict(v=[1])),
    (ValueError, "k is on meta", dict(k=K.to("meta"))),
    (ValueError, "mask has shape", dict(mask=torch.zeros(4, 5))),
    (ValueError, "mask has shape", dict(mask=torch.zeros(3, 3, 4, 6))),
    (TypeError, "mask has dtype", dict(mask=torch.zeros(4, 6, dtype=torch.int))),
    (TypeError, "mask is a", dict(mask=True)),
    (ValueError, "q_weight has shape", dict(q_weight=torch.ones(7))),
    (ValueError, "eps is", dict(eps=0.0)),
    (ValueError, "scale is", dict(scale=float("nan"))),
], ids=lambda value: value if isinstance(value, str) else None)
def test_bad_input(error, words, arguments):
    with pytest.raises(error, match=words):
        ops.attention(**{**dict(q=Q, k=K, v=V), **arguments})


@pytest.mark.parametrize("error, words, arguments", [
    (ValueError, "q2 has shape", dict(q2=Q[:1], k2=K[:1], v2=V[:1])),
    (ValueError, "k2 has shape", dict(k2=K[:, :, :1], v2=V[:, :, :1])),
    (TypeError, "q2 has dtype", dict(q2=Q.double(), k2=K.double(), v2=V.double())),
    (ValueError, "v2 has shape", dict(v2=V[:, :2])),
    (ValueError, "k2_weight has shape", dict(k2_weight=torch.ones(7))),
    (ValueError, r"q has shape \[3\]; it should be \[B, T, H, D\]", dict(q=torch.ones(3))),
    (ValueError, r"q2 has shape \[\]; it should be \[B, T, H, D\]", dict(q2=torch.ones(()))),
    (TypeError, "q is a NoneType", dict(q=None)),
], ids=lambda value: value if isinstance(value, str) else None)
def test_bad_joint_input(error, words, arguments):
    with pytest.raises(error, match=words):
        ops.joint_attention(**{**dict(q=Q, k=K, v=V, q2=Q, k2=K, v2=V), **arguments})
