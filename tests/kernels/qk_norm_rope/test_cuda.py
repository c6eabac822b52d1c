"""The QK-norm CUDA kernel with every thread on the CPU (tests/kernels/cuda_on_cpu): values, layouts, outputs. (Races and speed: tests/gpu.)"""

import pytest
import torch

from fusewire import ops
from fusewire.kernels.qk_norm_rope import reference
from tests.kernels.interpreted import ON_GPU
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Less than a chunk; tails; real heads; more lanes than a warp has, in one itemsize or both; the longest
HEAD_DIMS = (1, 6, 9, 40, 64, 72, 128, 160, 264, 512, 1024)


def inputs(dim, dtype=torch.bfloat16, tokens=3 if not ON_GPU else 99, heads=(2, 3)):  # as many as a thread after the other can do
    q, k = (torch.randn(2, tokens, count, dim).to(dtype) for count in heads)
    angle = torch.randn(tokens, dim // 2)
    return q, k, torch.randn(dim).to(dtype), torch.randn(dim).to(dtype), (angle.cos(), angle.sin())


@pytest.mark.parametrize("rotated", (False, True))
@pytest.mark.parametrize("norm", ("rms", "torch_rms"))
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(in_cuda, dtype, dim, norm, rotated):
    """head-dim, tail: exact gives stock's bits, close keeps the rule; 12 and 18 rows fill no block."""
    if rotated and dim % 2:
        pytest.skip("a rotation takes pairs")
    q, k, q_weight, k_weight, rope = inputs(dim, dtype)
    rope = rope if rotated else None
    before = q.clone(), k.clone()
    for weights in ((q_weight, k_weight), (None, None), (q_weight, None)):
        with in_cuda("qk_norm_rope", 2):
            exact, close = (ops.qk_norm_rope(q, k, *weights, rope=rope, norm=norm, numerics=numerics) for numerics in ("exact", "close"))
        for x, weight, got, got_close in zip((q, k), weights, exact, close):
            tables = rope or (None, None)
            plain = reference.qk_norm_one(x, weight, *tables, 1e-6, ops_norm(norm), True)
            wide = [None if t is None else t.double() for t in (weight, *tables)]
            assert_exact(got, plain)
            assert_close(got_close, reference.qk_norm_one(x.double(), *wide, 1e-6, reference.RMS, False), plain)
            assert got.is_contiguous() and got_close.is_contiguous()
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])


@pytest.mark.parametrize("dim", (6, 64, 72, 160))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_alone(in_cuda, dtype, dim):
    """tail: without a norm, and with tables for a part of the head."""
    q, k, _, _, rope = inputs(dim, dtype)
    for tables in (rope, tuple(table[:, :2] for table in rope)):
        with in_cuda("qk_norm_rope", 2):
            exact, close = (ops.qk_norm_rope(q, k, rope=tables, norm="none", numerics=numerics) for numerics in ("exact", "close"))
        for got, got_close, want in zip(exact, close, ops.qk_norm_rope(q, k, rope=tables, norm="none")):
            assert_exact(got, want)
            assert_exact(got_close, want)


def ops_norm(norm: str) -> int:
    return {"rms": reference.RMS, "torch_rms": reference.TORCH_RMS}[norm]


@pytest.mark.parametrize("numerics", ("exact", "close"))
@pytest.mark.parametrize("dim", (32, 40, 18))
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(in_cuda, layout, dim, numerics):
    """strided-input, misaligned: the same bits for any layout, one argument at a time."""
    v = dict(zip(("q", "k", "q_weight", "k_weight", "cos", "sin"), (*(x := inputs(dim))[:4], *x[4])))

    def call(v):
        return ops.qk_norm_rope(v["q"], v["k"], v["q_weight"], v["k_weight"], rope=(v["cos"], v["sin"]), numerics=numerics)

    with in_cuda("qk_norm_rope", 2 + len(v)):
        want = call(v)
        for changed in (*((name,) for name in v), tuple(v)):
            for got, one in zip(call({**v, **{name: layout(v[name]) for name in changed}}), want):
                assert_exact(got, one, str(changed))


def test_int32_stride(in_cuda):
    """int32-stride: three tokens 2^30 elements apart (memory that is never touched in between), read and written."""
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    far = torch.as_strided(base, (1, 3, 1, 8), (1, 2**30, 1, 1))
    q = torch.randn(1, 3, 1, 8).bfloat16()
    with in_cuda("qk_norm_rope", 1):
        want = ops.qk_norm_rope(q, q, numerics="close")[0]
    far.copy_(q)
    with in_cuda("qk_norm_into", 1):
        ops.qk_norm_into(far, q, None, None, far, torch.empty_like(q), numerics="close")
    assert_exact(far, want)


