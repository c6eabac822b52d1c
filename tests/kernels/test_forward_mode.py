"""Forward-mode derivatives of fused ops: those of plain PyTorch, by torch.func and by dual numbers, with and without grad mode; none is dropped."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusewire import ops

ROW, WIDE, WEIGHT = torch.linspace(-1, 1, 32).repeat(2, 1), torch.linspace(-1, 1, 24 * 32).view(24, 32) / 4, torch.linspace(0.5, 1.5, 32)


def chunked_heads(x):
    return [x.unflatten(-1, (4, 8)) + i for i in range(3)]


CALLS = {
    **{f"linear {name}": (lambda x, name=name: ops.linear(x, WIDE, WIDE[:, 0], activation=name, numerics="close"),
                          lambda x, act=act: act(F.linear(x, WIDE.to(x), WIDE[:, 0].to(x))))
       for name, act in (("gelu", F.gelu), ("silu", F.silu), ("gelu_tanh", lambda y: F.gelu(y, approximate="tanh")))},
    "layer_norm": (lambda x: ops.layer_norm(x, numerics="close"), lambda x: F.layer_norm(x, (32,), eps=1e-6)),
    "rms_norm exact": (lambda x: ops.rms_norm(x, WEIGHT), lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * WEIGHT.to(x)),
    "adaln_modulate": (lambda x: ops.adaln_modulate(x, ROW, ROW, numerics="close"),
                       lambda x: F.layer_norm(x, (32,), eps=1e-6) * (1 + ROW.to(x)[:, None]) + ROW.to(x)[:, None]),
    "gate_residual": (lambda x: ops.gate_residual(x, x * 2, ROW), lambda x: x + ROW.to(x)[:, None] * x * 2),
    "group_norm_silu": (lambda x: ops.group_norm_silu(x.mT.contiguous().unflatten(-1, (3, 5)), 4, numerics="close"),
                        lambda x: F.silu(F.group_norm(x.mT.contiguous().unflatten(-1, (3, 5)), 4))),
    "attention": (lambda x: ops.attention(*chunked_heads(x)),
                  lambda x: F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in chunked_heads(x))).transpose(1, 2)),
}


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.fixture
def values():
    torch.manual_seed(0)
    return torch.randn(2, 15, 32), torch.randn(2, 15, 32)


@pytest.mark.parametrize("grad_mode", (True, False))
@pytest.mark.parametrize("ours, plain", CALLS.values(), ids=CALLS)
def test_tangents(ours, plain, grad_mode, values):
    """grad-dropped"""
    x, tangent = values
    with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(grad_mode):  # the one attention of PyTorch's with such a derivative
        want = torch.func.jvp(plain, (x.double(),), (tangent.double(),))[1]
        assert want.abs().max() > 0.1
        near(torch.func.jvp(ours, (x,), (tangent,))[1], want)
        with forward.dual_level():
            near(forward.unpack_dual(ours(forward.make_dual(x, tangent))).tangent, want)


@pytest.mark.parametrize("ours, plain", CALLS.values(), ids=CALLS)
def test_a_differentiated_vmap(ours, plain, values):
    """grad-dropped: a batched tensor does not say that what it is a batch of requires a gradient."""
    x = values[0][:, None].requires_grad_()
    if "modulate" in str(ours.__code__.co_names) or "gate_residual" in str(ours.__code__.co_names):
        pytest.skip("takes a row for each sample of a batch")
    wide = x.detach().double().requires_grad_()
    want = torch.autograd.grad(torch.vmap(plain)(wide).sin().sum(), wide)[0]
    near(torch.autograd.grad(torch.vmap(ours)(x).sin().sum(), x)[0], want)
    if ours is not CALLS["attention"][0]:
        near(torch.func.grad(lambda x: torch.vmap(ours)(x).sin().sum())(x.detach()), want)
