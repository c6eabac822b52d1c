"""Attention's gradients and PyTorch's fused attention on a GPU: values, determinism, memory, graphs. ``python -m pytest -m gpu tests/gpu``."""

import pytest
import torch
import torch.nn.functional as F

from fusewire import ops
from fusewire.kernels.attention import cuda, op, reference, varlen
from fusewire.kernels.dispatch import forced
from tests import tolerance
from tests.tolerance import assert_exact

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 1178, 4, 64), (1, 333, 2, 128)]
on_nvidia = pytest.mark.skipif(torch.version.hip is not None, reason="the libraries are asked for on NVIDIA GPUs alone")
libraries = pytest.mark.parametrize("library", ("cudnn", "flash"))


def assert_close(got, want, plain, context=""):
    """On the CPU: CUDA has no nextafter for float16, which the rule's rounding noise needs."""
    tolerance.assert_close(got.cpu(), want.cpu(), plain.cpu(), context)


def rand(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda").to(dtype)


def gradients(call, tensors, grad):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    return torch.autograd.grad(call(*leaves), leaves, grad.to(leaves[0].dtype))


def stock(mask, causal):
    """PyTorch's attention over [B, T, H, D]."""
    return lambda q, k, v: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, is_causal=causal,
                                                          enable_gqa=True).transpose(1, 2)


def attended(mask, causal):
    return lambda q, k, v: reference.attend(q, k, v, mask, causal, None)[0]


def inputs(shape, dtype, kind, kv_heads=None):
    """q, k, v, slices of a packed projection where they have the same heads; the gradient; a mask, and whether causal."""
    batch, tokens, heads, dim = shape
    q, k, v = rand(batch, tokens, 3, heads, dim, dtype=dtype).unbind(2)
    k, v = (x[:, :, :kv_heads or heads] for x in (k, v))
    mask = None
    if kind in ("bool", "additive"):
        mask = rand(batch, 1, tokens, tokens) > -0.5
        mask[..., 0] = True
        mask = mask if kind == "bool" else torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    return (q, k, v), rand(*shape, dtype=dtype), mask, kind == "causal"


def check(got, tensors, grad, mask, causal):
    wide = mask if mask is None or mask.dtype is torch.bool else mask.double()
    want = gradients(attended(wide, causal), [x.double() for x in tensors], grad)
    for name, one, wanted, plain in zip("qkv", got, want, gradients(stock(mask, causal), tensors, grad)):
        assert_close(one, wanted, plain, f"d{name}")


