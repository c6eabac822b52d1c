"""The adaLN Triton kernel in the interpreter: indexing, masks, layouts and the rounding contract. (Races and speed: tests/gpu.)"""

import pytest
import torch

from fusewire import ops
from fusewire.kernels.adaln import reference
from tests.kernels.interpreted import DTYPES, in_triton, needs_interpreter, on_reference, unchanged
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_unbiased

pytestmark = needs_interpreter
# Channels: one; a tail; no multiple of 16; whole vectors
VALUES = [(1, "layer", False), (63, "layer", True), (72, "rms", True), (128, "layer", False)]


def inputs(channels, dtype, tokens=5, batch=2):
    """x, y, y2 and eight modulations: the chunks of one projection [B, C], [B, 1, C], and one for each token."""
    x, y, y2 = (torch.randn(batch, tokens, channels).to(dtype) for _ in range(3))
    chunks = list(torch.randn(batch, 5 * channels).to(dtype).chunk(5, -1))
    return x, y, y2, [*chunks, torch.randn(batch, 1, channels).to(dtype), *torch.randn(batch, tokens, 2 * channels).to(dtype).chunk(2, -1)]


def all_ops(x, y, y2, m, numerics, norm="layer", weight=None, bias=None):
    """Every output of every op of the room, by name."""
    affine = dict(norm=norm, weight=weight, bias=bias, numerics=numerics)
    residual, modulated = ops.gate_residual_adaln(x, y, m[0], m[1], m[5], y2=y2, gate2=m[6], **affine)
    dual = ops.adaln_modulate_dual(x, *m[:4], **affine)
    return {"modulate": ops.adaln_modulate(x, m[6], m[7], **affine), "dual 1": dual[0], "dual 2": dual[1],
            "gate": ops.gate_residual(x, y, m[4], numerics=numerics), "residual": residual, "gated modulate": modulated,
            "one gate": ops.gate_residual_adaln(x, y, m[5], m[0], m[2], **affine)[1]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, norm, affine", VALUES)
def test_values(dtype, channels, norm, affine):
    x, y, y2, m = inputs(channels, dtype)
    weight, bias = (torch.randn(2, channels).to(dtype).unbind() if affine else (None, None))
    check = unchanged(x, y, y2, *m)
    with in_triton("gate_residual_adaln", 4):
        exact, close = (all_ops(x, y, y2, m, numerics, norm, weight, bias) for numerics in ("exact", "close"))
    check()
    plain = on_reference(lambda: all_ops(x, y, y2, m, "exact", norm, weight, bias))
    wide = [None if t is None else t.double() for t in (x, y, y2, *m, weight, bias)]
    want = on_reference(lambda: all_ops(*wide[:3], wide[3:11], "close", norm, *wide[11:]))
    for name in plain:
        assert_exact(exact[name], plain[name], name)
        assert_close(close[name], want[name], plain[name], name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(layout):
    x, y, y2, m = inputs(64, torch.bfloat16)
    with in_triton("gate_residual_adaln", 4):
        plain = all_ops(x, y, y2, m, "close")
        strided = all_ops(layout(x), layout(y), layout(y2), [layout(t) for t in m], "close")
    for name in plain:
        assert_exact(strided[name], plain[name], name)
        assert strided[name].is_contiguous()


def test_mixed_dtypes():
    x, y, y2, m = inputs(48, torch.bfloat16)
    m = [t.float() if i % 2 else t for i, t in enumerate(m)]
    with in_triton("gate_residual_adaln", 4):
        got, close = all_ops(x, y.half(), y2, m, "exact"), all_ops(x, y.half(), y2, m, "close")
    for name, want in on_reference(lambda: all_ops(x, y.half(), y2, m, "exact")).items():
        assert_exact(got[name], want, name)
        assert close[name].dtype is want.dtype


@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_batch_coupling(numerics):
    x, y, y2, m = inputs(40, torch.float32, batch=8)
    with in_triton("gate_residual_adaln", 4):
        together = all_ops(x, y, y2, m, numerics)
        alone = all_ops(x[5:6], y[5:6], y2[5:6], [t[5:6] for t in m], numerics)
    for name in together:
        assert_exact(together[name][5:6], alone[name], name)


def test_cancellation():
    """Mean 100, deviation 0.01: a one-pass variance would be off by an order of magnitude."""
    x = 100 + 0.01 * torch.randn(1, 4, 1536)
    zero = torch.zeros(1, 1536)
    with in_triton("adaln_modulate"):
        got = ops.adaln_modulate(x, zero, zero, numerics="close")
    want = reference.adaln_modulate(x.double(), zero.double(), zero.double(), None, None, 1e-6, False, False)
    plain = torch.nn.functional.layer_norm(x, (1536,), eps=1e-6)
    assert_close(got, want, plain)


def test_fp16_overflow():
    x = torch.full((1, 2, 512), 1000.0, dtype=torch.float16)
    x[..., ::2] *= -1
    zero = torch.zeros(1, 512, dtype=torch.float16)
    with in_triton("adaln_modulate", 2):
        for norm in ("layer", "rms"):
            assert (ops.adaln_modulate(x, zero, zero, norm=norm, numerics="close").abs() == 1).all()


def test_eps():
    x = 1e-4 * torch.randn(1, 3, 64)
    zero = torch.zeros(1, 64)
    for eps in (1e-5, 1e-6):
        with in_triton("adaln_modulate"):
            got = ops.adaln_modulate(x, zero, zero, eps=eps, numerics="close")
        want = torch.nn.functional.layer_norm(x.double(), (64,), eps=eps)
        assert_close(got, want, torch.nn.functional.layer_norm(x, (64,), eps=eps))


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
def test_empty(shape):
    x = torch.randn(shape)
    m = [torch.randn(shape[0], shape[2]) for _ in range(8)]
    with in_triton("gate_residual_adaln", 2):
        for name, value in all_ops(x, x, x, m, "close").items():
            assert value.shape == shape, name


def test_biased_cast():
    """The mean signed error of the bfloat16 results is near zero: rounded, not truncated."""
    x = torch.randn(1, 64, 4096)
    with in_triton("gate_residual"):
        got = ops.gate_residual(x.bfloat16(), x.bfloat16(), torch.full((1, 4096), 0.3).bfloat16(), numerics="close")
    exact = x.bfloat16().double() * (1 + torch.tensor(0.3).bfloat16().double())
    assert_unbiased(got, exact)


def test_gradients():
    """Where a gradient is wanted the registered op runs, and its backward is the reference's."""
    from fusewire.kernels.dispatch import forced

    x, y, y2, m = inputs(24, torch.float32)
    grads = {}
    for backend in ("triton", "reference"):
        leaves = [t.detach().clone().requires_grad_() for t in (x, y, y2, *m)]
        with forced(backend):
            out = all_ops(*leaves[:3], leaves[3:], "exact")
            torch.stack([value.square().sum() for value in out.values()]).sum().backward()
        grads[backend] = [leaf.grad for leaf in leaves]
    for got, want in zip(*grads.values()):
        assert_exact(got, want)
