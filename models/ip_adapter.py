"""IP-Adapters of the U-Nets (SD1.5, SD2, SDXL) and of FLUX.1: pictures as a prompt beside the text; and what attaches one to any model.

Ye et al. (2023), "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models"; FLUX.1's is XLabs'. An encoder's embeddings of
pictures become tokens (``encoder_hid_proj``), to which attentions look with keys and values of their own (``processor``), one pair for each adapter. Names
and state-dict keys are those of diffusers' models after ``load_ip_adapter``: ``attach(model, projections_of(state_dict))``, then ``load_state_dict``.
``ip_adapter_resampler.py`` has the projections of many tokens, ``ip_adapter_sd3.py`` the modules of SD3's, ``ip_adapter_official.py`` loads the official
checkpoints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fusewire.models.cross_attention import attended
from fusewire.models.feed_forward import FeedForward
from fusewire.models.ip_adapter_resampler import FacePlusImageProjection, PlusImageProjection
from fusewire.models.ip_adapter_sd3 import HEAD_DIM, JointDecoupledAttention, TimeImageProjection, time_projection
from fusewire.models.layers import How, linear


class ImageProjection(nn.Module):
    """diffusers' ``ImageProjection``: one embedding of a picture [B, image_channels] -> [B, tokens, channels]."""

    takes_tokens = False

    def __init__(self, image_channels: int, channels: int, tokens: int, how: How = How()):
        super().__init__()
        self.image_channels, self.channels, self.tokens, self.how = image_channels, channels, tokens, how
        self.image_embeds = nn.Linear(image_channels, tokens * channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(linear(self.image_embeds, x.to(self.image_embeds.weight.dtype), self.how).unflatten(-1, (self.tokens, self.channels)))


class FullImageProjection(nn.Module):
    """diffusers' ``IPAdapterFullImageProjection``: all tokens of the encoder, [B, L, image_channels] -> [B, L, channels]."""

    takes_tokens = True

    def __init__(self, image_channels: int, channels: int, how: How = How()):
        super().__init__()
        self.image_channels, self.channels = image_channels, channels
        self.ff = FeedForward(image_channels, image_channels, how, approximate="none", out_channels=channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.ff(x))


class FaceImageProjection(nn.Module):
    """diffusers' ``IPAdapterFaceIDImageProjection``: a face's embedding [B, image_channels] -> [B, tokens, channels]."""

    takes_tokens = False

    def __init__(self, image_channels: int, channels: int, hidden: int, tokens: int = 4, how: How = How()):
        super().__init__()
        self.image_channels, self.channels, self.tokens = image_channels, channels, tokens
        self.ff = FeedForward(image_channels, hidden, how, approximate="none", out_channels=tokens * channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.ff(x).unflatten(-1, (self.tokens, self.channels)))


class MultiImageProjection(nn.Module):
    """diffusers' ``MultiIPAdapterImageProjection``: for each adapter [B, N, ...] -> [B, N, tokens, channels]."""

    def __init__(self, projections: Sequence[nn.Module]):
        super().__init__()
        self.image_projection_layers = nn.ModuleList(projections)

    def forward(self, embeds: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [projection(one.flatten(0, 1)).unflatten(0, one.shape[:2]) for one, projection in zip(embeds, self.image_projection_layers)]


class Pictures(NamedTuple):
    """What attentions see of the pictures: for each adapter states [B, N, L, C], and [B or 1, N, H, W], where each picture counts, or None."""

    states: list[torch.Tensor]
    masks: Sequence[torch.Tensor | None]


class DecoupledAttention(nn.Module):
    """Keys and values of each adapter's pictures, and ``scale``, each adapter's: a number, or where there are masks one for each picture."""

    def __init__(self, in_channels: Sequence[int], channels: int, bias: bool, how: How = How()):
        super().__init__()
        self.how, self.scale = how, [1.0] * len(in_channels)
        self.to_k_ip, self.to_v_ip = (nn.ModuleList(nn.Linear(one, channels, bias=bias) for one in in_channels) for _ in range(2))

    def forward(self, q: torch.Tensor, out: torch.Tensor | None, pictures: Pictures) -> torch.Tensor | None:
        """q [B, T, H, D], the text's attention [B, T, H * D] or None for zeros -> the same with the pictures' added."""
        for index, (states, scale, mask) in enumerate(zip(pictures.states, self.scale, pictures.masks)):
            for part, factor, where in _terms(states, scale, mask):
                if factor:
                    k, v = (linear(layers[index], part, self.how).flatten(1, -2).unflatten(-1, q.shape[2:]) for layers in (self.to_k_ip, self.to_v_ip))
                    where = None if where is None else over_tokens(where, q.shape[1]).to(q.dtype)
                    out = _sum(out, attended(q, k, v, None, self.how), factor, where, self.how)
        return out

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


def _terms(states, scale, mask) -> Iterator[tuple]:
    """(states, scale, mask [B or 1, H, W] or None) of one attention each: all pictures of an adapter together, or with a mask one by one."""
    several = isinstance(scale, (list, tuple))
    if mask is None:
        if several and any(scale):
            raise ValueError(f"scale is {list(scale)}, one for each picture; it should be a number where ip_adapter_masks has no mask of this adapter")
        yield states, 0 if several else scale, None
        return
    if several and len(scale) != mask.shape[1]:
        raise ValueError(f"scale is {list(scale)}; it should be a number, or {mask.shape[1]} of them, one for each picture")
    for picture in range(mask.shape[1]):
        yield states[:, picture], scale[picture] if several else scale, mask[:, picture]


def _sum(out, y, scale: float, mask, how: How) -> torch.Tensor:
    """out + scale * (y * mask); in ``close`` one pass."""
    if out is None:
        return scale * (y if mask is None else y * mask)
    if how.numerics == "close":
        return torch.add(out, y, alpha=scale) if mask is None else torch.addcmul(out, y, mask, value=scale)
    return out + scale * (y if mask is None else y * mask)


def over_tokens(mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """[B, H, W] -> [B, tokens, 1]: over so many tokens of a picture of the mask's aspect. Where that gives fewer, the last are 0, as stock has them."""
    height, width = mask.shape[1:]
    rows = min(max(int(math.sqrt(tokens / (width / height))), 1), tokens)
    rows += tokens % rows != 0
    small = F.interpolate(mask[None], size=(rows, tokens // rows), mode="bicubic")[0].flatten(1)
    return F.pad(small, (0, tokens - small.shape[1]))[..., None]


def slot(model: nn.Module) -> str:
    """Where a model has the projections of its adapters; an MMDiT, which takes one adapter, its only one."""
    return "image_proj" if hasattr(model, "image_proj") else "encoder_hid_proj"


def attach(model: nn.Module, projections: Sequence[nn.Module]) -> None:
    """Makes room in a ``UNet``, ``Flux`` or ``MMDiT`` for one adapter of each projection, in the place of those that were there; new weights are random,
    scales 1 (an MMDiT's 0.5), as diffusers'. Raises ValueError for projections that are not of such a model."""
    layers, timed = model.picture_layers(), slot(model) == "image_proj"
    if not layers or not projections:
        raise ValueError(f"{'projections is empty' if layers else 'model has no attention to text'}; an IP-Adapter needs one")
    _check_projections(model, projections, timed)
    for name in layers.values():
        layer = model.get_submodule(name)
        channels = layer.to_k.out_features
        if timed:
            new = JointDecoupledAttention(projections[0].channels, projections[0].width, channels, layer.heads, model.how)
        else:
            new = DecoupledAttention([one.channels for one in projections], channels, layer.to_k.bias is not None, model.how)
        layer.processor = new.to(layer.to_k.weight)
    setattr(model, slot(model), (projections[0] if timed else MultiImageProjection(projections)).to(layer.to_k.weight))


def _check_projections(model: nn.Module, projections: Sequence[nn.Module], timed: bool) -> None:
    for index, one in enumerate(projections):
        if isinstance(one, TimeImageProjection) != timed:
            raise ValueError(f"projections[{index}] is of the class {type(one).__name__}; it should {'' if timed else 'not '}be TimeImageProjection, "
                             f"as the model is of the class {type(model).__name__}")
    if timed and len(projections) > 1:
        raise ValueError(f"projections has {len(projections)} entries; it should have 1: an MMDiT takes one IP-Adapter")
    if timed and projections[0].channels != model.config.inner_dim:
        raise ValueError(f"projections[0] gives {projections[0].channels} channels; it should give {model.config.inner_dim}, as the model has")


def detach(model: nn.Module) -> None:
    """Takes all adapters away. The LoRA that came with one of FaceID stays, in peft's layers."""
    for name in model.picture_layers().values():
        model.get_submodule(name).processor = None
    setattr(model, slot(model), None)


def set_scale(model: nn.Module, scale, under: str = "") -> None:
    """How much each adapter counts, in the layers whose names begin with ``under`` (``"up_blocks.0.attentions.1"``, InstantStyle's style). A number for all,
    or one for each adapter: a number, or a list with one for each of its pictures, where there are masks. ValueError for another count."""
    layers = list(model.picture_layers().values())
    names = [name for name in layers if name.startswith(under)]
    count = len(model.get_submodule(layers[0]).processor.scale) if layers and getattr(model, slot(model)) is not None else 0
    scale = list(scale) if isinstance(scale, (list, tuple)) else [scale] * count
    if len(scale) != count or not count or any(one is None for one in scale):
        raise ValueError(f"scale is {scale}; it should be a number or {count} of them, one for each IP-Adapter of the model")
    if slot(model) == "image_proj" and isinstance(scale[0], (list, tuple)):
        raise ValueError(f"scale is {scale}; it should be a number, as an MMDiT takes no masks")
    if not names:
        raise ValueError(f"under is {under!r}, with which no name begins; names are {', '.join(layers)}")
    for name in names:
        model.get_submodule(name).processor.scale = [list(one) if isinstance(one, (list, tuple)) else one for one in scale]


def pictures_of(projection: MultiImageProjection | None, name: str, embeds, batch: int, masks=None) -> Pictures | None:
    """The projected pictures, or None where the model has no adapter. ``name``: of the argument ``embeds``, which errors tell.

    Raises: ValueError naming what is missing, too much or of another count or shape.
    """
    layers = () if projection is None else projection.image_projection_layers
    for given, tensors, needed in ((name, embeds, bool(layers)), ("ip_adapter_masks", masks, False)):
        if tensors is None and not needed:
            continue
        if not layers:
            raise ValueError(f"{given} is given; it should be None, as the model has no IP-Adapter")
        if not isinstance(tensors, (list, tuple)) or len(tensors) != len(layers):
            what = f"has {len(tensors)} entries" if isinstance(tensors, (list, tuple)) else f"is {'None' if tensors is None else 'a ' + type(tensors).__name__}"
            raise ValueError(f"{given} {what}; it should be a list of {len(layers)}, one for each IP-Adapter")
    if not layers:
        return None
    masks = [None] * len(layers) if masks is None else masks
    for index, (one, mask, layer) in enumerate(zip(embeds, masks, layers)):
        if one.dim() != 3 + layer.takes_tokens or one.shape[0] != batch or one.shape[-1] != layer.image_channels or 0 in one.shape:
            wanted = f"[{batch}, N, {'L, ' if layer.takes_tokens else ''}{layer.image_channels}]"
            raise ValueError(f"{name}[{index}] has shape {list(one.shape)}; it should be {wanted}")
        if mask is not None and (mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] != one.shape[1] or 0 in mask.shape):
            raise ValueError(f"ip_adapter_masks[{index}] has shape {list(mask.shape)}; it should be [{batch} or 1, {one.shape[1]}, H, W]")
    return Pictures(projection(embeds), masks)


def projections_of(state_dict: Mapping[str, torch.Tensor], how: How = How()) -> list[nn.Module]:
    """Projections of the shapes that a diffusers state dict of a model with IP-Adapters has, in order; their weights are not loaded.

    Raises KeyError for one of a kind that we do not have.
    """
    timed = {key.removeprefix("image_proj."): value for key, value in state_dict.items() if key.startswith("image_proj.")}
    if timed:
        return [time_projection(timed, how)]
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in state_dict.items():
        match = re.match(r"encoder_hid_proj\.image_projection_layers\.(\d+)\.", key)
        if match:
            found.setdefault(int(match[1]), {})[key[match.end():]] = value
    return [_projection(found[index], how) for index in sorted(found)]


def _projection(weights: Mapping[str, torch.Tensor], how: How) -> nn.Module:
    if "image_embeds.weight" in weights:
        channels, (outputs, inputs) = weights["norm.weight"].shape[0], weights["image_embeds.weight"].shape
        return ImageProjection(inputs, channels, outputs // channels, how)
    if "proj_in.weight" in weights:
        width, image_channels = weights["proj_in.weight"].shape
        heads, hidden = weights["layers.0.attn.to_q.weight"].shape[0] // HEAD_DIM, weights["layers.0.ff.1.net.0.proj.weight"].shape[0]
        shape = dict(image_channels=image_channels, channels=weights["proj_out.weight"].shape[0], width=width, heads=heads, mlp_ratio=hidden / width,
                     depth=len({key.split(".")[1] for key in weights if key.startswith("layers.")}), how=how)
        if "latents" in weights:
            return PlusImageProjection(tokens=weights["latents"].shape[1], **shape)
        if "proj.net.0.proj.weight" in weights:
            hidden, face_channels = weights["proj.net.0.proj.weight"].shape
            return FacePlusImageProjection(face_channels, hidden, tokens=weights["proj.net.2.weight"].shape[0] // width, **shape)
    if "ff.net.0.proj.weight" in weights:
        channels, (hidden, inputs), outputs = weights["norm.weight"].shape[0], weights["ff.net.0.proj.weight"].shape, weights["ff.net.2.weight"].shape[0]
        if hidden == inputs and outputs == channels:
            return FullImageProjection(inputs, channels, how)
        if outputs % channels == 0:
            return FaceImageProjection(inputs, channels, hidden, outputs // channels, how)
    raise KeyError(f"state_dict has a projection of {sorted(weights)}, which no IP-Adapter of ours has")
