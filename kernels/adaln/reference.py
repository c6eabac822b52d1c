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


def adaln_modulate_dual(x, shift, scale, shift2, scale2, eps: float, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm(x) * (1 + scale) + shift, layer_norm(x) * (1 + scale2) + shift2)."""
    dtype, dtype2 = promoted(x.dtype, scale, shift), promoted(x.dtype, scale2, shift2)
    if not exact:
        x, shift, scale, shift2, scale2 = _wide(x.dtype, x, shift, scale, shift2, scale2)
    norm = normalise(x, None, None, eps, False)
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
