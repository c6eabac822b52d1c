"""The prologue of attention: norm and rotation of q and k within the op, against the three in turn in float64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from fusewire import ops
from fusewire.kernels.dispatch import choices, forced
from fusewire.kernels.library import CPU
from fusewire.kernels.qk_norm_rope.reference import rotate
from tests.kernels.attention.cases import DTYPES, qkv, stock, stock_norm
from tests.kernels.interpreted import in_triton, needs_interpreter
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_within

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
BACKENDS = [pytest.param("cpu", marks=needs_library), "reference"]


def angles(tokens, channels, batch=()):
    turn = torch.rand(*batch, tokens, channels // 2) * 6.3
    return turn.cos(), turn.sin()


def turned(x, rope, dtype=torch.float64):
    """x rotated in its first dimensions; the tables [T, R/2] or [B, T, R/2]."""
    cos, sin = (table.to(dtype) for table in rope)
    width = 2 * cos.shape[-1]
    if cos.dim() == 2:
        cos, sin = (table.expand(x.shape[0], -1, -1) for table in (cos, sin))
    head = torch.cat([rotate(x[i:i + 1, ..., :width].to(dtype), cos[i], sin[i]) for i in range(x.shape[0])])
    return torch.cat([head, x[..., width:].to(dtype)], -1)


def prepared(x, weight, rope, eps=1e-6, dtype=torch.float64):
    """By PyTorch in ``dtype``, which rounds after the norm."""
    x = x.to(dtype) if weight is None else stock_norm(x, weight, eps, dtype)
    return x if rope is None else turned(x, rope, dtype)


def ran(backend, op):
    counts = ops.stats()[op]
    return counts[backend] > 0 and sum(counts.values()) == counts[backend]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normed", [(), (0,), (0, 1)], ids=["rope", "q normed", "normed"])
# (B, T, H, D): odd everything; a tail of channels; more than a block of keys; heads wider than two steps of a tile
@pytest.mark.parametrize("shape", [(4, 63, 1, 64), (2, 51, 3, 40), (1, 300, 2, 72), (1, 65, 2, 128), (8, 7, 5, 6)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, shape, normed, backend):
    """No more rounding than norm, rotation and attention in turn; causal, and grouped heads."""
    batch, tokens, heads, channels = shape
    q, k, v = qkv(batch, tokens, tokens, 2 * heads, channels, dtype, heads)
    weights = [torch.rand(channels).to(dtype) + 0.5 if i in normed else None for i in range(2)]
    rope, causal = angles(tokens, channels), len(normed) == 1
    with forced(backend):
        got = ops.attention(q, k, v, q_weight=weights[0], k_weight=weights[1], rope=rope, causal=causal)
    assert ran(backend, "attention") and not sum(ops.stats()["qk_norm_rope"].values())  # within attention
    wide, plain = ([prepared(x, weight, rope, dtype=kind) for x, weight in zip((q, k), weights)] for kind in (torch.float64, dtype))
    assert_close(got, stock(*wide, v, causal=causal), stock(*plain, v, causal=causal, dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ropes", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("lengths", [(63, 17), (1, 1), (40, 300), (49, 0), (0, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_joint(dtype, lengths, ropes, backend):
    """Each stream by its own tables, or as it is."""
    heads = 2 if sum(lengths) > 10 else 16  # a comparison of two maxima needs thousands of values
    streams = [qkv(4, n, n, heads, 64, dtype) for n in lengths]
    weights = [[torch.rand(64).to(dtype) + 0.5 for _ in range(2)] for _ in range(2)]
    tables = [angles(n, 64) if there else None for n, there in zip(lengths, ropes)]
    names = dict(zip(("q_weight", "k_weight", "q2_weight", "k2_weight"), weights[0] + weights[1]))
    with forced(backend):
        got = ops.joint_attention(*streams[0], *streams[1], **names, rope=tables[0], rope2=tables[1])
    assert ran(backend, "joint_attention") and not sum(ops.stats()["qk_norm_rope"].values())

    def joined(kind):
        parts = [[prepared(x, w, rope, dtype=kind) for x, w in zip(stream, (*pair, None))][:2] for stream, pair, rope in zip(streams, weights, tables)]
        return *(torch.cat(both, 1) for both in zip(*parts)), torch.cat([stream[2] for stream in streams], 1)

    want, plain = stock(*joined(torch.float64)), stock(*joined(dtype), dtype=dtype)
    assert_close(torch.cat(got, 1), want, plain)


FORMS = {  # the tables of 51 tokens and 40 channels as they may be given
    "every second": lambda: tuple(torch.stack([table, torch.full_like(table, torch.nan)], -1).flatten(1)[:, ::2] for table in angles(51, 40)),
    "half of the head": lambda: angles(51, 20), "complex": lambda: torch.polar(torch.ones(51, 20), torch.rand(51, 20)),
    "one for all": lambda: angles(51, 40, (1,)), "one for each sample": lambda: angles(51, 40, (2,)), "reversed": lambda: tuple(
        table.T.contiguous().T for table in angles(51, 40)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forms_of_the_tables(dtype, form):
    """rope of any form that ``qk_norm_rope`` takes, in any layout; tables that differ between samples are a pass of its own."""
    (q, k, v), rope = qkv(2, 51, 51, 3, 40, dtype), FORMS[form]()
    got = ops.attention(q, k, v, rope=rope)
    pair = (rope.real, rope.imag) if isinstance(rope, torch.Tensor) else tuple(table[0] if table.shape[0] == 1 else table for table in rope)
    wide, plain = ([prepared(x, None, pair, dtype=kind) for x in (q, k)] for kind in (torch.float64, dtype))
    assert_close(got, stock(*wide, v), stock(*plain, v, dtype=dtype))
    apart = sum(ops.stats()["qk_norm_rope"].values())
    assert apart == (form == "one for each sample")


@needs_library
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(layout):
    """strided-input, misaligned, batch-coupling, alias: the same bits for tensors and tables in any layout, nothing written to."""
    q, k, v = qkv(2, 51, 51, 3, 40)
    rope, weight = angles(51, 40), torch.rand(40) + 0.5
    kept = [x.clone() for x in (q, k, *rope)]
    want = ops.attention(q, k, v, q_weight=weight, k_weight=weight, rope=rope)
    assert_exact(ops.attention(layout(q), layout(k), layout(v), q_weight=layout(weight), k_weight=weight, rope=tuple(map(layout, rope))), want)
    assert_exact(ops.attention(q[1:], k[1:], v[1:], q_weight=weight, k_weight=weight, rope=rope), want[1:])
    first, second = slice(None, 20), slice(20, None)
    parts = [[x[:, part] for x in (q, k, v)] for part in (first, second)]
    weights = dict.fromkeys(("q_weight", "k_weight", "q2_weight", "k2_weight"), weight)
    tables = [tuple(layout(table)[part] for table in rope) for part in (first, second)]
    assert_exact(torch.cat(ops.joint_attention(*parts[0], *parts[1], **weights, rope=tables[0], rope2=tables[1]), 1), want)
    assert all(torch.equal(x, copy) for x, copy in zip((q, k, *rope), kept))


@needs_interpreter
@pytest.mark.parametrize("normed", [(), (0, 1), (1,)], ids=["rope", "normed", "k normed"])
def test_in_triton(normed):
    """There, and where no library is, the rotation is a pass of ``qk_norm_rope``; so it is where the log-sum-exp is asked for."""
    q, k, v = qkv(2, 33, 33, 2, 32, torch.bfloat16)
    rope, pair = angles(33, 32), [torch.rand(32).bfloat16() + 0.5 if i in normed else None for i in range(2)]
    q2, k2, v2 = qkv(2, 5, 5, 2, 32, torch.bfloat16)
    weights = dict(q_weight=pair[0], k_weight=pair[1])
    with in_triton("attention"), in_triton("qk_norm_rope"):
        got = ops.attention(q, k, v, **weights, rope=rope)
    with in_triton("joint_attention"), in_triton("qk_norm_rope"):
        joint = ops.joint_attention(q2, k2, v2, q, k, v, q2_weight=pair[0], k2_weight=pair[1], rope2=rope)[1]
    wide, plain = ([prepared(x, weight, rope, dtype=kind) for x, weight in zip((q, k), pair)] for kind in (torch.float64, q.dtype))
    assert_close(got, stock(*wide, v), stock(*plain, v, dtype=q.dtype))
    both = [torch.cat([x2.double(), x.double()], 1) for x2, x in zip((q2, k2, v2), (*wide, v))]
    assert_close(joint, stock(*both)[:, 5:], stock(*(x.bfloat16() for x in both), dtype=q.dtype)[:, 5:])
    out, lse = ops.attention(q, k, v, **weights, rope=rope, return_lse=True)
    assert_close(out, stock(*wide, v), stock(*plain, v, dtype=q.dtype))
    logits = torch.einsum("bqhd,bkhd->bhqk", *wide) * 32**-0.5
    assert torch.allclose(lse.double(), logits.logsumexp(-1), atol=0.03)


@pytest.mark.parametrize("normed", [False, True])
def test_gradients(normed):
    """Exact in float64 of every argument, the tables' included."""
    q, k, v = (x.requires_grad_() for x in qkv(1, 3, 3, 2, 4, torch.float64))
    q2, k2, v2 = (x.requires_grad_() for x in qkv(1, 2, 2, 2, 4, torch.float64))
    weights = [torch.rand(4, dtype=torch.float64, requires_grad=True) for _ in range(2)] if normed else [None, None]
    rope, rope2 = angles(3, 4), angles(2, 4)
    assert gradcheck(lambda q, k, v, a, b: ops.attention(q, k, v, q_weight=a, k_weight=b, rope=rope), (q, k, v, *weights))

    def joint(q, k, v, q2, k2, v2, a, b):
        return ops.joint_attention(q, k, v, q2, k2, v2, q_weight=a, k2_weight=b, rope=rope, rope2=rope2)

    assert gradcheck(joint, (q, k, v, q2, k2, v2, *weights))
    cos = rope[0].requires_grad_()
    (gradient,) = torch.autograd.grad(ops.attention(q, k, v, rope=(cos, rope[1])).sum(), cos)
    with torch.no_grad():
        other = cos.clone()
        other[1, 1] += 1e-2
        rise = (ops.attention(q, k, v, rope=(other, rope[1])) - ops.attention(q, k, v, rope=(cos, rope[1]))).sum() / (other - cos)[1, 1]
    assert abs(gradient[1, 1] - rise) <= 1e-2 * gradient.abs().max()


