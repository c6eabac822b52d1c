"""The gradients of the adaLN ops in ``close``: their registration, their backends, and how autograd reaches them.

``wanted`` has a bit for each gradient that an op returns, the first in the lowest; one that is not wanted has no elements.
"""

from __future__ import annotations

from fusewire.kernels.adaln import cuda_backward, native, reference, triton_limits
from fusewire.kernels.cuda_rows import row as cuda_row
from fusewire.kernels.dispatch import Backend, Table, always
from fusewire.kernels.library import define
from fusewire.kernels.triton_rows import row as triton_row


def _asked(wanted: int, *of):
    """An empty result for each of ``of``, in its shape where it is there and wanted."""
    like = of[0]
    return tuple(like.new_empty(0 if tensor is None or not wanted >> i & 1 else tensor.shape) for i, tensor in enumerate(of))


def _fake_modulate(grad, x, shift, scale, weight, bias, eps, rms, wanted):
    return _asked(wanted, x, shift, scale, weight, bias)


def _fake_modulate_dual(grad, grad2, x, shift, scale, shift2, scale2, weight, bias, eps, rms, wanted):
    return _asked(wanted, x, shift, scale, shift2, scale2, weight, bias)


def _fake_gate(grad, y, gate, wanted):
    return _asked(wanted, y, gate)


def _fake_gate_modulate(grad, grad2, x, y, gate, y2, gate2, shift, scale, weight, bias, eps, rms, wanted):
    return _asked(wanted, x, y, gate, y2, gate2, shift, scale, weight, bias)


def _table(schema: str, meaning, fake, why_not: str) -> Table:
    """``why_not``: the name of the predicates in native.py, cuda_backward.py and triton_limits.py."""
    op, name = define(schema, fallback=meaning, fake=fake), meaning.__name__
    return Table(name, [Backend("cpu", getattr(native, why_not), op),
                        cuda_row(op, cuda_backward.op, getattr(cuda_backward, why_not), getattr(cuda_backward, name)),
                        triton_row(op, getattr(triton_limits, why_not), f"adaln.{name}"), Backend("reference", always, meaning)])


_AFFINE = "Tensor? weight, Tensor? bias, float eps, bool rms, int wanted"
_modulate = _table(f"adaln_modulate_backward(Tensor grad, Tensor x, Tensor shift, Tensor scale, {_AFFINE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
                   reference.adaln_modulate_backward, _fake_modulate, "why_not_modulate_backward")
_modulate_dual = _table("adaln_modulate_dual_backward(Tensor grad, Tensor grad2, Tensor x, Tensor shift, Tensor scale, Tensor shift2, Tensor scale2, "
                        f"{_AFFINE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
                        reference.adaln_modulate_dual_backward, _fake_modulate_dual, "why_not_modulate_dual_backward")
_gate = _table("gate_residual_backward(Tensor grad, Tensor y, Tensor gate, int wanted) -> (Tensor, Tensor)",
               reference.gate_residual_backward, _fake_gate, "why_not_gate_backward")
_gate_modulate = _table("gate_residual_adaln_backward(Tensor grad, Tensor grad2, Tensor x, Tensor y, Tensor gate, Tensor? y2, Tensor? gate2, Tensor shift, "
                        f"Tensor scale, {_AFFINE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
                        reference.gate_residual_adaln_backward, _fake_gate_modulate, "why_not_gate_modulate_backward")


def _bits(needed) -> int:
    return sum(1 << i for i, asked in enumerate(needed) if asked)


def _given(grad, like):
    """An output that was not used has a gradient of zeros."""
    return like.new_zeros(()).expand(like.shape) if grad is None else grad


def _wanted(needed, found):
    """The gradients that were asked for, None for the others and for the op's remaining arguments."""
    return (*(gradient if asked else None for asked, gradient in zip(needed, found)), *[None] * (len(needed) - len(found)))


def of_modulate(needed, grads, x, shift, scale, weight, bias, eps, rms, exact):
    return _wanted(needed, _modulate(grads[0], x, shift, scale, weight, bias, eps, rms, _bits(needed[:5])))


def of_modulate_dual(needed, grads, x, shift, scale, shift2, scale2, weight, bias, eps, rms, exact):
    grad, grad2 = (_given(grad, x) for grad in grads)
    return _wanted(needed, _modulate_dual(grad, grad2, x, shift, scale, shift2, scale2, weight, bias, eps, rms, _bits(needed[:7])))


def of_gate(needed, grads, x, y, gate, exact):
    found = _gate(grads[0], y, gate, _bits(needed[1:3])) if needed[1] or needed[2] else (None, None)
    return _wanted(needed, (grads[0], *found))


def of_gate_modulate(needed, grads, x, y, gate, y2, gate2, shift, scale, weight, bias, eps, rms, exact):
    grad, grad2 = (_given(grad, x) for grad in grads)
    return _wanted(needed, _gate_modulate(grad, grad2, x, y, gate, y2, gate2, shift, scale, weight, bias, eps, rms, _bits(needed[:9])))


def recomputed(*args) -> bool:
    """exact: the gradients are stock's; so are those of arguments that differ in dtype."""
    dtype = args[0].dtype
    return args[-1] or any(hasattr(value, "dtype") and value.dtype is not dtype for value in args)
