"""The Triton backward of QK norm and its rotation in the interpreter: values against float64, sums over rows, masks, layouts."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from fusewire import ops
from fusewire.kernels import dispatch
from fusewire.kernels.qk_norm_rope import reference, triton_backward, triton_limits
from tests.kernels.interpreted import DTYPES, needs_interpreter, unchanged
from tests.kernels.qk_norm_rope.cases import NAMES, check, gradients, inputs, plain, wide
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_unbiased, assert_within

pytestmark = needs_interpreter


def backward(v: dict, names=NAMES, **options) -> dict[str, torch.Tensor]:
    """The gradients, which Triton must have computed."""
    counts = ops.stats()["qk_norm_rope_backward"]
    found = gradients(v, "triton", names, **options)
    after = ops.stats()["qk_norm_rope_backward"]
    assert (after["triton"], after["reference"]) == (counts["triton"] + 1, counts["reference"])
    return found


@pytest.mark.parametrize("rotated", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((2, 5, 3, 8), (1, 11, 3, 40), (2, 9, 4, 64), (1, 5, 2, 72), (1, 7, 3, 128), (1, 2, 3, 1024)), ids=str)
def test_values(shape, dtype, rotated):
    """head-dim, tail: rows that fill no tile and more than one, heads below, at and beyond whole vectors, up to the longest."""
    v = inputs(*shape, dtype, rotated, k_heads=2)
    check_unchanged = unchanged(*(t for name, t in v.items() if name != "rope"))
    check(backward, v)
    check_unchanged()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", (1, 63))
def test_odd_heads(dim, dtype):
    """tail: an odd number of channels, which nothing can turn; k with tokens of its own."""
    v = inputs(2, 6, 3, dim, dtype, k_tokens=4)
    if dim == 1:  # dx is what rounding leaves of a difference of equals: the weights' gradients alone
        got, want = backward(v), plain(wide(v))
        for name in ("q_weight", "k_weight"):
            assert_within(got[name], want[name], 4, name)
    else:
        check(backward, v)


@pytest.mark.parametrize("norm", ("rms", "torch_rms"))
@pytest.mark.parametrize("weights", ((), ("q_weight",), ("k_weight",)), ids=str)
def test_without_weights(weights, norm):
    v = inputs(2, 5, 3, 24, rotated=True)
    v |= {name: None for name in ("q_weight", "k_weight") if name not in weights}
    these = [None if v[name] is None else v[name].double().requires_grad_() for name in NAMES]
    outputs = reference.qk_norm_rope(*these, *v["rope"], 1e-6, reference.RMS, False)
    want = torch.autograd.grad(outputs, [t for t in these if t is not None], [v["q_grad"].double(), v["k_grad"].double()])
    for (name, got), theirs in zip(backward(v, norm=norm).items(), want, strict=True):
        assert_within(got, theirs, 8, name)


@pytest.mark.parametrize("form", ("partial", "by sample", "partial by sample", "complex"))
def test_forms(form):
    """Tables for a part of the head, for each sample, and complex ones are tables of the same kernel."""
    v = inputs(2, 5, 3, 24)
    angle = torch.randn(*((2,) if "sample" in form else ()), 5, 7 if "partial" in form else 12)
    v["rope"] = torch.polar(torch.ones_like(angle), angle) if form == "complex" else (angle.cos(), angle.sin())

    def true(q, k, q_weight, k_weight):
        """The first channels turned by each sample's angles, in complex numbers."""
        turn = torch.polar(torch.ones_like(angle.double()), angle.double()).expand(2, -1, -1).unsqueeze(2)
        for x, weight in ((q, q_weight), (k, k_weight)):
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
            width = 2 * angle.shape[-1]
            turned = torch.view_as_complex(y[..., :width].unflatten(-1, (-1, 2)).contiguous()) * turn
            yield torch.cat([torch.view_as_real(turned).flatten(-2), y[..., width:]], -1)

    these = [v[name].double().requires_grad_() for name in NAMES]
    want = torch.autograd.grad(list(true(*these)), these, [v["q_grad"].double(), v["k_grad"].double()])
    for (name, got), theirs in zip(backward(v).items(), want, strict=True):
        assert_within(got, theirs, 16, name)


