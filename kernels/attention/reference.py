"""Attention in plain PyTorch: the meaning of the room's ops.

Vaswani et al., "Attention Is All You Need" (2017); the joint attention over image and text tokens is Esser et al., "Scaling Rectified Flow
Transformers for High-Resolution Image Synthesis" (2024), the norm of q and k Dehghani et al. (2023).
"""

from __future__ import annotations

import torch

from fusewire.kernels.qk_norm_rope.reference import rotate
from fusewire.kernels.rounding import compute_dtype


def widen(x, weight, eps: float, cos=None, sin=None) -> torch.Tensor:
    """x [B, T, H, D] in the dtype that the op computes in, each head RMS-normalised where there is a weight [D], and turned where there are tables."""
    x = x.to(compute_dtype(x.dtype))
    x = x if weight is None else x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
    return x if cos is None else rotate(x, cos, sin)


BLOCK, EMPTY, FULL = 32, -2, -1  # of a pattern: kernels/attention/patterns.py


def pattern_mask(blocks, words, queries: int, keys: int) -> torch.Tensor:
    """A pattern as a boolean mask [B or 1, H or 1, Tq, Tk]."""
    bits = (words.unsqueeze(-1) >> torch.arange(BLOCK, dtype=torch.int32, device=words.device) & 1).to(torch.bool)
    whole = torch.arange(2, device=words.device).to(torch.bool)[:, None, None].expand(2, BLOCK, BLOCK)  # an empty block and a full one
    squares = torch.cat([whole, bits])[(blocks - EMPTY).to(torch.int64)]  # [B, H, blocks of queries, of keys, 32, 32]
    return squares.transpose(3, 4).flatten(4).flatten(2, 3)[:, :, :queries, :keys]


def _hidden(q, k, mask, causal: bool, pattern=None) -> torch.Tensor:
    """Which keys each query of [B, H, T, D] does not see, broadcastable to [B, H, Tq, Tk]. ``pattern``: a boolean mask beside ``mask``."""
    hidden = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=q.device) if pattern is None else ~pattern
    if mask is not None:
        hidden = hidden | (~mask if mask.dtype is torch.bool else mask == -torch.inf)
    if causal:
        hidden = hidden | torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return hidden


def _heads_first(q, k, v) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, T, H, D] -> [B, H, T, D], the heads of k and v repeated for q's."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return q, *(x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) if x.shape[1] != q.shape[1] else x for x in (k, v))


def _logits(q, k, mask, hidden, scale: float | None) -> torch.Tensor:
    logits = q @ k.mT * (max(q.shape[-1], 1) ** -0.5 if scale is None else scale)
    if mask is not None and mask.dtype is not torch.bool:
        logits = logits + mask.to(logits.dtype)
    return logits.masked_fill(hidden, -torch.inf)


