"""The encoders of transformers that pipelines come with: CLIP's, of text and of pictures, and T5's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation, NewGELUActivation, QuickGELUActivation
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention, CLIPEncoderLayer
from transformers.models.t5.modeling_t5 import (T5Attention, T5Block, T5DenseActDense, T5DenseGatedActDense, T5LayerFF, T5LayerNorm,
                                                T5LayerSelfAttention)

from fusewire.models import layers
from fusewire.models.clip import clip_attention, clip_layer, clip_mlp
from fusewire.models.layers import How
from fusewire.models.t5 import NORMS, t5_attention, t5_block, t5_dense_hidden, t5_norm
from fusewire.models.text_layers import KINDS
from fusewire.swap.custom import called_linear
from fusewire.swap.families import Candidate, Family
from fusewire.swap.fused import CARRIES, MAKERS, stock_of, unknown_forward
from fusewire.swap.parts import KEEPS_LINEAR, attention_layer, candidate

OPS = ("gate_residual_adaln", "rms_norm", "attention", "quick_gelu", "linear")

# As transformers 5.0 to 5.24 has them; T5's blocks and attention as 5.15 to 5.24 has them, where they return what they do now.
SDPA = {sdpa_attention_forward: ("29994cc48f54", "e5abdfbac129", "83f68b4ed085", "7bf2d7101fc6", "8cbd22140fff", "bc9f9d73040a", "f868235cfe2e")}
CLIP_LAYER = {CLIPEncoderLayer.forward: ("dc557d88a21d", "163531d18f5d")}
CLIP_ATTENTION = {CLIPAttention.forward: ("d2db76afe7ce", "c8a9fcb04144", "8c787662cb73"), **SDPA}
CLIP_MLP = {CLIPMLP.forward: ("fa71bd268eac",)}
T5_NORM = {T5LayerNorm.forward: ("24a028bc24c7",)}
T5_BLOCK = {T5Block.forward: ("306f07dac833", "82424a1fa643"), T5LayerSelfAttention.forward: ("832c30a33d4e", "18fb91bfdc0d"),
            T5LayerFF.forward: ("a329c9a1116a",), **T5_NORM}
T5_ATTENTION = {T5Attention.forward: ("bacb8cde6993", "8acb90566868"), **SDPA}
if hasattr(sdpa_attention, "create_position_bias_mask"):  # before 5.14 T5's attention does without
    T5_ATTENTION[sdpa_attention.create_position_bias_mask] = ("7eee3f62d833", "a96abe405ebf")
T5_DENSE = {T5DenseActDense.forward: ("2a0f704675bd",), T5DenseGatedActDense.forward: ("15f9704f51ef",)}

if not unknown_forward({QuickGELUActivation.forward: ("3dbec3bafe8d",)}):
    KINDS[QuickGELUActivation] = lambda activation: "quick_gelu"
if not unknown_forward({NewGELUActivation.forward: ("898e5f0c37a9",)}):
    KINDS[NewGELUActivation] = lambda activation: "gelu_tanh"
if not unknown_forward({GELUActivation.forward: ("fe09d2258ef0",)}):
    KINDS[GELUActivation] = lambda activation: "gelu" if activation.act is F.gelu else ""
if not unknown_forward(T5_NORM):
    NORMS.add(T5LayerNorm)

ASKED_OF_THE_MODEL = {"output_hidden_states", "return_dict"}  # keywords that models pass on to layers, where they have no effect


def _kept_implementation(module: nn.Module) -> str:
    """Why this layer's attention is not the one that ours stands for; "" where it is."""
    chosen = module.config._attn_implementation
    if chosen != "sdpa" or ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:
        return f"its attention implementation {chosen!r} is kept"
    if layers.intercepted(module):
        return "F.scaled_dot_product_attention was replaced, or a function mode is at work"
    return ""


def _unusual_call(module: nn.Module, keywords: Mapping) -> bool:
    """Whether this call of an attention layer wants what only stock gives: another implementation, attention weights, dropout."""
    wanted = any(value is not None and value is not False for key, value in keywords.items() if key not in ASKED_OF_THE_MODEL)
    return wanted or module.training and module.dropout != 0 or bool(_kept_implementation(module))


def _clip_layer(how: How) -> dict:
    def forward(self, hidden_states, attention_mask, **kwargs):
        return clip_layer(self, hidden_states, attention_mask, how, kwargs)

    return {"forward": forward}


def _clip_attention(how: How) -> dict:
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        others = {key: value for key, value in kwargs.items() if key != "is_causal"}
        if hidden_states.dim() != 3 or _unusual_call(self, others):
            return CLIPAttention.forward(self, hidden_states, attention_mask, **kwargs)
        causal = kwargs.get("is_causal")
        return clip_attention(self, hidden_states, attention_mask, self.is_causal if causal is None else causal, how), None

    return {"forward": forward}


def _clip_mlp(how: How) -> dict:
    def forward(self, hidden_states):
        return clip_mlp(self, hidden_states, how)

    return {"forward": forward, "takes_residual": True}


def _t5_norm(how: How) -> dict:
    def forward(self, hidden_states):
        return t5_norm(self, hidden_states, how)

    return {"forward": forward}


