"""diffusers' ``BasicTransformerBlock``: of the SD and SDXL U-Nets (affine norms, cross-attention), of DiT (adaLN-Zero) and of PixArt (adaLN-single).

Submodules are called; the sums, gates and norms between them are fused. Attention layers take more keywords from ``attention_kwargs``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fusewire import ops
from fusewire.kernels.checks import autocasts, kind_of
from fusewire.models.feed_forward import feed_forward_residual
from fusewire.models.layers import How, for_all, gate_residual_norm, norm_input, plain_layer_norm, untouched


def affine_block(block, x, how: How, context=None, mask=None, context_mask=None, attention_kwargs: Mapping | None = None):
    """Self-attention (or, ``only_cross_attention``, attention to the context), attention to the context where there is a second one, feed-forward; each
    behind a LayerNorm with weight and bias. x [B, T, C], context [B, L, C'] -> [B, T, C]."""
    more = attention_kwargs or {}
    attended = block.attn1(block.norm1(x), encoder_hidden_states=context if block.only_cross_attention else None, attention_mask=mask, **more)
    if block.attn2 is not None:
        x, y = sum_norm(block.norm2, x, attended, how)
        attended = block.attn2(y, encoder_hidden_states=context, attention_mask=context_mask, **more)
    x, y = sum_norm(block.norm3, x, attended, how)
    return feed_forward_residual(block.ff, y, None, x, how)


def zero_block(block, x, how: How, timestep=None, class_labels=None, mask=None, attention_kwargs: Mapping | None = None):
    """DiT's: adaLN-Zero from the timestep and the class label, which ``norm1`` embeds itself."""
    (x,) = for_all(max(len(x), *(t.numel() for t in (timestep, class_labels) if isinstance(t, torch.Tensor))), x)
    y, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
    attended = block.attn1(y, encoder_hidden_states=None, attention_mask=mask, **(attention_kwargs or {}))
    x, y = gate_residual_norm(block.norm3, x, attended, gate, shift_mlp, scale_mlp, how)
    return feed_forward_residual(block.ff, y, gate_mlp, x, how)


def single_block(block, x, how: How, timestep, context=None, mask=None, context_mask=None, attention_kwargs: Mapping | None = None):
    """PixArt's: adaLN-single, a table of the block's own added to one modulation of all blocks, ``timestep`` [B, 6 C]. No norm stands before the
    attention to the context."""
    more = attention_kwargs or {}
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (block.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)).unbind(1)
    attended = block.attn1(_modulated(block.norm1, x, shift, scale, how), encoder_hidden_states=context if block.only_cross_attention else None,
                           attention_mask=mask, **more)
    if block.attn2 is None:
        x, y = gate_residual_norm(block.norm2, x, attended, gate, shift_mlp, scale_mlp, how)
    else:
        x = ops.gate_residual(x, attended, gate, numerics=how.numerics)
        x = block.attn2(x, encoder_hidden_states=context, attention_mask=context_mask, **more) + x
        y = _modulated(block.norm2, x, shift_mlp, scale_mlp, how)
    return feed_forward_residual(block.ff, y, gate_mlp, x, how)


def _modulated(norm: nn.Module, x, shift, scale, how: How) -> torch.Tensor:
    if plain_layer_norm(norm):
        return ops.adaln_modulate(norm_input(x), shift, scale, eps=norm.eps, numerics=how.numerics)
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def sum_norm(norm: nn.Module, x, y, how: How) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + y, norm(x + y)): in one pass for a LayerNorm with weight and bias, as a gated sum whose gate is 1 and a modulation that changes nothing. (On a
    GPU the two calls are as fast, and cheaper to launch.)"""
    if x.is_cpu and type(norm) is nn.LayerNorm and norm.weight is not None and norm.weight.dtype is x.dtype and norm.bias is not None and untouched(norm) \
            and not autocasts(kind_of(x)):
        zero, one = (value.expand(x.shape[0], x.shape[2]) for value in (x.new_zeros(()), x.new_ones(())))
        return ops.gate_residual_adaln(x, y, one, zero, zero, weight=norm.weight, bias=norm.bias, eps=norm.eps, numerics=how.numerics)
    x = y + x
    return x, norm(x)
