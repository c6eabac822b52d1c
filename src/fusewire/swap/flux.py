"""FLUX.1: what is swapped in ``FluxTransformer2DModel``, and in whatever else is built of its blocks (its ControlNet)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import (FluxAttention, FluxAttnProcessor, FluxPosEmbed, FluxSingleTransformerBlock,
                                                            FluxTransformer2DModel, FluxTransformerBlock, _get_fused_projections, _get_projections,
                                                            _get_qkv_projections)
from torch import nn

from fusewire.models import layers
from fusewire.models.flux import double_block, single_block
from fusewire.models.flux_attention import flux_attention
from fusewire.models.layers import How
from fusewire.swap.custom import called_linear, described
from fusewire.swap.families import Candidate, Family
from fusewire.swap.fused import ANNOUNCE, CARRIES, MAKERS, announce_block, stock_of, unknown_forward
from fusewire.swap.parts import attention_layer, candidate, feed_forward_candidates, norm_candidates

OPS = ("adaln_modulate", "gate_residual", "gate_residual_adaln", "qk_norm_rope", "attention", "linear")

# The stock functions that our forwards stand for, as diffusers 0.40 to 0.42 has them.
BLOCK = {FluxTransformerBlock.forward: ("e988c2bc5431",)}
SINGLE_BLOCK = {FluxSingleTransformerBlock.forward: ("bdc8d269208a",)}
ATTENTION = {FluxAttention.forward: ("73e37aad0a59",), FluxAttnProcessor.__call__: ("eee98f764420",), _get_qkv_projections: ("61e0d276c65c",),
             _get_projections: ("387af60d181a",), _get_fused_projections: ("f33214123f15",), FluxPosEmbed.forward: ("df63b1d3b9cd",),
             apply_rotary_emb: ("ac820aef4ed2",)}

_CALL = FluxAttnProcessor.__call__


def _block(how: How) -> dict:
    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        return double_block(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, how, joint_attention_kwargs)

    return {"forward": forward}


def _single_block(how: How) -> dict:
    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        return single_block(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, how, joint_attention_kwargs)

    return {"forward": forward}


def _attention(how: How) -> dict:
    without_attention = How(how.numerics, linear=how.linear)

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **kwargs):
        processor = self.processor
        # A processor that was set meanwhile (IP-Adapter, a user's own) does its own work; so does stock for keywords of which it warns.
        known = type(processor) is FluxAttnProcessor and _as_made() and _as_verified(image_rotary_emb, hidden_states)
        if not known or attention_mask is not None or kwargs:
            return FluxAttention.forward(self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs)

        def attend(q, k, v):
            return dispatch_attention_fn(q, k, v, backend=processor._attention_backend, parallel_config=processor._parallel_config).to(q.dtype)

        # A backend that the user chose, and attention that is split over devices, stay; so does one that is somebody's own.
        chosen = how.attention and (_chosen(processor) or layers.intercepted(self))
        return flux_attention(self, hidden_states, encoder_hidden_states, image_rotary_emb, without_attention if chosen else how, attend)

    return {"forward": forward}


def _as_made() -> bool:
    """Whether what the processor calls is what it came with."""
    return (FluxAttnProcessor.__call__ is _CALL and transformer_flux.dispatch_attention_fn is dispatch_attention_fn
            and transformer_flux.apply_rotary_emb is apply_rotary_emb)


def _chosen(processor) -> bool:
    backend = processor._attention_backend or _AttentionBackendRegistry._active_backend
    return processor._parallel_config is not None or backend != AttentionBackendName.NATIVE


def _as_verified(rope, x: torch.Tensor) -> bool:
    """The tables are those of ``FluxPosEmbed``: float32, one row a token (a user's own may be anything)."""
    return rope is None or isinstance(rope, tuple) and all(table.dtype is torch.float32 and table.dim() == 2 and table.device == x.device for table in rope)


MAKERS.update({FluxTransformerBlock: _block, FluxSingleTransformerBlock: _single_block, FluxAttention: _attention})
ANNOUNCE.update({FluxTransformerBlock: announce_block, FluxSingleTransformerBlock: announce_block})
CARRIES.update({FluxTransformerBlock: ("gate_residual", "gate_residual_adaln"), FluxSingleTransformerBlock: ("gate_residual",),
                FluxAttention: ("qk_norm_rope", "attention"), FluxTransformer2DModel: ("adaln_modulate",)})


def candidates(name: str, instance, how: How) -> Iterator[Candidate]:
    """A block of either kind with its parts, or the final norm of a ``FluxTransformer2DModel``."""
    stock = stock_of(instance) or type(instance)
    dot = f"{name}." if name else ""
    if stock is FluxTransformer2DModel:
        yield from norm_candidates(f"{dot}norm_out", instance.norm_out, how)
    elif stock is FluxTransformerBlock:
        yield candidate(name or "block", instance, ("gate_residual", "gate_residual_adaln"), how, unknown_forward(BLOCK))
        for part in ("norm1", "norm1_context"):
            yield from norm_candidates(dot + part, getattr(instance, part), how)
        yield from _attention_candidates(f"{dot}attn", instance.attn, how)
        for part in ("ff", "ff_context"):
            yield from feed_forward_candidates(dot + part, getattr(instance, part), how)
    elif stock is FluxSingleTransformerBlock:
        yield candidate(name or "block", instance, ("linear",) if how.linear else ("gate_residual",), how, unknown_forward(SINGLE_BLOCK))
        yield from norm_candidates(f"{dot}norm", instance.norm, how)
        yield from _attention_candidates(f"{dot}attn", instance.attn, how)
        for part in ("proj_mlp", "proj_out"):
            yield from called_linear(dot + part, getattr(instance, part), how)


def _attention_candidates(name: str, module: nn.Module, how: How) -> Iterator[Candidate]:
    stock, reason = stock_of(module) or type(module), ""
    if stock is not FluxAttention:
        reason = f"{type(module).__name__} is not an attention layer that we know"
    elif type(module.processor) is not FluxAttnProcessor:
        reason = f"its processor {type(module.processor).__name__} is kept"
    else:
        reason = unknown_forward(ATTENTION) or ("" if _as_made() else "a function of transformer_flux was replaced") or _unusual_norm(module)
    yield from attention_layer(name, module, how, True, reason,
                               ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"))


def _unusual_norm(module: nn.Module) -> str:
    """Why this attention's QK norm is none that we know; a norm with hooks is one (it is then called)."""
    for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        norm = getattr(module, part, None)
        if norm is not None and type(norm) is not nn.RMSNorm:
            return f"its {part} is {described(norm)}, not torch's RMSNorm"
    return ""


FAMILY = Family("flux", OPS, candidates)
