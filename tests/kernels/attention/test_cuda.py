"""The rows that call PyTorch's fused attention, on the CPU: what is chosen, what it is given, registration, gradients. (The libraries: tests/gpu.)

The device check is patched, and PyTorch's fused attention for the CPU stands in for cuDNN's and FlashAttention's.
"""

import pytest
import torch
from torch.library import opcheck
from torch.nn.attention import SDPBackend

from fusewire import ops
from fusewire.kernels.attention import cuda, op, reference
from fusewire.kernels.dispatch import BackendError, forced
from fusewire.kernels.tuning import attention_library, attention_library_backward, attention_library_softmax
from tests.kernels.attention.cases import qkv, stock
from tests.kernels.interpreted import ON_GPU, unchanged
from tests.tolerance import assert_close, assert_exact

pytestmark = pytest.mark.skipif(ON_GPU, reason="tests/gpu has the libraries themselves")
ROWS = ("attention", "joint_attention", "attention_softmax", "attention_backward")
DTYPES = (torch.bfloat16, torch.float16)


class Libraries:
    """In the place of both libraries; ``calls``: (which, and the layout of what it was given)."""

    def __init__(self):
        self.calls = []

    def forward(self, name):
        def run(q, k, v, causal, scale, wanted):
            self.calls.append((name, q.transpose(1, 2).is_contiguous()))
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
            return out, lse.unsqueeze(-1) if name == "cudnn" else lse
        return run

    def backward(self, name):
        def run(grad, q, k, v, out, lse, causal, scale):
            self.calls.append((f"{name} backward", grad.transpose(1, 2).is_contiguous()))
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)
        return run


def pretend(monkeypatch, arch="sm_90", reason=""):
    def gpu(index):
        return reason, arch

    gpu._dynamo_marked_constant = True
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(cuda, "_at_once", set())
    monkeypatch.setattr(cuda, "_gpu", gpu)
    monkeypatch.setattr(cuda, "_library", lambda name: "")


@pytest.fixture(params=("cudnn", "flash"))
def libraries(request, monkeypatch):
    """Everything goes to one library."""
    found = Libraries()
    pretend(monkeypatch)
    monkeypatch.setattr(cuda, "NONDETERMINISTIC", True)
    for table, make in ((cuda.FORWARD, found.forward), (cuda.BACKWARD, found.backward)):
        for name in tuple(table):
            monkeypatch.setitem(table, name, make(name))
    for name in ("attention_library", "attention_library_softmax", "attention_library_backward"):
        monkeypatch.setattr(cuda, name, lambda dim, queries, keys, arch: request.param)
    with forced("cuda"):
        yield found


def served(name: str, args: tuple, kwargs: dict) -> str:
    """What ``ops.backends`` says of the row."""
    return next(choice.reason for choice in ops.backends(name, *args, **kwargs) if choice.backend == "cuda")


def test_the_rows_stand_before_triton():
    for name in ROWS:
        rows = list(ops.stats()[name])
        assert rows.index("cuda") < (rows.index("triton") if "triton" in rows else rows.index("reference"))


@pytest.mark.parametrize("dim, queries, keys, arch, want", [
    (64, 4096, 4096, "sm_90", "cudnn"), (128, 64, 77, "sm_100", "cudnn"), (64, 4096, 4096, "sm_80", "flash"), (128, 1178, 1178, "sm_89", "flash"),
    (160, 4096, 4096, "sm_100", "flash"), (256, 100, 100, "sm_80", "flash"), (256, 100, 100, "sm_86", ""), (264, 4096, 4096, "sm_90", ""),
    (64, 63, 4096, "sm_90", ""), (64, 4096, 20, "sm_80", "")])
def test_choice(dim, queries, keys, arch, want):
    assert attention_library(dim, queries, keys, arch) == attention_library_softmax(dim, queries, keys, arch) == attention_library_backward(dim, queries, keys, arch) == want


@pytest.mark.parametrize("dim, version, want", [(136, 91900, "cudnn"), (256, 91100, "cudnn"), (256, 91002, "flash"), (128, 91002, "cudnn"), (264, 91900, ""), (256, None, "flash")])
def test_choice_of_wide_heads(monkeypatch, dim, version, want):
    """cuDNN's by PyTorch where it has them, and forwards alone."""
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    assert cuda._forward_library(dim, 256, 256, "sm_90") == want
    if dim > 128:
        assert attention_library_softmax(dim, 256, 256, "sm_90") == attention_library_backward(dim, 256, 256, "sm_90") == ("flash" if dim <= 256 else "")


