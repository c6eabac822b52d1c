"""A tiny StableDiffusion3Pipeline without text encoders: it is called with prompt embeddings."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from tests.models.stock_sd3 import inputs, stock_model

__all__ = ["generate", "inputs", "run", "stock_model", "tiny_pipeline"]


def tiny_pipeline(variant: str = "sd3.5", dtype: torch.dtype = torch.float32, cls=StableDiffusion3Pipeline, **changes):
    vae = AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, sample_size=16,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, shift_factor=0.1, scaling_factor=1.3)
    parts = dict(text_encoder=None, text_encoder_2=None, text_encoder_3=None, tokenizer=None, tokenizer_2=None, tokenizer_3=None)
    pipe = cls(transformer=stock_model(variant, dtype), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae.to(dtype), **parts, **changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, steps: int = 4, batch: int = 1, seed: int = 0, **changes) -> torch.Tensor:
    """The final latents for random prompt embeddings."""
    generator = torch.Generator().manual_seed(seed)
    dtype = pipe.transformer.dtype

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    embeds = dict(prompt_embeds=randn(batch, 5, 32), negative_prompt_embeds=randn(batch, 5, 32), pooled_prompt_embeds=randn(batch, 64),
                  negative_pooled_prompt_embeds=randn(batch, 64))
    call = dict(num_inference_steps=steps, guidance_scale=4.0, height=16, width=24, generator=generator, output_type="latent", return_dict=False)
    return pipe(**embeds, **dict(call, **changes))[0]


@torch.no_grad()
def run(model, data: dict, **more) -> torch.Tensor:
    return model(**data, **more, return_dict=False)[0]


