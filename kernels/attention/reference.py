"""Attention in plain PyTorch: the meaning of the room's ops.

Vaswani et al., "Attention Is All You Need" (2017); the joint attention over image and text tokens is Esser et al., "Scaling Rectified Flow
Transformers for High-Resolution Image Synthesis" (2024), the norm of q and k Dehghani et al. (2023).
"""

from __future__ import annotations

import torch

from fusewire.kernels.rounding import compute_dtype


def widen(x, weight, eps: float) -> torch.Tensor:
    """x [B, T, H, D] in the dtype that the op computes in, each head RMS-normalised where there is a weight [D]."""
    x = x.to(compute_dtype(x.dtype))
    return x if weight is None else x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def attend(q, k, v, mask, causal: bool, scale: float | None) -> torch.Tensor:
    """softmax(q k^T * scale + mask) v over [B, T, H, D]; 0 for a query that no key is left for."""
    if k.shape[1] == 0:
        return torch.zeros_like(q)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) if x.shape[1] != q.shape[1] else x for x in (k, v))
    hidden = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=q.device)
    if mask is not None:
        hidden = ~mask if mask.dtype is torch.bool else mask == -torch.inf
    if causal:
        hidden = hidden | torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    # Keys that no query attends to may hold anything, even NaN
    unused = hidden.all(dim=-2).unsqueeze(-1)
    k, v = k.masked_fill(unused, 0), v.masked_fill(unused, 0)
    logits = q @ k.mT * (max(q.shape[-1], 1) ** -0.5 if scale is None else scale)
    if mask is not None and mask.dtype is not torch.bool:
        logits = logits + mask.to(logits.dtype)
    logits = logits.masked_fill(hidden, -torch.inf)
    highest = logits.amax(-1, keepdim=True).detach().clamp(min=torch.finfo(logits.dtype).min)
    weights = torch.exp(logits - highest)
    total = weights.sum(-1, keepdim=True)
    return (weights @ v / total.masked_fill(total == 0, 1)).transpose(1, 2)


def attention(q, k, v, mask, q_weight, k_weight, causal: bool, scale: float | None, eps: float) -> torch.Tensor:
    """-> [B, Tq, H, D] in q's dtype: one rounding, at the end."""
    out = attend(widen(q, q_weight, eps), widen(k, k_weight, eps), widen(v, None, eps), mask, causal, scale)
    return out.to(q.dtype).contiguous()


def joint_attention(q, k, v, q2, k2, v2, q_weight, k_weight, q2_weight, k2_weight, scale: float | None, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``attention`` over [q; q2], [k; k2], [v; v2], concatenated along the tokens -> (its rows for q, its rows for q2)."""
    joint_q = torch.cat([widen(q, q_weight, eps), widen(q2, q2_weight, eps)], dim=1)
    joint_k = torch.cat([widen(k, k_weight, eps), widen(k2, k2_weight, eps)], dim=1)
    joint_v = torch.cat([widen(v, None, eps), widen(v2, None, eps)], dim=1)
    out = attend(joint_q, joint_k, joint_v, None, False, scale).to(q.dtype)
    return out[:, :q.shape[1]].contiguous(), out[:, q.shape[1]:].contiguous()