def test_fake_mismatch():
    """fake-mismatch: opcheck with tables; one graph without a break; under autocast the tables stay float32."""
    q, k, v = qkv(2, 5, 5, 2, 8)
    cos, sin = angles(5, 8)
    torch.library.opcheck(torch.ops.fusewire.attention.default, (q.requires_grad_(), k, v, None, torch.rand(8), None, False, None, 1e-6, None, None, cos, sin))
    torch.library.opcheck(torch.ops.fusewire.joint_attention.default,
                          (q, k, v, k, k, v, None, torch.rand(8), None, None, 0.5, 1e-6, None, None, cos, sin))
    q = q.detach()
    compiled = torch.compile(lambda q, k, v: ops.attention(q, k, v, rope=(cos, sin)) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), ops.attention(q, k, v, rope=(cos, sin)) + 1)
    with torch.autocast("cpu", torch.bfloat16):
        under = ops.attention(q, k, v, rope=(cos, sin))
    assert_exact(under, ops.attention(*(x.bfloat16() for x in (q, k, v)), rope=(cos, sin)))


def test_what_would_serve():
    """The GPU's rows say why they do not take tables; the op that is asked about is attention."""
    q, k, v = qkv(1, 5, 5, 2, 8)
    found = {choice.backend: choice for choice in choices(ops.attention, q, k, v, rope=angles(5, 8))}
    assert found["cpu"].runs is CPU.loaded and "qk_norm_rope" in found["cuda"].reason and "qk_norm_rope" in found["triton"].reason
    found = {choice.backend: choice for choice in choices(ops.joint_attention, q, k, v, q, k, v, rope2=angles(5, 8))}
    assert found["cpu"].runs is CPU.loaded and "qk_norm_rope" in found["cuda"].reason and "qk_norm_rope" in found["triton"].reason


