"""Stable Diffusion 2 from the prompt to the picture: a text encoder like OpenCLIP's (GELU, as many heads as it has 64 channels), a U-Net with linear
projections and heads by level, velocities predicted."""

from __future__ import annotations

import pytest
import torch
from diffusers import (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline,
                       StableDiffusionPipeline, UNet2DConditionModel)

import fusewire
from tests.models.stock_sd3 import randomise
from tests.models.stock_unet import SD
from tests.swap.whole import CASES, check, clip, counts, quiet, vae
from tests.tiny import letters

# 96 and 24 positions: fewer than 32 rows of a linear stay PyTorch's, in close too
SIZE = dict(height=16, width=24)
UNET = dict(SD, block_out_channels=(16, 32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=(1, 2, 4), use_linear_projection=True,
            upcast_attention=True, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"))
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction", steps_offset=1)
# As the model is published; and with a last signal-to-noise ratio of zero, as velocities allow it
SCHEDULERS = {"DDIM": DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
              "DDIM, zero SNR": DDIMScheduler(**BETAS, clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
              "Euler": EulerDiscreteScheduler(**BETAS), "DPM-Solver++": DPMSolverMultistepScheduler(**BETAS)}


def pipeline(scheduler: str = "DDIM", dtype: torch.dtype = torch.float32, cls=StableDiffusionPipeline):
    torch.manual_seed(5)
    tokenizer, stock = letters(), SCHEDULERS[scheduler]
    unet = randomise(UNet2DConditionModel(**UNET)).eval().to(dtype)
    encoder = clip(dtype, 32, tokenizer, hidden_act="gelu", num_hidden_layers=3)
    return quiet(cls(unet=unet, vae=vae(dtype), text_encoder=encoder, tokenizer=tokenizer, scheduler=type(stock).from_config(stock.config),
                     safety_checker=None, feature_extractor=None, requires_safety_checker=False))


def generate(pipe, prompt="a b c", **more) -> torch.Tensor:
    given = dict(prompt=prompt, negative_prompt="d", num_inference_steps=4, guidance_scale=5.0, generator=torch.Generator().manual_seed(0),
                 output_type="pt", return_dict=False)
    return pipe(**dict(given, **SIZE) | more)[0]


@CASES
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_from_the_prompt_to_the_picture(scheduler, numerics, dtype):
    pipe = pipeline(scheduler, dtype)
    report, ran, want = check(pipe, generate, numerics)
    assert want.shape == (1, 3, *SIZE.values())
    assert {entry.name.split(".")[0] for entry in report.swapped} == {"unet", "vae", "scheduler", "text_encoder"}
    assert {"group_norm_silu", "gate_residual_adaln", "solver_step"} <= ran
    # The encoder's GELU and the U-Net's projections are linears, its feed-forward a GEGLU
    assert {"attention", "linear", "geglu"} <= ran if numerics == "close" else not {"attention", "linear", "geglu"} & ran
    assert "quick_gelu" not in ran
    assert counts(generate(pipe, "x y z"), want)


@CASES
def test_from_embeddings_to_latents(numerics, dtype):
    """Two prompts, each of two pictures, their guidance rescaled as Lin et al. (2024) want it of velocities."""
    draw = torch.Generator().manual_seed(4)
    embeddings = dict(prompt_embeds=torch.randn(2, 5, 32, generator=draw).to(dtype), negative_prompt_embeds=torch.randn(2, 5, 32, generator=draw).to(dtype))
    call = dict(embeddings, negative_prompt=None, num_images_per_prompt=2, guidance_rescale=0.7, output_type="latent")
    pipe = pipeline("DDIM, zero SNR", dtype)
    _, _, want = check(pipe, lambda pipe: generate(pipe, None, **call), numerics)
    assert want.shape == (4, 4, 8, 12) and not torch.equal(generate(pipe, None, **dict(call, guidance_rescale=0.0)), want)


@CASES
@pytest.mark.parametrize("cls", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def test_pictures_from_pictures(cls, numerics, dtype):
    draw = torch.Generator().manual_seed(6)
    given = dict(image=torch.rand(1, 3, *SIZE.values(), generator=draw), strength=0.7)
    if cls is StableDiffusionInpaintPipeline:
        given |= dict(SIZE, mask_image=(torch.rand(1, 1, *SIZE.values(), generator=draw) > 0.5).float())

    def made(pipe, **more):
        call = dict(prompt="a b c", num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="pt", return_dict=False)
        return pipe(**call | given | more)[0]

    _, _, want = check(pipeline("Euler", dtype, cls), made, numerics)
    assert want.shape == (1, 3, *SIZE.values())
    assert not torch.equal(made(pipeline("Euler", dtype, cls), image=1 - given["image"]), want)


def test_velocities_are_not_taken_for_noise():
    """A scheduler's table is made anew when its prediction_type is changed on the swapped pipeline."""
    pipe = pipeline("Euler")
    want = generate(pipe)
    with fusewire.swapped(pipe):
        assert torch.equal(generate(pipe), want)
        pipe.scheduler.register_to_config(prediction_type="epsilon")
        changed = generate(pipe)
    assert torch.equal(generate(pipe), changed) and not torch.equal(changed, want)
