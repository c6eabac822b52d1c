"""Stable Diffusion 3 and 3.5: what is swapped in ``SD3Transformer2DModel`` (and in whatever else is built of ``JointTransformerBlock``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward, JointTransformerBlock
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, RMSNorm, SD35AdaLayerNormZeroX
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import nn

from fusewire.models import layers
from fusewire.models.attention import attention
from fusewire.models.layers import How, plain_layer_norm, plain_linear
from fusewire.models.mmdit import joint_block
from fusewire.swap.families import Candidate, Family
from fusewire.swap.fused import ANNOUNCE, MAKERS, fused_class, stock_of, unknown_forward

OPS = ("adaln_modulate", "adaln_modulate_dual", "gate_residual", "gate_residual_adaln", "qk_norm_rope", "attention", "linear")

# The stock methods that our forwards stand for, as diffusers 0.40 to 0.42 has them.
BLOCK = {JointTransformerBlock.forward: ("f12a42101b07",)}
ADALN_ZERO = {AdaLayerNormZero.forward: ("690b44401a6e",)}
ADALN_ZERO_X = {SD35AdaLayerNormZeroX.forward: ("4f1a3bc7c343",)}
ADALN_CONTINUOUS = {AdaLayerNormContinuous.forward: ("55cf4ec15e80",)}
ATTENTION = {Attention.forward: ("9b9838fe95f4",), JointAttnProcessor2_0.__call__: ("42343d48f37f",)}
RMS_NORM = {RMSNorm.forward: ("692c06909233", "fa67df9e7dd9")}
FEED_FORWARD = {FeedForward.forward: ("1c9cc6e8159c",)}
GELU_PROJECTION = {GELU.forward: ("1e920b8c9a7d", "87ac7265011e"), GELU.gelu: ("c95d6b6161e5",)}

KEEPS_ATTENTION = "exact keeps PyTorch's attention, whose bits no other kernel gives; numerics='close' puts the fused attention here"
KEEPS_LINEAR = "exact keeps the stock matrix products; numerics='close' puts the fused linears with their epilogues here"

if not unknown_forward(RMS_NORM):
    layers.RMS_NORMS.add(RMSNorm)
if not unknown_forward(GELU_PROJECTION):
    layers.GELU_PROJECTIONS.add(GELU)


def _block(how: How) -> dict:
    def forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
        if self._chunk_size is not None:
            return JointTransformerBlock.forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
        return joint_block(self, hidden_states, encoder_hidden_states, temb, how, joint_attention_kwargs)

    return {"forward": forward}


def _adaln_zero(how: How) -> dict:
    def forward(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
        if self.emb is not None or not plain_layer_norm(self.norm):
            return AdaLayerNormZero.forward(self, x, timestep, class_labels, hidden_dtype, emb)
        return layers.ada_layer_norm_zero(self, x, emb, how)

    return {"forward": forward}


def _adaln_zero_x(how: How) -> dict:
    def forward(self, hidden_states, emb=None):
        if not plain_layer_norm(self.norm):
            return SD35AdaLayerNormZeroX.forward(self, hidden_states, emb)
        return layers.ada_layer_norm_zero_x(self, hidden_states, emb, how)

    return {"forward": forward}


def _adaln_continuous(how: How) -> dict:
    def forward(self, x, conditioning_embedding):
        if not plain_layer_norm(self.norm):
            return AdaLayerNormContinuous.forward(self, x, conditioning_embedding)
        return layers.ada_layer_norm_continuous(self, x, conditioning_embedding, how)

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


def _feed_forward(how: How) -> dict:
    def forward(self, hidden_states, *args, **kwargs):
        if args or kwargs:
            return FeedForward.forward(self, hidden_states, *args, **kwargs)
        hidden, output = layers.feed_forward_hidden(self, hidden_states, how)
        return layers.linear(output, hidden, how)

    return {"forward": forward, "takes_gate": True}


def _announce_block(fused: type) -> None:
    """diffusers' cache hooks look a block's class up in a registry; the subclass gets the entry of its stock class."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    TransformerBlockRegistry.register(fused, dataclasses.replace(TransformerBlockRegistry.get(JointTransformerBlock)))


MAKERS.update({JointTransformerBlock: _block, AdaLayerNormZero: _adaln_zero, SD35AdaLayerNormZeroX: _adaln_zero_x,
               AdaLayerNormContinuous: _adaln_continuous, Attention: _attention, FeedForward: _feed_forward})
ANNOUNCE[JointTransformerBlock] = _announce_block


def candidates(name: str, instance, how: How) -> Iterator[Candidate]:
    """A ``JointTransformerBlock`` with its parts, or the final norm of an ``SD3Transformer2DModel``."""
    stock = stock_of(instance) or type(instance)
    dot = f"{name}." if name else ""
    if stock is SD3Transformer2DModel:
        yield from _norm_candidates(f"{dot}norm_out", instance.norm_out, how)
    if stock is not JointTransformerBlock:
        return
    yield _candidate(name or "block", instance, ("gate_residual", "gate_residual_adaln"), how, unknown_forward(BLOCK))
    for part in ("norm1", "norm1_context"):
        yield from _norm_candidates(dot + part, getattr(instance, part), how)
    for part in ("attn", "attn2"):
        if getattr(instance, part) is not None:
            yield from _attention_candidates(dot + part, getattr(instance, part), how)
    for part in ("ff", "ff_context"):
        if getattr(instance, part) is not None:
            yield from _feed_forward_candidates(dot + part, getattr(instance, part), how)


