"""The attention kernel for Hopper on the GPU it is for: values, layouts, both ways of launching, graphs, determinism. (Predicates, launcher: tests/kernels.)"""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusewire import ops
from fusewire.kernels import plans
from fusewire.kernels.attention import reference
from fusewire.kernels.attention.hopper_limits import DIMS, why_not_hopper
from fusewire.kernels.dispatch import forced
from fusewire.kernels.tuning import OURS_FROM
from tests import tolerance
from tests.layouts import LAYOUTS
from tests.tolerance import assert_exact

HOPPER = torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a GPU of the Hopper architecture")]
dims = pytest.mark.parametrize("dim", DIMS)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Every test here must have launched the kernel; the number of times."""
    from fusewire.kernels.attention import hopper

    counted, launch = [], hopper._launch
    monkeypatch.setattr(hopper, "_launch", lambda *arguments: (counted.append(1), launch(*arguments))[1])
    yield counted
    assert counted


def qkv(batch, queries, keys, heads, dim, dtype=torch.bfloat16, key_heads=None):
    return tuple(torch.randn(batch, tokens, n, dim, device="cuda").to(dtype)
                 for tokens, n in ((queries, heads), (keys, key_heads or heads), (keys, key_heads or heads)))


def sdpa(q, k, v, causal=False, scale=None):
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, scale=scale,
                                              enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)


def check(got, q, k, v, causal=False, scale=None):
    want = reference.attend(q.double(), k.double(), v.double(), None, causal, scale)[0]
    tolerance.assert_close(got.cpu(), want.cpu(), sdpa(q, k, v, causal, scale).cpu())
    assert got.is_contiguous()


def attention(*arguments, **keywords):
    with torch.no_grad(), forced("triton"):
        return ops.attention(*arguments, **keywords)


def joint_attention(*arguments, **keywords):
    with torch.no_grad(), forced("triton"):
        return ops.joint_attention(*arguments, **keywords)


@pytest.mark.parametrize("causal", [False, True])
# One token; the ends of a warpgroup's queries, of a program's and of a tile of keys; SD3's length; few keys, and more
@pytest.mark.parametrize("tokens", [(1, 1), (63, 63), (64, 64), (65, 65), (127, 127), (129, 257), (1178, 1178), (300, 77), (5, 1000)], ids=str)
@dtypes
@dims
def test_values(dim, dtype, tokens, causal):
    q, k, v = qkv(2, *tokens, 3, dim, dtype)
    assert why_not_hopper(q, k) == ""
    check(attention(q, k, v, causal=causal), q, k, v, causal)


@pytest.mark.parametrize("causal", [False, True])
@dims
def test_grouped_heads_and_scale(dim, causal):
    q, k, v = qkv(2, 300, 333, 8, dim, key_heads=2)
    check(attention(q, k, v, causal=causal, scale=0.3), q, k, v, causal, 0.3)


@dims
def test_large_scores(dim):
    q, k, v = qkv(1, 500, 500, 2, dim, torch.float16)
    q, k = q.sign() * 100, k.sign() * 100  # logits up to 1e5
    got = attention(q, k, v)
    assert got.isfinite().all()
    check(got, q, k, v)


@pytest.mark.parametrize("weighted", ["", "q", "k2", "all"])
@pytest.mark.parametrize("tokens", [(1024, 154), (130, 9), (1, 300), (64, 128)], ids=str)
@dims
def test_joint_attention(dim, tokens, weighted):
    q, k, v = qkv(2, tokens[0], tokens[0], 3, dim)
    q2, k2, v2 = qkv(2, tokens[1], tokens[1], 3, dim)
    names = ("q_weight", "k_weight", "q2_weight", "k2_weight")
    weights = [torch.randn(dim, device="cuda").bfloat16() if weighted == "all" or name == f"{weighted}_weight" else None for name in names]
    got = joint_attention(q, k, v, q2, k2, v2, **dict(zip(names, weights)))
    wide = [None if x is None else x.double() for x in (q, k, v, q2, k2, v2, *weights)]
    want = torch.cat(reference.joint_attention(*wide, None, 1e-6), 1)
    normed = [x if w is None else reference.widen(x, w, 1e-6).bfloat16() for x, w in zip((q, k, q2, k2), weights)]
    plain = sdpa(torch.cat([normed[0], normed[2]], 1), torch.cat([normed[1], normed[3]], 1), torch.cat([v, v2], 1))
    tolerance.assert_close(torch.cat(got, 1).cpu(), want.cpu(), plain.cpu())
    assert all(x.is_contiguous() for x in got)


@dims
def test_norm(dim):
    q, k, v = qkv(2, 200, 200, 3, dim)
    w, w2 = torch.randn(2, dim, device="cuda").bfloat16()
    got = attention(q, k, v, q_weight=w, k_weight=w2)
    want = reference.attention(q.double(), k.double(), v.double(), None, w.double(), w2.double(), False, None, 1e-6)
    plain = sdpa(reference.widen(q, w, 1e-6).bfloat16(), reference.widen(k, w2, 1e-6).bfloat16(), v)
    tolerance.assert_close(got.cpu(), want.cpu(), plain.cpu())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@dims
def test_strided_input(dim, layout):
    q, k, v = qkv(2, 150, 150, 4, dim)
    k[1], q[1], v[1] = k[0], q[0], v[0]  # so that an expanded layout exists
    want, want2 = attention(q, k, v), joint_attention(q, k, v, q, k, v)
    assert_exact(attention(*(layout(x) for x in (q, k, v))), want)
    for got, one in zip(joint_attention(*(layout(x) for x in (q, k, v, q, k, v))), want2):
        assert_exact(got, one)


@dims
def test_packed_input(dim):
    q, k, v = torch.randn(2, 700, 3, 6, dim, device="cuda").bfloat16().unbind(2)
    assert_exact(attention(q, k, v), attention(*(x.contiguous() for x in (q, k, v))))


@pytest.mark.xdist_group("memory")
def test_large_stride():
    """int32-stride: few elements, the last of them more than 2^31 elements from the first."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    base = torch.zeros(150, 2**24, dtype=torch.bfloat16, device="cuda")
    base[:, :256] = torch.randn(150, 256, device="cuda").bfloat16()
    q = base[:, :256].view(1, 150, 4, 64)
    assert_exact(attention(q, q, q), attention(*[q.contiguous()] * 3))


