"""The families of the compatibility matrix: for each a tiny denoiser with random weights and the inputs of one call, and a tiny pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import (AutoencoderKL, DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler,
                       FluxPipeline, PixArtAlphaPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline)
from torch import nn

from tests.models import stock_flux, stock_sd3, stock_unet
from tests.swap import tiny


@dataclass(frozen=True)
class Family:
    """``model(dtype, **changes)``; ``inputs(batch, large, dtype)`` of one call of it; ``pipe(dtype)`` and ``generate(pipe, batch, **keywords) -> latents``.

    Both sizes have 48 tokens and more everywhere: below, `close` leaves linears to PyTorch. ``linears``: names that LoRA targets. ``block``: the class name of a repeated block. ``latents``: dimensions of what a call returns.
    """

    model: Callable[..., nn.Module]
    inputs: Callable[..., dict]
    linears: tuple[str, ...]
    block: str
    pipe: Callable[[torch.dtype], object]
    generate: Callable[..., torch.Tensor]


def call(model: nn.Module, inputs: dict) -> torch.Tensor:
    return model(**inputs, return_dict=False)[0]


def _vae(dtype: torch.dtype, channels: int = 4, **changes) -> AutoencoderKL:
    config = dict(stock_unet.VAE, latent_channels=channels, block_out_channels=(8, 8), **changes)
    return stock_sd3.randomise(AutoencoderKL(**config)).eval().to(dtype)


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _normal(seed: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(seed)
    return generator, lambda *shape: torch.randn(*shape, generator=generator).to(dtype)


def _sd3_inputs(batch=2, large=False, dtype=torch.float32):
    return stock_sd3.inputs(batch, *((16, 16) if large else (16, 12)), 5, dtype)


def _flux_inputs(batch=2, large=False, dtype=torch.float32):
    return stock_flux.inputs("dev", batch, *((10, 7) if large else (8, 7)), dtype=dtype)


def _unet_inputs(variant):
    return lambda batch=2, large=False, dtype=torch.float32: stock_unet.unet_inputs(variant, batch, *((24, 16) if large else (16, 20)), dtype=dtype)


def _dit_inputs(batch=2, large=False, dtype=torch.float32):
    return stock_unet.dit_inputs(batch, dtype, 20 if large else 16)  # diffusers makes squares of tokens


def _pixart_inputs(batch=2, large=False, dtype=torch.float32):
    return dict(stock_unet.pixart_inputs(batch, dtype=dtype), hidden_states=torch.randn(batch, 4, *((20, 24) if large else (16, 18))).to(dtype))


def _flux_pipe(dtype):
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return _quiet(FluxPipeline(transformer=stock_flux.stock_model("dev", dtype), vae=_vae(dtype, shift_factor=0.1, scaling_factor=1.3),
                               scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), **parts))


def _flux_generate(pipe, batch=1, seed=0, **more):
    generator, normal = _normal(seed, pipe.transformer.dtype)
    given = dict(prompt_embeds=normal(batch, 7, 32), pooled_prompt_embeds=normal(batch, 24), num_inference_steps=3, height=16, width=24)
    return pipe(**dict(given, generator=generator, output_type="latent", return_dict=False) | more)[0]


def _sd_pipe(dtype):
    return _quiet(StableDiffusionPipeline(unet=stock_unet.unet("sd", dtype), vae=_vae(dtype), scheduler=DDIMScheduler(clip_sample=False), text_encoder=None,
                                          tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False))


def _sd_generate(pipe, batch=1, seed=0, **more):
    generator, normal = _normal(seed, pipe.unet.dtype)
    given = dict(prompt_embeds=normal(batch, 5, 24), negative_prompt_embeds=normal(batch, 5, 24), num_inference_steps=3, height=16, width=24)
    return pipe(**dict(given, generator=generator, output_type="latent", return_dict=False) | more)[0]


def _sdxl_pipe(dtype):
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = StableDiffusionXLPipeline(unet=stock_unet.unet("sdxl", dtype), vae=_vae(dtype), scheduler=EulerDiscreteScheduler(), add_watermarker=False, **parts)
    pipe._get_add_time_ids = lambda *args, **kwargs: torch.tensor([[16.0, 24.0, 0.0, 0.0, 16.0, 24.0]], dtype=dtype)  # it asks a text encoder
    return _quiet(pipe)


def _sdxl_generate(pipe, batch=1, seed=0, **more):
    generator, normal = _normal(seed, pipe.unet.dtype)
    given = dict(prompt_embeds=normal(batch, 5, 24), negative_prompt_embeds=normal(batch, 5, 24), pooled_prompt_embeds=normal(batch, 32),
                 negative_pooled_prompt_embeds=normal(batch, 32), num_inference_steps=3, height=16, width=24)
    return pipe(**dict(given, generator=generator, output_type="latent", return_dict=False) | more)[0]


def _dit_pipe(dtype):
    return _quiet(DiTPipeline(transformer=stock_unet.dit(dtype), vae=_vae(dtype), scheduler=DDIMScheduler(clip_sample=False)))


def _dit_generate(pipe, batch=1, seed=0, **more):
    """Pictures: this pipeline returns no latents."""
    generator, _ = _normal(seed, torch.float32)
    found = pipe(class_labels=[1 + i for i in range(batch)], generator=generator, num_inference_steps=3, output_type="np", **more).images
    return torch.as_tensor(found)


def _pixart_pipe(dtype):
    return _quiet(PixArtAlphaPipeline(transformer=stock_unet.pixart(dtype), vae=_vae(dtype), scheduler=DPMSolverMultistepScheduler(), text_encoder=None,
                                      tokenizer=None))


def _pixart_generate(pipe, batch=1, seed=0, **more):
    generator, normal = _normal(seed, pipe.transformer.dtype)
    given = dict(prompt_embeds=normal(batch, 5, 12), prompt_attention_mask=torch.ones(batch, 5), negative_prompt_embeds=normal(batch, 5, 12),
                 negative_prompt=None, negative_prompt_attention_mask=torch.ones(batch, 5), num_inference_steps=3, height=16, width=16,
                 use_resolution_binning=False)
    return pipe(**dict(given, generator=generator, output_type="latent", return_dict=False) | more)[0]


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FAMILIES = {
    "SD3.5": Family(partial(stock_sd3.stock_model, "sd3.5"), _sd3_inputs, (*ATTENTION, "add_q_proj", "norm1.linear", "net.0.proj", "net.2"),
                    "JointTransformerBlock", lambda dtype: tiny.tiny_pipeline("sd3.5", dtype),
                    lambda pipe, batch=1, seed=0, **more: tiny.generate(pipe, 3, batch, seed, **more)),
    "Flux.1": Family(partial(stock_flux.stock_model, "dev"), _flux_inputs, (*ATTENTION, "add_q_proj", "norm.linear", "proj_mlp", "proj_out",
                                                                                       "net.0.proj", "net.2"),
                     "FluxTransformerBlock", _flux_pipe, _flux_generate),
    "SD1.5": Family(partial(stock_unet.unet, "sd"), _unet_inputs("sd"), (*ATTENTION, "net.0.proj", "net.2", "time_emb_proj", "conv1", "proj_in"),
                    "BasicTransformerBlock", _sd_pipe, _sd_generate),
    "SDXL": Family(partial(stock_unet.unet, "sdxl"), _unet_inputs("sdxl"), (*ATTENTION, "net.0.proj", "net.2", "time_emb_proj", "conv2",
                                                                                        "proj_in"),
                   "BasicTransformerBlock", _sdxl_pipe, _sdxl_generate),
    "DiT": Family(stock_unet.dit, _dit_inputs, (*ATTENTION, "norm1.linear", "net.0.proj", "net.2"), "BasicTransformerBlock", _dit_pipe, _dit_generate),
    "PixArt": Family(stock_unet.pixart, _pixart_inputs, (*ATTENTION, "net.0.proj", "net.2", "proj_out"), "BasicTransformerBlock", _pixart_pipe,
                     _pixart_generate),
}
# Changes to a model that leave one block of each kind, for whole graphs: tracing takes as long as there are blocks. Of U-Nets that are traced with dynamic
# shapes or shared out the middle block goes too: it is made of what the others are made of.
SMALL = {"SD3.5": dict(num_layers=2), "Flux.1": dict(num_layers=1, num_single_layers=1), "SD1.5": {}, "SDXL": dict(transformer_layers_per_block=1),
         "DiT": dict(num_layers=1), "PixArt": dict(num_layers=1)}
SMALLEST = {family: small | (dict(mid_block_type=None) if family in ("SD1.5", "SDXL") else {}) for family, small in SMALL.items()}
