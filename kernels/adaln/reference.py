"""adaLN modulation in plain PyTorch: the meaning of the room's ops.

Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023), adaLN-Zero: ``norm(x) * (1 + scale) + shift`` and ``x + gate * y``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusewire.kernels.rounding import compute_dtype


def over_tokens(modulation: torch.Tensor) -> torch.Tensor:
    """[B, C] -> [B, 1, C]; [B, 1, C] and [B, T, C] stay."""
    return modulation.unsqueeze(1) if modulation.dim() == 2 else modulation


def normalise(x, weight, bias, eps: float, rms: bool) -> torch.Tensor:
    """LayerNorm or RMSNorm over the channels of x [B, T, C], in x's dtype, rounding as the stock modules do."""
    if not rms:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    # diffusers' RMSNorm: float32 inside, rounded to the weight's dtype before the multiplication with the weight
    variance = x.to(compute_dtype(x.dtype)).pow(2).mean(-1, keepdim=True)
    y = x * torch.rsqrt(variance + eps)
    if weight is None:
        return y.to(x.dtype)
    if weight.dtype in (torch.float16, torch.bfloat16):
        y = y.to(weight.dtype)
    y = y * weight
    return y if bias is None else y + bias


def adaln_modulate(x, shift, scale, weight, bias, eps: float, rms: bool, exact: bool) -> torch.Tensor:
    """norm(x) * (1 + scale) + shift for x [B, T, C]; shift, scale [B, C], [B, 1, C] or [B, T, C]."""
    shift, scale = over_tokens(shift), over_tokens(scale)
    if exact:  # eager rounds after the norm, after 1 + scale, after the product and after the sum
        return normalise(x, weight, bias, eps, rms) * (1 + scale) + shift
    dtype = torch.promote_types(torch.promote_types(x.dtype, scale.dtype), shift.dtype)
    wide = compute_dtype(dtype)
    vectors = (None if weight is None else weight.to(wide), None if bias is None else bias.to(wide))
    return (normalise(x.to(wide), *vectors, eps, rms) * (1 + scale.to(wide)) + shift.to(wide)).to(dtype)