@dims
def test_batch_coupling(dim):
    """A sample alone and among others: fewer programs than multiprocessors, and many tiles for each. So do a head and a query's block."""
    q, k, v = qkv(8, 300, 300, 24, dim)
    whole = attention(q, k, v)
    assert_exact(attention(q[5:6], k[5:6], v[5:6]), whole[5:6])
    assert_exact(attention(q[:, :, 7:8], k[:, :, 7:8], v[:, :, 7:8]), whole[:, :, 7:8])
    assert_exact(attention(q[:, :70], k, v), whole[:, :70])
    out, out2 = joint_attention(q, k, v, q[:, :90], k[:, :90], v[:, :90])
    for got, want in zip(joint_attention(*(x[3:4] for x in (q, k, v, q[:, :90], k[:, :90], v[:, :90]))), (out[3:4], out2[3:4])):
        assert_exact(got, want)


@dims
def test_nondeterminism(dim):
    q, k, v = qkv(2, 1178, 1178, 24, dim)
    first = attention(q, k, v)
    assert all(torch.equal(attention(q, k, v), first) for _ in range(100))
    q2, k2, v2 = qkv(2, 154, 154, 24, dim)
    first = joint_attention(q, k, v, q2, k2, v2)
    assert all(torch.equal(a, b) for _ in range(100) for a, b in zip(joint_attention(q, k, v, q2, k2, v2), first))


@dims
def test_both_ways_of_launching(dim):
    """The first launch goes through Triton's front, those after it do not; arguments of other sizes, strides and places, the same kernel."""
    from fusewire.kernels.attention import hopper

    hopper._started.clear()
    first, second = qkv(2, 1178, 1178, 3, dim), tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(1, 90, 300, 5, dim))
    calls = [lambda x=x, causal=causal: attention(*x, causal=causal) for x in (first, second) for causal in (False, True)]
    calls += [lambda: torch.cat(joint_attention(*first, *(x[:, :64] for x in first)), 1)]
    got = [call() for call in calls]
    assert len(hopper._started) == 3
    for call, one in zip(calls, got):
        assert_exact(call(), one)
    hopper._started.clear()
    for call, one in zip(reversed(calls), reversed(got)):  # what was launched first is now launched later
        assert_exact(call(), one)


