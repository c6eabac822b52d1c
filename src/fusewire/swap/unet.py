"""U-Nets, their ControlNets and adapters, DiT, PixArt and autoencoders: what is swapped in the blocks that diffusers builds them of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers.models.adapter import T2IAdapter
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_blocks import AttnSkipDownBlock2D, AttnSkipUpBlock2D, SkipDownBlock2D, SkipUpBlock2D, UNetMidBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional as F

from fusewire import ops
from fusewire.kernels.checks import autocasts, kind_of
from fusewire.models.convolution import convolution
from fusewire.models.layers import How, as_made
from fusewire.models.resnet import resnet_block
from fusewire.models.transformer_block import affine_block, single_block, zero_block
from fusewire.swap.attention import attention_candidates
from fusewire.swap.custom import described
from fusewire.swap.families import Candidate, Family
from fusewire.swap.fused import ANNOUNCE, CARRIES, MAKERS, announce_block, stock_of, unknown_forward
from fusewire.swap.parts import candidate, feed_forward_candidates, norm_candidates

OPS = ("group_norm_silu", "convolution", "adaln_modulate", "gate_residual", "gate_residual_adaln", "attention", "geglu", "linear")

# As diffusers 0.40 to 0.42 has them.
RESNET = {ResnetBlock2D.forward: ("40d2e36e0db5",)}
BLOCK = {BasicTransformerBlock.forward: ("fe4764e16c58",)}
BLOCKS = {"layer_norm": affine_block, "ada_norm_zero": zero_block, "ada_norm_single": single_block}
# Where a plain GroupNorm lies, by the class that has it.
GROUP_NORMS = {UNet2DConditionModel: "conv_norm_out", UNet2DModel: "conv_norm_out", Decoder: "conv_norm_out", Encoder: "conv_norm_out",
               Transformer2DModel: "norm", SkipUpBlock2D: "skip_norm", AttnSkipUpBlock2D: "skip_norm"}
# Where convolutions lie, by the class that has them; the last of a model gives the format that stock would give.
CONVOLUTIONS = {ResnetBlock2D: ("conv1", "conv2", "conv_shortcut"), Upsample2D: ("conv",), Downsample2D: ("conv",), Transformer2DModel: ("proj_in", "proj_out"),
                UNet2DConditionModel: ("conv_in", "conv_out"), UNet2DModel: ("conv_in", "conv_out"), Encoder: ("conv_in", "conv_out"),
                Decoder: ("conv_in", "conv_out"),
                **dict.fromkeys((SkipDownBlock2D, AttnSkipDownBlock2D, SkipUpBlock2D, AttnSkipUpBlock2D), ("skip_conv",))}
REPLACED = "torch.nn.{}.forward was replaced"
KEEPS_ADAPTER = "it is convolutions, ReLU and sums, and runs once a picture: there is nothing to fuse"


LAST = 16  # channels: of pictures and latents, not of what lies inside a model


def _resnet(how: How) -> dict:
    def forward(self, input_tensor, temb, *args, **kwargs):
        if args or kwargs:  # of a scale that stock warns of
            return ResnetBlock2D.forward(self, input_tensor, temb, *args, **kwargs)
        return resnet_block(self, input_tensor, temb, how)

    return {"forward": forward}


def _group_norm(how: How) -> dict:
    def forward(self, input):
        weight, bias = self.weight, self.bias  # once: a parametrisation computes them anew at each request
        if autocasts(kind_of(input)) or weight is not None and weight.dtype is not input.dtype:
            return F.group_norm(input, self.num_groups, weight, bias, self.eps)
        return ops.group_norm_silu(input, self.num_groups, weight, bias, eps=self.eps, silu=False, numerics=how.numerics)

    return {"forward": forward}


def _convolution(how: How) -> dict:
    def forward(self, input):
        y, weight = convolution(self, input), self._parameters.get("weight")
        if self.training or self.out_channels > LAST or weight is None or not weight.is_contiguous():
            return y
        return y.contiguous(memory_format=torch.channels_last if how.keeps_layout and len(input) > 1 else torch.contiguous_format)

    return {"forward": forward}


def _block(how: How) -> dict:
    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, timestep=None,
                cross_attention_kwargs=None, class_labels=None, added_cond_kwargs=None):
        kwargs, kind = cross_attention_kwargs or {}, self.norm_type
        if self._chunk_size is not None or hidden_states.dim() != 3 or kwargs.get("gligen") is not None or kwargs.get("scale") is not None:
            return BasicTransformerBlock.forward(self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                                                 cross_attention_kwargs, class_labels, added_cond_kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key != "gligen"}
        if kind == "ada_norm_zero":
            return zero_block(self, hidden_states, how, timestep, class_labels, attention_mask, kwargs)
        streams = dict(context=encoder_hidden_states, mask=attention_mask, context_mask=encoder_attention_mask, attention_kwargs=kwargs)
        return affine_block(self, hidden_states, how, **streams) if kind == "layer_norm" else single_block(self, hidden_states, how, timestep, **streams)

    return {"forward": forward}


MAKERS.update({ResnetBlock2D: _resnet, nn.Conv2d: _convolution, nn.GroupNorm: _group_norm, BasicTransformerBlock: _block})
ANNOUNCE[BasicTransformerBlock] = announce_block
CARRIES.update({ResnetBlock2D: ("group_norm_silu",), BasicTransformerBlock: ("gate_residual_adaln",), **dict.fromkeys(GROUP_NORMS, ("group_norm_silu",))})


def _ends_channels_last(instance, part: str) -> bool:
    """Half an autoencoder whose attention in the middle gives channels-last pictures, of several samples: so stock's latents lie, and noise is drawn like
    them."""
    middle = getattr(instance, "mid_block", None)
    return part == "conv_out" and isinstance(instance, (Encoder, Decoder)) and any(layer is not None for layer in getattr(middle, "attentions", ()))


def candidates(name: str, instance, how: How) -> Iterator[Candidate]:
    """A residual block, a transformer block with its parts, the attention of a block without one, or a GroupNorm between blocks."""
    stock = stock_of(instance) or type(instance)
    dot = f"{name}." if name else ""
    if how.numerics == "close":
        for part in CONVOLUTIONS.get(stock, ()):
            layer = getattr(instance, part, None)
            if (stock_of(layer) or type(layer)) is nn.Conv2d and layer.groups == 1:
                stocks = how._replace(keeps_layout=_ends_channels_last(instance, part))
                yield candidate(dot + part, layer, ("convolution",), stocks, "" if as_made(nn.Conv2d) else REPLACED.format("Conv2d"))
    if stock is T2IAdapter:
        yield Candidate(name or "adapter", instance, ("convolution",), None, KEEPS_ADAPTER, by_choice=True)
    if stock in GROUP_NORMS:
        norm = getattr(instance, GROUP_NORMS[stock], None)
        if norm is not None:
            reason = "" if as_made(nn.GroupNorm) else REPLACED.format("GroupNorm")
            if (stock_of(norm) or type(norm)) is not nn.GroupNorm:
                reason = f"{described(norm)} is not a GroupNorm"
            yield candidate(f"{dot}{GROUP_NORMS[stock]}", norm, ("group_norm_silu",), how, reason)
    if stock is ResnetBlock2D:
        yield candidate(name or "block", instance, ("group_norm_silu",), how, unknown_forward(RESNET))
    elif stock is BasicTransformerBlock:
        yield from _block_candidates(name or "block", dot, instance, how)
    elif stock is ResnetBlockCondNorm2D:  # Its norms look at an embedding or at another picture
        yield Candidate(name or "block", instance, ("group_norm_silu",), None, "ResnetBlockCondNorm2D is not a block that we know")
    elif isinstance(instance, nn.Module) and stock.__module__ in (UNetMidBlock2D.__module__, Decoder.__module__):
        for index, layer in enumerate(getattr(instance, "attentions", None) or ()):
            if layer is not None and not hasattr(layer, "transformer_blocks"):
                yield from attention_candidates(f"{dot}attentions.{index}", layer, how)


def _block_candidates(name: str, dot: str, block: BasicTransformerBlock, how: How) -> Iterator[Candidate]:
    carried, reason = {"layer_norm": ("gate_residual_adaln",), "ada_norm_zero": ("gate_residual", "gate_residual_adaln"),
                       "ada_norm_single": ("adaln_modulate", "gate_residual")}.get(block.norm_type), unknown_forward(BLOCK)
    if carried is None:
        carried, reason = ("gate_residual_adaln",), f"its norm_type {block.norm_type!r} is not one that we know"
    elif block.pos_embed is not None or block.norm_type == "ada_norm_zero" and block.attn2 is not None:
        reason = "its position embedding, or its second attention, is not part of a block that we know"
    yield candidate(name, block, carried, how, reason)
    if block.norm_type == "ada_norm_zero":
        yield from norm_candidates(f"{dot}norm1", block.norm1, how)
    for part in ("attn1", "attn2"):
        if getattr(block, part) is not None:
            yield from attention_candidates(dot + part, getattr(block, part), how)
    yield from feed_forward_candidates(f"{dot}ff", block.ff, how)


FAMILY = Family("unet", OPS, candidates)
