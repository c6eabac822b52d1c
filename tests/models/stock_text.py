"""Tiny text encoders of transformers with random weights in every parameter, and their inputs."""

from __future__ import annotations

import types

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5LayerNorm

CLIP = dict(vocab_size=40, hidden_size=32, intermediate_size=48, projection_dim=24, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=60, bos_token_id=1, eos_token_id=3, pad_token_id=0)
T5 = dict(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, relative_attention_num_buckets=8, relative_attention_max_distance=20)
CLIPS = {"CLIP quick_gelu": (CLIPTextModel, CLIP), "CLIP gelu": (CLIPTextModelWithProjection, dict(CLIP, hidden_act="gelu")),
         "CLIP old": (CLIPTextModelWithProjection, dict(CLIP, eos_token_id=2))}
T5S = {"T5 gated-gelu": dict(T5, feed_forward_proj="gated-gelu"), "T5 relu": dict(T5, feed_forward_proj="relu"),
       "T5 gated-silu": dict(T5, feed_forward_proj="gated-silu")}
VARIANTS = (*CLIPS, *T5S)


def randomise(model: nn.Module) -> nn.Module:
    """Every parameter random, so that no bias and no gain is invisible."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=1.0 if "relative_attention_bias" in name else 0.15)
    return model


def stock_model(variant: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    if variant in CLIPS:
        cls, config = CLIPS[variant]
        model = cls(CLIPTextConfig(**dict(config, **changes)))
    else:
        model = T5EncoderModel(T5Config(**dict(T5S[variant], **changes)))
    return randomise(model).eval().to(dtype)


def tokens(batch: int = 2, length: int = 52, seed: int = 0) -> torch.Tensor:
    """[B, T] with an end token (3), another place in each row."""
    ids = torch.randint(4, 40, (batch, length), generator=torch.Generator().manual_seed(seed))
    for row in range(batch):
        ids[row, length - 2 - 3 * row:] = 3
    return ids


def padding(ids: torch.Tensor) -> torch.Tensor:
    """[B, T], 1 up to the first end token and 0 behind it."""
    return ((ids == 3).cumsum(1) <= 1).long()


def in_float64(model: nn.Module) -> nn.Module:
    """The stock model in float64, with T5's mean squares, hard-coded in float32, in float64 as well."""
    model = model.double()
    for module in model.modules():
        if type(module) is T5LayerNorm:
            module.forward = types.MethodType(_norm64, module)
    return model


def _norm64(self, x):
    return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


def tensors(output) -> list[torch.Tensor]:
    """All that a stock model returned, in order."""
    return [part for value in output.values() for part in (value if isinstance(value, tuple) else (value,))]
