"""adaLN in plain PyTorch: the meaning of the room's ops.

Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023), adaLN-Zero: ``norm(x) * (1 + scale) + shift`` and ``x + gate * y``.
Esser et al., "Scaling Rectified Flow Transformers" (2024) and SD3.5-medium: one norm may feed two modulations, two gated sums one norm.
``exact`` is eager PyTorch's arithmetic, operation by operation; otherwise float32 inside (float64 for float64) and one rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusewire.kernels.rounding import compute_dtype, promoted


def over_tokens(modulation: torch.Tensor) -> torch.Tensor:
    """[B, C] -> [B, 1, C]; [B, 1, C] and [B, T, C] stay."""
    return modulation.unsqueeze(1) if modulation.dim() == 2 else modulation


def normalise(x, weight, bias, eps: float, rms: bool) -> torch.Tensor:
    """LayerNorm or RMSNorm over the channels of x [B, T, C], rounding as the stock modules do."""
    if not rms:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    x = x.contiguous()  # the order in which torch sums depends on the layout: that of contiguous rows is meant, as in the room norm
    # diffusers' RMSNorm: float32 inside, rounded to the weight's dtype before the multiplication with the weight
    variance = x.to(compute_dtype(x.dtype)).pow(2).mean(-1, keepdim=True)
    y = x * torch.rsqrt(variance + eps)
    if weight is None:
        y = y.to(x.dtype)
    else:
        y = (y.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else y) * weight
    return y if bias is None else y + bias


def normalised_dtype(dtype: torch.dtype, weight, bias, rms: bool) -> torch.dtype:
    """The dtype of ``normalise`` for an x of ``dtype``: the stock RMSNorm follows its weight's dtype, LayerNorm its input's."""
    if not rms or weight is None:
        return promoted(dtype, bias) if rms else dtype
    return promoted(weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else promoted(compute_dtype(dtype), weight), bias)


def _wide(dtype: torch.dtype, *tensors) -> list[torch.Tensor | None]:
    """The tensors in the dtype that ``close`` computes a result of ``dtype`` in; None stays None."""
    return [None if tensor is None else tensor.to(compute_dtype(promoted(dtype, *tensors))) for tensor in tensors]


def _modulated(norm, shift, scale) -> torch.Tensor:
    return (norm * (1 + over_tokens(scale)) + over_tokens(shift)).contiguous()


def _gated(x, y, gate, y2, gate2) -> torch.Tensor:
    x = x + over_tokens(gate) * y
    return (x if y2 is None else x + over_tokens(gate2) * y2).contiguous()


def adaln_modulate(x, shift, scale, weight, bias, eps: float, rms: bool, exact: bool) -> torch.Tensor:
    """norm(x) * (1 + scale) + shift for x [B, T, C]; shift, scale [B, C], [B, 1, C] or [B, T, C]."""
    dtype = promoted(normalised_dtype(x.dtype, weight, bias, rms), scale, shift)
    if not exact:
        x, shift, scale, weight, bias = _wide(dtype, x, shift, scale, weight, bias)
    # exact: eager rounds after the norm, after 1 + scale, after the product and after the sum
    return _modulated(normalise(x, weight, bias, eps, rms), shift, scale).to(dtype)


def adaln_modulate_dual(x, shift, scale, shift2, scale2, weight, bias, eps: float, rms: bool, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x) * (1 + scale) + shift, norm(x) * (1 + scale2) + shift2)."""
    normed = normalised_dtype(x.dtype, weight, bias, rms)
    dtype, dtype2 = promoted(normed, scale, shift), promoted(normed, scale2, shift2)
    if not exact:
        x, shift, scale, shift2, scale2, weight, bias = _wide(normed, x, shift, scale, shift2, scale2, weight, bias)
    norm = normalise(x, weight, bias, eps, rms)
    return _modulated(norm, shift, scale).to(dtype), _modulated(norm, shift2, scale2).to(dtype2)


def gate_residual(x, y, gate, exact: bool) -> torch.Tensor:
    """x + gate * y for x, y [B, T, C]; gate [B, C], [B, 1, C] or [B, T, C]."""
    dtype = promoted(x.dtype, y, gate)
    if not exact:
        x, y, gate = _wide(dtype, x, y, gate)
    return _gated(x, y, gate, None, None).to(dtype)