def test_batch_coupling(monkeypatch):
    """The dispatch does not look at the batch, and FlashAttention is left alone where its own kernel would."""
    pretend(monkeypatch, "sm_80")
    for heads, queries, keys, dim, splits in ((24, 1178, 1178, 64, False), (4, 1178, 1178, 64, True), (4, 1178, 256, 64, False), (4, 1178, 257, 64, True),
                                              (2, 8192, 8192, 128, False), (2, 8128, 8192, 128, True), (1, 64, 128, 128, False), (1, 64, 129, 128, True),
                                              (1, 64, 64, 160, False), (1, 64, 65, 160, True)):
        for batch in (1, 2, 64):
            q = torch.empty(batch, queries, heads, dim, dtype=torch.bfloat16, device="meta")
            k = torch.empty(batch, keys, heads, dim, dtype=torch.bfloat16, device="meta")
            monkeypatch.setattr(cuda, "DEVICE", "meta")
            reason = cuda.why_not_attention(q, k, k, None, None, None, False, None, 1e-6)
            assert bool(reason) is splits and ("split the keys" in reason) is splits, (heads, queries, keys, dim, batch)


def refused():
    """(what the reason says, the arguments of the public op, its keywords)."""
    q, k, v = qkv(2, 80, 80, 2, 64, torch.bfloat16)
    w = torch.ones(64)
    yield "mask", (q, k, v), dict(mask=torch.ones(80, 80, dtype=torch.bool))
    yield "pattern", (q, k, v), dict(pattern=ops.block_pattern(lambda q, k: k <= q, 80, 80))
    yield "float32", (q.float(), k.float(), v.float()), {}
    yield "float64", (q.double(), k.double(), v.double()), {}
    yield "more heads", (q, k[:, :, :1], v[:, :, :1]), {}
    yield "dimension is 60", (q[..., :60], k[..., :60], v[..., :60]), {}
    yield "as many keys", (q, k[:, :70], v[:, :70]), dict(causal=True)
    yield "not positive", (q, k, v), dict(scale=-1.0)
    yield "samples", (q[:0], k[:0], v[:0]), {}
    yield "preferred for heads of 64, 63", (q[:, :63], k, v), {}
    yield "another dtype", (q, k, v), dict(q_weight=w)
    for layout in (lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), lambda x: torch.cat([x, x[..., :4]], -1)[..., :64],
                   lambda x: x[:1].expand(2, -1, -1, -1)):
        yield "16 bytes", (q, k, layout(v)), {}
        yield "16 bytes", (q, layout(k), v), {}