@pytest.mark.parametrize("error, words, arguments", [
    (TypeError, "rope is a list", dict(rope=[1])), (TypeError, "rope is a Tensor", dict(rope=torch.ones(4, 4))),
    (TypeError, "rope's sin has dtype", dict(rope=(torch.ones(4, 4), torch.ones(4, 4).double()))),
    (ValueError, "rope's cos has shape", dict(rope=angles(5, 8))), (ValueError, "rope's cos has shape", dict(rope=angles(4, 10))),
    (ValueError, "rope's sin is on meta", dict(rope=(torch.ones(4, 4), torch.ones(4, 4, device="meta")))),
    (ValueError, "rope is given for q of shape", dict(k=torch.zeros(2, 6, 3, 8), v=torch.zeros(2, 6, 3, 8), rope=angles(4, 8))),
])
def test_bad_input(error, words, arguments):
    x = torch.zeros(2, 4, 3, 8)
    with pytest.raises(error, match=words):
        ops.attention(**{**dict(q=x, k=x, v=x), **arguments})
    other = arguments.pop("rope")
    with pytest.raises(error, match=words.replace("rope", "rope2", 1)):
        ops.joint_attention(x, x, x, **{f"{name}2": value for name, value in {**dict(q=x, k=x, v=x), **arguments}.items()}, rope2=other)