@pytest.mark.parametrize("numerics", ("exact", "close"))
@pytest.mark.parametrize("norm", ("rms", "torch_rms"))
@pytest.mark.parametrize("dim", (32, 40))
def test_into_joint_buffer(in_cuda, numerics, norm, dim):
    """Written in place into slices of one buffer, at places where a vector fits and where none does; nothing else is touched, its version moves."""
    q, k, q_weight, k_weight, rope = inputs(dim, tokens=5, heads=(2, 2))
    joint = torch.full((2, 9, 2, 2 * dim + 1), torch.nan).bfloat16()
    for tokens, start in ((slice(0, 5), dim), (slice(2, 7), dim + 1)):
        q_out, k_out = joint[:, tokens, :, :dim], joint[:, tokens, :, start:start + dim]
        untouched, version = joint.isnan(), joint._version
        untouched[:, tokens, :, :dim] = False
        untouched[:, tokens, :, start:start + dim] = False
        with in_cuda("qk_norm_into"):
            ops.qk_norm_into(q, k, q_weight, k_weight, q_out, k_out, rope=rope, numerics=numerics, norm=norm)
        with in_cuda("qk_norm_rope"):
            want = ops.qk_norm_rope(q, k, q_weight, k_weight, rope=rope, numerics=numerics, norm=norm)
        assert_exact(q_out, want[0])
        assert_exact(k_out, want[1])
        assert joint._version > version
        assert torch.equal(joint.isnan(), untouched)
        joint.fill_(torch.nan)


def test_in_place(in_cuda):
    q, k, *_, rope = inputs(32)
    with in_cuda("qk_norm_rope"):
        want = ops.qk_norm_rope(q, k, rope=rope, numerics="close")
    with in_cuda("qk_norm_into"):
        ops.qk_norm_into(q, k, None, None, q, k, rope=rope, numerics="close")
    assert_exact(q, want[0])
    assert_exact(k, want[1])


@pytest.mark.parametrize("dim", (16, 300))
def test_batch_coupling(in_cuda, dim):
    """A sample alone equals the sample in a batch; q and k of other lengths and heads, in blocks of their own."""
    q, k = torch.randn(5, 1, 1, dim), torch.randn(5, 17, 3, dim)
    with in_cuda("qk_norm_rope", 2):
        together, alone = ops.qk_norm_rope(q, k, numerics="close"), ops.qk_norm_rope(q[3:4], k[3:4], numerics="close")
    for whole, one in zip(together, alone):
        assert_exact(whole[3:4], one)


def test_nondeterminism(in_cuda, cuda_machine):
    """Threads, warps and blocks in the opposite order give the same bits."""
    q, k, q_weight, k_weight, rope = inputs(72)
    with in_cuda("qk_norm_rope", 2):
        forward = ops.qk_norm_rope(q, k, q_weight, k_weight, rope=rope, numerics="close")
        cuda_machine.reverse(True)
        try:
            backward = ops.qk_norm_rope(q, k, q_weight, k_weight, rope=rope, numerics="close")
        finally:
            cuda_machine.reverse(False)
    assert all(torch.equal(one, other) for one, other in zip(forward, backward))


@pytest.mark.parametrize("shape", ((0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0)), ids=str)
def test_empty(in_cuda, shape):
    q = torch.randn(shape)
    with in_cuda("qk_norm_rope", 2):
        assert all(x.shape == shape for numerics in ("exact", "close") for x in ops.qk_norm_rope(q, q, numerics=numerics))


def test_fp16_overflow(in_cuda):
    q = torch.full((1, 1, 1, 64), 1000.0, dtype=torch.float16)
    with in_cuda("qk_norm_rope"):
        assert (ops.qk_norm_rope(q, -q, numerics="close")[0] == 1).all()


def test_eps(in_cuda):
    q = 1e-4 * torch.randn(1, 2, 2, 64)
    for eps in (1e-5, 1e-6):
        with in_cuda("qk_norm_rope"):
            got = ops.qk_norm_rope(q, q, eps=eps, numerics="close")[0]
        assert_close(got, reference.qk_norm_one(q.double(), None, None, None, eps, reference.RMS, False),
                     reference.qk_norm_one(q, None, None, None, eps, reference.RMS, True))
