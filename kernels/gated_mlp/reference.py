"""Gated activations of feed-forward layers in plain PyTorch: the meaning of the room's ops.

Shazeer, "GLU Variants Improve Transformer" (2020): GEGLU and SwiGLU, as diffusers' modules spell them. Quick GELU: Hendrycks and Gimpel, "Gaussian
Error Linear Units" (2016), in the form that CLIP uses. ``exact`` is eager PyTorch's arithmetic; otherwise float32 inside (float64 for
float64) and one rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusewire.kernels.autograd import over_rows
from fusewire.kernels.rounding import compute_dtype, promoted


def _halves(x, gate, bias, gate_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden, gate), the bias added."""
    if gate is None:
        first, second = (x if bias is None else x + bias).chunk(2, -1)
        return (second, first) if gate_first else (first, second)
    if bias is None:
        return x, gate
    hidden_bias, gate_bias = bias.chunk(2)
    return x + hidden_bias, gate + gate_bias


def _gated(activation, x, gate, bias, gate_first: bool, exact: bool) -> torch.Tensor:
    dtype = promoted(x.dtype, gate, bias)
    if not exact:
        x, gate, bias = (None if t is None else t.to(compute_dtype(dtype)) for t in (x, gate, bias))
    hidden, gate = _halves(x, gate, bias, gate_first)
    return (hidden * activation(gate)).to(dtype).contiguous()


def geglu(x, gate, bias, exact: bool) -> torch.Tensor:
    """hidden * gelu(gate), with (hidden, gate) the halves of x + bias, x [..., 2F]; or x and ``gate``, both [..., F]."""
    return _gated(F.gelu, x, gate, bias, False, exact)


def swiglu(x, gate, bias, gate_first: bool, exact: bool) -> torch.Tensor:
    """hidden * silu(gate), with (hidden, gate), or where ``gate_first`` (gate, hidden), the halves of x + bias."""
    return _gated(F.silu, x, gate, bias, gate_first, exact)


def quick_gelu(x, bias, exact: bool) -> torch.Tensor:
    """y * sigmoid(1.702 y) with y = x + bias"""
    dtype = promoted(x.dtype, bias)
    if not exact:
        x, bias = (None if t is None else t.to(compute_dtype(dtype)) for t in (x, bias))
    y = x if bias is None else x + bias
    return (y * torch.sigmoid(1.702 * y)).to(dtype).contiguous()


def _gelu_slope(z):
    """P(X <= z) + z * density(z) for a standard normal X"""
    return 0.5 * torch.erfc(-0.7071067811865476 * z) + z * torch.exp(-0.5 * z * z) * 0.3989422804014327


def _silu_slope(z):
    part = torch.sigmoid(z)
    return part * (1 + z * (1 - part))


def _gradients(activation, slope, grad, x, gate, bias, gate_first: bool, of_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Those of x, gate and bias, in the rounding of ``close``, all of one dtype: dhidden = grad * act(gate), dgate = grad * hidden * act'(gate).

    That of the gate has no elements where x holds both halves, that of the bias where it is not wanted.
    """
    dtype = x.dtype
    grad, x, given, bias = (None if t is None else t.to(compute_dtype(dtype)) for t in (grad, x, gate, bias))
    hidden, gate = _halves(x, given, bias, gate_first)
    dhidden, dgate = grad * activation(gate), grad * hidden * slope(gate)
    both = torch.cat((dgate, dhidden) if gate_first else (dhidden, dgate), -1)
    of_bias = over_rows(both) if of_bias else x.new_empty(0)
    if given is None:
        return both.to(dtype), x.new_empty(0, dtype=dtype), of_bias.to(dtype)
    return dhidden.to(dtype).contiguous(), dgate.to(dtype).contiguous(), of_bias.to(dtype)


def geglu_backward(grad, x, gate, bias, of_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _gradients(F.gelu, _gelu_slope, grad, x, gate, bias, False, of_bias)


def swiglu_backward(grad, x, gate, bias, gate_first: bool, of_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _gradients(F.silu, _silu_slope, grad, x, gate, bias, gate_first, of_bias)


def quick_gelu_backward(grad, x, bias, of_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of x and bias; that of the bias has no elements where it is not wanted."""
    dtype = x.dtype
    grad, x, bias = (None if t is None else t.to(compute_dtype(dtype)) for t in (grad, x, bias))
    dx = grad * _silu_slope(1.702 * (x if bias is None else x + bias))
    dbias = over_rows(dx) if of_bias and bias is not None else x.new_empty(0)
    return dx.to(dtype).contiguous(), dbias.to(dtype)
