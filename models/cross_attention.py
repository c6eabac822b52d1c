"""Self- and cross-attention of U-Nets, DiT and autoencoders over diffusers' attribute names: no QK norm; of tokens or of pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fusewire import ops
from fusewire.models.layers import How, linear, projected_out


class CrossAttention(nn.Module):
    """One attention layer: of tokens to themselves, or to a context of ``context_channels``."""

    spatial_norm = None
    residual_connection, rescale_output_factor = False, 1.0

    def __init__(self, channels: int, heads: int, head_dim: int, context_channels: int | None = None, bias: bool = False, how: How = How(),
                 out_bias: bool = True):
        super().__init__()
        self.heads, self.how, inner = heads, how, heads * head_dim
        self.group_norm: nn.Module | None = None  # on the instance: a class's attribute would hide the module that a subclass puts here
        self.processor: nn.Module | None = None  # an IP-Adapter's, where there is one
        self.to_q = nn.Linear(channels, inner, bias=bias)
        self.to_k, self.to_v = (nn.Linear(context_channels or channels, inner, bias=bias) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(inner, channels, bias=out_bias), nn.Dropout(0.0)])

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
                pictures=None):
        """[B, T, C], [B, L, C'] or None, a mask added to the logits [B, H or 1, T or 1, L] or None -> [B, T, C]. ``pictures``: what an IP-Adapter of this
        layer sees (``ip_adapter.Pictures``); a layer without one does not look at them."""
        return cross_attention(self, hidden_states, encoder_hidden_states, attention_mask, self.how, pictures=pictures)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class PictureAttention(CrossAttention):
    """Self-attention of the positions of a picture, behind a GroupNorm (``groups`` None: none), with a residual: of autoencoders and ADM's U-Net."""

    residual_connection = True

    def __init__(self, channels: int, heads: int, groups: int | None, eps: float, how: How = How()):
        super().__init__(channels, heads, channels // heads, bias=True, how=how)
        if groups is not None:
            self.group_norm = nn.GroupNorm(groups, channels, eps=eps)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor | None = None):
        """[B, C, H, W] -> [B, C, H, W]."""
        return cross_attention(self, hidden_states, None, None, self.how)


def cross_attention(module, x, context, mask, how: How, temb=None, pictures=None):
    """The whole layer: x [B, T, C] or a picture [B, C, H, W], which is taken as H * W tokens; context [B, L, C'] or None for x itself.

    ``mask``: [B, heads or 1, T or 1, L], added to the logits, or None. ``temb``: what a spatial norm looks at.
    ``pictures``: what ``module.processor``, of our own, adds to the attention.
    """
    residual = x
    if module.spatial_norm is not None:
        x = module.spatial_norm(x, temb)
    picture = x.shape if x.dim() == 4 else None
    if picture is not None:
        x = x.flatten(2).transpose(1, 2)
    if module.group_norm is not None:
        x = module.group_norm(x.transpose(1, 2)).transpose(1, 2)
    context = x if context is None else context
    q, k, v = linear(module.to_q, x, how), linear(module.to_k, context, how), linear(module.to_v, context, how)
    q, k, v = (part.unflatten(-1, (module.heads, -1)) for part in (q, k, v))
    out = attended(q, k, v, mask, how)
    if pictures is not None and module.processor is not None:
        out = module.processor(q, out, pictures)
    out = projected_out(module, out, how)
    if picture is not None:
        out = out.transpose(1, 2).reshape(picture)
    if module.residual_connection:
        out = out + residual
    return out if module.rescale_output_factor == 1 else out / module.rescale_output_factor


def attended(q, k, v, mask, how: How) -> torch.Tensor:
    """[B, T, H, D] -> [B, T, H * D], by ``ops.attention`` where that is permitted, otherwise by PyTorch's."""
    if how.attention:
        return ops.attention(q, k, v, mask=mask).flatten(2)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2).to(q.dtype).flatten(2)
