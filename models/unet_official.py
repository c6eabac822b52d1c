"""The names of the official U-Nets (latent-diffusion, generative-models, guided-diffusion), which are one code base, under ours; their ControlNets' use
the same ones.

Their layers are numbered in the order of the forward, so what a number is follows from the config.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from fusewire.models.unet import UP_BLOCKS, UNetConfig
from fusewire.models.unet_encoder import DOWN_BLOCKS, EncoderConfig

_RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2",
           "skip_connection": "conv_shortcut"}
_SELF = {"norm": "group_norm", "proj_out": "to_out.0"}
ENCODER_TOP = {"input_blocks.0.0": "conv_in", "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
               "label_emb": "class_embedding", "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
_TOP = dict(ENCODER_TOP, **{"out.0": "conv_norm_out", "out.2": "conv_out"})


def encoder_layers(config: EncoderConfig) -> Iterator[tuple[str, str, str]]:
    """(official name, our name, what it is) of each layer of the way down and the middle: a residual block, an attention "cross" or "self", or a
    resampling convolution."""
    number, levels = 1, len(config.block_out_channels)
    for level, name in enumerate(config.down_block_types):
        attention, sample = DOWN_BLOCKS[name]
        ours = f"down_blocks.{level}"
        for index in range(config.at("layers_per_block", level)):
            yield f"input_blocks.{number}.0", f"{ours}.resnets.{index}", "resnet"
            if attention:
                yield f"input_blocks.{number}.1", f"{ours}.attentions.{index}", attention
            number += 1
        if level < levels - 1:
            yield f"input_blocks.{number}.0", f"{ours}.downsamplers.0", config.downsample_type if sample == "typed" else sample
            number += 1

    attention = "cross" if config.mid_block_type == "UNetMidBlock2DCrossAttn" else "self" if config.add_attention else None
    yield "middle_block.0", "mid_block.resnets.0", "resnet"
    if attention:
        yield "middle_block.1", "mid_block.attentions.0", attention
    yield f"middle_block.{2 if attention else 1}", "mid_block.resnets.1", "resnet"


def _decoder_layers(config: UNetConfig) -> Iterator[tuple[str, str, str]]:
    """The same of the way up."""
    number, levels = 0, len(config.block_out_channels)
    for step, name in enumerate(config.up_block_types):
        attention, sample = UP_BLOCKS[name]
        ours, level = f"up_blocks.{step}", levels - 1 - step
        for index in range(config.at("layers_per_block", level) + 1):
            yield f"output_blocks.{number}.0", f"{ours}.resnets.{index}", "resnet"
            if attention:
                yield f"output_blocks.{number}.1", f"{ours}.attentions.{index}", attention
            number += 1
        if level:
            yield f"output_blocks.{number - 1}.{2 if attention else 1}", f"{ours}.upsamplers.0", config.upsample_type if sample == "typed" else sample


def from_official(state_dict: Mapping[str, torch.Tensor], config: UNetConfig, new_attention_order: bool = False) -> dict[str, torch.Tensor]:
    """The state dict of an official ``UNetModel`` under our (diffusers') names.

    A ``model.diffusion_model.`` prefix is dropped, and with it whatever in a full checkpoint is not the U-Net. The packed qkv of ADM's attentions are
    split: there a head has its q, k, v side by side, and with ``new_attention_order``, the setting of that name, all q come first.
    Raises KeyError for a name that the config does not lead to.
    """
    return renamed(state_dict, "model.diffusion_model.", _TOP, [*encoder_layers(config), *_decoder_layers(config)], config, new_attention_order)


def renamed(state_dict: Mapping[str, torch.Tensor], prefix: str, top: Mapping[str, str], layers: Iterable[tuple[str, str, str]], config: EncoderConfig,
            new_attention_order: bool = False) -> dict[str, torch.Tensor]:
    """``top``: official name -> ours of single layers; ``layers``: of blocks, as above. Without ``prefix``, and what else is beside it."""
    if any(key.startswith(prefix) for key in state_dict):
        state_dict = {key[len(prefix):]: value for key, value in state_dict.items() if key.startswith(prefix)}
    layers = {official: (ours, kind) for official, ours, kind in layers}
    out: dict[str, torch.Tensor] = {}
    for key, value in state_dict.items():
        stem, leaf = key.rsplit(".", 1)
        layer, rest = ".".join(stem.split(".")[:2 if stem.startswith("middle") else 3]), stem.split(".")[2 if stem.startswith("middle") else 3:]
        ours, kind = layers.get(layer, (None, None))
        part = ".".join(rest)
        if stem in top:
            out[f"{top[stem]}.{leaf}"] = value
        elif kind == "resnet" and part in _RESNET:
            out[f"{ours}.{_RESNET[part]}.{leaf}"] = value
        elif kind == "conv" and part in ("op", "conv"):
            out[f"{ours}.conv.{leaf}"] = value
        elif kind == "cross":
            out[f"{ours}.{part}.{leaf}"] = value
        elif kind == "self" and part == "qkv":
            for name, third in zip("qkv", _thirds(value, config, new_attention_order)):
                out[f"{ours}.to_{name}.{leaf}"] = third
        elif kind == "self" and part in _SELF:
            out[f"{ours}.{_SELF[part]}.{leaf}"] = value.flatten(1) if value.dim() == 3 else value
        else:
            raise KeyError(f"state_dict has {key!r}, which a model of this config does not have")
    return out


def _thirds(value: torch.Tensor, config: EncoderConfig, new_attention_order: bool) -> Iterator[torch.Tensor]:
    """Of a packed convolution over one position [3 C, C, 1], or of its bias [3 C]."""
    value = value.flatten(1) if value.dim() == 3 else value
    if new_attention_order or config.attention_head_dim is None:
        return iter(value.chunk(3))
    split = value.unflatten(0, (-1, 3, config.at("attention_head_dim", 0)))  # (h three d) ... -> h three d ...
    return (third.flatten(0, 1) for third in split.unbind(1))
