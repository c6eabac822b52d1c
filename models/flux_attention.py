"""FLUX.1's attention over diffusers' attribute names: ``torch.nn.RMSNorm`` of q and k, then a rotary embedding, over [text, image]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from fusewire import ops
from fusewire.kernels.dispatch import recording
from fusewire.models.layers import How, linear, projected_out, untouched


class FluxAttention(nn.Module):
    """The projections of one attention layer; with ``context`` also those of the text stream, without it none for the output."""

    fused_projections = False  # diffusers packs q, k and v into one linear on demand

    def __init__(self, channels: int, heads: int, context: bool, how: How = How()):
        super().__init__()
        self.heads, self.head_dim, self.how = heads, channels // heads, how

        def norm():
            return nn.RMSNorm(self.head_dim, eps=1e-6)

        self.processor: nn.Module | None = None  # an IP-Adapter's, where there is one
        self.norm_q, self.norm_k = norm(), norm()
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        if context:
            self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])
            self.norm_added_q, self.norm_added_k = norm(), norm()
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(channels, channels) for _ in range(3))
            self.to_add_out = nn.Linear(channels, channels)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, image_rotary_emb=None, pictures=None):
        """[B, T, C] -> [B, T, C] (no output projection), or with the text stream [B, L, C] -> ([B, T, C], [B, L, C]), and a third [B, T, C] of
        ``pictures`` (``ip_adapter.Pictures``) where an IP-Adapter's scale is not 0."""
        return flux_attention(self, hidden_states, encoder_hidden_states, image_rotary_emb, self.how, pictures=pictures)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


def flux_attention(module, x, context, rope, how: How, attend: Callable | None = None, pictures=None):
    """The whole layer: projections, norms, rotation, attention over [context, x], output projections where there is a context.

    Args:
        rope: (cos, sin), each float32 [L + T, D], every value twice; or None.
        attend: PyTorch's attention of (q, k, v), each [B, L + T, H, D], to use where ``how`` leaves attention to it.
        pictures: what ``module.processor``, of our own, attends to with the normed q before its rotation.
    """
    q, k, v = _project(module, x, ("to_q", "to_k", "to_v"), "to_qkv", how)
    if context is None:
        gains = _gains(module.norm_q, module.norm_k, q.dtype) if how.attention else None
        if gains is not None:  # the norm and the rotation within attention
            return ops.attention(q, k, v, q_weight=gains[0], k_weight=gains[1], rope=_pairs(rope), eps=gains[2]).flatten(2)
        q, k = _normed(module.norm_q, module.norm_k, q, k, _pairs(rope), how)
        return (ops.attention(q, k, v) if how.attention else (attend or _sdpa)(q, k, v)).flatten(2)
    q2, k2, v2 = _project(module, context, ("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv", how)
    adapts = pictures is not None and module.processor is not None
    adapted = module.processor(module.norm_q(q), None, pictures) if adapts else None
    tokens = context.shape[1]
    pairs2, pairs = _pairs(rope, end=tokens), _pairs(rope, start=tokens)
    if how.attention:
        gains, gains2 = _gains(module.norm_q, module.norm_k, q.dtype), _gains(module.norm_added_q, module.norm_added_k, q2.dtype)
        within = {}
        if gains is not None and gains2 is not None and gains[2] == gains2[2]:
            within = dict(q_weight=gains[0], k_weight=gains[1], q2_weight=gains2[0], k2_weight=gains2[1], rope=pairs, rope2=pairs2, eps=gains[2])
        else:
            q, k = _normed(module.norm_q, module.norm_k, q, k, pairs, how)
            q2, k2 = _normed(module.norm_added_q, module.norm_added_k, q2, k2, pairs2, how)
        out, out2 = (part.flatten(2) for part in ops.joint_attention(q, k, v, q2, k2, v2, **within))
    else:
        q, k = _joint(module, (q2, k2), (q, k), pairs2, pairs, how)
        both = (attend or _sdpa)(q, k, torch.cat([v2, v], dim=1)).flatten(2)
        out2, out = both.split_with_sizes([tokens, both.shape[1] - tokens], dim=1)
        if not adapts:  # as stock, which leaves them as they lie beside an IP-Adapter: another kernel with other bits multiplies them then
            out2, out = out2.contiguous(), out.contiguous()
    out = projected_out(module, out, how)
    streams = out, linear(module.to_add_out, out2, how)
    return streams if adapted is None else (*streams, adapted)


def _project(module, x, names: tuple[str, str, str], packed: str, how: How):
    """-> q, k, v [B, T, H, D]; the number of heads is what the projections give (fewer under tensor parallelism)."""
    if module.fused_projections:
        parts = linear(getattr(module, packed), x, how).chunk(3, dim=-1)
    else:
        parts = (linear(getattr(module, name), x, how) for name in names)
    return tuple(part.unflatten(-1, (-1, module.head_dim)) for part in parts)


def _pairs(rope, start: int = 0, end: int | None = None):
    """The tables of some tokens, each value once."""
    return None if rope is None else tuple(table[start:end, ::2] for table in rope)


def _gains(norm_q, norm_k, dtype: torch.dtype):
    """(q_weight, k_weight, eps) of norms that may be read, or None: they are called then."""
    if type(norm_q) is nn.RMSNorm and type(norm_k) is nn.RMSNorm and untouched(norm_q) and untouched(norm_k) and norm_q.eps == norm_k.eps:
        weights = norm_q.weight, norm_k.weight
        if norm_q.eps is not None and all(weight is not None and weight.dtype is dtype for weight in weights):
            return *weights, norm_q.eps
    return None


def _normed(norm_q, norm_k, q, k, pairs, how: How):
    """The norms of q and k, and their rotation: one pass."""
    gains = _gains(norm_q, norm_k, q.dtype)
    if gains is None:
        q, k = norm_q(q), norm_k(k)
        return (q, k) if pairs is None else ops.qk_norm_rope(q, k, rope=pairs, norm="none", numerics=how.numerics)
    return ops.qk_norm_rope(q, k, *gains[:2], rope=pairs, eps=gains[2], norm="torch_rms", numerics=how.numerics)


def _joint(module, context, image, context_pairs, image_pairs, how: How):
    """q and k of both streams, [context, image]; written where a concatenation would have copied them to, where nothing records a graph."""
    streams = ((module.norm_added_q, module.norm_added_k, *context, context_pairs), (module.norm_q, module.norm_k, *image, image_pairs))
    q = image[0]
    if recording() or any(_gains(*stream[:2], q.dtype) is None for stream in streams):
        parts = [_normed(*stream, how) for stream in streams]
        return (torch.cat(both, dim=1) for both in zip(*parts))
    batch, _, heads, channels = q.shape
    tokens = context[0].shape[1]
    joint_q, joint_k = q.new_empty((2, batch, tokens + q.shape[1], heads, channels))
    for (norm_q, norm_k, q, k, pairs), part in zip(streams, (slice(0, tokens), slice(tokens, None))):
        *weights, eps = _gains(norm_q, norm_k, q.dtype)
        ops.qk_norm_into(q, k, *weights, joint_q[:, part], joint_k[:, part], rope=pairs, eps=eps, norm="torch_rms", numerics=how.numerics)
    return joint_q, joint_k


def _sdpa(q, k, v) -> torch.Tensor:
    """PyTorch's attention on [B, T, H, D]."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
