"""Tiny stock U-Nets, autoencoders and transformers of diffusers with random weights in every parameter, and their inputs."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel
from diffusers.models.embeddings import Timesteps
from torch import nn

from tests.models.stock_sd3 import Waves64, randomise

SD = dict(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=24, norm_num_groups=4,
          down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2)
SDXL = dict(SD, block_out_channels=(16, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=80)
# Guided Diffusion's form: the time embedding as scale and shift of the second norm, resampling inside residual blocks
ADM = dict(SD, resnet_time_scale_shift="scale_shift", down_block_types=("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
           up_block_types=("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"))
UNETS = {"sd": SD, "sdxl": SDXL, "adm": ADM}
DIT = dict(sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=8,
           norm_type="ada_norm_zero", num_embeds_ada_norm=1000, norm_elementwise_affine=False, activation_fn="gelu-approximate", attention_bias=True)
PIXART = dict(sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=8,
              cross_attention_dim=16, caption_channels=12, num_embeds_ada_norm=1000, norm_elementwise_affine=False)
VAE = dict(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, sample_size=16,
           down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
# Two levels and three; with and without quantisation convolutions (SD3 and FLUX.1 have none) and attention
VAES = {"sd": VAE, "flux": dict(VAE, latent_channels=16, block_out_channels=(8, 16, 32), down_block_types=("DownEncoderBlock2D",) * 3,
                                up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=2, use_quant_conv=False, use_post_quant_conv=False,
                                scaling_factor=0.3611, shift_factor=0.1159, force_upcast=False, sample_size=32),
        "no attention": dict(VAE, mid_block_add_attention=False)}


def in_float64(model: nn.Module) -> nn.Module:
    """The stock model in float64, its timestep sinusoids too: they are all that it computes in float32."""
    model = model.double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is Timesteps:
                setattr(module, name, Waves64(child.num_channels, child.downscale_freq_shift, child.flip_sin_to_cos))
    return model


def unet(variant: str = "sd", dtype: torch.dtype = torch.float32, **changes) -> UNet2DConditionModel:
    return randomise(UNet2DConditionModel(**dict(UNETS[variant], **changes))).eval().to(dtype)


def unet_inputs(variant: str = "sd", batch: int = 2, height: int = 8, width: int = 12, tokens: int = 5, dtype: torch.dtype = torch.float32) -> dict:
    """Not square, so that rows and columns cannot be exchanged unnoticed."""
    given = dict(sample=torch.randn(batch, 4, height, width).to(dtype), timestep=torch.tensor(500),
                 encoder_hidden_states=torch.randn(batch, tokens, 24).to(dtype))
    if variant == "sdxl":
        given["added_cond_kwargs"] = dict(text_embeds=torch.randn(batch, 32).to(dtype), time_ids=torch.rand(batch, 6).to(dtype))
    return given


def dit(dtype: torch.dtype = torch.float32, **changes) -> DiTTransformer2DModel:
    return randomise(DiTTransformer2DModel(**dict(DIT, **changes))).eval().to(dtype)


def dit_inputs(batch: int = 2, dtype: torch.dtype = torch.float32, size: int = 8) -> dict:
    return dict(hidden_states=torch.randn(batch, 4, size, size).to(dtype), timestep=torch.randint(0, 1000, (batch,)), class_labels=torch.randint(0, 8, (batch,)))


def pixart(dtype: torch.dtype = torch.float32, **changes) -> PixArtTransformer2DModel:
    return randomise(PixArtTransformer2DModel(**dict(PIXART, **changes))).eval().to(dtype)


def pixart_inputs(batch: int = 2, tokens: int = 5, dtype: torch.dtype = torch.float32) -> dict:
    mask = torch.ones(batch, tokens)
    mask[0, tokens // 2 + 1:] = 0
    return dict(hidden_states=torch.randn(batch, 4, 8, 8).to(dtype), timestep=torch.randint(0, 1000, (batch,)),
                encoder_hidden_states=torch.randn(batch, tokens, 12).to(dtype), encoder_attention_mask=mask,
                added_cond_kwargs=dict(resolution=None, aspect_ratio=None))


def vae(dtype: torch.dtype = torch.float32, variant: str = "sd") -> AutoencoderKL:
    return randomise(AutoencoderKL(**VAES[variant])).eval().to(dtype)