@pytest.mark.parametrize("dtype, weight_dtype", [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.float64, torch.bfloat16),
                                                 (torch.float16, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("given", ("alone", "log-sum-exp", "gradient", "rope by sample", "joint"))
def test_a_weight_of_fewer_digits(given, dtype, weight_dtype):
    """autocast: q and k keep the dtype that they have, also where the norm is a pass of its own."""
    q, k, v = qkv(2, 33, 33, 2, 64, dtype)
    weight, keywords, gradient = torch.rand(64).to(weight_dtype) + 0.5, {}, given in ("gradient", "joint")
    if given == "rope by sample":
        keywords["rope"] = angles(33, 64, (2,))
    want, plain = (stock(prepared(q, weight, keywords.get("rope"), dtype=wide), prepared(k, weight, keywords.get("rope"), dtype=wide), v.to(wide))
                   for wide in (torch.float64, dtype))
    v = v.requires_grad_(gradient)
    if given == "joint":
        got, _ = ops.joint_attention(q, k, v, q[:, :0], k[:, :0], v[:, :0], q_weight=weight, k_weight=weight)
    else:
        got = ops.attention(q, k, v, q_weight=weight, k_weight=weight, return_lse=given == "log-sum-exp", **keywords)
        got = got[0] if given == "log-sum-exp" else got
    if CPU.loaded and dtype is not torch.float64:
        assert ops.stats()[dict(joint="joint_attention").get(given, "attention")]["cpu"] or ops.stats()["attention_softmax"]["cpu"]
    if dtype is torch.float16:
        assert_close(got.detach(), want, plain.to(dtype))
    else:  # what bfloat16 would lose is a thousand times as much
        assert_within(got.detach(), want, 8, plain=plain)


def test_tables_whose_batch_is_a_number():
    """compile: under dynamic shapes the number of samples is a symbol in q and none in the tables."""
    q, cos = torch.randn(2, 16, 2, 8), torch.randn(16, 4)

    def turned_attention(q, cos):
        return ops.attention(q, q, q, rope=(cos[None].expand(2, -1, -1),) * 2)

    got = torch.compile(turned_attention, fullgraph=True, dynamic=True, backend="aot_eager")(q, cos)
    torch.testing.assert_close(got, turned_attention(q, cos))