def attend(q, k, v, mask, causal: bool, scale: float | None, pattern=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """softmax(q k^T * scale + mask) v over [B, T, H, D], 0 for a query that no key is left for.

    Also [B, H, Tq] of each query's highest logit, which counts as a constant where gradients are taken, and of the sum of exp(logit - highest):
    their log-sum-exp is highest + log(total).
    """
    if k.shape[1] == 0:
        rows = q.new_zeros((q.shape[0], q.shape[2], q.shape[1]))
        return q.masked_fill(torch.ones_like(q, dtype=torch.bool), 0), rows, rows.clone()  # whose gradient is 0, not none
    q, k, v = _heads_first(q, k, v)
    hidden = _hidden(q, k, mask, causal, pattern)
    # Keys that no query attends to may hold anything, even NaN
    unused = hidden.all(dim=-2).unsqueeze(-1)
    k, v = k.masked_fill(unused, 0), v.masked_fill(unused, 0)
    logits = _logits(q, k, mask, hidden, scale)
    highest = logits.amax(-1, keepdim=True).detach().clamp(min=torch.finfo(logits.dtype).min)
    weights = torch.exp(logits - highest)
    total = weights.sum(-1, keepdim=True)
    divisor = total.masked_fill(total == 0, 1)
    # Divided after the product, which rounds better; before it where it is differentiated: the gradient of q then subtracts sums of the same
    # products, and that of a query which sees one key is 0, as it should be
    out = weights / divisor @ v if weights.requires_grad else weights @ v / divisor
    return out.transpose(1, 2), highest.squeeze(-1), total.squeeze(-1)


def _visible(q, k, blocks, words) -> torch.Tensor | None:
    return None if blocks is None else pattern_mask(blocks, words, q.shape[1], k.shape[1])


def attention(q, k, v, mask, q_weight, k_weight, causal: bool, scale: float | None, eps: float, blocks=None, words=None, cos=None,
              sin=None) -> torch.Tensor:
    """-> [B, Tq, H, D] in q's dtype: one rounding, at the end."""
    wide = widen(q, q_weight, eps, cos, sin), widen(k, k_weight, eps, cos, sin), widen(v, None, eps)
    out, _, _ = attend(*wide, mask, causal, scale, _visible(q, k, blocks, words))
    return out.to(q.dtype).contiguous()


def attention_softmax(q, k, v, mask, causal: bool, scale: float | None, blocks=None,
                      words=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> [B, Tq, H, D] in q's dtype, and the highest logits and the totals of ``attend`` in float64."""
    out, highest, total = attend(*(widen(x, None, 0) for x in (q, k, v)), mask, causal, scale, _visible(q, k, blocks, words))
    return out.to(q.dtype).contiguous(), highest.to(torch.float64).contiguous(), total.to(torch.float64).contiguous()


def _unused(blocks, words, keys: int) -> torch.Tensor:
    """``~pattern_mask(...).any(-2)``, without the mask: [B or 1, H or 1, Tk]."""
    bits = (words.unsqueeze(-1) >> torch.arange(BLOCK, dtype=torch.int32, device=words.device) & 1).any(1)
    whole = torch.arange(2, device=words.device).to(torch.bool)[:, None].expand(2, BLOCK)
    return ~torch.cat([whole, bits])[(blocks - EMPTY).to(torch.int64)].any(2).flatten(2)[..., :keys]


def without_unused(q, k, v, mask, causal: bool, blocks=None, words=None) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v [B, T, H_kv, D] with zeros for the keys that no query of any head of theirs sees: those may hold anything, even NaN."""
    if mask is None and not causal and blocks is not None:
        unused = _unused(blocks, words, k.shape[1])
    else:
        unused = _hidden(q.transpose(1, 2), k.transpose(1, 2), mask, causal, _visible(q, k, blocks, words)).all(dim=-2)
    if unused.shape[1] not in (1, k.shape[2]):
        unused = unused.unflatten(1, (k.shape[2], -1)).all(dim=2)
    unused = unused.transpose(1, 2).unsqueeze(-1)
    return k.masked_fill(unused, 0), v.masked_fill(unused, 0)


def attention_backward(grad, lse_grad, q, k, v, out, highest, total, mask, causal: bool,
                       scale: float | None, blocks=None, words=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v. Dao et al. (2022), "FlashAttention", appendix B.2, with the softmax's two numbers a query in the place of their
    log-sum-exp, which loses the second where the first is large."""
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dtypes, groups = (q.dtype, k.dtype, v.dtype), q.shape[2] // k.shape[2]
    pattern = _visible(q, k, blocks, words)
    q, k, v = _heads_first(*(widen(x, None, 0) for x in (q, k, v)))
    grad, out = (widen(x, None, 0).transpose(1, 2) for x in (grad, out))
    hidden = _hidden(q, k, mask, causal, pattern)
    unused = hidden.all(dim=-2).unsqueeze(-1)
    k, v = k.masked_fill(unused, 0), v.masked_fill(unused, 0)
    highest, total = highest.masked_fill(total == 0, 0).unsqueeze(-1), total.masked_fill(total == 0, 1).unsqueeze(-1)
    weights = (torch.exp(_logits(q, k, mask, hidden, scale) - highest) / total).to(q.dtype)
    delta = (grad * out).sum(-1, keepdim=True)
    if lse_grad is not None:
        delta = delta - lse_grad.unsqueeze(-1).to(q.dtype)
    slopes = weights * (grad @ v.mT - delta).masked_fill(hidden, 0) * (q.shape[-1] ** -0.5 if scale is None else scale)
    k_grad, v_grad = (x.reshape(x.shape[0], x.shape[1] // groups, groups, *x.shape[2:]).sum(2) for x in (slopes.mT @ q, weights.mT @ grad))
    return tuple(x.transpose(1, 2).to(dtype).contiguous() for x, dtype in zip((slopes @ k, k_grad, v_grad), dtypes))


def _sequences(cu_seqlens_q, cu_seqlens_k) -> list[tuple[slice, slice]] | None:
    """The queries and the keys of each packed sequence (at least one, if it is empty); None where reading them would wait for a device, or cannot
    be traced."""
    if not cu_seqlens_q.is_cpu or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return [(slice(a, b), slice(c, d)) for a, b, c, d in zip(ends[0], ends[0][1:], ends[1], ends[1][1:])] or [(slice(0), slice(0))]


def _same_sequence(q, k, cu_seqlens_q, cu_seqlens_k, causal: bool) -> torch.Tensor:
    """The mask [1, 1, Tq, Tk] for packed sequences as one: each query sees the keys of its own. (A NaN among the values then reaches them all.)"""
    places = []
    for x, cu_seqlens in ((q, cu_seqlens_q), (k, cu_seqlens_k)):
        token = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
        sequence = torch.searchsorted(cu_seqlens.contiguous(), token, right=True) - 1
        places.append((sequence, token - cu_seqlens[sequence]))
    (q_sequence, q_token), (k_sequence, k_token) = places
    mask = q_sequence[:, None] == k_sequence
    return (mask & (k_token <= q_token[:, None]) if causal else mask)[None, None]


def attention_varlen_softmax(q, k, v, cu_seqlens_q, cu_seqlens_k, causal: bool,
                             scale: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``attention_softmax`` within each packed sequence: [Tq, H, D] -> [Tq, H, D] in q's dtype, twice [H, Tq] in float64."""
    sequences = _sequences(cu_seqlens_q, cu_seqlens_k)
    if sequences is None:
        mask = _same_sequence(q, k, cu_seqlens_q, cu_seqlens_k, causal)
        return tuple(x[0] for x in attention_softmax(q[None], k[None], v[None], mask, False, scale))
    parts = [attention_softmax(q[None, i], k[None, j], v[None, j], None, causal, scale) for i, j in sequences]
    return tuple(torch.cat([x[0] for x in each], dim=dim) for each, dim in zip(zip(*parts), (0, 1, 1)))


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal: bool, scale: float | None) -> torch.Tensor:
    return attention_varlen_softmax(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale)[0]


def attention_varlen_backward(grad, lse_grad, q, k, v, out, highest, total, cu_seqlens_q, cu_seqlens_k, causal: bool,
                              scale: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sequences = _sequences(cu_seqlens_q, cu_seqlens_k)
    if sequences is None:
        mask = _same_sequence(q, k, cu_seqlens_q, cu_seqlens_k, causal)
        tensors = (None if x is None else x[None] for x in (grad, lse_grad, q, k, v, out, highest, total))
        return tuple(x[0] for x in attention_backward(*tensors, mask, False, scale))
    parts = [attention_backward(grad[None, i], None if lse_grad is None else lse_grad[None, :, i], q[None, i], k[None, j], v[None, j], out[None, i],
                                highest[None, :, i], total[None, :, i], None, causal, scale) for i, j in sequences]
    return tuple(torch.cat([x[0] for x in each]) for each in zip(*parts))


def joint_attention(q, k, v, q2, k2, v2, q_weight, k_weight, q2_weight, k2_weight, scale: float | None, eps: float, cos=None, sin=None,
                    cos2=None, sin2=None) -> tuple[torch.Tensor, torch.Tensor]:
    """``attention`` over [q; q2], [k; k2], [v; v2], concatenated along the tokens -> (its rows for q, its rows for q2)."""
    joint_q = torch.cat([widen(q, q_weight, eps, cos, sin), widen(q2, q2_weight, eps, cos2, sin2)], dim=1)
    joint_k = torch.cat([widen(k, k_weight, eps, cos, sin), widen(k2, k2_weight, eps, cos2, sin2)], dim=1)
    joint_v = torch.cat([widen(v, None, eps), widen(v2, None, eps)], dim=1)
    out = attend(joint_q, joint_k, joint_v, None, False, scale)[0].to(q.dtype)
    return out[:, :q.shape[1]].contiguous(), out[:, q.shape[1]:].contiguous()
