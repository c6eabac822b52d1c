"""Gated activations: the public ops, their registration, their gradients and their backends."""

from __future__ import annotations

import torch

from fusewire.kernels import checks
from fusewire.kernels.autograd import fused
from fusewire.kernels.dispatch import Backend, Table, always
from fusewire.kernels.gated_mlp import native, reference, triton_limits
from fusewire.kernels.library import define
from fusewire.kernels.rounding import is_exact, promoted
from fusewire.kernels.triton_rows import row as triton_row


def _fake(x, gate, bias, *rest):
    width = x.shape[-1] // 2 if gate is None else x.shape[-1]
    return x.new_empty((*x.shape[:-1], width), dtype=promoted(x.dtype, gate, bias))


def _fake_backward(grad, x, gate, bias, *rest):
    of_bias = x.shape[-1] * (1 if gate is None else 2) if rest[-1] else 0
    return x.new_empty(x.shape), x.new_empty(0 if gate is None else x.shape), x.new_empty(of_bias)


def _fake_quick(x, bias, exact):
    return x.new_empty(x.shape, dtype=promoted(x.dtype, bias))


def _fake_quick_backward(grad, x, bias, of_bias):
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if of_bias and bias is not None else 0)


def _table(op, why_not: str, meaning) -> Table:
    """``why_not``: the name of the predicate, in native.py and in triton_limits.py."""
    name = meaning.__name__
    return Table(name, [Backend("cpu", getattr(native, why_not), op), triton_row(op, getattr(triton_limits, why_not), f"gated_mlp.{name}"),
                        Backend("reference", always, meaning)])


def _backward_table(arguments: str, results: str, meaning, fake) -> Table:
    return _table(define(f"{meaning.__name__}({arguments}) -> {results}", fallback=meaning, fake=fake), "why_not_backward", meaning)


_TENSORS, _THREE = "Tensor grad, Tensor x, Tensor? gate, Tensor? bias", "(Tensor, Tensor, Tensor)"
_geglu_backward = _backward_table(f"{_TENSORS}, bool of_bias", _THREE, reference.geglu_backward, _fake_backward)
_swiglu_backward = _backward_table(f"{_TENSORS}, bool gate_first, bool of_bias", _THREE, reference.swiglu_backward, _fake_backward)
_quick_backward = _backward_table("Tensor grad, Tensor x, Tensor? bias, bool of_bias", "(Tensor, Tensor)", reference.quick_gelu_backward,
                                  _fake_quick_backward)


def _recomputed(x, *rest) -> bool:
    """exact: the gradients are stock's; so are those of arguments that differ in dtype."""
    return rest[-1] or any(isinstance(value, torch.Tensor) and value.dtype is not x.dtype for value in rest)


def _gradients(table: Table):
    def gradients(needed, grads, x, gate, bias, *rest):
        dx, dgate, dbias = table(grads[0], x, gate, bias, *rest[:-1], needed[2])
        return dx, dgate if needed[1] else None, dbias if needed[2] else None, *[None] * len(rest)
    return gradients


def _gradients_quick(needed, grads, x, bias, exact):
    dx, dbias = _quick_backward(grads[0], x, bias, needed[1])
    return dx, dbias if needed[1] else None, None


def _forward_table(arguments: str, meaning, fake, gradients) -> Table:
    backward, setup_context = fused(meaning, gradients, _recomputed)
    op = define(f"{meaning.__name__}({arguments}) -> Tensor", fallback=meaning, fake=fake, backward=backward, setup_context=setup_context)
    return _table(op, "why_not_forward", meaning)


_geglu = _forward_table("Tensor x, Tensor? gate, Tensor? bias, bool exact", reference.geglu, _fake, _gradients(_geglu_backward))
_swiglu = _forward_table("Tensor x, Tensor? gate, Tensor? bias, bool gate_first, bool exact", reference.swiglu, _fake, _gradients(_swiglu_backward))
_quick_gelu = _forward_table("Tensor x, Tensor? bias, bool exact", reference.quick_gelu, _fake_quick, _gradients_quick)


def _check(x, gate, bias) -> None:
    """x [..., 2F], or x and gate [..., F]; bias [2F]."""
    checks.floating("x", x)
    if not x.dim() or (gate is None and x.shape[-1] % 2):
        raise ValueError(f"x has shape {list(x.shape)}; it should be {'[..., 2F], an even last dimension' if gate is None else '[..., F]'}")
    if gate is not None:
        checks.floating("gate", gate)
        if gate.shape != x.shape:
            raise ValueError(f"gate has shape {list(gate.shape)}; it should be {list(x.shape)}, as x")
        checks.same_device("gate", gate, x.device)
    if bias is not None:
        checks.vector("bias", bias, x.shape[-1] * (1 if gate is None else 2), x.device)


def geglu(x, *, gate=None, bias=None, numerics: str = "exact") -> torch.Tensor:
    """``hidden * gelu(gate)`` with the exact (erf) GELU, in one pass.

    Args:
        x: [..., 2F], the hidden half and then the gate half of one projection; or, with ``gate``, the hidden half alone, [..., F]. float32, bfloat16,
            float16 or float64, any strides.
        gate: [..., F], or None where x holds both halves.
        bias: [2F], added to both halves first (that of the projection), or None.
        numerics: ``"exact"`` is eager PyTorch's chain, by PyTorch's own kernels on the CPU; ``"close"`` rounds once at the end.

    Returns: [..., F], contiguous, in the dtype that eager PyTorch gives.
    Raises: TypeError for a dtype, ValueError for a shape, a device or ``numerics`` that is not as stated.
    Source: Shazeer (2020), "GLU Variants Improve Transformer"; diffusers' GEGLU.
    """
    _check(x, gate, bias)
    return _geglu(x, gate, bias, is_exact(numerics))


def swiglu(x, *, gate=None, bias=None, gate_first: bool = False, numerics: str = "exact") -> torch.Tensor:
    """``hidden * silu(gate)``, in one pass.

    Args:
        x, gate, bias, numerics: as in ``geglu``.
        gate_first: the halves of x (and of the bias) are (gate, hidden), as in Flux.2, instead of (hidden, gate), as in diffusers' SwiGLU.

    Returns: [..., F], contiguous, in the dtype that eager PyTorch gives.
    Raises: as ``geglu``; also ValueError for ``gate_first`` beside a ``gate`` of its own.
    Source: Shazeer (2020), "GLU Variants Improve Transformer".
    """
    _check(x, gate, bias)
    if gate_first and gate is not None:
        raise ValueError("gate_first is True beside a gate of its own; it should be False, or gate None")
    return _swiglu(x, gate, bias, bool(gate_first), is_exact(numerics))


def quick_gelu(x, *, bias=None, numerics: str = "exact") -> torch.Tensor:
    """``x * sigmoid(1.702 x)``, in one pass.

    Args:
        x: [..., F], float32, bfloat16, float16 or float64, any strides.
        bias: [F], added to x first (that of the projection), or None.
        numerics: as in ``geglu``.

    Returns: [..., F], contiguous, in the dtype that eager PyTorch gives.
    Raises: as ``geglu``.
    Source: CLIP's activation; diffusers' ApproximateGELU, transformers' QuickGELUActivation.
    """
    checks.floating("x", x)
    if not x.dim():
        raise ValueError("x has shape []; it should be [..., F]")
    if bias is not None:
        checks.vector("bias", bias, x.shape[-1], x.device)
    return _quick_gelu(x, bias, is_exact(numerics))
