"""What qk_norm_rope and qk_norm_into promise to autograd, torch.compile and the caller."""

from __future__ import annotations

import pytest
import torch

from fusewire import ops
from fusewire.kernels.qk_norm_rope import reference

ROPE_OP, INTO_OP = torch.ops.fusewire.qk_norm_rope.default, torch.ops.fusewire.qk_norm_into.default


def inputs(dtype=torch.float32, dim=8, **kwargs):
    q, k = torch.randn(2, 3, 4, dim, dtype=dtype, **kwargs), torch.randn(2, 3, 2, dim, dtype=dtype, **kwargs)
    weight = torch.randn(dim, dtype=dtype, **kwargs)
    angle = torch.randn(3, dim // 2)
    return q, k, weight, angle.cos(), angle.sin()


@pytest.mark.parametrize("rotated", (False, True))
def test_gradcheck(rotated):
    q, k = (torch.randn(1, 2, count, 4, dtype=torch.float64, requires_grad=True) for count in (2, 1))
    weight, angle = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.randn(2, 2)
    rope = (angle.cos(), angle.sin()) if rotated else None
    function = lambda q, k, w: ops.qk_norm_rope(q, k, w, None, rope=rope, numerics="close")  # noqa: E731
    assert torch.autograd.gradcheck(function, (q, k, weight))
    assert torch.autograd.gradgradcheck(function, (q, k, weight))


@pytest.mark.parametrize("rotated", (False, True))
def test_gradcheck_into(rotated):
    """First and second derivatives through slices of a joint buffer, and of what was in it before."""
    q, k = (torch.randn(1, 2, count, 4, dtype=torch.float64, requires_grad=True) for count in (2, 1))
    weight, angle = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.randn(2, 2)
    before = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    rope = (angle.cos(), angle.sin()) if rotated else None

    def run(q, k, weight, before):
        joint_q, joint_k = before.clone(), before[:, :, :1].clone()
        ops.qk_norm_into(q, k, weight, None, joint_q[:, 1:], joint_k[:, 1:], rope=rope, numerics="close")
        return joint_q, joint_k

    assert torch.autograd.gradcheck(run, (q, k, weight, before))
    assert torch.autograd.gradgradcheck(run, (q, k, weight, before), atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("norm", ("rms", "torch_rms"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_autocast_into(dtype, norm):
    """autocast: as the norm's module, which autocast leaves alone; forward, recorded or not, and backward."""
    q, k, weight, _, _ = inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        want = ops.qk_norm_rope(q, k, weight, norm=norm)
    for recording in (False, True):
        out = [torch.zeros_like(x) for x in (q, k)]
        with torch.autocast("cpu", torch.bfloat16):
            ops.qk_norm_into(q.requires_grad_(recording), k, weight, None, *out, norm=norm)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(out, want, strict=True))
    out[0].sum().backward()
    assert q.grad.dtype is dtype and q.grad.any()


def test_strided_grad():
    q, k, weight, cos, sin = inputs(requires_grad=True)
    wanted = reference.qk_norm_rope(q, k, weight, None, cos, sin, 1e-6, 0, True)
    got = ops.qk_norm_rope(q, k, weight, rope=(cos, sin))
    for grads in ([torch.ones(()).expand(x.shape) for x in got], [torch.randn_like(x.transpose(1, 3)).transpose(1, 3) for x in got]):
        expected = torch.autograd.grad(wanted, (q, k, weight), grads, retain_graph=True)
        for mine, theirs in zip(torch.autograd.grad(got, (q, k, weight), grads, retain_graph=True), expected):
            assert torch.equal(mine, theirs)


def test_gradient_flows_through_into():
    q, k, weight, _, _ = inputs(requires_grad=True)
    joint_q, joint_k = torch.zeros(2, 5, 4, 8), torch.zeros(2, 5, 2, 8)
    ops.qk_norm_into(q, k, weight, None, joint_q[:, 2:], joint_k[:, 2:])
    expected = torch.autograd.grad(sum(x.pow(3).sum() for x in ops.qk_norm_rope(q, k, weight)), (q, k, weight))
    for mine, theirs in zip(torch.autograd.grad(joint_q.pow(3).sum() + joint_k.pow(3).sum(), (q, k, weight)), expected):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("permuted", (False, True))
def test_opcheck(permuted):
    q, k, weight, cos, sin = inputs()
    if permuted:  # dense, but not contiguous
        q, k = (x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2) for x in (q, k))
    torch.library.opcheck(INTO_OP, (q, k, None, weight, torch.empty_like(q), torch.empty_like(k), None, None, 1e-6, 0, False))
    torch.library.opcheck(ROPE_OP, (q.requires_grad_(), k, weight, None, cos, sin, 1e-6, 0, True))


def test_compile_fullgraph():
    def joint(q, k, weight, cos, sin):
        joint_q, joint_k = q.new_zeros(2, 5, 4, 8), k.new_zeros(2, 5, 2, 8)
        ops.qk_norm_into(q, k, weight, None, joint_q[:, 2:], joint_k[:, 2:])
        first, second = ops.qk_norm_rope(q, k, weight, rope=(cos, sin))
        return joint_q * 2, joint_k, first + 1, second

    arguments = inputs()
    for got, want in zip(torch.compile(joint, fullgraph=True, backend="aot_eager")(*arguments), joint(*arguments)):
        assert torch.equal(got, want)


BAD = {
    "q is a list": (TypeError, "q is a list", lambda a: {**a, "q": [1.0]}),
    "q integer": (TypeError, "q has dtype torch.int64", lambda a: {**a, "q": a["q"].long()}),
    "q rank": (ValueError, r"q has shape \[2, 3, 32\]; it should be \[B, T, H, D\]", lambda a: {**a, "q": a["q"].flatten(2)}),
    "k channels": (ValueError, "k has shape", lambda a: {**a, "k": a["k"][..., :4]}),
    "k dtype": (TypeError, "k has dtype", lambda a: {**a, "k": a["k"].bfloat16()}),
    "weight length": (ValueError, r"q_weight has shape \[7\]; it should be \[8\]", lambda a: {**a, "q_weight": torch.ones(7)}),
    "weight, no rope": (TypeError, "q_weight is a list", lambda a: {**a, "q_weight": [1.0] * 8, "rope": None}),
    "weight device": (ValueError, "q_weight is on meta", lambda a: {**a, "q_weight": torch.ones(8, device="meta")}),
    "eps": (ValueError, "eps is 0", lambda a: {**a, "eps": 0}),
    "norm": (ValueError, "norm is 'group'", lambda a: {**a, "norm": "group"}),
    "numerics": (ValueError, "numerics is 'fast'", lambda a: {**a, "numerics": "fast"}),
    "rope not a pair": (TypeError, "rope is a Tensor", lambda a: {**a, "rope": a["rope"][0]}),
    "rope shape": (ValueError, r"rope's sin has shape \[3, 8\]; it should be \[3, 4\]", lambda a: {**a, "rope": (a["rope"][0], torch.ones(3, 8))}),
    "rope dtype": (TypeError, "rope's cos has dtype torch.float64", lambda a: {**a, "rope": (a["rope"][0].double(), a["rope"][1])}),
    "rope tokens": (ValueError, "T should be the same", lambda a: {**a, "k": a["k"][:, :2]}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, message, change = BAD[case]
    q, k, weight, cos, sin = inputs()
    arguments = change({"q": q, "k": k, "q_weight": weight, "rope": (cos, sin)})
    with pytest.raises(error, match=message):
        ops.qk_norm_rope(arguments.pop("q"), arguments.pop("k"), arguments.pop("q_weight"), **arguments)


def test_bad_outputs():
    q, k, weight, _, _ = inputs()
    good = torch.zeros_like(q)
    for error, message, out in ((ValueError, "q_out has shape", good[:1]), (TypeError, "q_out has dtype", good.double()),
                                (ValueError, "share one place", good[:1].expand(q.shape)), (ValueError, "q_out is on meta", good.to("meta"))):
        with pytest.raises(error, match=message):
            ops.qk_norm_into(q, k, weight, None, out, torch.zeros_like(k))
    assert not good.any()
