"""Stable Diffusion 3 and 3.5: what is swapped in ``SD3Transformer2DModel`` (and in whatever else is built of ``JointTransformerBlock``)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.normalization import SD35AdaLayerNormZeroX
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import nn

from fusewire.models import layers
from fusewire.models.attention import attention
from fusewire.models.layers import How, plain_layer_norm
from fusewire.models.mmdit import joint_block
from fusewire.swap.families import Candidate, Family
from fusewire.swap.fused import ANNOUNCE, MAKERS, announce_block, stock_of, unknown_forward
from fusewire.swap.parts import NORMS, attention_candidates, candidate, described, feed_forward_candidates, norm_candidates

OPS = ("adaln_modulate", "adaln_modulate_dual", "gate_residual", "gate_residual_adaln", "qk_norm_rope", "attention", "linear")

# The stock methods that our forwards stand for, as diffusers 0.40 to 0.42 has them.
BLOCK = {JointTransformerBlock.forward: ("f12a42101b07",)}
ADALN_ZERO_X = {SD35AdaLayerNormZeroX.forward: ("4f1a3bc7c343",)}
ATTENTION = {Attention.forward: ("9b9838fe95f4",), JointAttnProcessor2_0.__call__: ("42343d48f37f",)}


def _block(how: How) -> dict:
    def forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
        if self._chunk_size is not None:
            return JointTransformerBlock.forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
        return joint_block(self, hidden_states, encoder_hidden_states, temb, how, joint_attention_kwargs)

    return {"forward": forward}


def _adaln_zero_x(how: How) -> dict:
    def forward(self, hidden_states, emb=None):
        if not plain_layer_norm(self.norm):
            return SD35AdaLayerNormZeroX.forward(self, hidden_states, emb)
        return layers.ada_layer_norm_zero_x(self, hidden_states, emb, how)

    return {"forward": forward}


def _attention(how: How) -> dict:
    without_attention = How(how.numerics, linear=how.linear)

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **cross_attention_kwargs):
        # A processor that was set meanwhile (IP-Adapter, PAG, a user's own) does its own work; stock warns of keywords that it ignores.
        if cross_attention_kwargs or type(self.processor) is not JointAttnProcessor2_0:
            return Attention.forward(self, hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)
        # A hook may run this with a function mode that intercepts PyTorch's attention (perturbed attention guidance): then that is what is called.
        intercepted = how.attention and torch._C._len_torch_function_stack() and not layers.untouched(self)
        return attention(self, hidden_states, encoder_hidden_states, without_attention if intercepted else how)

    return {"forward": forward}


MAKERS.update({JointTransformerBlock: _block, SD35AdaLayerNormZeroX: _adaln_zero_x, Attention: _attention})
NORMS[SD35AdaLayerNormZeroX] = (ADALN_ZERO_X, "adaln_modulate_dual")
ANNOUNCE[JointTransformerBlock] = announce_block


def candidates(name: str, instance, how: How) -> Iterator[Candidate]:
    """A ``JointTransformerBlock`` with its parts, or the final norm of an ``SD3Transformer2DModel``."""
    stock = stock_of(instance) or type(instance)
    dot = f"{name}." if name else ""
    if stock is SD3Transformer2DModel:
        yield from norm_candidates(f"{dot}norm_out", instance.norm_out, how)
    if stock is not JointTransformerBlock:
        return
    yield candidate(name or "block", instance, ("gate_residual", "gate_residual_adaln"), how, unknown_forward(BLOCK))
    for part in ("norm1", "norm1_context"):
        yield from norm_candidates(dot + part, getattr(instance, part), how)
    for part in ("attn", "attn2"):
        if getattr(instance, part) is not None:
            yield from _attention_candidates(dot + part, getattr(instance, part), how)
    for part in ("ff", "ff_context"):
        if getattr(instance, part) is not None:
            yield from feed_forward_candidates(dot + part, getattr(instance, part), how)


def _attention_candidates(name: str, module: nn.Module, how: How) -> Iterator[Candidate]:
    stock, reason = stock_of(module) or type(module), ""
    if stock is not Attention:
        reason = f"{type(module).__name__} is not an attention layer that we know"
    elif type(module.processor) is not JointAttnProcessor2_0:
        reason = f"its processor {type(module.processor).__name__} is kept"
    else:
        reason = unknown_forward(ATTENTION) or _unusual_norm(module)
    has_norm = stock is Attention and module.norm_q is not None
    yield from attention_candidates(name, module, how, stock, has_norm, reason,
                                    ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"))


def _unusual_norm(module: nn.Module) -> str:
    """Why this attention's QK norm is none that we know; a norm with hooks is one (it is then called)."""
    for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        norm = getattr(module, part, None)
        if norm is not None and (type(norm) not in layers.RMS_NORMS or norm.weight is None or norm.bias is not None):
            return f"its {part} is {described(norm)}, not an RMSNorm with weight that we know"
    return ""


FAMILY = Family("sd3", OPS, candidates)
