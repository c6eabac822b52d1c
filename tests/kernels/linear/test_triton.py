"""The linear epilogue's Triton kernel in the interpreter."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fusewire import ops
from fusewire.kernels.linear import reference
from tests.kernels.interpreted import DTYPES, in_triton, needs_interpreter, on_reference, unchanged
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact

pytestmark = needs_interpreter


def layer(dtype, shape=(2, 5, 16), n=72):
    return torch.randn(shape).to(dtype), (torch.randn(n, shape[-1]) / 4).to(dtype), torch.randn(n).to(dtype)


def wide(*tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate_shape", [(2, 72), (2, 1, 72), (2, 5, 72), (72,), None])
def test_gate_residual(dtype, gate_shape):
    x, weight, bias = layer(dtype)
    gate = None if gate_shape is None else torch.randn(gate_shape).to(dtype)
    residual = torch.randn(2, 5, 72).to(dtype)
    check = unchanged(x, weight, bias, gate, residual)
    plain = reference.linear(x, weight, bias, "none", gate, residual, True)
    want = reference.linear(*wide(x, weight, bias), "none", *wide(gate, residual), True)
    with in_triton("linear", 1 if gate is None else 2):
        assert_close(ops.linear(x, weight, bias, gate=gate, residual=residual, numerics="close"), want, plain)
        if gate is not None:
            assert_exact(ops.linear(x, weight, bias, gate=gate, residual=residual), plain)
    check()


@pytest.mark.parametrize("gate_shape", [(2, 1, 5, 72), (2, 3, 1, 72), (3, 5, 1), (2, 1, 1, 1)], ids=str)
def test_gates_of_some_dimensions(gate_shape):
    """The kernel's four sizes: dimensions of different lengths, which a gate keeps from being seen as one."""
    x, weight, bias = layer(torch.float32, (2, 3, 5, 16))
    gate, residual = torch.randn(gate_shape), torch.randn(*x.shape[:-1], 72)
    want = reference.linear(x, weight, bias, "none", gate, residual, True)
    with in_triton("linear"):
        assert_exact(ops.linear(x, weight, bias, gate=gate, residual=residual), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu"])
@pytest.mark.parametrize("shape, n", [((1, 63), 65), ((2, 1, 3, 16), 1100)])  # a tail of everything; more than one block a row
def test_activation(dtype, activation, shape, n):
    x, weight, bias = layer(dtype, shape, n)
    for b in (bias, None):
        plain = reference.linear(x, weight, b, activation, None, None, True)
        want = reference.linear(*wide(x, weight, b), activation, None, None, True)
        with in_triton("linear"):
            assert_close(ops.linear(x, weight, b, activation=activation, numerics="close"), want, plain)


def test_activation_tails():
    """Large arguments: 0 and x, no NaN from an overflowing exponential."""
    x = torch.tensor([[-100.0, -20.0, 0.0, 20.0, 100.0]])
    with in_triton("linear", 2):
        for activation in ("gelu_tanh", "silu"):
            got = ops.linear(x, torch.eye(5), torch.zeros(5), activation=activation, numerics="close")
            assert torch.allclose(got, torch.tensor([[0.0, 0.0, 0.0, 20.0, 100.0]]), atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(layout):
    x, weight, bias = layer(torch.bfloat16)
    gate, residual = torch.randn(2, 1, 72).bfloat16(), torch.randn(2, 5, 72).bfloat16()
    with in_triton("linear", 2):
        plain = ops.linear(x, weight, bias, gate=gate, residual=residual)
        assert_exact(ops.linear(x, weight, bias, gate=layout(gate), residual=layout(residual)), plain)


def test_mixed_dtypes():
    x, weight, bias = layer(torch.bfloat16)
    gate, residual = torch.randn(2, 72), torch.randn(2, 5, 72).half()
    with in_triton("linear"):
        got = ops.linear(x, weight, bias, gate=gate, residual=residual)
    assert_exact(got, on_reference(lambda: ops.linear(x, weight, bias, gate=gate, residual=residual)))
    for others in ((gate, residual), (None, residual), (None, None)):
        with FakeTensorMode() as mode:
            fake = torch.ops.fusewire.linear_triton(*(t if t is None else mode.from_tensor(t) for t in (x, weight, bias)), "none",
                                                    *(t if t is None else mode.from_tensor(t) for t in others), True)
        want = torch.ops.fusewire.linear_triton(x, weight, bias, "none", *others, True)
        assert fake.dtype is want.dtype and fake.shape == want.shape and fake.stride() == want.stride()
