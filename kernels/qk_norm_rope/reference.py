"""Per-head RMS norm of queries and keys with rotary embedding, in plain PyTorch: the meaning of the room's ops.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters" (2023),
for the norm of q and k; Su et al., "RoFormer" (2021), for the rotation, in the interleaved form that Flux uses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusewire.kernels.rounding import compute_dtype

RMS, TORCH_RMS = 0, 1  # which module's rounding: diffusers' RMSNorm, torch.nn.RMSNorm
ROTATION, HALVES_ROTATION = 2, 3  # no norm and no weights, the rotation alone: of pairs (x[2i], x[2i+1]), or (x[i], x[i + D/2])


def result_dtype(x: torch.Tensor, weight: torch.Tensor | None, norm: int) -> torch.dtype:
    """The dtype that the stock norm returns for ``x`` and ``weight``."""
    if weight is None or norm == TORCH_RMS:
        return x.dtype
    if weight.dtype in (torch.float16, torch.bfloat16):
        return weight.dtype
    return torch.promote_types(torch.promote_types(x.dtype, torch.float32), weight.dtype)


def stock_norm(x, weight, eps: float, norm: int) -> torch.Tensor:
    """RMS norm over the last dimension of x, rounding where the stock module rounds."""
    if norm >= ROTATION:
        return x
    if norm == TORCH_RMS:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)  # float32 for float64 inputs too
    y = x * torch.rsqrt(variance + eps)
    if weight is None:
        return y.to(x.dtype)
    return (y.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else y) * weight


def rotate(x, cos, sin, halves: bool = False) -> torch.Tensor:
    """Each pair (x[2i], x[2i+1]) of x [B, T, H, D], or (x[i], x[i + D/2]), turned by the angle of cosine cos[t, i] and sine sin[t, i] ([T, D/2]). Of x in
    16 bits in float32, each factor by itself, so that the gradients round where stock's do."""
    wide = torch.promote_types(torch.promote_types(x.dtype, torch.float32), cos.dtype)
    if halves:
        cos, sin = (torch.cat([table, table], -1)[None, :, None] for table in (cos, sin))
        first, second = x.chunk(2, -1)
        return x.to(wide) * cos + torch.cat([-second, first], -1).to(wide) * sin
    cos, sin = (table[None, :, None].repeat_interleave(2, dim=-1) for table in (cos, sin))
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x.to(wide) * cos + turned.to(wide) * sin


def qk_norm_one(x, weight, cos, sin, eps: float, norm: int, exact: bool) -> torch.Tensor:
    """The norm, then the rotation where cos and sin are given, of q or of k: [B, T, H, D] -> [B, T, H, D], contiguous."""
    x = x.contiguous()  # the order in which torch sums depends on the layout: that of a contiguous head dimension is meant
    dtype = result_dtype(x, weight, norm)
    if exact:
        y = stock_norm(x, weight, eps, norm)
        return y if cos is None else rotate(y if y.dtype is not torch.float64 else y.float(), cos, sin, norm == HALVES_ROTATION).to(y.dtype)
    wide = compute_dtype(torch.promote_types(x.dtype, dtype))
    y = x.to(wide)
    if norm < ROTATION:
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(wide)
    return (y if cos is None else rotate(y, cos.to(wide), sin.to(wide), norm == HALVES_ROTATION)).to(dtype)


def qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps: float, norm: int, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(q), norm(k)) for q, k [B, T, H, D], both rotated where cos and sin [T, D/2] are given."""
    return qk_norm_one(q, q_weight, cos, sin, eps, norm, exact), qk_norm_one(k, k_weight, cos, sin, eps, norm, exact)


def qk_norm_into(q, k, q_weight, k_weight, q_out, k_out, cos, sin, eps: float, norm: int, exact: bool) -> None:
    """``qk_norm_rope`` written into q_out and k_out."""
    q_new, k_new = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps, norm, exact)
    q_out.copy_(q_new)
    k_out.copy_(k_new)


def _gradients_of_one(grad, x, weight, cos, sin, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x and of its weight, for the gradient of ``qk_norm_one``'s result. With g the gradient of xhat: dx = (g - xhat * mean(g * xhat)) * rstd."""
    wide, dtype = compute_dtype(x.dtype), x.dtype
    grad, x = grad.to(wide), x.to(wide)
    if cos is not None:
        grad = rotate(grad, cos.to(wide), -sin.to(wide))  # turned back
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    xhat = x * rstd
    g = grad if weight is None else grad * weight.to(wide)
    dx = (g - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd
    return dx.to(dtype).contiguous(), (grad * xhat).sum((0, 1, 2)).to(dtype)


def qk_norm_rope_backward(q_grad, k_grad, q, k, q_weight, k_weight, cos, sin, eps: float, wanted: int) -> tuple[torch.Tensor, ...]:
    """The gradients of q, k, q_weight and k_weight in the rounding of ``close``, all of one dtype.

    Bit i of ``wanted`` asks for the i-th; one that is not wanted, or that there is not, has no elements.
    """
    (dq, dq_weight), (dk, dk_weight) = (_gradients_of_one(q_grad, q, q_weight, cos, sin, eps), _gradients_of_one(k_grad, k, k_weight, cos, sin, eps))
    there = (True, True, q_weight is not None, k_weight is not None)
    return tuple(gradient if exists and wanted >> i & 1 else q.new_empty(0) for i, (exists, gradient) in enumerate(zip(there, (dq, dk, dq_weight, dk_weight))))
