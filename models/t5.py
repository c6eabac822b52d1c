"""T5's encoder, on Fusewire's ops: the text encoder of PixArt, and the last one of Stable Diffusion 3 and FLUX.1.

Raffel et al. (2020), "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"; gated feed-forwards: Shazeer (2020), "GLU
Variants Improve Transformer". Attribute names and state-dict keys are those of transformers' ``T5EncoderModel``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fusewire import ops
from fusewire.models.inputs import check_inputs, present
from fusewire.models.layers import How, gated_linear, inactive, linear, takes, untouched
from fusewire.models.text_layers import TransformersConfig, activated, activation_of, sdpa


@dataclass(frozen=True)
class T5Config(TransformersConfig):
    """Field names and defaults of transformers' ``T5Config``. ``feed_forward_proj``: an activation, ``"gated-"`` before it where it gates."""

    stock = "T5Config"
    fixed = dict(is_decoder=(False,))

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        name = self.feed_forward_proj.removeprefix("gated-")
        return "gelu_new" if self.gated and name == "gelu" else name  # the published gated weights were trained with the tanh form


class T5LayerNorm(nn.Module):
    """RMS norm with a gain, rounding before a 16-bit gain. ``exact`` takes the mean square in float32, as transformers does, float64's too."""

    def __init__(self, config: T5Config, how: How):
        super().__init__()
        self.variance_epsilon, self.how = config.layer_norm_epsilon, how
        self.weight = nn.Parameter(torch.ones(config.d_model))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]"""
        return t5_norm(self, hidden_states, self.how)


# What t5_block may run together with the sum before it. It grows by the stock class, once ``fusewire.swap`` has verified it.
NORMS: set[type] = {T5LayerNorm}


def t5_norm(norm, x, how: How) -> torch.Tensor:
    return ops.rms_norm(x, norm.weight, eps=norm.variance_epsilon, numerics=how.numerics)


def relative_buckets(tokens: int, buckets: int, furthest: int, device: torch.device | None = None) -> torch.Tensor:
    """[T, T]: in which bucket each query (row) finds each key (column). Half of the buckets are for keys ahead; half of each half are single
    distances, the rest grow with the logarithm of the distance up to ``furthest``."""
    places = torch.arange(tokens, device=device)
    ahead = places[None, :] - places[:, None]
    half = buckets // 2
    near, distance = half // 2, ahead.abs()
    # float32, and in this order: a distance at the edge of a bucket must not fall into another one
    far = near + (torch.log(distance.float() / near) / math.log(furthest / near) * (half - near)).long()
    return torch.where(ahead > 0, half, 0) + torch.where(distance < near, distance, far.clamp(max=half - 1))


class T5Attention(nn.Module):
    """Self-attention whose logits are not scaled, with a bias by the distance of the tokens, which the first layer has for all of them."""

    def __init__(self, config: T5Config, has_bias: bool, how: How):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.config, self.n_heads, self.how = config, config.num_heads, how
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def compute_bias(self, tokens: int, device: torch.device) -> torch.Tensor:
        """[1, H, T, T]"""
        config = self.config
        buckets = relative_buckets(tokens, config.relative_attention_num_buckets, config.relative_attention_max_distance, device)
        return self.relative_attention_bias(buckets).permute(2, 0, 1)[None]

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, position_bias: torch.Tensor | None = None):
        """[B, T, C] -> ([B, T, C], the bias [1, H, T, T])"""
        if position_bias is None:
            position_bias = self.compute_bias(hidden_states.shape[1], hidden_states.device).contiguous()
        return t5_attention(self, hidden_states, mask, position_bias, self.how), position_bias


def t5_attention(module, x, mask, position_bias, how: How) -> torch.Tensor:
    """The whole layer: our own, and transformers'. ``mask``: [B, 1, T or 1, T], bool or added to the logits, or None."""
    q, k, v = (linear(projection, x, how).unflatten(-1, (module.n_heads, -1)) for projection in (module.q, module.k, module.v))
    if mask is not None:
        visible = mask.dtype is torch.bool
        position_bias = torch.where(mask, position_bias, torch.finfo(k.dtype).min) if visible else position_bias + mask
    out = ops.attention(q, k, v, mask=position_bias, scale=1.0) if how.attention else sdpa(q, k, v, position_bias.contiguous(), False, 1.0)
    return linear(module.o, out.flatten(2), how)


class T5LayerSelfAttention(nn.Module):
    """An attention and the norm before it."""

    def __init__(self, config: T5Config, has_bias: bool, how: How):
        super().__init__()
        self.SelfAttention = T5Attention(config, has_bias, how)
        self.layer_norm = T5LayerNorm(config, how)
        self.dropout = nn.Dropout(config.dropout_rate)