def test_rotation_alone():
    """Without a norm the gradient is turned back by the forward's kernel."""
    v = inputs(2, 5, 3, 16, torch.bfloat16, rotated=True)
    q, k = v["q"].requires_grad_(), v["k"].requires_grad_()
    outputs = ops.qk_norm_rope(q, k, rope=v["rope"], norm="none", numerics="close")
    counts = ops.stats()["qk_norm_rope"]["triton"]
    with dispatch.forced("triton"):
        found = torch.autograd.grad(outputs, (q, k), (v["q_grad"], v["k_grad"]))
    assert ops.stats()["qk_norm_rope"]["triton"] == counts + 1
    cos, sin = v["rope"]
    for name, got in zip(("q_grad", "k_grad"), found):
        assert_exact(got, reference.rotate(v[name].float(), cos, -sin).bfloat16(), name)


@pytest.mark.parametrize("parts", (1, 2, 5))
def test_sums_over_many_tiles(monkeypatch, parts):
    """A program that walks over several tiles, the last one cut short, and steps beyond the rows: 33 rows of q are 17 tiles of two, 22 of k are 11."""
    monkeypatch.setattr(triton_backward, "PARTS", parts)
    check(backward, inputs(1, 11, 3, 512, rotated=True, k_heads=2))


def test_more_partial_sums_than_a_tile():
    """70 rows of 1024 channels are as many programs: the second kernel adds up three blocks of their sums."""
    check(backward, inputs(1, 35, 2, 1024, rotated=True))


@pytest.mark.parametrize("dim", (40, 64))
@pytest.mark.parametrize("names", (("q",), ("k",), ("q_weight",), ("k_weight",), ("k", "q_weight")), ids=str)
def test_some_gradients(names, dim):
    """What is not wanted is not computed, and changes nothing in the rest."""
    v = inputs(2, 9, 5, dim, rotated=True)
    want = backward(v)
    for name, got in backward(v, names).items():
        assert_exact(got, want[name], name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dim", (24, 64))
def test_strided_input(dim, layout):
    """strided-input, misaligned, strided-grad: the same values in any layout, gradients and tables included, give the same bits."""
    v = inputs(2, 7, 3, dim, torch.bfloat16, rotated=True)
    for name in ("q", "k", "q_grad", "k_grad"):
        v[name][1] = v[name][0]  # so that an expanded layout exists
    want = backward(v)
    for changed in (("q", "k_grad", "q_weight"), ("k", "q_grad", "k_weight", "rope")):
        laid = {name: tuple(map(layout, v[name])) if name == "rope" else layout(v[name]) for name in changed}
        for name, got in backward({**v, **laid}).items():
            assert_exact(got, want[name], f"{name} where {changed} are {layout.__name__}")
            assert got.is_contiguous()


def test_strided_grad():
    """strided-grad: `.sum()`, whose gradient has stride 0 everywhere."""
    v = inputs(2, 7, 3, 64, rotated=True)
    ones = {"q_grad": torch.ones(()).expand(v["q"].shape), "k_grad": torch.ones(()).expand(v["k"].shape)}
    want = backward({**v, **{name: t.contiguous() for name, t in ones.items()}})
    for name, got in backward({**v, **ones}).items():
        assert_exact(got, want[name], name)


def test_int32_stride():
    """int32-stride: three tokens 2^30 elements apart (memory that is never touched in between), in q, k and their gradients."""
    far = torch.as_strided(torch.empty(2**31 + 64, dtype=torch.bfloat16), (1, 3, 2, 8), (1, 2**30, 8, 1))
    v = inputs(1, 3, 2, 8, torch.bfloat16, True)
    want = backward(v)
    for name in ("q", "k", "q_grad", "k_grad"):
        far.copy_(v[name])
        for other, got in backward({**v, name: far}).items():
            assert_exact(got, want[other], f"{other} where {name} is far apart")


@pytest.mark.parametrize("dim", (40, 64))
def test_batch_coupling(dim):
    """batch-coupling: dq and dk of a sample alone are those among 5."""
    v = inputs(5, 9, 3, dim, torch.float16, True)
    whole, alone = backward(v), backward({k: t[3:4] if k not in ("q_weight", "k_weight", "rope") else t for k, t in v.items()})
    for name in ("q", "k"):
        assert_exact(alone[name], whole[name][3:4], name)


@pytest.mark.parametrize("shape", ((0, 3, 2, 8), (1, 0, 2, 8), (1, 3, 0, 8), (1, 3, 2, 0)), ids=str)
def test_empty(shape):
    """empty: a zero in each dimension; sums over no rows are zero."""
    v = inputs(*shape)
    for name, grad in backward(v).items():
        assert grad.shape == v[name].shape and not grad.any(), name


def test_alias():
    """alias: gradients share no storage with an input, with grad_out or with each other."""
    v = inputs(2, 3, 2, 16)
    found = [*backward(v).values(), *(t for name, t in v.items() if name != "rope")]
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)