@pytest.mark.parametrize("kind", ("plain", "bool", "additive", "causal", "grouped"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton(dtype, shape, kind):
    tensors, grad, mask, causal = inputs(shape, dtype, kind, shape[2] // 2 if kind == "grouped" else None)
    with forced("triton"):
        got = gradients(lambda *x: ops.attention(*x, mask=mask, causal=causal), tensors, grad)
    assert ops.stats()["attention_backward"]["triton"] == 1
    check(got, tensors, grad, mask, causal)


@pytest.mark.parametrize("dim", (16, 40, 72, 160, 256))
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_heads(dtype, dim):
    if dim > 128 and dtype is torch.float32:
        pytest.skip("float32 heads end at 128")
    tensors, grad, mask, causal = inputs((1, 200, 4, dim), dtype, "plain")
    with forced("triton"):
        got = gradients(ops.attention, tensors, grad)
    check(got, tensors, grad, mask, causal)


def pick(monkeypatch, library):
    """Everything goes to one library, also what our kernel for Hopper is preferred for."""
    monkeypatch.setattr(cuda, "NONDETERMINISTIC", True)
    monkeypatch.setattr(cuda, "attention_ours", lambda *shape: False)
    for name in ("attention_library", "attention_library_softmax", "attention_library_backward"):
        monkeypatch.setattr(cuda, name, lambda dim, queries, keys, arch: library)


@on_nvidia
@libraries
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("dim", (64, 128))
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_libraries(monkeypatch, dtype, dim, causal, library):
    """cuDNN and FlashAttention: out, gradients, the log-sum-exp, the norms; as many heads as FlashAttention needs not to split the keys."""
    pick(monkeypatch, library)
    tensors, grad, _, _ = inputs((2, 1178, 24, dim), dtype, "plain")
    w = rand(dim, dtype=dtype)
    with forced("cuda"):
        got = gradients(lambda *x: ops.attention(*x, causal=causal), tensors, grad)
        with torch.no_grad():
            out, lse = ops.attention(*tensors, causal=causal, return_lse=True)
    with torch.no_grad():
        normed = ops.attention(*tensors, causal=causal, q_weight=w, k_weight=w)  # (the norms are by whichever row can)
    counts = ops.stats()
    assert counts["attention_softmax"]["cuda"] == 2 and counts["attention_backward"]["cuda"] == counts["attention"]["cuda"] == 1
    check(got, tensors, grad, None, causal)
    wide = [x.double() for x in tensors]
    want, highest, total = reference.attend(*wide, None, causal, None)
    assert_close(out, want, stock(None, causal)(*tensors))
    assert (lse - (highest + total.log())).abs().max() < 1e-3  # as tests/kernels/attention/test_backward.py allows in bfloat16
    plain = [reference.widen(x, w, 1e-6).to(dtype) for x in tensors[:2]]
    want = reference.attention(*wide, None, w.double(), w.double(), causal, None, 1e-6)
    assert_close(normed, want, stock(None, causal)(*plain, tensors[2]))


@on_nvidia
@libraries
@pytest.mark.parametrize("batch", (1, 2))
def test_libraries_joint(monkeypatch, batch, library):
    pick(monkeypatch, library)
    (q, k, v), *_ = inputs((batch, 1024, 24, 64), torch.bfloat16, "plain")
    (q2, k2, v2), *_ = inputs((batch, 154, 24, 64), torch.bfloat16, "plain")
    w = rand(64, dtype=torch.bfloat16)
    with torch.no_grad():
        got = ops.joint_attention(q, k, v, q2, k2, v2, q_weight=w, k_weight=w, q2_weight=w, k2_weight=w)
    assert ops.stats()["joint_attention"]["cuda"] == 1 and all(x.is_contiguous() for x in got)
    wide = [x.double() for x in (q, k, v, q2, k2, v2, w, w, w, w)]
    normed = [torch.cat([reference.widen(x, w, 1e-6).bfloat16() for x in pair], 1) for pair in ((q, q2), (k, k2))]
    assert_close(torch.cat(got, 1), torch.cat(reference.joint_attention(*wide, None, 1e-6), 1), stock(None, False)(*normed, torch.cat([v, v2], 1)))


@on_nvidia
def test_libraries_one_sample(monkeypatch):
    """batch-coupling of FlashAttention, where its own rule cannot split the keys."""
    pick(monkeypatch, "flash")
    (q, k, v), *_ = inputs((3, 1178, 24, 64), torch.bfloat16, "plain")
    with forced("cuda"), torch.no_grad():
        assert_exact(ops.attention(q[1:2], k[1:2], v[1:2]), ops.attention(q, k, v)[1:2])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nondeterminism(dtype, shape):
    """50 repeats, and a sample alone: the same bits."""
    tensors, grad, _, _ = inputs(shape, dtype, "plain")
    with forced("triton"):
        first = gradients(ops.attention, tensors, grad)
        for _ in range(50):
            assert all(torch.equal(one, other) for one, other in zip(gradients(ops.attention, tensors, grad), first))
        for one, whole in zip(gradients(ops.attention, [x[-1:] for x in tensors], grad[-1:]), first):
            assert_exact(one, whole[-1:])


@on_nvidia
@pytest.mark.parametrize("allowed", (False, True))
def test_deterministic_algorithms(monkeypatch, allowed):
    """By default, and where PyTorch is asked for them whatever is allowed."""
    monkeypatch.setattr(cuda, "NONDETERMINISTIC", allowed)
    tensors, grad, _, _ = inputs((2, 1178, 4, 64), torch.bfloat16, "plain")
    try:
        torch.use_deterministic_algorithms(allowed)
        first = gradients(ops.attention, tensors, grad)
        assert all(torch.equal(one, other) for _ in range(10) for one, other in zip(gradients(ops.attention, tensors, grad), first))
    finally:
        torch.use_deterministic_algorithms(False)
    assert ops.stats()["attention_backward"]["triton"] == 11


@pytest.mark.parametrize("kind", ("plain", "causal"))
@pytest.mark.parametrize("backend", ("triton", None))
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory(dtype, backend, kind):
    """8192 tokens: nothing of T x T, which would be 1 GiB in 16 bits."""
    tensors, grad, mask, causal = inputs((1, 8192, 8, 64), dtype, kind)
    leaves = [x.requires_grad_() for x in tensors]
    with forced(backend):
        torch.autograd.grad(ops.attention(*leaves, causal=causal), leaves, grad)  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        got = torch.autograd.grad(ops.attention(*leaves, causal=causal), leaves, grad)
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 16 * leaves[0].numel() * leaves[0].itemsize + 2**24 < 2**29
    assert all(x.isfinite().all() for x in got)
    assert ops.stats()["attention_backward"]["reference"] == 0


def test_masked_row_and_nan_under_mask():
    q, k, v = (rand(1, 170, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    k[:, 150:], v[:, 150:] = torch.nan, torch.nan
    mask = (torch.arange(170, device="cuda") < 150).expand(1, 1, 170, 170).clone()
    mask[..., 3, :] = False
    grad = rand(1, 170, 2, 64, dtype=torch.bfloat16)
    with forced("triton"):
        got = gradients(lambda *x: ops.attention(*x, mask=mask), (q, k, v), grad)
        cut = gradients(lambda *x: ops.attention(*x, mask=mask[..., :150]), (q, k[:, :150], v[:, :150]), grad)
    assert (got[0][:, 3] == 0).all() and all((x[:, 150:] == 0).all() for x in got[1:])
    for one, other in zip((got[0], *(x[:, :150] for x in got[1:])), cut):
        assert_exact(one, other)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_varlen(dtype, causal):
    """Each packed sequence has the bits that it has alone."""
    cu = torch.tensor([0, 333, 333, 340, 1000], dtype=torch.int32, device="cuda")
    q, k, v = (rand(1000, 4, 64, dtype=dtype) for _ in range(3))
    grad = rand(1000, 4, 64, dtype=dtype)
    with forced("triton"):
        got = gradients(lambda *x: ops.attention_varlen(*x, cu, causal=causal), (q, k, v), grad)
        for a, b in ((0, 333), (333, 340), (340, 1000)):
            alone = gradients(lambda *x: ops.attention(*x, causal=causal), [x[None, a:b] for x in (q, k, v)], grad[None, a:b])
            for one, other in zip(got, alone):
                assert_exact(one[a:b], other[0])
    assert ops.stats()["attention_varlen_backward"]["triton"] == 1 and varlen._gradients.calls["reference"] == 0


@pytest.mark.parametrize("backend", ("triton", pytest.param("cuda", marks=on_nvidia)))
def test_graph_capture(monkeypatch, backend):
    """Forwards and backwards in a CUDA graph; no call waits for the device."""
    monkeypatch.setattr(cuda, "NONDETERMINISTIC", True)
    (q, k, v), grad, _, _ = inputs((2, 1178, 24, 64), torch.bfloat16, "plain")

    def step():
        out, highest, total = op._softmax(q, k, v, None, False, None)
        return out, *op._gradients(grad, None, q, k, v, out, highest, total, None, False, None)

    with torch.no_grad(), forced(backend):
        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        q.copy_(rand(2, 1178, 24, 64))
        graph.replay()
        torch.cuda.synchronize()
        got, want = [x.clone() for x in captured], step()
    for one, other in zip(got if backend == "triton" else got[:1], want):  # (the libraries' gradients are summed by atomics)
        assert_exact(one, other)
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("backend", ("triton", pytest.param("cuda", marks=on_nvidia)))
def test_compile(monkeypatch, backend):
    """A training step in one graph."""
    monkeypatch.setattr(cuda, "NONDETERMINISTIC", True)
    tensors, grad, _, _ = inputs((2, 1178, 24, 64), torch.bfloat16, "plain")
    with forced(backend):
        want = gradients(lambda *x: ops.attention(*x) * 2, tensors, grad)
        got = gradients(torch.compile(lambda q, k, v: ops.attention(q, k, v) * 2, fullgraph=True), tensors, grad)
    for one, other in zip(got, want):
        if backend == "triton":
            assert_exact(one, other)
        else:
            assert torch.allclose(one, other, rtol=0.02, atol=0.02)


@pytest.mark.xdist_group("memory")
def test_large_stride():
    """int32-stride: few elements, token stride times tokens beyond 2^31."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    base = torch.zeros(70, 2**26, dtype=torch.bfloat16, device="cuda")
    base[:, :256] = rand(70, 256, dtype=torch.bfloat16)
    q = base[:, :256].view(1, 70, 4, 64)
    with torch.no_grad(), forced("triton"):
        out, highest, total = op._softmax(q, q, q, None, False, None)
        got = op._gradients(q, None, q, q, q, out, highest, total, None, False, None)
        small = q.contiguous()
        for one, other in zip(got, op._gradients(small, None, small, small, small, out, highest, total, None, False, None)):
            assert_exact(one, other)
