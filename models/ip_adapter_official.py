"""The names of the official IP-Adapters (tencent-ailab's, in h94/IP-Adapter and h94/IP-Adapter-FaceID; XLabs' of FLUX.1; InstantX's of SD3.5) under ours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from fusewire.models.ip_adapter import attach, projections_of, slot
from fusewire.models.lora import add_lora, require_peft

_SIMPLE = {"proj": "image_embeds", "norm": "norm"}
_FULL = {"proj.0": "ff.net.0.proj", "proj.2": "ff.net.2", "proj.3": "norm"}
_FACE = {"proj.0": "ff.net.0.proj", "proj.2": "ff.net.2", "norm": "norm"}
_FACE_PLUS = {"proj.0": "proj.net.0.proj", "proj.2": "proj.net.2", "norm": "norm"}
_RESAMPLER = {"0.norm1": "ln0", "0.norm2": "ln1", "0.to_q": "attn.to_q", "0.to_out": "attn.to_out.0", "1.0": "ff.0", "1.1": "ff.1.net.0.proj",
              "1.3": "ff.1.net.2"}
_TIMED = {"0.norm1": "ln0", "0.norm2": "ln1", "0.to_q": "attn.to_q", "0.to_kv": "attn.to_kv", "0.to_out": "attn.to_out.0", "1.0": "adaln_norm",
          "1.1": "ff.net.0.proj", "1.3": "ff.net.2", "2.1": "adaln_proj"}
_LORA = r"ip_adapter\.(\d+)\.to_([qkv]|out)_lora\.(down|up)\.weight"
_KEYS = r"(?:ip_adapter\.(\d+)\.to_([kv])_ip|double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj)\.(weight|bias)"


def from_official(checkpoints: Sequence[Mapping], model: nn.Module) -> dict[str, torch.Tensor]:
    """Official checkpoints, one for each adapter, under our (diffusers') names.

    h94/IP-Adapter's and InstantX's of SD3.5, ``image_proj`` and ``ip_adapter`` as dicts or as prefixes of the names, and XLabs' of FLUX.1. The packed keys and
    values of h94's resampler are split into views. FaceID's LoRA, which is no part of a model without peft's layers, is left out: ``face_lora``. Raises
    KeyError for a name that they or ``model`` do not have; ValueError for a second checkpoint for an MMDiT.
    """
    out, layers = {}, model.picture_layers()
    if slot(model) == "image_proj":
        if len(checkpoints) > 1:
            raise ValueError(f"checkpoints has {len(checkpoints)} entries; it should have 1: an MMDiT takes one IP-Adapter")
        return {name: value for one in checkpoints for key, value in _flat(one).items() for name in [_timed(key, layers)]}
    for index, checkpoint in enumerate(checkpoints):
        flat = _flat(checkpoint)
        projection = {re.sub(r"^(image_proj|ip_adapter_proj_model)\.", "", key): value for key, value in flat.items()
                      if not re.fullmatch(f"{_KEYS}|{_LORA}", key)}
        for key, value in _official_projection(projection):
            out[f"encoder_hid_proj.image_projection_layers.{index}.{key}"] = value
        for key, value in flat.items():
            match = re.fullmatch(_KEYS, key)
            if match:
                number, kind = int(match[1] or match[3]), match[2] or match[4]
                out[f"{_layer(layers, number, key)}.processor.to_{kind}_ip.{index}.{match[5]}"] = value
    return out


def face_lora(checkpoint: Mapping, model: nn.Module) -> dict[str, torch.Tensor]:
    """The LoRA of an official FaceID checkpoint as peft's names, ``<linear>.lora_A.weight`` and ``lora_B``; empty where it has none.

    Raises KeyError for a layer that ``model`` does not have, or half of a pair; ValueError for shapes that do not fit it.
    """
    out, layers, parts = {}, model.picture_layers(), {"down": "lora_A", "up": "lora_B"}
    for key, value in _flat(checkpoint).items():
        match = re.fullmatch(_LORA, key)
        if not match:
            continue
        # Attentions to themselves and to text are numbered in turn; picture_layers() has the latter.
        number = int(match[1])
        name = _layer(layers, number | 1, key).removesuffix("2") + "12"[number % 2]
        out[f"{name}.to_{'out.0' if match[2] == 'out' else match[2]}.{parts[match[3]]}.weight"] = value
    for key, down in out.items():
        stem, part = key.removesuffix(".weight").rsplit(".", 1)
        layer, up = model.get_submodule(stem), out.get(f"{stem}.lora_B.weight")
        if up is None or f"{stem}.lora_A.weight" not in out:
            raise KeyError(f"checkpoint has {key!r}, as one half of a pair")
        if part == "lora_A" and (down.shape[1], *up.shape) != (layer.in_features, layer.out_features, down.shape[0]):
            raise ValueError(f"{stem} has a LoRA of {list(up.shape)} times {list(down.shape)}; it should make [{layer.out_features}, {layer.in_features}]")
    return out


def _layer(layers: Mapping[int, str], number: int, key: str) -> str:
    if number not in layers:
        raise KeyError(f"checkpoint has {key!r}, which this model has no layer for")
    return layers[number]


def _flat(checkpoint: Mapping) -> dict[str, torch.Tensor]:
    flat = {}
    for key, value in checkpoint.items():
        flat |= {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat


def _timed(key: str, layers: Mapping[int, str]) -> str:
    """Our name for one of InstantX's."""
    match = re.fullmatch(r"ip_adapter\.(\d+)\.((?:to_[kv]_ip|norm_q|norm_k|norm_ip_k)\.weight|norm_ip\.linear\.(?:weight|bias))", key)
    if match:
        return f"{_layer(layers, int(match[1]), key)}.processor.{match[2]}"
    match = re.fullmatch(r"image_proj\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
    if match and match[2] in _TIMED:
        return f"image_proj.layers.{match[1]}.{_TIMED[match[2]]}.{match[3]}"
    if re.fullmatch(r"image_proj\.(latents|(proj_in|proj_out|norm_out|time_embedding\.linear_[12])\.(weight|bias))", key):
        return key
    raise KeyError(f"checkpoint has {key!r}, which no IP-Adapter of an MMDiT has")


def _official_projection(weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    names, resampled = {}, "latents" in weights or "perceiver_resampler.proj_in.weight" in weights
    if "proj.weight" in weights:
        names = _SIMPLE
    elif "proj.3.weight" in weights:
        names = _FULL
    elif "proj.0.weight" in weights:
        names = _FACE_PLUS if resampled else _FACE
    for name, value in weights.items():
        key = name.removeprefix("perceiver_resampler.")
        stem, _, leaf = key.rpartition(".")
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", stem)
        if stem in names:
            yield f"{names[stem]}.{leaf}", value
        elif resampled and (key == "latents" or stem in ("proj_in", "proj_out", "norm_out")):
            yield key, value
        elif layer and layer[2] in _RESAMPLER:
            yield f"layers.{layer[1]}.{_RESAMPLER[layer[2]]}.{leaf}", value
        elif layer and layer[2] == "0.to_kv":
            for kind, half in zip("kv", value.chunk(2)):
                yield f"layers.{layer[1]}.attn.to_{kind}.{leaf}", half
        else:
            raise KeyError(f"checkpoint has {name!r}, which no IP-Adapter of such a model has")


def load(model: nn.Module, checkpoints: Sequence[Mapping]) -> None:
    """Attaches one adapter for each official checkpoint, with its weights, in the place of those that were there. FaceID's LoRA becomes an adapter of peft's,
    ``faceid_<number of the checkpoint>``; of several the last is on, as diffusers has it.

    Raises KeyError for a name too much or too few, as ``from_official``, ValueError for a shape, ImportError where a LoRA needs peft, which is not installed;
    the model is then as it was.
    """
    state_dict = from_official(checkpoints, model)
    loras = {f"faceid_{index}": lora for index, one in enumerate(checkpoints) if (lora := face_lora(one, model))}
    if loras:
        require_peft()
    holders = [model.get_submodule(name) for name in model.picture_layers().values()]
    before, projection = [holder.processor for holder in holders], getattr(model, slot(model))
    try:
        attach(model, projections_of(state_dict, model.how))
        _check(state_dict, model)
        model.load_state_dict(state_dict, strict=False)
    except BaseException:
        for holder, processor in zip(holders, before):
            holder.processor = processor
        setattr(model, slot(model), projection)
        raise
    for name, lora in loras.items():
        add_lora(model, lora, name)


def _check(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    wanted = {key: value.shape for key, value in model.state_dict().items() if key.startswith(f"{slot(model)}.") or ".processor." in key}
    missing, unexpected = sorted(wanted.keys() - state_dict.keys()), sorted(state_dict.keys() - wanted.keys())
    if missing or unexpected:
        raise KeyError(f"checkpoints lack {missing} and have {unexpected}, which they should not")
    for key, value in state_dict.items():
        if value.shape != wanted[key]:
            raise ValueError(f"checkpoints have {key} of shape {list(value.shape)}; it should be {list(wanted[key])}")