@pytest.mark.parametrize("weighted", (False, True), ids=("plain", "norms"))
@pytest.mark.parametrize("backend", ("triton", None), ids=str)
@dims
def test_calls_by_plan(dim, backend, weighted, monkeypatch):
    """The third call of a kind goes by the plan of the second: other values in other memory, the bits of a call that is worked out."""
    ran, original = [], plans.Plan.__call__
    monkeypatch.setattr(plans.Plan, "__call__", lambda plan, args: (ran.append(plan), original(plan, args))[1])
    weights = {f"{name}_weight": torch.randn(dim, device="cuda").to(torch.bfloat16) for name in ("q", "k", "q2", "k2")} if weighted else {}
    with torch.no_grad(), forced(backend):
        for _ in range(3):
            image, text, before = qkv(2, 1100, 1100, 4, dim), qkv(2, 77, 77, 4, dim), len(ran)
            got = ops.joint_attention(*image, *text, **weights)
        assert len(ran) > before
        plans.forget()
        want = ops.joint_attention(*image, *text, **weights)
    for mine, theirs in zip(got, want):
        assert_exact(mine, theirs)


@dims
def test_graph_capture(dim):
    """Two calls of each op in a graph, replayed with new values in the same places."""
    given = qkv(2, 1178, 1178, 4, dim) + qkv(2, 154, 154, 4, dim)
    w = torch.randn(dim, device="cuda").bfloat16()

    def step():
        out, out2 = joint_attention(*given, q_weight=w, k_weight=w, q2_weight=w)
        return out, out2, attention(*given[:3]), attention(out, given[1], given[2]), attention(*given[3:], causal=True)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        for x in given:
            x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip([x.clone() for x in captured], step()):
            assert_exact(got, want)


@dims
def test_compile(dim):
    """One graph, the bits of eager; without a mode, and in inference mode."""
    given = qkv(1, 1100, 1100, 2, dim) + qkv(1, 100, 100, 2, dim)
    w = torch.randn(dim, device="cuda").bfloat16()

    def block(q, k, v, q2, k2, v2):
        out, out2 = ops.joint_attention(q, k, v, q2, k2, v2, q_weight=w, k_weight=w, q2_weight=w, k2_weight=w)
        return out, out2, ops.attention(out * 2, k, v)

    compiled = torch.compile(block, fullgraph=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for got, want in zip(compiled(*given), block(*given)):
                assert_exact(got, want)


def test_no_synchronisation_and_streams():
    q, k, v = qkv(2, 1178, 1178, 4, 64)
    want = attention(q, k, v)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream, late = torch.cuda.Stream(), torch.zeros_like(q)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        got = attention(late, k, v)  # on this stream, behind the copy
    torch.cuda.synchronize()
    assert_exact(got, want)


@dims
def test_what_is_preferred(dim, launches):
    """Nothing forced: this kernel for much to compute, cuDNN for less, for causal attention and where the log-sum-exp is wanted; of two streams this
    kernel from 1024 tokens on."""
    heads = OURS_FROM // (2048 * 2048 * dim)
    long, short = qkv(1, 2048, 2048, heads, dim), qkv(1, 300, 300, heads, dim)
    with torch.no_grad():
        for call, runs in ((lambda: ops.attention(*long), True), (lambda: ops.attention(*short), False),
                           (lambda: ops.attention(*(x[:, :2047] for x in long)), False), (lambda: ops.attention(*long, causal=True), False),
                           (lambda: ops.attention(*long, return_lse=True), False), (lambda: ops.joint_attention(*long, *short), True),
                           (lambda: ops.joint_attention(*short, *short), False)):
            before = len(launches)
            call()
            assert (len(launches) > before) is runs
