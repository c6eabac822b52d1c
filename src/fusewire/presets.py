"""Models at their full width with random weights: what diffusers class, which arguments, and the inputs of one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fusewire.errors import BadInput

VAE_FACTOR = 8  # pixels per latent of every family


@dataclass(frozen=True)
class Preset:
    """A model of class ``cls``: its arguments but for the depth, which ``depth`` gives from a number of layers (None: it has one depth only)."""

    cls: str
    config: dict
    size: int  # picture width and height, pixels
    text_tokens: int = 0
    layers: int = 1  # unless told otherwise
    full_layers: int = 1
    depth: Callable[[int], dict] | None = None
    step: int = 16  # pixels that a size has to be a multiple of
    largest: int | None = None  # pixels


def _sd3(heads: int, pos_embed_max_size: int, qk_norm: str | None, layers: int, full_layers: int, full_dual: int = 0, **tiny) -> Preset:
    """``full_dual``: of the full model's blocks, how many have a second attention (they come first)."""
    width = 64 * heads
    config = dict(sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64, num_attention_heads=heads,
                  joint_attention_dim=4096, caption_projection_dim=width, pooled_projection_dim=2048, pos_embed_max_size=pos_embed_max_size,
                  qk_norm=qk_norm) | tiny

    def depth(layers: int) -> dict:
        return dict(num_layers=layers, dual_attention_layers=tuple(range(round(layers * full_dual / full_layers))))

    size, tokens = (64, 7) if tiny else (512, 154)
    return Preset("SD3Transformer2DModel", config, size, tokens, layers, full_layers, depth, largest=16 * pos_embed_max_size)


def _flux(guidance: bool, layers: int = 1, full_layers: int = 19, **tiny) -> Preset:
    """As many layers of two streams, and twice as many of one, as the full model has them."""
    config = dict(patch_size=1, in_channels=64, attention_head_dim=128, num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768,
                  guidance_embeds=guidance, axes_dims_rope=(16, 56, 56)) | tiny
    size, tokens = (64, 7) if tiny else (512, 512)
    return Preset("FluxTransformer2DModel", config, size, tokens, layers, full_layers, lambda n: dict(num_layers=n, num_single_layers=2 * n))


def _dit(heads: int, head_dim: int, layers: int, full_layers: int, sample_size: int, **more) -> Preset:
    config = dict(num_attention_heads=heads, attention_head_dim=head_dim, in_channels=4, out_channels=8, sample_size=sample_size, patch_size=2,
                  attention_bias=True, activation_fn="gelu-approximate", norm_elementwise_affine=False) | more
    size = VAE_FACTOR * sample_size
    return Preset("DiTTransformer2DModel", config | dict(num_embeds_ada_norm=1000, norm_type="ada_norm_zero"), size, 0, layers, full_layers,
                  lambda n: dict(num_layers=n), largest=size)