@pytest.mark.parametrize("eps", (1e-6, 1e-2))
def test_eps(eps):
    """eps: inside the root; q ~ 1e-4, where it decides the result."""
    v = inputs(2, 9, 5, 40, rotated=True)
    v["q"] *= 1e-4
    got, stock, want = backward(v, eps=eps), plain(v, eps), plain(wide(v), eps)
    assert_close(got["q"], want["q"], stock["q"])
    assert_within(got["q_weight"], want["q_weight"], 8)


def test_rows_that_are_not_there():
    """tail: a tile is cut short, and 1 / sqrt(eps) is infinite in float32: the weights' sums stay finite."""
    v = inputs(1, 3, 1, 64)
    got, want = backward(v, eps=1e-60), plain(wide(v), 1e-60)
    for name in NAMES:
        assert_within(got[name], want[name], 16, name)


def test_fp16_overflow():
    """fp16-overflow: values of +-1000, whose squares do not fit fp16."""
    v = inputs(1, 5, 3, 128, torch.float16, True)
    v["q"] = torch.where(torch.rand(1, 5, 3, 128) > 0.5, 1000.0, -1000.0).half()
    assert all(grad.isfinite().all() for grad in backward(v).values())


def test_biased_cast():
    """biased-cast: the bfloat16 gradients are rounded, not truncated."""
    v = inputs(1, 256, 2, 64, torch.bfloat16, True)
    got, want = backward(v, ("q",))["q"], plain(wide(v))["q"]
    assert_unbiased(got, want)


@pytest.mark.parametrize("rotated", (False, True))
def test_joint_buffer(rotated):
    """strided-grad, silent-off: what qk_norm_into writes into slices of one buffer has the same gradients, by the same kernel."""
    v = inputs(2, 7, 3, 24, rotated=rotated)
    want = backward(v)
    leaves = [v[k].detach().requires_grad_() for k in NAMES]
    joint = torch.zeros(2, 14, 3, 24)
    ops.qk_norm_into(*leaves, joint[:, :7], joint[:, 7:], rope=v["rope"], numerics="close")
    counts = ops.stats()["qk_norm_rope_backward"]["triton"]
    with dispatch.forced("triton"):
        found = torch.autograd.grad(joint, leaves, torch.cat([v["q_grad"], v["k_grad"]], 1))
    assert ops.stats()["qk_norm_rope_backward"]["triton"] == counts + 1
    for name, got in zip(NAMES, found):
        assert_exact(got, want[name], name)


@pytest.mark.parametrize("permuted", (False, True), ids=("contiguous", "permuted"))
@pytest.mark.parametrize("wanted", (15, 10, 5))
def test_fake_mismatch(wanted, permuted):
    """fake-mismatch: opcheck of the Triton row's own op, on contiguous and on permuted-dense inputs; it means what the reference means."""
    v = inputs(2, 3, 2, 8, rotated=True)
    op = torch.ops.fusewire.qk_norm_rope_backward_triton.default
    lay = (lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)) if permuted else torch.Tensor.contiguous
    heads = [lay(v[k]) for k in ("q_grad", "k_grad", "q", "k")]
    for rest in ((v["q_weight"], None, *v["rope"], 1e-6, wanted), (None, v["k_weight"], None, None, 1e-6, wanted)):
        with dispatch.forced("triton"):
            opcheck(op, (*heads, *rest))
        for got, want in zip(op(*heads, *rest), reference.qk_norm_rope_backward(*heads, *rest), strict=True):
            assert got.shape == want.shape and got.stride() == want.stride()
            assert_within(got, want, 8)


def test_limits():
    """silent-off: what the row declines, and why."""
    def reason(q, grad=None, weight=None):
        grad = q if grad is None else grad
        return triton_limits.why_not_backward(grad, q, q, q, weight, None, None, None, 1e-6, 15)

    with dispatch.forced("triton"):
        q = torch.empty(1, 2, 3, 1024)
        assert not reason(q) and not reason(q, weight=q[0, 0, 0])
        assert "1026 dimensions, more than 1024" in reason(torch.empty(1, 2, 3, 1026))
        assert "dtype" in reason(q, grad=q.bfloat16()) and "dtype" in reason(q, weight=q[0, 0, 0].half())
        rows = torch.empty(1).expand(2**15, 2**15, 2, 1)
        assert f"more than {2**30} rows" in reason(rows) and not reason(rows[:, :, :1])
        assert "torch.float64" in reason(q.double())
