"""CLIP's text encoder, on Fusewire's ops: the first text encoder of Stable Diffusion 1 to 3 and of FLUX.1.

Radford et al. (2021), "Learning Transferable Visual Models From Natural Language Supervision". Attribute names and state-dict keys are those of
transformers' ``CLIPTextModel`` and ``CLIPTextModelWithProjection``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from fusewire import ops
from fusewire.models.inputs import check_inputs, present
from fusewire.models.layers import How, gated_linear, linear, takes
from fusewire.models.text_layers import TransformersConfig, activated, activation_of, sdpa
from fusewire.models.transformer_block import sum_norm


@dataclass(frozen=True)
class CLIPTextConfig(TransformersConfig):
    """Field names and defaults of transformers' ``CLIPTextConfig``."""

    stock = "CLIPTextConfig"
    fixed = dict(attention_dropout=(0.0,))

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size is {self.hidden_size}; it should be a multiple of num_attention_heads = {self.num_attention_heads}")


class CLIPStates(NamedTuple):
    """``last_hidden_state`` [B, T, C]; ``pooler_output`` [B, C], that of the end token; ``hidden_states``: the embeddings and what each layer gives,
    before the last norm; ``text_embeds`` [B, P] where there is a projection."""

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...]
    text_embeds: torch.Tensor | None = None


class CLIPEmbeddings(nn.Module):
    """Tokens [B, T] -> [B, T, C], positions added."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.token_embedding(input_ids) + self.position_embedding(places[None])


class CLIPAttention(nn.Module):
    """Self-attention."""

    def __init__(self, channels: int, heads: int, how: How):
        super().__init__()
        self.num_heads, self.scale, self.how = heads, (channels // heads)**-0.5, how
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, is_causal: bool = True) -> tuple[torch.Tensor]:
        """[B, T, C] -> ([B, T, C],)"""
        return (clip_attention(self, hidden_states, attention_mask, is_causal, self.how),)


def clip_attention(module, x, mask, causal: bool, how: How) -> torch.Tensor:
    """The whole layer: our own, and transformers'. ``mask``: [B, 1, T, T], bool or added to the logits, or None; ``causal``: without a mask."""
    q, k, v = (linear(projection, x, how).unflatten(-1, (module.num_heads, -1)) for projection in (module.q_proj, module.k_proj, module.v_proj))
    causal = causal and mask is None
    out = ops.attention(q, k, v, mask=mask, causal=causal, scale=module.scale) if how.attention else sdpa(q, k, v, mask, causal, module.scale)
    return linear(module.out_proj, out.flatten(2), how)


class CLIPMLP(nn.Module):
    """Projection, activation, projection."""

    takes_residual = True  # clip_layer may run it together with the sum behind it

    def __init__(self, config: CLIPTextConfig, how: How):
        super().__init__()
        self.how = how
        self.activation_fn = activation_of(config.hidden_act)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, T, C] -> [B, T, C]"""
        return clip_mlp(self, hidden_states, self.how)


def clip_mlp(module, x, how: How) -> torch.Tensor:
    return linear(module.fc2, activated(module.fc1, module.activation_fn, x, how), how)


class CLIPEncoderLayer(nn.Module):
    """Attention and MLP, each behind a LayerNorm."""

    def __init__(self, config: CLIPTextConfig, how: How):
        super().__init__()
        self.how, channels = how, config.hidden_size
        self.self_attn = CLIPAttention(channels, config.num_attention_heads, how)
        self.layer_norm1 = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config, how)
        self.layer_norm2 = nn.LayerNorm(channels, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """[B, T, C] -> [B, T, C]"""
        return clip_layer(self, hidden_states, attention_mask, self.how)


def clip_layer(layer, x, mask, how: How, attention_kwargs: Mapping | None = None) -> torch.Tensor:
    """The forward of a layer: our own, and transformers'. Submodules are called; the sum and the norm between them are fused."""
    attended = layer.self_attn(hidden_states=layer.layer_norm1(x), attention_mask=mask, **(attention_kwargs or {}))[0]
    x, y = sum_norm(layer.layer_norm2, x, attended, how)
    mlp = layer.mlp
    if how.linear and takes(mlp, "takes_residual"):
        return gated_linear(mlp.fc2, activated(mlp.fc1, mlp.activation_fn, y, how), None, x, how)
    return x + mlp(y)


class CLIPEncoder(nn.Module):
    """The layers."""

    def __init__(self, config: CLIPTextConfig, how: How):
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config, how) for _ in range(config.num_hidden_layers))


class CLIPText(nn.Module):
    """transformers' ``CLIPTextModel``. ``numerics`` as in ``fusewire.swap``."""

    def __init__(self, config: CLIPTextConfig, numerics: str = "close"):
        super().__init__()
        self.config, self.numerics = config, numerics
        self.embeddings = CLIPEmbeddings(config)
        self.encoder = CLIPEncoder(config, How.of(numerics))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> CLIPStates:
        """The states of a prompt.

        Args:
            input_ids: [B, T] tokens, T at most ``max_position_embeddings``.
            attention_mask: [B, T], 0 where a token is padding that no other should attend to, or None.

        Raises: ValueError naming the argument whose shape or device does not fit, TypeError whose dtype does not.
        """
        longest = self.config.max_position_embeddings
        check_inputs(self.embeddings.token_embedding, {}, dict(input_ids=input_ids), masks=present(attention_mask=attention_mask))
        if input_ids.dim() != 2 or not 0 < input_ids.shape[1] <= longest:
            raise ValueError(f"input_ids has shape {list(input_ids.shape)}; it should be [B, T] with T at most {longest}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}; it should be {list(input_ids.shape)}")
        states, mask = [self.embeddings(input_ids)], _causal_mask(attention_mask)
        for layer in self.encoder.layers:
            states.append(layer(states[-1], mask))
        last = self.final_layer_norm(states[-1])
        return CLIPStates(last, last[torch.arange(len(last), device=last.device), self._ends(input_ids)], tuple(states))

    def _ends(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B]: the place of the first end token. Early configs call it 2, wrongly; it is the largest token of their vocabularies."""
        if self.config.eos_token_id == 2:
            return input_ids.argmax(-1)
        return (input_ids == self.config.eos_token_id).int().argmax(-1)


def _causal_mask(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """[B, T] -> bool [B, 1, T, T]: earlier tokens that are no padding; None where causal attention needs no mask."""
    if attention_mask is None:
        return None
    tokens = attention_mask.shape[1]
    return attention_mask[:, None, None].bool() & torch.ones(tokens, tokens, dtype=torch.bool, device=attention_mask.device).tril()


class CLIPTextWithProjection(nn.Module):
    """transformers' ``CLIPTextModelWithProjection``: the pooled state is projected to where pictures are."""

    def __init__(self, config: CLIPTextConfig, numerics: str = "close"):
        super().__init__()
        self.config, self.numerics = config, numerics
        self.text_model = CLIPText(config, numerics)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> CLIPStates:
        """As ``CLIPText.forward``, with ``text_embeds``."""
        states = self.text_model(input_ids, attention_mask)
        return states._replace(text_embeds=linear(self.text_projection, states.pooler_output, How.of(self.numerics)))
