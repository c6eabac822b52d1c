"""The Triton kernel of the gradients of bias and activation in the interpreter, and the training step around it."""

import pytest
import torch

from fusewire import ops
from fusewire.kernels import dispatch
from fusewire.kernels.linear import reference, triton_backward, triton_limits
from tests.kernels.interpreted import DTYPES, check_registered, needs_interpreter, unchanged
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_within

pytestmark = needs_interpreter
ACTIVATIONS = ("gelu_tanh", "gelu", "silu")
OP = torch.ops.fusewire.bias_activation_backward_triton.default


def inputs(shape, dtype=torch.float32):
    """(grad, y, bias)"""
    return torch.randn(shape).to(dtype), (2 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)


def eager(grad, y, bias, activation):
    """PyTorch's own chain: y + bias rounded, then the activation."""
    leaves = [y.detach().requires_grad_(), bias.detach().requires_grad_()]
    return torch.autograd.grad(reference.ACTIVATIONS[activation](leaves[0] + leaves[1]), leaves, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", ((1, 1), (3, 63), (2, 9, 72), (2, 1, 5, 600), (37, 256)), ids=str)
def test_values(shape, activation, dtype):
    """tail: of rows and of columns; more than a block of columns; more than a tile of rows."""
    given = inputs(shape, dtype)
    check = unchanged(*given)
    got, plain = OP(*given, activation, True), eager(*given, activation)
    want = eager(*(t.double() for t in given), activation)
    check()
    assert_within(got[1], want[1], 8, "bias")
    if got[0].numel() > 100:
        assert_close(got[0], want[0], plain[0])
    else:
        assert_within(got[0], want[0], 4)


@pytest.mark.parametrize("parts", (1, 2, 5))
def test_sums_over_many_tiles(monkeypatch, parts):
    """A program that walks over several tiles, the last one cut short, and steps beyond the rows: 73 rows are 10 tiles of eight."""
    monkeypatch.setattr(triton_backward, "PARTS", parts)
    given = inputs((73, 40))
    for got, want in zip(OP(*given, "gelu_tanh", True), eager(*(t.double() for t in given), "gelu_tanh")):
        assert_within(got, want, 8)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_strided_input(activation, layout):
    """strided-input, strided-grad, misaligned: the same bits for any layout."""
    grad, y, bias = inputs((2, 9, 40), torch.bfloat16)
    grad[1], y[1] = grad[0], y[0]
    want = OP(grad, y, bias, activation, True)
    for laid in ((layout(grad), y, bias), (grad, layout(y), bias), (grad, y, layout(bias))):
        for got, other in zip(OP(*laid, activation, True), want):
            assert_exact(got, other)
            assert got.is_contiguous()


def test_some_gradients():
    """What is not wanted has no elements, and changes nothing in the rest; a layer without a bias has no gradient of one."""
    grad, y, bias = inputs((3, 9, 40))
    want = OP(grad, y, bias, "silu", True)
    dy, none = OP(grad, y, bias, "silu", False)
    assert_exact(dy, want[0])
    assert none.shape == (0,)
    assert_exact(OP(grad, y, None, "silu", True)[0], OP(grad, y, torch.zeros_like(bias), "silu", True)[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_far_out(activation):
    """0 on the left and 1 on the right, also where squares and cubes overflow."""
    y = torch.tensor([[-1e30, -1e10, -200.0, 200.0, 1e10, 1e30]])
    assert torch.equal(OP(torch.ones_like(y), y, None, activation, False)[0].abs(), torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]))


@pytest.mark.parametrize("shape", ((0, 3, 8), (2, 0, 8), (2, 3, 0)), ids=str)
def test_empty(shape):
    """empty: a zero in each dimension; sums over no rows are zero."""
    dy, dbias = OP(*inputs(shape), "gelu", True)
    assert dy.shape == shape and dbias.shape == shape[-1:] and not dbias.any()


def test_batch_coupling():
    """batch-coupling: dy of a sample alone is that among 5."""
    grad, y, bias = inputs((5, 9, 40), torch.float16)
    assert_exact(OP(grad[3:4], y[3:4], bias, "gelu_tanh", True)[0], OP(grad, y, bias, "gelu_tanh", True)[0][3:4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_step(activation, bias, dtype):
    """silent-off: where autograd records, forward and backward are Triton's; every gradient keeps the rule of close."""
    v = {"x": torch.randn(2, 40, 64), "weight": torch.randn(96, 64) / 8, "bias": torch.randn(96) if bias else None}
    v, grad = {name: t if t is None else t.to(dtype) for name, t in v.items()}, torch.randn(2, 40, 96).to(dtype)

    def gradients(v, grad, call):
        these = {name: t if t is None else t.detach().requires_grad_() for name, t in v.items()}
        out = call(*these.values())
        return dict(zip([name for name, t in v.items() if t is not None], torch.autograd.grad(out, [t for t in these.values() if t is not None], grad)))

    def stock(*args):
        return reference.linear(*args, activation, None, None, True)

    counts = ops.stats()
    with dispatch.forced("triton"):
        got = gradients(v, grad, lambda *args: ops.linear(*args, activation=activation, numerics="close"))
    after = ops.stats()
    for name in ("linear", "bias_activation", "bias_activation_backward"):
        assert after[name]["triton"] == counts[name]["triton"] + 1
    plain, want = gradients(v, grad, stock), gradients({name: t if t is None else t.double() for name, t in v.items()}, grad.double(), stock)
    for name in want:
        if want[name].numel() >= 1000:
            assert_close(got[name], want[name], plain[name], name)
        else:
            assert_within(got[name], want[name], 4, name)


@pytest.mark.parametrize("gate_shape", ((2, 80), (2, 1, 80), (2, 9, 80), None), ids=str)
def test_gate_and_residual(gate_shape):
    """silent-off: where autograd records, gate and residual are a pass of their own, whose gradients are Triton's."""
    v = {"x": torch.randn(2, 9, 96), "weight": torch.randn(80, 96) / 8, "bias": torch.randn(80), "residual": torch.randn(2, 9, 80)}
    grad = torch.randn(2, 9, 80)
    if gate_shape:
        v["gate"] = torch.randn(gate_shape)

    def gradients(v, grad, call):
        these = {name: t.detach().requires_grad_() for name, t in v.items()}
        return torch.autograd.grad(call(**these), list(these.values()), grad)

    def stock(x, weight, bias, residual, gate=None):
        return reference.linear(x, weight, bias, "none", gate, residual, True)

    counts = ops.stats()["gate_residual_backward"]["triton"]
    with dispatch.forced("triton"):
        found = gradients(v, grad, lambda **these: ops.linear(**these, numerics="close"))
    assert ops.stats()["gate_residual_backward"]["triton"] == counts + (gate_shape is not None)
    for name, got, want in zip(v, found, gradients({name: t.double() for name, t in v.items()}, grad.double(), stock), strict=True):
        assert_within(got, want, 8, name)


@pytest.mark.parametrize("permuted", (False, True), ids=("contiguous", "permuted"))
def test_fake_mismatch(permuted):
    """fake-mismatch: opcheck of the Triton rows' own ops; they mean what the references mean."""
    lay = (lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)) if permuted else torch.Tensor.contiguous
    grad, y, bias = inputs((2, 3, 8))
    for name, arguments in (("bias_activation", (lay(y), bias, "gelu")), ("bias_activation_backward", (lay(grad), lay(y), bias, "gelu_tanh", True)),
                            ("bias_activation_backward", (lay(grad), lay(y), None, "silu", True))):
        check_registered(name, getattr(reference, name), arguments)


def test_limits():
    """silent-off: what the rows decline, and why; the epilogue of cuBLASLt keeps no product, so training goes to Triton."""
    x, weight, bias = torch.randn(2, 8), torch.randn(4, 8, requires_grad=True), torch.randn(4)
    with dispatch.forced("triton"):
        assert triton_limits.trained(x, weight, bias, "gelu") and not triton_limits.trained(x, weight.detach(), bias, "gelu")
        assert not triton_limits.trained(x, weight, bias, "none") and not triton_limits.trained(x, weight, bias.half(), "gelu")
        y = torch.empty(1).expand(2**15, 2**15, 1)
        assert not triton_limits.why_not_bias_activation_backward(y, y, None, "gelu", True)
        y = torch.empty(1).expand(2**15 + 1, 2**15, 1)
        assert f"more than {2**30} rows" in triton_limits.why_not_bias_activation_backward(y, y, None, "gelu", True)
        assert "torch.float64" in triton_limits.why_not_bias_activation_backward(torch.empty(1, dtype=torch.float64).expand(y.shape), y, None, "gelu", True)
