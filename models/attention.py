"""Attention of one or two streams over diffusers' attribute names (``to_q``, ``add_q_proj``, ``norm_added_q``, ...)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fusewire import ops
from fusewire.kernels.dispatch import recording
from fusewire.models.layers import RMS_NORMS, How, RMSNorm, linear, projected_out, untouched


class Attention(nn.Module):
    """The projections of one attention layer; with ``context`` also those of the text stream (``pre_only``: its output is not used)."""

    def __init__(self, channels: int, heads: int, qk_norm: str | None, context: bool, pre_only: bool = False, how: How = How()):
        super().__init__()
        self.heads, self.context_pre_only, self.how = heads, pre_only, how
        head_dim = channels // heads

        def norm():
            return None if qk_norm is None else RMSNorm(head_dim, eps=1e-6)

        self.processor: nn.Module | None = None  # an IP-Adapter's, where there is one
        self.norm_q, self.norm_k = norm(), norm()
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])
        if context:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(channels, channels) for _ in range(3))
            self.to_add_out = None if pre_only else nn.Linear(channels, channels)
            self.norm_added_q, self.norm_added_k = norm(), norm()

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, pictures=None):
        """[B, T, C] -> [B, T, C], or with the text stream [B, L, C] -> ([B, T, C], [B, L, C]). ``pictures``: what an IP-Adapter of this layer sees
        (``ip_adapter_sd3.TimedPictures``)."""
        return attention(self, hidden_states, encoder_hidden_states, self.how, pictures)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


def attention(module, x, context, how: How, pictures=None):
    """The whole layer: projections, norms, attention over [x, context], output projections (``pre_only``: none for the context).

    ``pictures``: what ``module.processor``, of our own, adds to the attention of x.
    """
    out, out_context, adapted = _attend(module, x, context, how, pictures)
    if adapted is not None:
        out = module.processor.added(out, adapted)
    out = projected_out(module, out, how)
    if context is None:
        return out
    return out, out_context if module.context_pre_only else linear(module.to_add_out, out_context, how)


def _attend(module, x, context, how: How, pictures):
    """-> (out [B, T, C], context's [B, L, C] or None, the IP-Adapter's [B, T, C] or None), heads merged, before the output projections."""
    tokens = x.shape[1]
    q, k, v = _project(module, x, module.to_q, module.to_k, module.to_v, how)
    adapted = None if pictures is None or module.processor is None else module.processor(q, k, v, pictures)
    q, k, gains = _gains(q, k, module.norm_q, module.norm_k)
    if context is None:
        if how.attention:
            q_weight, k_weight, eps = gains
            return ops.attention(q, k, v, q_weight=q_weight, k_weight=k_weight, eps=eps).flatten(2), None, adapted
        q, k = _normed(q, k, gains, how)
        return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)), None, adapted

    q2, k2, v2 = _project(module, context, module.add_q_proj, module.add_k_proj, module.add_v_proj, how)
    q2, k2, gains2 = _gains(q2, k2, module.norm_added_q, module.norm_added_k)
    if how.attention:
        if gains[2] != gains2[2]:  # one stream's norm was called, or their eps differ: the op takes one eps
            (q, k), (q2, k2), gains, gains2 = _normed(q, k, gains, how), _normed(q2, k2, gains2, how), _NONE, _NONE
        out, out2 = ops.joint_attention(q, k, v, q2, k2, v2, q_weight=gains[0], k_weight=gains[1], q2_weight=gains2[0], k2_weight=gains2[1], eps=gains[2])
        return out.flatten(2), out2.flatten(2), adapted

    if gains[0] is None or gains2[0] is None or recording() or q.dtype is not gains[0].dtype:
        (q, k), (q2, k2) = _normed(q, k, gains, how), _normed(q2, k2, gains2, how)
        q, k = (torch.cat([one.transpose(1, 2), two.transpose(1, 2)], dim=2) for one, two in ((q, q2), (k, k2)))
    else:  # the norms write where the concatenation would have copied to
        batch, _, heads, channels = q.shape
        joint_q, joint_k = q.new_empty((2, batch, heads, tokens + q2.shape[1], channels))
        rows_q, rows_k = joint_q.transpose(1, 2), joint_k.transpose(1, 2)
        ops.qk_norm_into(q, k, *gains[:2], rows_q[:, :tokens], rows_k[:, :tokens], eps=gains[2], numerics=how.numerics)
        ops.qk_norm_into(q2, k2, *gains2[:2], rows_q[:, tokens:], rows_k[:, tokens:], eps=gains2[2], numerics=how.numerics)
        q, k = joint_q, joint_k
    out = sdpa(q, k, torch.cat([v.transpose(1, 2), v2.transpose(1, 2)], dim=2))
    return out[:, :tokens], out[:, tokens:], adapted


_NONE = (None, None, 1e-6)


def _project(module, x, to_q, to_k, to_v, how: How):
    """-> q, k, v [B, T, H, D], without norms."""
    q, k, v = linear(to_q, x, how), linear(to_k, x, how), linear(to_v, x, how)
    shape = (q.shape[0], -1, module.heads, k.shape[-1] // module.heads)
    return q.view(shape), k.view(shape), v.view(shape)


def _gains(q, k, norm_q, norm_k):
    """-> q, k, and the gains (q_weight, k_weight, eps) of the norms that remain to be done; norms that may not be read are called."""
    if norm_q is None and norm_k is None:
        return q, k, _NONE
    if type(norm_q) in RMS_NORMS and type(norm_k) in RMS_NORMS and norm_q.eps == norm_k.eps and untouched(norm_q) and untouched(norm_k):
        q_weight, k_weight = norm_q.weight, norm_k.weight
        if q_weight is not None and k_weight is not None:
            return q, k, (q_weight, k_weight, norm_q.eps)
    # Called as stock calls them, on [B, H, T, D].
    q = q if norm_q is None else norm_q(q.transpose(1, 2)).transpose(1, 2)
    k = k if norm_k is None else norm_k(k.transpose(1, 2)).transpose(1, 2)
    return q, k, _NONE


def _normed(q, k, gains, how: How):
    q_weight, k_weight, eps = gains
    return (q, k) if q_weight is None else ops.qk_norm_rope(q, k, q_weight, k_weight, eps=eps, numerics=how.numerics)


def sdpa(q, k, v) -> torch.Tensor:
    """PyTorch's attention on [B, H, T, D] -> [B, T, H * D] in q's dtype (autocast gives it another)."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=False).transpose(1, 2).flatten(2).to(q.dtype)
