"""A linear layer's gradients in ``close``: the ops that compute them, and how autograd reaches them.

Where autograd records a call with an activation, ``linear_activated`` runs in the place of ``linear``: it also returns the product, without which the
slope of the activation would need it done again. Gate and residual are then ``gate_residual``, which has gradients of its own.
"""

from __future__ import annotations

import torch.nn.functional as F

from fusewire.kernels.autograd import fused, over_rows
from fusewire.kernels.dispatch import Backend, Table, always
from fusewire.kernels.library import define
from fusewire.kernels.linear import native, reference, triton_limits
from fusewire.kernels.triton_rows import row as triton_row

_bias_activation_backward_op = define(
    "bias_activation_backward(Tensor grad, Tensor y, Tensor? bias, str activation, bool of_bias) -> (Tensor, Tensor)",
    fallback=reference.bias_activation_backward,
    fake=lambda grad, y, bias, activation, of_bias: (y.new_empty(y.shape), y.new_empty(y.shape[-1] if of_bias and bias is not None else 0)))
_bias_activation_backward = Table("bias_activation_backward", [
    Backend("cpu", native.why_not_bias_activation_backward, _bias_activation_backward_op),
    triton_row(_bias_activation_backward_op, triton_limits.why_not_bias_activation_backward, "linear.bias_activation_backward"),
    Backend("reference", always, reference.bias_activation_backward),
])


def _of_bias_activation(needed, grads, y, bias, activation):
    dy, dbias = _bias_activation_backward(grads[0], y, bias, activation, needed[1])
    return dy, dbias if needed[1] else None, None


# Calls that autograd records come by way of `activated`; a vmap that is differentiated from without does not show that it is.
_backward, _setup = fused(reference.bias_activation, _of_bias_activation, lambda *args: False)
_bias_activation_op = define("bias_activation(Tensor y, Tensor? bias, str activation) -> Tensor", fallback=reference.bias_activation,
                             fake=lambda y, bias, activation: y.new_empty(y.shape), backward=_backward, setup_context=_setup)
bias_activation = Table("bias_activation", [
    Backend("cpu", native.why_not_bias_activation, _bias_activation_op),
    triton_row(_bias_activation_op, triton_limits.why_not_bias_activation, "linear.bias_activation"),
    Backend("reference", always, reference.bias_activation),
])


def of_linear(needed, grads, x, weight, bias, activation, gate, residual, exact):
    """Without an epilogue: ``recomputed`` holds for every other call."""
    dx, dweight = native.products_backward(grads[0], x, weight, needed[0], needed[1])
    return dx, dweight, over_rows(grads[0]) if needed[2] else None, None, None, None, None


def recomputed(x, weight, bias, activation, gate, residual, exact) -> bool:
    """Every call with an epilogue. (Without one no row takes an exact call, or one of dtypes that differ.)"""
    return activation != "none" or residual is not None


def _activated(x, weight, bias, activation):
    y = native.product(x, weight) if x.is_cpu else F.linear(x, weight)
    return bias_activation(y, bias, activation), y


def _fake_activated(x, weight, bias, activation):
    return tuple(x.new_empty((*x.shape[:-1], weight.shape[0])) for _ in range(2))


def _of_activated(needed, grads, x, weight, bias, activation, y):
    dy, dbias = _bias_activation_backward(grads[0], y, bias, activation, needed[2])
    return *native.products_backward(dy, x, weight, needed[0], needed[1]), dbias if needed[2] else None, None


_backward, _setup = fused(reference.linear_activated, _of_activated, lambda *args: False, kept=slice(1, None))
activated = define("linear_activated(Tensor x, Tensor weight, Tensor? bias, str activation) -> (Tensor, Tensor)",
                   fallback=_activated, fake=_fake_activated, backward=_backward, setup_context=_setup, meaning=reference.linear_activated)