class T5Dense(nn.Module):
    """Projection, activation, projection; ``gated``: the activation's result times a second projection."""

    takes_residual = True  # t5_block may run it together with the sum behind it

    def __init__(self, config: T5Config, how: How):
        super().__init__()
        self.how = how
        for name in ("wi_0", "wi_1") if config.gated else ("wi",):
            setattr(self, name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.act = activation_of(config.activation)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, T, C] -> [B, T, C]"""
        return linear(self.wo, t5_dense_hidden(self, hidden_states, self.how), self.how)


def t5_dense_hidden(module, x, how: How) -> torch.Tensor:
    """The input of the last projection, in its dtype (float16 checkpoints keep it in float32)."""
    if hasattr(module, "wi_0"):
        hidden = activated(module.wi_0, module.act, x, how) * linear(module.wi_1, x, how)
    else:
        hidden = activated(module.wi, module.act, x, how)
    hidden, weight = module.dropout(hidden), module.wo.weight
    is_float = isinstance(weight, torch.Tensor) and weight.dtype is not torch.int8
    return hidden.to(weight.dtype) if is_float and hidden.dtype is not weight.dtype else hidden


class T5LayerFF(nn.Module):
    """A feed-forward and the norm before it."""

    def __init__(self, config: T5Config, how: How):
        super().__init__()
        self.DenseReluDense = T5Dense(config, how)
        self.layer_norm = T5LayerNorm(config, how)
        self.dropout = nn.Dropout(config.dropout_rate)


class T5Block(nn.Module):
    """Attention and feed-forward, each behind a norm."""

    def __init__(self, config: T5Config, has_bias: bool, how: How):
        super().__init__()
        self.how = how
        self.layer = nn.ModuleList([T5LayerSelfAttention(config, has_bias, how), T5LayerFF(config, how)])

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None, position_bias: torch.Tensor | None):
        """([B, T, C], mask, the bias of the first block) -> ([B, T, C], bias)"""
        return t5_block(self, hidden_states, mask, position_bias, self.how)


def t5_block(block, x, mask, position_bias, how: How, attention_kwargs: Mapping | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward of a block: our own, and transformers' encoder's. What lies in its two layers is called; sums and norms between are fused."""
    first, last = block.layer
    attended, position_bias, *_ = first.SelfAttention(first.layer_norm(x), mask=mask, position_bias=position_bias, **(attention_kwargs or {}))
    x, y = _sum_norm(last.layer_norm, x, first.dropout(attended), how)
    dense = last.DenseReluDense
    if how.linear and takes(dense, "takes_residual") and inactive(last.dropout):
        hidden = t5_dense_hidden(dense, y, how)
        x = gated_linear(dense.wo, hidden, None, x, how) if hidden.dtype is x.dtype else x + linear(dense.wo, hidden, how)
    else:
        x = x + last.dropout(dense(y))
    # Later blocks lay the bias out anew if it is not contiguous. A checkpoint marks what comes out of it as requiring gradients: there it stays as it
    # lies, for stock's later blocks lay out a copy that does not, by which PyTorch chooses its attention.
    checkpointed = block.training and getattr(block, "gradient_checkpointing", False)
    return _kept_finite(x), position_bias if checkpointed else position_bias.contiguous()


def _sum_norm(norm, x, y, how: How) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + y, norm(x + y)): in one pass as a gated sum whose gate is 1 and a modulation that changes nothing. float16 is clamped in between, the mean
    square of float64 is taken in float32 where stock's bits are wanted, and on a GPU two calls are cheaper to launch."""
    known = x.is_cpu and getattr(type(norm), "fusewire_stock", type(norm)) in NORMS and untouched(norm)
    if known and x.dtype in (torch.float32, torch.bfloat16) and x.dtype is y.dtype is norm.weight.dtype:
        zero, one = (value.expand(x.shape[0], x.shape[2]) for value in (x.new_zeros(()), x.new_ones(())))
        return ops.gate_residual_adaln(x, y, one, zero, zero, norm="rms", weight=norm.weight, eps=norm.variance_epsilon, numerics=how.numerics)
    x = _kept_finite(x + y)
    return x, norm(x)


def _kept_finite(x: torch.Tensor) -> torch.Tensor:
    """float16 as stock clamps it: a little below the largest number, once there is an infinity."""
    if x.dtype is not torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    limit = torch.where(torch.isinf(x).any(), largest - 1000, largest)
    return torch.clamp(x, min=-limit, max=limit)


class T5Stack(nn.Module):
    """The embeddings, the blocks and the last norm."""

    def __init__(self, config: T5Config, embed_tokens: nn.Embedding, how: How):
        super().__init__()
        self.embed_tokens = embed_tokens
        self.block = nn.ModuleList(T5Block(config, index == 0, how) for index in range(config.num_layers))
        self.final_layer_norm = T5LayerNorm(config, how)
        self.dropout = nn.Dropout(config.dropout_rate)


class T5Encoder(nn.Module):
    """transformers' ``T5EncoderModel``. ``numerics`` as in ``fusewire.swap``."""

    def __init__(self, config: T5Config, numerics: str = "close"):
        super().__init__()
        self.config, self.numerics = config, numerics
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config, self.shared, How.of(numerics))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The states [B, T, C] of a prompt.

        Args:
            input_ids: [B, T] tokens, of any number.
            attention_mask: [B, T], 0 where a token is padding that no other should attend to, or None.

        Raises: ValueError naming the argument whose shape or device does not fit, TypeError whose dtype does not.
        """
        check_inputs(self.shared, {}, dict(input_ids=input_ids), masks=present(attention_mask=attention_mask))
        if input_ids.dim() != 2 or not input_ids.shape[1]:
            raise ValueError(f"input_ids has shape {list(input_ids.shape)}; it should be [B, T]")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}; it should be {list(input_ids.shape)}")
        stack, bias = self.encoder, None
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        x = stack.dropout(stack.embed_tokens(input_ids))
        for block in stack.block:
            x, bias = block(x, mask, bias)
        return stack.dropout(stack.final_layer_norm(x))