def test_what_is_refused(monkeypatch):
    pretend(monkeypatch)
    q, k, v = qkv(2, 80, 80, 2, 64, torch.bfloat16)
    for args, kwargs in (((q, k, v), {}), ((q, k, v), dict(causal=True, scale=0.3)), ((*torch.stack([q, k, v], 2).unbind(2),), {}),
                         ((q.transpose(1, 2).contiguous().transpose(1, 2), k, v), {}), ((q, k[:, :70], v[:, :70]), {})):
        assert served("attention", args, kwargs) in ("", "a backend that is preferred serves the call")
    for wanted, args, kwargs in refused():
        assert wanted in served("attention", args, kwargs), wanted
        with forced("cuda"), torch.no_grad(), pytest.raises(BackendError, match=wanted):
            ops.attention(*args, **kwargs)
    monkeypatch.setattr(cuda, "_library", lambda name: f"there is no {name}")
    assert served("attention", (q, k, v), {}) == "there is no cudnn"
    pretend(monkeypatch, reason="too old")
    assert served("attention", (q, k, v), {}) == "too old"
    monkeypatch.undo()
    assert served("attention", (q, k, v), {}) == "q is on cpu"


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("weights", ("", "q", "k", "qk"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(libraries, dtype, weights, causal):
    q, k, v = torch.randn(2, 70, 3, 2, 64).to(dtype).unbind(2)  # slices of a packed QKV
    w = torch.randn(64).to(dtype)
    q_weight, k_weight = (w if name in weights else None for name in "qk")
    same = unchanged(q, k, v)
    with torch.no_grad():
        got = ops.attention(q, k, v, q_weight=q_weight, k_weight=k_weight, causal=causal, scale=0.2)
    wide = [None if x is None else x.double() for x in (q_weight, k_weight)]
    want = reference.attention(q.double(), k.double(), v.double(), None, *wide, causal, 0.2, 1e-6)
    normed = [x if weight is None else reference.widen(x, weight, 1e-6).to(dtype) for x, weight in ((q, q_weight), (k, k_weight))]
    assert_close(got, want, stock(*normed, v, None, causal, 0.2, dtype))
    assert got.is_contiguous() and ops.stats()["attention"]["cuda"] == 1
    assert [given for _, given in libraries.calls] == ["q" in weights]  # read where it lies, or normalised into a tensor of its own
    same()


@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("weighted", ("", "1", "2", "12", "q1"))
def test_joint_attention(libraries, weighted, batch):
    q, k, v = torch.randn(batch, 70, 2, 3, 40).bfloat16().permute(3, 0, 1, 2, 4)
    q, k, v = (torch.cat([x, x], -1)[..., 3:43] for x in (q, k, v))  # no layout that the libraries read
    q2, k2, v2 = qkv(batch, 9, 12, 2, 40, torch.bfloat16)
    k, v = k[:, :, :2], v[:, :, :2]
    q = q[:, :, :2]
    w = torch.randn(40).bfloat16()
    weights = [w if on else None for on in ("1" in weighted, "1" in weighted and "q" not in weighted, "2" in weighted, "2" in weighted)]
    same = unchanged(q, k, v, q2, k2, v2)
    with torch.no_grad():
        got = ops.joint_attention(q, k, v, q2, k2, v2, **dict(zip(("q_weight", "k_weight", "q2_weight", "k2_weight"), weights)))
    wide = [None if x is None else x.double() for x in (q, k, v, q2, k2, v2, *weights)]
    normed = [x if weight is None else reference.widen(x, weight, 1e-6).bfloat16() for x, weight in zip((q, k, q2, k2), weights)]
    plain = stock(torch.cat([normed[0], normed[2]], 1), torch.cat([normed[1], normed[3]], 1), torch.cat([v, v2], 1), dtype=torch.bfloat16)
    assert_close(torch.cat(got, 1), torch.cat(reference.joint_attention(*wide, None, 1e-6), 1), plain)
    assert got[0].shape == q.shape and got[1].shape == q2.shape and all(x.is_contiguous() for x in got)
    assert got[0].untyped_storage().data_ptr() != got[1].untyped_storage().data_ptr()
    assert ops.stats()["joint_attention"]["cuda"] == 1 and [given for _, given in libraries.calls] == [True]
    same()


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(libraries, dtype, causal):
    """Through the library's own backward, not by recomputing; and the log-sum-exp."""
    leaves = [x.requires_grad_() for x in qkv(2, 70, 70, 2, 64, dtype)]
    grad = torch.randn(2, 70, 2, 64).to(dtype)
    got = torch.autograd.grad(ops.attention(*leaves, causal=causal), leaves, grad)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    want = torch.autograd.grad(stock(*wide, causal=causal), wide, grad.double())
    again = [x.detach().requires_grad_() for x in leaves]
    plain = torch.autograd.grad(stock(*again, causal=causal, dtype=dtype), again, grad)
    for name, one, wanted, of_stock in zip("qkv", got, want, plain):
        assert_close(one, wanted, of_stock, f"d{name}")
        assert one.is_contiguous()
    assert ops.stats()["attention_softmax"]["cuda"] == ops.stats()["attention_backward"]["cuda"] == 1
    assert [name.split()[-1] == "backward" for name, _ in libraries.calls] == [False, True]
    with torch.no_grad():
        out, lse = ops.attention(*leaves, causal=causal, return_lse=True)
    assert_exact(out, ops.attention(*(x.detach() for x in leaves), causal=causal))
    assert_exact(lse, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*(x.detach().transpose(1, 2) for x in leaves), 0.0, causal)[1])


def test_what_the_gradients_refuse(libraries):
    q, k, v = qkv(1, 70, 70, 2, 64, torch.bfloat16)
    out, highest, total = op._softmax(q, k, v, None, False, None)
    args = (torch.randn_like(out), None, q, k, v, out, highest, total, None, False, None)
    assert cuda.why_not_backward(*args) == ""
    assert "log-sum-exp" in cuda.why_not_backward(args[0], highest, *args[2:])
    assert "mask" in cuda.why_not_backward(*args[:8], torch.ones(1, 1, 70, 70), False, None)
    try:
        torch.use_deterministic_algorithms(True)
        assert "atomics" in cuda.why_not_backward(*args)
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradients_of_norms_and_of_two_streams(libraries, monkeypatch):
    tensors = [x.requires_grad_() for x in (*qkv(1, 60, 60, 2, 32, torch.bfloat16), *qkv(1, 10, 10, 2, 32, torch.bfloat16))]
    w = torch.rand(32).bfloat16().requires_grad_()
    grads = torch.randn(1, 60, 2, 32).bfloat16(), torch.randn(1, 10, 2, 32).bfloat16()
    for table in (op._softmax, op._gradients):  # nothing is forced, as norms have no CUDA row here: as on a GPU, there is no CPU's
        monkeypatch.setattr(table, "rows", [row for row in table.rows if row.name != "cpu"])
    with forced(None):
        got = torch.autograd.grad(ops.joint_attention(*tensors, q_weight=w, k_weight=w, q2_weight=w, k2_weight=w), [*tensors, w], grads)
    assert ops.stats()["attention_softmax"]["cuda"] == ops.stats()["attention_backward"]["cuda"] == 1
    wide = [x.detach().double().requires_grad_() for x in (*tensors, w)]
    want = torch.autograd.grad(reference.joint_attention(*wide[:6], *[wide[6]] * 4, None, 1e-6), wide, [g.double() for g in grads])
    plain_leaves = [x.detach().requires_grad_() for x in (*tensors, w)]
    q, k, v, q2, k2, v2, weight = plain_leaves
    normed = [torch.nn.functional.rms_norm(x, (32,), weight, 1e-6) for x in (q, k, q2, k2)]
    out = stock(torch.cat([normed[0], normed[2]], 1), torch.cat([normed[1], normed[3]], 1), torch.cat([v, v2], 1), dtype=torch.bfloat16)
    plain = torch.autograd.grad(out.split((60, 10), 1), plain_leaves, grads)
    for one, wanted, of_stock in zip(got, want, plain):
        assert_close(one, wanted, of_stock)


@pytest.mark.parametrize("permuted", (False, True))
def test_fake_mismatch(libraries, permuted):
    """opcheck of the registered ops on contiguous and permuted inputs."""
    q, k, v = qkv(2, 70, 70, 2, 16, torch.bfloat16)
    w = torch.ones(16, dtype=torch.bfloat16)
    if permuted:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    out, highest, total = op._softmax(q, k, v, None, False, None)
    calls = {"attention": (q, k, v, None, w, None, False, None, 1e-6), "joint_attention": (q, k, v, q, k, v, w, w, None, None, None, 1e-6),
             "attention_softmax": (q, k, v, None, True, 0.3),
             "attention_backward": (torch.randn_like(out), None, q, k, v, out, highest, total, None, False, None)}
    for name, args in calls.items():
        opcheck(getattr(torch.ops.fusewire, f"{name}_cuda").default, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_compile(libraries):
    """One graph without and with gradients, the registered ops in it, the same bits; another length needs none of its own."""
    w = torch.rand(64).bfloat16()

    def both(q, k, v):
        out, out2 = ops.joint_attention(q, k, v, q, k, v, q_weight=w)
        return ops.attention(q, k, v, q_weight=w) + out + out2

    def one(q, k, v):
        return ops.attention(q, k, v) * 2

    compiled, compiled_one = (torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True) for f in (both, one))
    for tokens in (70, 90):
        q, k, v = torch.randn(2, tokens, 3, 2, 64).bfloat16().unbind(2)
        with torch.no_grad():
            assert_exact(compiled(q, k, v), both(q, k, v))
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        for got, want in zip(torch.autograd.grad(compiled_one(*leaves).sum(), leaves), torch.autograd.grad(one(*leaves).sum(), leaves)):
            assert_exact(got, want)


@pytest.mark.parametrize("own", (False, True))
def test_misaligned(libraries, own):
    """misaligned: a first element that lies anywhere, in memory of ours or that another library allocated, is copied to where vectors can be read."""
    q, k, _ = qkv(1, 70, 70, 2, 64, torch.bfloat16)
    base = torch.empty(q.numel() + 1, dtype=q.dtype)[1:] if own else torch.frombuffer(bytearray(2 * q.numel() + 64), dtype=q.dtype, offset=2, count=q.numel())
    at = base.view(q.shape).copy_(q)
    assert at.data_ptr() % 16
    aligned = []
    for name, run in tuple(cuda.FORWARD.items()):
        cuda.FORWARD[name] = lambda *args, run=run: aligned.append([x.data_ptr() % 16 == 0 for x in args[:3]]) or run(*args)
    assert_exact(ops.attention(at, k, at), ops.attention(q, k, q))
    assert aligned == [[True] * 3] * 2


def test_nondeterministic_gradients_are_not_the_default(libraries, monkeypatch):
    monkeypatch.setattr(cuda, "NONDETERMINISTIC", False)
    q, k, v = (torch.randn(1, 70, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    out, highest, total = cuda.attention_softmax(q, k, v, None, False, None)
    assert "atomics" in cuda.why_not_backward(out, None, q, k, v, out, highest, total, None, False, None)


@pytest.mark.on_reference(reason="the two ways of calling cuDNN alone, without a dispatch table")
def test_which_call_reaches_cudnn(monkeypatch):
    """PyTorch's own attention where it would choose cuDNN by itself, which it is asked once for each kind of arguments; the bare op where it would not, where
    cuDNN is switched off for it, where the log-sum-exp is wanted, and where gradients are recorded."""
    asked, by_op = [], []
    chosen = [SDPBackend.CUDNN_ATTENTION.value]
    monkeypatch.setattr(cuda, "_by_itself", {})
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda q, k, v, is_causal, scale: (asked.append((q.shape, k.shape, is_causal, scale)), chosen[0])[1])
    monkeypatch.setattr(torch._C, "_get_cudnn_sdp_enabled", lambda: enabled)
    monkeypatch.setattr(cuda, "_cudnn_op", lambda q, k, v, causal, scale, wanted: (by_op.append(wanted), (q, "lse"))[1])
    q, k, v = (x.transpose(1, 2) for x in qkv(1, 30, 30, 2, 64, torch.bfloat16))
    enabled = True
    with torch.no_grad():
        for scale in (None, 0.3):
            for causal in (False, True, False):
                out, lse = cuda._cudnn(q, k, v, causal, scale, False)
                assert lse is None
                assert_exact(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale))
        assert len(asked) == 2 and not by_op, "once for each of causal and not; the scale is no reason"
        assert cuda._cudnn(q, k, v, False, None, True)[1] == "lse" and by_op == [True]
        enabled = False
        cuda._cudnn(q, k, v, False, None, False)
        enabled, chosen[0] = True, SDPBackend.FLASH_ATTENTION.value
        cuda._cudnn(q[:, :, :20], k, v, False, None, False)
    cuda._cudnn(q, k, v, False, None, False)
    assert by_op == [True, False, False, False] and len(asked) == 3


def test_what_is_served_at_once(monkeypatch):
    """A kind of call that went to PyTorch's own attention goes there again without the checks, and is counted; another shape, layout or alignment, a graph
    that is recorded, a forced backend, cuDNN switched off and autocast do not."""
    pretend(monkeypatch)
    monkeypatch.setattr(cuda, "_by_itself", {})
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda q, k, v, is_causal, scale: SDPBackend.CUDNN_ATTENTION.value)
    enabled, checked, check = [True], [], op.check
    monkeypatch.setattr(torch._C, "_get_cudnn_sdp_enabled", lambda: enabled[0])
    monkeypatch.setattr(cuda, "_cudnn_op", lambda q, k, v, *rest: (torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=rest[1]), "lse"))
    monkeypatch.setattr(op, "check", lambda *arguments: (checked.append(1), check(*arguments))[1])
    monkeypatch.setattr(op._attention, "rows", [row for row in op._attention.rows if row.name == "cuda"])
    q, k, v = qkv(1, 80, 80, 2, 64, torch.bfloat16)
    packed = torch.stack((q, k, v), 2)

    def at_once(q=q, k=k, v=v, **keywords) -> bool:
        before, calls = len(checked), ops.stats()["attention"]["cuda"]
        got = ops.attention(q, k, v, **keywords)
        assert ops.stats()["attention"]["cuda"] == calls + 1
        assert_exact(got, torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **keywords).transpose(1, 2))
        assert got.is_contiguous()
        return len(checked) == before

    off_by_one = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view_as(q).copy_(q)
    assert not at_once() and not cuda._at_once, "autograd records"
    with torch.no_grad():
        assert not at_once() and at_once()
        for change in (dict(q=q[:, :70]), dict(k=k[:, :70], v=v[:, :70]), dict(q=packed[:, :, 0]), dict(scale=0.3)):
            assert not at_once(**change) and at_once(**change), change
        assert not at_once(q=off_by_one) and not at_once(q=off_by_one)
        enabled[0] = False
        assert not at_once()
        enabled[0] = True
        with forced("cuda"):
            assert not at_once()
        with torch.autocast("cpu", torch.bfloat16):
            assert not at_once()
        with pytest.raises(TypeError, match="k is a NoneType"):
            ops.attention(q, None, v)
        assert at_once()