def gate_residual_adaln(x, y, gate, y2, gate2, shift, scale, weight, bias, eps: float, rms: bool, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(r, norm(r) * (1 + scale) + shift) with r = x + gate * y, or r = x + gate * y + gate2 * y2."""
    dtype = promoted(x.dtype, y, gate, y2, gate2)
    modulated_dtype = promoted(normalised_dtype(dtype, weight, bias, rms), scale, shift)
    if not exact:
        x, y, gate, y2, gate2, shift, scale, weight, bias = _wide(modulated_dtype, x, y, gate, y2, gate2, shift, scale, weight, bias)
    residual = _gated(x, y, gate, y2, gate2)
    return residual.to(dtype), _modulated(normalise(residual, weight, bias, eps, rms), shift, scale).to(modulated_dtype)


def _summed(grad, modulation) -> torch.Tensor:
    """What ``modulation`` gets of ``grad`` [B, T, C], in its shape: the sum over the tokens, unless each token has a row of its own."""
    if modulation.dim() == 2:
        return grad.sum(1)
    return grad.sum(1, keepdim=True) if modulation.shape[1] == 1 else grad


def _norm_gradients(x, modulated, weight, bias, eps: float, rms: bool) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor, torch.Tensor]:
    """Of x, of each (shift, scale), of weight and of bias, the last three not summed over any row. ``modulated``: (scale, gradient of the output).

    With g the gradient of xhat: dx = (g - mean(g) - xhat * mean(g * xhat)) * rstd, where RMSNorm has no mean(g).
    """
    centred = x if rms else x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    xhat = centred * rstd
    norm = xhat if weight is None else xhat * weight
    norm = norm if bias is None else norm + bias
    upstream = sum(grad * (1 + over_tokens(scale)) for scale, grad in modulated)
    g = upstream if weight is None else upstream * weight
    dx = (g - (0 if rms else g.mean(-1, keepdim=True)) - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd
    return dx, [(grad, grad * norm) for _, grad in modulated], upstream * xhat, upstream


def _asked(wanted: int, dtype: torch.dtype, gradients: list[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    """Contiguous, in ``dtype``; one whose bit in ``wanted`` is not set, or that there is not, has no elements."""
    some = next(gradient for gradient in gradients if gradient is not None)
    return tuple(some.new_empty(0, dtype=dtype) if gradient is None or not wanted >> i & 1 else
                 gradient.to(dtype, copy=True, memory_format=torch.contiguous_format) for i, gradient in enumerate(gradients))


def adaln_modulate_backward(grad, x, shift, scale, weight, bias, eps: float, rms: bool, wanted: int) -> tuple[torch.Tensor, ...]:
    """The gradients of x, shift, scale, weight and bias in the rounding of ``close``, all of one dtype. Bit i of ``wanted`` asks for the i-th."""
    dtype, (grad, x, wide_scale, weight, bias) = x.dtype, _wide(x.dtype, grad, x, scale, weight, bias)
    dx, ((dshift, dscale),), dweight, dbias = _norm_gradients(x, [(wide_scale, grad)], weight, bias, eps, rms)
    return _asked(wanted, dtype, [dx, _summed(dshift, shift), _summed(dscale, scale), None if weight is None else dweight.sum((0, 1)),
                                  None if bias is None else dbias.sum((0, 1))])


def adaln_modulate_dual_backward(grad, grad2, x, shift, scale, shift2, scale2, weight, bias, eps: float, rms: bool, wanted: int) -> tuple[torch.Tensor, ...]:
    """The gradients of x, shift, scale, shift2, scale2, weight and bias."""
    dtype, (grad, grad2, x, wide, wide2, weight, bias) = x.dtype, _wide(x.dtype, grad, grad2, x, scale, scale2, weight, bias)
    dx, ((dshift, dscale), (dshift2, dscale2)), dweight, dbias = _norm_gradients(x, [(wide, grad), (wide2, grad2)], weight, bias, eps, rms)
    return _asked(wanted, dtype, [dx, _summed(dshift, shift), _summed(dscale, scale), _summed(dshift2, shift2), _summed(dscale2, scale2),
                                  None if weight is None else dweight.sum((0, 1)), None if bias is None else dbias.sum((0, 1))])


def gate_residual_backward(grad, y, gate, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of y and gate; that of x is ``grad`` itself."""
    dtype, (grad, y, wide_gate) = y.dtype, _wide(y.dtype, grad, y, gate)
    return _asked(wanted, dtype, [grad * over_tokens(wide_gate), _summed(grad * y, gate)])


def gate_residual_adaln_backward(grad, grad2, x, y, gate, y2, gate2, shift, scale, weight, bias, eps: float, rms: bool, wanted: int) -> tuple[torch.Tensor, ...]:
    """The gradients of x, y, gate, y2, gate2, shift, scale, weight and bias. ``grad`` is that of the residual stream, ``grad2`` of the modulated norm."""
    dtype, gates = x.dtype, (gate, gate2)
    grad, grad2, x, y, gate, y2, gate2, wide_scale, weight, bias = _wide(dtype, grad, grad2, x, y, gate, y2, gate2, scale, weight, bias)
    norm, ((dshift, dscale),), dweight, dbias = _norm_gradients(_gated(x, y, gate, y2, gate2), [(wide_scale, grad2)], weight, bias, eps, rms)
    total = grad + norm
    second = (None, None) if y2 is None else (total * over_tokens(gate2), _summed(total * y2, gates[1]))
    return _asked(wanted, dtype, [total, total * over_tokens(gate), _summed(total * y, gates[0]), *second, _summed(dshift, shift), _summed(dscale, scale),
                                  None if weight is None else dweight.sum((0, 1)), None if bias is None else dbias.sum((0, 1))])
