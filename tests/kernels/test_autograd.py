"""Who computes a gradient: the op's backward kernel, or the reference, recomputed."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint

from fusewire.kernels.autograd import fused, over_rows


@pytest.fixture
def scaled():
    """(op: x * factor, whose kernel's gradient is off by a sign on purpose, so that it can be told; the calls of that kernel)."""
    calls = []

    def reference(x, factor, exact):
        return x * factor

    def gradients(needed, grads, x, factor, exact):
        calls.append(needed)
        return -grads[0] * factor, None, None

    backward, setup_context = fused(reference, gradients, lambda x, factor, exact: exact)
    with torch.library._scoped_library("fusewire_test_autograd", "DEF") as library:
        library.define("scaled(Tensor x, float factor, bool exact) -> Tensor")
        library.impl("scaled", reference, "CompositeExplicitAutograd")
        torch.library.register_autograd("fusewire_test_autograd::scaled", backward, setup_context=setup_context, lib=library)
        yield torch.ops.fusewire_test_autograd.scaled, calls


def test_the_kernel_computes_plain_gradients(scaled):
    op, calls = scaled
    x = torch.ones(3, requires_grad=True)
    op(x, 2.0, False).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), -2.0)) and calls == [(True, False, False)]


def test_exact_and_create_graph_differentiate_the_reference(scaled):
    op, calls = scaled
    x = torch.ones(3, requires_grad=True)
    op(x, 2.0, True).sum().backward()
    (again,) = torch.autograd.grad((op(x, 3.0, False) ** 2).sum(), x, create_graph=True)
    assert torch.equal(x.grad, torch.full((3,), 2.0)) and torch.equal(again, torch.full((3,), 18.0)) and again.requires_grad
    assert calls == []


@pytest.mark.parametrize("exact, want", ((False, -2.0), (True, 2.0)))
def test_under_activation_checkpointing(scaled, exact, want):
    """Saved tensors may be asked for once: a second request would compute the forward again, and is refused."""
    op, _ = scaled
    x = torch.ones(3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(lambda x: op(x, 2.0, exact), x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), want))


@pytest.mark.parametrize("shape", ((4,), (1, 4), (3, 4), (2, 3, 4), (0, 4)), ids=str)
def test_the_sum_over_rows(shape):
    """One row alone too: the gradient of a vector is a vector, in memory of its own."""
    x = torch.randn(shape)
    got = over_rows(x)
    assert torch.allclose(got, x.reshape(-1, 4).sum(0)) and got.shape == (4,) and got.data_ptr() != x.data_ptr()