_SD = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
_SDXL = dict(sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
             down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
             up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
             use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
_SD_TINY = dict(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=24, norm_num_groups=4, attention_head_dim=2,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
_VAE = dict(latent_channels=4, block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
_TINY = dict(sample_size=8, in_channels=4, out_channels=4, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
             caption_projection_dim=32, pooled_projection_dim=64)

PRESETS = {
    "sd3.5-medium": _sd3(24, 384, "rms_norm", 3, 24, full_dual=13),
    "sd3.5-large": _sd3(38, 192, "rms_norm", 2, 38),
    "sd3-medium": _sd3(24, 192, None, 3, 24),
    "flux-dev": _flux(True),
    "flux-schnell": _flux(False),
    "sd1.5": Preset("UNet2DConditionModel", _SD, 512, 77, step=64),
    "sdxl": Preset("UNet2DConditionModel", _SDXL, 512, 77, step=32),
    "sd-vae": Preset("AutoencoderKL", _VAE, 256, step=8),
    "dit-xl-2": _dit(16, 72, 4, 28, 32),
    "sd3.5-tiny": _sd3(2, 16, "rms_norm", 2, 2, 1, **_TINY),
    "sd3-tiny": _sd3(2, 16, None, 2, 2, **_TINY),
    "flux-tiny": _flux(True, 1, 1, in_channels=16, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=24,
                       axes_dims_rope=(4, 4, 8)),
    "sd-tiny": Preset("UNet2DConditionModel", _SD_TINY, 64, 7),
    "dit-tiny": _dit(2, 8, 2, 2, 8),
}


def check_shape(name: str, layers: int | None, size: int | None) -> tuple[int, int]:
    """(layers, size) of a preset, its own where there is None. BadInput for a depth or size that it cannot have."""
    preset = PRESETS[name]
    for option, value in (("layers", layers), ("size", size)):
        if value is not None and value < 1:
            raise BadInput(f"{option} is {value}; it should be at least 1")
    if layers is not None and preset.depth is None:
        raise BadInput(f"--layers is {layers}; {name} has one depth only")
    layers, size = layers or preset.layers, size or preset.size
    if size % preset.step or preset.largest is not None and size > preset.largest:
        most = "" if preset.largest is None else f", at most {preset.largest}"
        raise BadInput(f"--size is {size}; for {name} it should be a multiple of {preset.step}{most}")
    if layers > preset.full_layers:
        raise BadInput(f"--layers is {layers}; {name} has {preset.full_layers}")
    return layers, size


def build(name: str, dtype: torch.dtype, layers: int | None, size: int | None, seed: int) -> tuple[nn.Module, dict, str, int]:
    """(model, inputs of one call, description, size) of a preset, in evaluation mode. BadInput for a depth or size that it cannot have."""
    from fusewire.folders import needs, silent

    diffusers = needs("diffusers")
    layers, size = check_shape(name, layers, size)
    preset = PRESETS[name]
    depth = preset.depth(layers) if preset.depth else {}
    before, generator_state = torch.get_default_dtype(), torch.get_rng_state()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        model = getattr(diffusers, preset.cls)(**depth, **preset.config)
    finally:
        torch.set_default_dtype(before)
        torch.set_rng_state(generator_state)
    with silent():
        model = model.to(dtype).eval().requires_grad_(False)
    inputs = inputs_for(model, size=size, text_tokens=preset.text_tokens, seed=seed)
    blocks = f"{layers} of {preset.full_layers} blocks, " if preset.depth else ""
    text = f" + {preset.text_tokens} text tokens" if preset.text_tokens else ""
    return model, inputs, f"{blocks}{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, {size} x {size} pixels{text}", size


def inputs_for(model: nn.Module, *, size: int | None = None, text_tokens: int | None = None, batch: int = 1, seed: int = 0) -> dict:
    """Random inputs of one call of a denoiser or autoencoder of diffusers, in its dtype and on its device, halfway through the noise.

    Args:
        size: picture width and height in pixels; the model's own sample size unless told.
        text_tokens: length of the text; that of the family's encoders unless told.

    Raises: BadInput for a class that no preset has.
    """
    kind = _INPUTS.get(type(model).__name__)
    if kind is None:
        raise BadInput(f"inputs is None; for a {type(model).__name__} it should hold the keyword arguments of one call")
    make, usual = kind
    generator, place = torch.Generator("cpu").manual_seed(seed), dict(dtype=model.dtype, device=model.device)

    def normal(*shape):
        return torch.randn(batch, *shape, generator=generator, device="cpu").to(**place)

    timestep = torch.full((batch,), 500.0, device=model.device)
    return dict(make(model.config, normal, size, text_tokens or usual, timestep), return_dict=False)


def _latent(config, size: int | None) -> int:
    return config.sample_size if size is None else size // VAE_FACTOR


def _sd3_inputs(config, normal, size, tokens, timestep) -> dict:
    side = _latent(config, size)
    return dict(hidden_states=normal(config.in_channels, side, side), encoder_hidden_states=normal(tokens, config.joint_attention_dim),
                pooled_projections=normal(config.pooled_projection_dim), timestep=timestep)


def _flux_inputs(config, normal, size, tokens, timestep) -> dict:
    side = (size or 1024) // (2 * VAE_FACTOR)
    ids = torch.zeros(side, side, 3, device=timestep.device)
    ids[..., 1] += torch.arange(side, device=timestep.device)[:, None]
    ids[..., 2] += torch.arange(side, device=timestep.device)
    given = dict(hidden_states=normal(side * side, config.in_channels), encoder_hidden_states=normal(tokens, config.joint_attention_dim),
                 pooled_projections=normal(config.pooled_projection_dim), timestep=timestep / 1000, img_ids=ids.view(-1, 3),
                 txt_ids=torch.zeros(tokens, 3, device=timestep.device))
    return given | dict(guidance=torch.full_like(timestep, 3.5)) if config.guidance_embeds else given


def _unet_inputs(config, normal, size, tokens, timestep) -> dict:
    side = _latent(config, size)
    given = dict(sample=normal(config.in_channels, side, side), timestep=timestep, encoder_hidden_states=normal(tokens, config.cross_attention_dim))
    if config.addition_embed_type != "text_time":
        return given
    ids = torch.tensor([side * VAE_FACTOR, side * VAE_FACTOR, 0, 0, side * VAE_FACTOR, side * VAE_FACTOR])
    pooled = normal(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
    return given | dict(added_cond_kwargs=dict(text_embeds=pooled, time_ids=ids.to(pooled).expand(len(pooled), 6)))


def _dit_inputs(config, normal, size, tokens, timestep) -> dict:
    side = _latent(config, size)
    return dict(hidden_states=normal(config.in_channels, side, side), timestep=timestep.long(), class_labels=torch.zeros_like(timestep).long())


def _pixart_inputs(config, normal, size, tokens, timestep) -> dict:
    side = _latent(config, size)
    return dict(hidden_states=normal(config.in_channels, side, side), encoder_hidden_states=normal(tokens, config.caption_channels),
                timestep=timestep.long(), added_cond_kwargs=dict(resolution=None, aspect_ratio=None))


def _vae_inputs(config, normal, size, tokens, timestep) -> dict:
    side = size or config.sample_size
    return dict(sample=normal(config.in_channels, side, side))


_INPUTS = {"SD3Transformer2DModel": (_sd3_inputs, 154), "FluxTransformer2DModel": (_flux_inputs, 512), "UNet2DConditionModel": (_unet_inputs, 77),
           "DiTTransformer2DModel": (_dit_inputs, 0), "PixArtTransformer2DModel": (_pixart_inputs, 120), "AutoencoderKL": (_vae_inputs, 0)}
