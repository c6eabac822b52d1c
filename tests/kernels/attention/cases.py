"""What the attention tests share: PyTorch's own attention as the independent reference, and random inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def stock(q, k, v, mask=None, causal=False, scale=None, dtype=torch.float64):
    """PyTorch's attention over [B, T, H, D], computed in ``dtype``."""
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(dtype)
    if q.shape[2] != k.shape[2]:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale).transpose(1, 2)


def stock_norm(x, weight, eps, dtype=torch.float64):
    """RMS norm of each head, as PyTorch computes it in ``dtype``."""
    return F.rms_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), eps)


def stock_joint(streams, weights, eps=1e-6, dtype=torch.float64):
    """PyTorch's attention over two streams of q, k and v, one after the other, in ``dtype``. ``weights``: those of the norms by the op's keywords."""
    def normed(x, name):
        return x.to(dtype) if weights.get(name) is None else stock_norm(x, weights[name], eps, dtype)

    (q, k, v), (q2, k2, v2) = streams
    return stock(torch.cat([normed(q, "q_weight"), normed(q2, "q2_weight")], 1), torch.cat([normed(k, "k_weight"), normed(k2, "k2_weight")], 1),
                 torch.cat([v, v2], 1), dtype=dtype)


def qkv(batch, queries, keys, heads, channels, dtype=torch.float32, key_heads=None):
    def make(tokens, heads):
        return torch.randn(batch, tokens, heads, channels).to(dtype)

    return make(queries, heads), make(keys, key_heads or heads), make(keys, key_heads or heads)
