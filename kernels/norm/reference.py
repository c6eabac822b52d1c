"""RMSNorm, LayerNorm and global response normalisation in plain PyTorch: the meaning of the room's ops.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); Ba et al., "Layer Normalization" (2016); Woo et al., "ConvNeXt V2" (2023).
``exact`` is the stock module's arithmetic, operation by operation; otherwise float32 inside (float64 for float64), one rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusewire.kernels.autograd import over_rows
from fusewire.kernels.rounding import promoted

HALVES = (torch.float16, torch.bfloat16)


def _to(dtype: torch.dtype, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def rms_dtype(x, weight, bias, as_torch: bool) -> torch.dtype:
    """The dtype that the stock RMSNorm returns: torch's that of x; diffusers' that of a 16-bit weight, and with a wider one the promoted dtype."""
    dtype = x.dtype
    if weight is not None and not as_torch:
        dtype = weight.dtype if weight.dtype in HALVES else torch.promote_types(torch.promote_types(dtype, torch.float32), weight.dtype)
    return dtype if bias is None else torch.promote_types(dtype, bias.dtype)


def _wide(dtype: torch.dtype, *tensors: torch.Tensor | None) -> torch.dtype:
    """What ``close`` computes in: float64 where an argument or the result has it, otherwise float32."""
    return torch.float64 if torch.float64 in (dtype, *(t.dtype for t in tensors if t is not None)) else torch.float32


def picture_layout(x: torch.Tensor) -> torch.memory_format:
    """channels_last where the channels of x [B, C, H, W] lie side by side, otherwise contiguous."""
    return torch.channels_last if x.stride(1) == 1 and x.shape[1] > 1 else torch.contiguous_format


def rms_norm(x, weight, bias, eps: float, as_torch: bool, exact: bool) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight + bias over the last dimension of x [..., C]."""
    x = x.contiguous()  # the order in which torch sums depends on the layout: that of contiguous rows is meant
    dtype = rms_dtype(x, weight, bias, as_torch)
    if not exact:
        x, weight, bias = _to(_wide(dtype, x, weight, bias), x, weight, bias)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        y = y if weight is None else y * weight
        return (y if bias is None else y + bias).to(dtype)
    if as_torch:  # torch.nn.RMSNorm: one rounding, after the weight
        y = F.rms_norm(x, x.shape[-1:], weight, eps)
    else:  # diffusers' RMSNorm, transformers' T5LayerNorm: the variance in float32, rounded to a 16-bit weight's dtype before the weight
        y = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)
        if weight is None:
            y = y.to(x.dtype)
        else:
            y = (y.to(weight.dtype) if weight.dtype in HALVES else y) * weight
    return y if bias is None else y + bias


def layer_norm(x, weight, bias, eps: float, wide: bool, exact: bool) -> torch.Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension of x [..., C]."""
    dtype = x.dtype
    if wide and exact:  # diffusers' FP32LayerNorm, which computes float64 in float32 too
        x, weight, bias = _to(torch.float32, x, weight, bias)
    elif not exact:
        x, weight, bias = _to(_wide(dtype, x, weight, bias), x, weight, bias)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(dtype)


def layer_norm_2d(x, weight, bias, eps: float, exact: bool) -> torch.Tensor:
    """``layer_norm`` over the channels of x [B, C, H, W]; the result lies in memory as x does: channels last, or contiguous."""
    y = layer_norm(x.permute(0, 2, 3, 1), weight, bias, eps, False, exact).permute(0, 3, 1, 2)
    return y.contiguous(memory_format=picture_layout(x))


def norm_backward(grad, x, weight, eps: float, rms: bool, of_x: bool, of_weight: bool, of_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, weight and bias [C] in the rounding of ``close``, all of one dtype; one that is not wanted has no elements.

    With g = grad * weight, the gradient of xhat: dx = (g - mean(g) - xhat * mean(g * xhat)) * rstd, where RMSNorm has no mean(g).
    """
    dtype = x.dtype
    grad, x, weight = _to(_wide(dtype, weight, grad), grad, x, weight)
    centred = x if rms else x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    xhat = centred * rstd
    g = grad if weight is None else grad * weight
    dx = (g - (0 if rms else g.mean(-1, keepdim=True)) - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd if of_x else x.new_empty(0)
    sums = over_rows(grad * xhat) if of_weight else x.new_empty(0), over_rows(grad) if of_bias else x.new_empty(0)
    return dx.to(dtype).contiguous(), sums[0].to(dtype), sums[1].to(dtype)


def rms_norm_backward(grad, x, weight, eps: float, of_x: bool, of_weight: bool, of_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return norm_backward(grad, x, weight, eps, True, of_x, of_weight, of_bias)


def layer_norm_backward(grad, x, weight, eps: float, of_x: bool, of_weight: bool, of_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return norm_backward(grad, x, weight, eps, False, of_x, of_weight, of_bias)


def layer_norm_2d_backward(grad, x, weight, eps: float, of_x: bool, of_weight: bool, of_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``layer_norm_backward`` over the channels of x [B, C, H, W]; the gradient of x lies in memory as ``layer_norm_2d``'s result."""
    dx, *affine = norm_backward(grad.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1), weight, eps, False, of_x, of_weight, of_bias)
    return dx.permute(0, 3, 1, 2).contiguous(memory_format=picture_layout(x)) if of_x else dx, *affine


def global_response_norm(x, weight, bias, eps: float, exact: bool) -> torch.Tensor:
    """x + weight * (x * n) + bias for x [B, H, W, C], where n = g / (mean(g) + eps) and g is the norm of each channel of a picture."""
    x = x.contiguous()  # the order in which torch sums depends on the layout: that of channels side by side is meant
    dtype = promoted(x.dtype, weight, bias)
    if not exact:
        x, weight, bias = _to(_wide(dtype, x), x, weight, bias)
    response = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
    response = response / (response.mean(dim=-1, keepdim=True) + eps)
    y = weight * (x * response) + bias + x if exact else x * (1 + weight * response) + bias
    return y.to(dtype)


def global_response_norm_backward(grad, x, weight, eps: float, of_x: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, weight and bias in the rounding of ``close``, all of one dtype; that of x has no elements where it is not wanted.

    With s = 1 / (mean(g) + eps) and S the sum of grad * x over a picture's channel: that of g is weight * S * s - mean(weight * S * g) * s^2, of
    which x gets x / g, and nothing where g is 0.
    """
    dtype = x.dtype
    grad, x, weight = _to(_wide(dtype), grad, x, weight)
    norm = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
    scale = 1 / (norm.mean(-1, keepdim=True) + eps)
    product = (grad * x).sum((1, 2), keepdim=True)
    of_norm = weight * product * scale - (weight * product * norm).mean(-1, keepdim=True) * scale * scale
    share = torch.where(norm == 0, 0, of_norm / norm)
    dx = grad * (1 + weight * norm * scale) + x * share if of_x else x.new_empty(0)
    return dx.to(dtype).contiguous(), (norm * scale * product).sum((0, 1, 2)).to(dtype), grad.sum((0, 1, 2)).to(dtype)
