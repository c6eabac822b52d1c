"""diffusers' ``Attention`` layer, whose processor says what it computes: the joint attention of SD3, or the self- and cross-attention of U-Nets, DiT,
PixArt and autoencoders."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from torch import nn

from fusewire.models import layers
from fusewire.models.attention import attention
from fusewire.models.cross_attention import cross_attention
from fusewire.models.layers import How
from fusewire.swap.custom import described
from fusewire.swap.families import Candidate
from fusewire.swap.fused import CARRIES, MAKERS, stock_of, unknown_forward
from fusewire.swap.parts import attention_layer

# As diffusers 0.40 to 0.42 has them.
JOINT = {Attention.forward: ("9b9838fe95f4",), JointAttnProcessor2_0.__call__: ("42343d48f37f",)}
CROSS = {Attention.forward: ("9b9838fe95f4",), AttnProcessor2_0.__call__: ("bdc4598ae686",), Attention.prepare_attention_mask: ("3a67553a79f1",)}
VERIFIED = {JointAttnProcessor2_0: JOINT, AttnProcessor2_0: CROSS}
CALLS = {kind: kind.__call__ for kind in VERIFIED}


def _maker(how: How) -> dict:
    without_attention = How(how.numerics, linear=how.linear)

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **cross_attention_kwargs):
        # A processor that was set meanwhile (IP-Adapter, PAG, a user's own) does its own work; stock warns of keywords that it ignores.
        kind = type(self.processor)
        stocks = kind is AttnProcessor2_0 and (not how.attention or _unusual(self))
        if stocks or kind.__call__ is not CALLS.get(kind) or cross_attention_kwargs.keys() - {"temb"}:
            return Attention.forward(self, hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)
        chosen = without_attention if how.attention and layers.intercepted(self) else how
        if kind is JointAttnProcessor2_0:
            return attention(self, hidden_states, encoder_hidden_states, chosen)
        if attention_mask is not None:
            keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            length = keys.shape[1] if keys.dim() == 3 else keys.shape[2:].numel()
            attention_mask = self.prepare_attention_mask(attention_mask, length, keys.shape[0])
            attention_mask = attention_mask.view(keys.shape[0], self.heads, -1, attention_mask.shape[-1])
        return cross_attention(self, hidden_states, encoder_hidden_states, attention_mask, chosen, **cross_attention_kwargs)

    return {"forward": forward}


MAKERS[Attention] = _maker
CARRIES[Attention] = ("attention",)


def attention_candidates(name: str, module: nn.Module, how: How) -> Iterator[Candidate]:
    """An ``Attention`` with either of the processors that we know."""
    stock, reason = stock_of(module) or type(module), ""
    if stock is not Attention:
        reason = f"{type(module).__name__} is not an attention layer that we know"
    elif type(module.processor) not in VERIFIED:
        reason = f"its processor {type(module.processor).__name__} is kept"
    elif type(module.processor) is JointAttnProcessor2_0:
        reason = unknown_forward(JOINT) or _unusual_norm(module)
    else:
        reason = unknown_forward(CROSS) or _unusual(module)
    has_norm = stock is Attention and module.norm_q is not None
    yield from attention_layer(name, module, how, has_norm, reason, ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"))


def _unusual(module: nn.Module) -> str:
    """Why an ``AttnProcessor2_0`` computes something else on this layer than we do."""
    for part in ("norm_q", "norm_k", "norm_cross"):
        if getattr(module, part, None) is not None:
            return f"it has a {part}, which we do not know with this processor"
    return "it packs its projections into one" if getattr(module, "fused_projections", False) else ""


def _unusual_norm(module: nn.Module) -> str:
    """Why this attention's QK norm is none that we know; a norm with hooks is one (it is then called)."""
    for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        norm = getattr(module, part, None)
        if norm is not None and (type(norm) not in layers.RMS_NORMS or norm.weight is None or norm.bias is not None):
            return f"its {part} is {described(norm)}, not an RMSNorm with weight that we know"
    return ""
