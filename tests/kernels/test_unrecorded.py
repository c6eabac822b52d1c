"""Ops whose autograd formula is passed where there is nothing to record (``dispatch.unrecorded``): everybody else who sees calls of ops still sees them."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusewire import ops
from fusewire.kernels.library import CPU

pytestmark = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
FORMULAS = "autograd_impl", "_moving_versions"  # of torch.library.register_autograd, and of ops that change arguments


@pytest.fixture
def tokens():
    return torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 8)


def formulas(call) -> list[str]:
    """Which of them ``call`` runs."""
    seen = []
    sys.setprofile(lambda frame, event, arg: seen.append(frame.f_code.co_name) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [name for name in seen if name in FORMULAS]


def test_formulas(tokens):
    """Passed under no_grad, in inference mode and where nothing learns; reached where something does."""
    x, y, gate = tokens

    def call():
        return ops.gate_residual(x, y, gate, numerics="close")

    assert formulas(call) == []
    with torch.no_grad():
        assert formulas(call) == []
        y.requires_grad_()
        assert formulas(call) == [] and not call().requires_grad
    assert formulas(call) == ["autograd_impl"]
    out = call()
    out.sum().backward()
    torch.testing.assert_close(y.grad, gate[:, None].expand(y.shape))
    with torch.inference_mode():
        assert formulas(call) == [] and call().is_inference()


def test_versions():
    """An op that changes arguments moves their version counters once, whoever calls."""
    q, k, out, k_out = (torch.randn(1, 4, 2, 8) for _ in range(4))
    weight = torch.rand(8)

    def call(out=out):
        ops.qk_norm_into(q, k, weight, weight, out, k_out)

    for recording in (False, True):
        with torch.set_grad_enabled(recording):
            before, places = out._version, (k_out._version, q._version)
            assert formulas(call) == []
            assert out._version == before + 1 and (k_out._version, q._version) == (places[0] + 1, places[1])
    learns = torch.randn(1, 4, 2, 8, requires_grad=True)
    kept = (learns.clone() * 2).pow(2)  # the power's gradient needs what it was made of
    made = learns.clone()
    square = made.pow(2)
    with torch.no_grad():
        call(made)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()
    kept.sum().backward()
    with torch.inference_mode():
        call(torch.empty(1, 4, 2, 8))


def test_modes_and_subclasses(tokens):
    """A dispatch mode sees the op, and so does a tensor that wraps another."""
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*(arg.inner if isinstance(arg, Wrapper) else arg for arg in args), **(kwargs or {}))

    with torch.no_grad():
        want = ops.gate_residual(*tokens)
        with Mode():
            got = ops.gate_residual(*tokens)
        assert torch.equal(got, want)
        assert seen == ["fusewire.gate_residual.default"]
        assert torch.equal(ops.gate_residual(Wrapper(tokens[0]), *tokens[1:]), want)
        assert seen == ["fusewire.gate_residual.default"] * 2


@pytest.mark.parametrize("recording", (True, False))
def test_transforms(tokens, recording):
    """torch.func's gradients are their own: inside each other, and whether or not autograd records around them."""
    x, y, gate = tokens

    def loss(y):
        return ops.gate_residual(x, y, gate, numerics="close").square().sum()

    def by_sample(y):
        return torch.vmap(lambda x, y, gate: ops.gate_residual(x[None], y[None], gate[None], numerics="close").square().sum())(x, y, gate).sum()

    want = 2 * (x + gate[:, None] * y) * gate[:, None]
    with torch.set_grad_enabled(recording):
        torch.testing.assert_close(torch.func.grad(loss)(y), want)
        torch.testing.assert_close(torch.func.grad(by_sample)(y), want)
        per_sample = torch.vmap(torch.func.grad(lambda y, x, gate: ops.gate_residual(x[None], y[None], gate[None], numerics="close").square().sum()))(y, x, gate)
        torch.testing.assert_close(per_sample, want)
