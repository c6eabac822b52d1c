"""Forward-mode derivatives of fused ops: those of plain PyTorch, by torch.func and by dual numbers, with and without grad mode; none is dropped."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusewire import ops
from fusewire.models.convolution import convolution

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


def both_ways(function, x, tangent, grad_mode: bool) -> list[torch.Tensor]:
    """The tangents by torch.func and by dual numbers."""
    with torch.set_grad_enabled(grad_mode):
        found = torch.func.jvp(function, (x,), (tangent,))[1]
        with forward.dual_level():
            return [found, forward.unpack_dual(function(forward.make_dual(x, tangent))).tangent]


HALVES = {"linear": (lambda x: ops.linear(x, WIDE.bfloat16(), numerics="close"), lambda x: F.linear(x, WIDE.bfloat16().to(x))),
          "linear gelu": (lambda x: ops.linear(x, WIDE.bfloat16(), activation="gelu_tanh", numerics="close"),
                          lambda x: F.gelu(F.linear(x, WIDE.bfloat16().to(x)), approximate="tanh")),
          "geglu": (lambda x: ops.linear(x, WIDE.bfloat16(), activation="geglu", numerics="close"),
                    lambda x: (lambda h, g: h * F.gelu(g))(*F.linear(x, WIDE.bfloat16().to(x)).chunk(2, -1)))}


@pytest.mark.parametrize("grad_mode", (True, False))
@pytest.mark.parametrize("ours, plain", HALVES.values(), ids=HALVES)
def test_tangents_in_bfloat16(ours, plain, grad_mode, values):
    """grad-dropped: oneDNN's product, which is called past the registered op where nothing is recorded, has no such derivative."""
    x, tangent = (value.bfloat16() for value in values)
    want = torch.func.jvp(plain, (x.double(),), (tangent.double(),))[1]
    for got in both_ways(ours, x, tangent, grad_mode):
        assert (got.double() - want).norm() <= 0.02 * want.norm()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("channels, size", ((64, 16), (512, 4)), ids=str)
def test_convolutions(channels, size, dtype):
    """grad-dropped: the ways of ``close`` to convolve have no derivatives of their own, and leave to PyTorch what a transform differentiates."""
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1).to(dtype).requires_grad_(False)
    x, tangent = torch.randn(2, 1, channels, size, size).to(dtype)
    want = F.conv2d(tangent.double(), layer.weight.double(), padding=1)
    for grad_mode in (True, False):
        for got in both_ways(lambda x: convolution(layer, x), x, tangent, grad_mode):
            assert (got.double() - want).norm() <= 0.02 * want.norm()
    batch = torch.randn(3, 1, channels, size, size).to(dtype).requires_grad_()
    wide = batch.detach().double().requires_grad_()
    found = [torch.autograd.grad(torch.vmap(f)(leaf).sin().sum(), leaf)[0].double() for f, leaf in
             ((lambda x: convolution(layer, x), batch), (lambda x: F.conv2d(x, layer.weight.double(), layer.bias.double(), padding=1), wide))]
    assert (found[0] - found[1]).norm() <= 0.02 * found[1].norm()


@pytest.mark.parametrize("norm", ("rms", "torch_rms"))
@pytest.mark.parametrize("turned", (False, True), ids=("plain", "turned"))
@pytest.mark.parametrize("numerics", ("exact", "close"))
@pytest.mark.parametrize("grad_mode", (True, False))
def test_what_is_written_into_buffers(grad_mode, numerics, turned, norm):
    """grad-dropped: outputs of ``qk_norm_into`` carry the tangents that ``qk_norm_rope`` has, in slices of a joint buffer too."""
    q, k, tq, tk = torch.randn(4, 1, 6, 2, 16)
    weight, rope = torch.rand(16) + 0.5, (torch.randn(6, 8), torch.randn(6, 8)) if turned else None
    with torch.set_grad_enabled(grad_mode), forward.dual_level():
        given = forward.make_dual(q, tq), forward.make_dual(k, tk), weight, weight
        joint = torch.zeros(2, 1, 9, 2, 16)
        ops.qk_norm_into(*given, joint[0, :, 3:], joint[1, :, :6], rope=rope, norm=norm, numerics=numerics)
        want = ops.qk_norm_rope(*given, rope=rope, norm=norm, numerics=numerics)
        for part, other in zip((joint[0, :, 3:], joint[1, :, :6]), want, strict=True):
            value, tangent = forward.unpack_dual(part)
            assert torch.equal(value, forward.unpack_dual(other).primal) and torch.equal(tangent, forward.unpack_dual(other).tangent)


BACKWARD = {"gate_residual": lambda x: ops.gate_residual(x, x, ROW, numerics="close"), "rms_norm": lambda x: ops.rms_norm(x, numerics="close"),
            "layer_norm": lambda x: ops.layer_norm(x, numerics="close"), "quick_gelu": lambda x: ops.quick_gelu(x, numerics="close"),
            "adaln_modulate": lambda x: ops.adaln_modulate(x, ROW, ROW, numerics="close"),
            "qk_norm_rope": lambda x: ops.qk_norm_rope(*[x.unflatten(-1, (4, 8))] * 2, numerics="close")[0],
            "linear": lambda x: ops.linear(x, WIDE, activation="gelu", numerics="close"),
            "global_response_norm": lambda x: ops.global_response_norm(x.unflatten(1, (3, 5)), WEIGHT, WEIGHT, numerics="close"),
            "attention": lambda x: ops.attention(*chunked_heads(x))}


@pytest.mark.parametrize("ours", BACKWARD.values(), ids=BACKWARD)
def test_forward_over_reverse(ours, values):
    """grad-dropped: a gradient of a dual number has a tangent. It is linear, so that its tangent along t is the gradient for t; or the error is PyTorch's."""
    x = values[0].requires_grad_()
    y = ours(x)
    grad, tangent = torch.randn(2, *y.shape)
    want = torch.autograd.grad(y, x, tangent, retain_graph=True)[0]
    with forward.dual_level():
        try:
            got = forward.unpack_dual(torch.autograd.grad(y, x, forward.make_dual(grad, tangent))[0]).tangent
        except (NotImplementedError, RuntimeError) as error:
            assert "forward AD" in str(error) and ours is BACKWARD["attention"], error
        else:
            near(got, want.double())