def _candidate(name: str, instance, ops: tuple[str, ...], how: How, reason: str) -> Candidate:
    stock = stock_of(instance) or type(instance)
    return Candidate(name, instance, ops, None if reason else fused_class(stock, how), reason)


def _norm_candidates(name: str, norm: nn.Module, how: How) -> Iterator[Candidate]:
    stock = stock_of(norm) or type(norm)
    known = {AdaLayerNormZero: ADALN_ZERO, SD35AdaLayerNormZeroX: ADALN_ZERO_X, AdaLayerNormContinuous: ADALN_CONTINUOUS}.get(stock)
    op = "adaln_modulate_dual" if stock is SD35AdaLayerNormZeroX else "adaln_modulate"
    if known is None:
        yield Candidate(name, norm, (op,), None, f"{type(norm).__name__} is not a norm that we know")
        return
    reason = unknown_forward(known)
    if not reason and not (type(norm.norm) is nn.LayerNorm and norm.norm.weight is None):
        reason = f"its norm is {_described(norm.norm)}, not a LayerNorm without weight"
    if not reason and getattr(norm, "emb", None) is not None:
        reason = "it embeds class labels itself"
    yield _candidate(name, norm, (op,), how, reason)


def _attention_candidates(name: str, module: nn.Module, how: How) -> Iterator[Candidate]:
    stock = stock_of(module) or type(module)
    has_norm = stock is Attention and module.norm_q is not None
    ops = (("attention",) if how.attention else ("qk_norm_rope",) if has_norm else ()) + (("linear",) if how.linear else ())
    reason = ""
    if stock is not Attention:
        reason = f"{type(module).__name__} is not an attention layer that we know"
    elif type(module.processor) is not JointAttnProcessor2_0:
        reason = f"its processor {type(module.processor).__name__} is kept"
    else:
        reason = unknown_forward(ATTENTION) or _unusual_norm(module)
    if reason:
        yield Candidate(name, module, ops or ("attention",), None, reason)
        return
    if ops:
        yield _candidate(name, module, ops, how, "")
    if how.numerics == "exact":
        yield Candidate(name, module, ("attention",), None, KEEPS_ATTENTION, by_choice=True)
        yield Candidate(name, module, ("linear",), None, KEEPS_LINEAR, by_choice=True)
    if how.linear:
        for part in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            yield from _called_linear(f"{name}.{part}", getattr(module, part, None))
        yield from _called_linear(f"{name}.to_out.0", module.to_out[0])


def _feed_forward_candidates(name: str, module: nn.Module, how: How) -> Iterator[Candidate]:
    stock = stock_of(module) or type(module)
    if how.numerics == "exact":
        yield Candidate(name, module, ("linear",), None, KEEPS_LINEAR, by_choice=True)
        return
    if not how.linear:
        return
    if stock is not FeedForward:
        reason = f"{type(module).__name__} is not a feed-forward that we know"
    elif [type(part) for part in module.net[:2]] != [GELU, nn.Dropout] or len(module.net) != 3 or module.net[0].approximate != "tanh":
        reason = f"its layers are {', '.join(type(part).__name__ for part in module.net)}, not GELU-tanh, Dropout, Linear"
    else:
        reason = unknown_forward(FEED_FORWARD) or unknown_forward(GELU_PROJECTION)
    yield _candidate(name, module, ("linear",), how, reason)
    if not reason:
        yield from _called_linear(f"{name}.net.0.proj", module.net[0].proj)
        yield from _called_linear(f"{name}.net.2", module.net[2])


def _called_linear(name: str, module: nn.Module | None) -> Iterator[Candidate]:
    """A linear that is called as it is: LoRA-wrapped, quantised, offloaded or observed."""
    if module is not None and not plain_linear(module):
        yield Candidate(name, module, ("linear",), None, f"{_described(module)} is called as it is", by_choice=True)


def _unusual_norm(module: nn.Module) -> str:
    """Why this attention's QK norm is none that we know; a norm with hooks is one (it is then called)."""
    for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        norm = getattr(module, part, None)
        if norm is not None and (type(norm) not in layers.RMS_NORMS or norm.weight is None or norm.bias is not None):
            return f"its {part} is {_described(norm)}, not an RMSNorm with weight that we know"
    return ""


def _described(module: nn.Module) -> str:
    """A module's class with its package, and what sets the instance apart from a plain one."""
    cls = stock_of(module) or type(module)
    weight = getattr(module, "weight", None)
    extra = f" with a {type(weight).__name__} weight" if weight is not None and type(weight) is not nn.Parameter else ""
    return f"{cls.__module__.split('.')[0]}'s {cls.__name__}{extra}{'' if layers.untouched(module) else ' with hooks'}"


FAMILY = Family("sd3", OPS, candidates)