def _t5_block(how: How) -> dict:
    # ``cache``: what transformers names past_key_values until 5.23 and cache from then on
    def forward(self, hidden_states, attention_mask=None, position_bias=None, encoder_hidden_states=None, encoder_attention_mask=None,
                encoder_decoder_position_bias=None, *cache, **kwargs):
        # Who asks for attention weights hooks the layers, which are then called
        if self.is_decoder or cache or not all(layers.untouched(layer) for layer in self.layer):
            return T5Block.forward(self, hidden_states, attention_mask, position_bias, encoder_hidden_states, encoder_attention_mask,
                                   encoder_decoder_position_bias, *cache, **kwargs)
        return *t5_block(self, hidden_states, attention_mask, position_bias, how, kwargs), None

    return {"forward": forward}


def _t5_attention(how: How) -> dict:
    def forward(self, hidden_states, mask=None, key_value_states=None, position_bias=None, *cache, **kwargs):
        no_bias = position_bias is None and not self.has_relative_attention_bias
        if no_bias or key_value_states is not None or cache or hidden_states.dim() != 3 or _unusual_call(self, kwargs):
            return T5Attention.forward(self, hidden_states, mask, key_value_states, position_bias, *cache, **kwargs)
        if position_bias is None:
            tokens = hidden_states.shape[1]
            position_bias = self.compute_bias(tokens, tokens, device=hidden_states.device).contiguous()
        return t5_attention(self, hidden_states, mask, position_bias, how), position_bias, None

    return {"forward": forward}


def _t5_dense(how: How) -> dict:
    def forward(self, hidden_states):
        return layers.linear(self.wo, t5_dense_hidden(self, hidden_states, how), how)

    return {"forward": forward, "takes_residual": True}


CARRIES.update({CLIPEncoderLayer: ("gate_residual_adaln",), T5LayerNorm: ("rms_norm",), T5Block: ("gate_residual_adaln",)})
MAKERS.update({CLIPEncoderLayer: _clip_layer, CLIPAttention: _clip_attention, CLIPMLP: _clip_mlp, T5LayerNorm: _t5_norm, T5Block: _t5_block,
               T5Attention: _t5_attention, T5DenseActDense: _t5_dense, T5DenseGatedActDense: _t5_dense})


def candidates(name: str, instance, how: How) -> Iterator[Candidate]:
    """A layer of CLIP or a block of T5's encoder with its parts, or any norm of T5's."""
    stock = stock_of(instance) or type(instance)
    dot = f"{name}." if name else ""
    if stock is CLIPEncoderLayer:
        yield candidate(name or "layer", instance, ("gate_residual_adaln",), how, unknown_forward(CLIP_LAYER))
        yield from _attention(f"{dot}self_attn", instance.self_attn, how, CLIPAttention, CLIP_ATTENTION, ("q_proj", "k_proj", "v_proj", "out_proj"))
        yield from _feed_forward(f"{dot}mlp", instance.mlp, how, {CLIPMLP: ("fc1", "fc2")}, CLIP_MLP)
    elif stock is T5LayerNorm:
        yield candidate(name or "norm", instance, ("rms_norm",), how, unknown_forward(T5_NORM))
    elif stock is T5Block:
        reason, encoder = unknown_forward(T5_BLOCK), not instance.is_decoder and tuple(map(type, instance.layer)) == (T5LayerSelfAttention, T5LayerFF)
        if not encoder:
            reason = "it is a decoder's, or its layers are not those of an encoder that we know"
        yield candidate(name or "block", instance, ("gate_residual_adaln",), how, reason)
        if encoder:
            first, last = instance.layer
            yield from _attention(f"{dot}layer.0.SelfAttention", first.SelfAttention, how, T5Attention, T5_ATTENTION, ("q", "k", "v", "o"))
            yield from _feed_forward(f"{dot}layer.1.DenseReluDense", last.DenseReluDense, how,
                                     {T5DenseGatedActDense: ("wi_0", "wi_1", "wo"), T5DenseActDense: ("wi", "wo")}, T5_DENSE)


def _attention(name: str, module: nn.Module, how: How, known: type, verified: dict, projections: tuple[str, ...]) -> Iterator[Candidate]:
    if (stock_of(module) or type(module)) is not known:
        reason = f"{type(module).__name__} is not an attention layer that we know"
    else:
        reason = unknown_forward(verified) or _kept_implementation(module)
    # What exact would leave anyway needs no other reason
    yield from attention_layer(name, module, how, False, "" if how.numerics == "exact" else reason, projections)


def _feed_forward(name: str, module: nn.Module, how: How, known: dict[type, tuple[str, ...]], verified: dict) -> Iterator[Candidate]:
    if how.numerics == "exact":
        yield Candidate(name, module, ("linear",), None, KEEPS_LINEAR, by_choice=True)
    projections = known.get(stock_of(module) or type(module))
    if how.numerics == "exact" or not how.linear:
        for part in projections or ():
            yield from called_linear(f"{name}.{part}", getattr(module, part), how)
        return
    reason = f"{type(module).__name__} is not a feed-forward that we know" if projections is None else unknown_forward(verified)
    activation = getattr(module, "activation_fn", None)
    quick = type(activation) in KINDS and KINDS[type(activation)](activation) == "quick_gelu"
    yield candidate(name, module, ("quick_gelu", "linear") if quick else ("linear",), how, reason)
    for part in () if reason else projections:
        yield from called_linear(f"{name}.{part}", getattr(module, part), how)


FAMILY = Family("text_encoders", OPS, candidates)
