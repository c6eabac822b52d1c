"""Whole pictures of tiny Stable Diffusion pipelines (flows: SD3's) with each swapped scheduler: torch.equal to stock in text, img2img and inpainting."""

from __future__ import annotations

import pytest
import torch
from diffusers import (DDIMInverseScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, PNDMScheduler,
                       StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline, StableDiffusionDiffEditPipeline, StableDiffusionImg2ImgPipeline,
                       StableDiffusionInpaintPipeline, StableDiffusionPipeline)

import fusewire
from fusewire import ops
from tests.models import stock_unet
from tests.swap import tiny
from tests.swap.trajectories import DPM, ONE_EACH, SD, SDE, seldom

PIPELINES = {"text": StableDiffusionPipeline, "img2img": StableDiffusionImg2ImgPipeline, "inpainting": StableDiffusionInpaintPipeline}
OTHERS = (FlowMatchHeunDiscreteScheduler, DDIMInverseScheduler)  # which these pipelines do not take
CASES = [*(case for case in ONE_EACH if case[0] not in OTHERS), (DPM, SDE, {}), (ONE_EACH[0][0], SD, dict(eta=0.5))]


def pictures(pipe, kind: str, options: dict) -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    embeds = torch.randn(1, 5, 24, generator=draw).to(pipe.unet.dtype)
    given = dict(prompt_embeds=embeds, negative_prompt_embeds=-embeds, guidance_scale=4.0, num_inference_steps=5, output_type="pt",
                 num_images_per_prompt=2, generator=torch.Generator().manual_seed(7))
    if kind != "text":
        given |= dict(image=torch.rand(1, 3, 16, 16, generator=draw), strength=0.7)
    if kind == "inpainting":
        given |= dict(mask_image=(torch.rand(1, 1, 16, 16, generator=draw) > 0.5).float(), height=16, width=16)
    return pipe(**given, **options).images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("cls, config, options", seldom(CASES, [f"{cls.__name__} {list(options)}" for cls, _, options in CASES], PNDMScheduler))
def test_pictures_are_stock(cls, config, options, kind, dtype):
    options = options if cls.__name__ == "DDIMScheduler" else {}
    pipe = PIPELINES[kind](vae=stock_unet.vae(dtype), text_encoder=None, tokenizer=None, unet=stock_unet.unet("sd", dtype), scheduler=cls(**config),
                           safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    want = pictures(pipe, kind, options)
    assert want.isfinite().all() and want.std() > 0
    handle = fusewire.swap(pipe.scheduler)
    ops.reset_stats()
    assert torch.equal(pictures(pipe, kind, options), want)
    # (img2img and inpainting begin in the middle; a step of Heun is two)
    assert sum(ops.stats()["solver_step"].values()) >= 3
    handle.restore()
    assert torch.equal(pictures(pipe, kind, options), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inversion_is_stock(dtype):
    """From a picture to its noise and back by DiffEdit, with both schedulers swapped."""
    config = dict(SD, clip_sample=False, steps_offset=1)
    pipe = StableDiffusionDiffEditPipeline(
        vae=stock_unet.vae(dtype), text_encoder=None, tokenizer=None, unet=stock_unet.unet("sd", dtype), scheduler=DDIMScheduler(**config),
        inverse_scheduler=DDIMInverseScheduler(**config), safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(2)
    embeds, picture = torch.randn(1, 5, 24, generator=draw).to(dtype), torch.rand(1, 3, 16, 16, generator=draw)
    given = dict(prompt_embeds=embeds, negative_prompt_embeds=-embeds, num_inference_steps=5)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        noise = pipe.invert(image=picture, inpaint_strength=0.8, generator=torch.Generator().manual_seed(7), **given).latents
        image = pipe(mask_image=torch.ones(1, 8, 8), image_latents=noise, inpaint_strength=0.8, generator=torch.Generator().manual_seed(8),
                     output_type="pt", **given).images
        return noise, image

    want = run()
    with fusewire.swapped(pipe.scheduler), fusewire.swapped(pipe.inverse_scheduler):
        ops.reset_stats()
        assert all(map(torch.equal, run(), want)) and all(tensor.isfinite().all() for tensor in want)
        assert sum(ops.stats()["solver_step"].values()) == 8  # four each way


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline])
@pytest.mark.parametrize("cls, config", [(FlowMatchHeunDiscreteScheduler, {}), (FlowMatchEulerDiscreteScheduler, dict(stochastic_sampling=True))])
def test_flows_are_stock(cls, config, kind, dtype):
    pipe = tiny.tiny_pipeline(cls=kind, dtype=dtype)
    pipe.scheduler = cls(**config, shift=3.0)
    given = dict(image=torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(3)), strength=0.7) if "Img2Img" in kind.__name__ else {}
    torch.manual_seed(4)
    want = tiny.generate(pipe, steps=6, **given)
    handle = fusewire.swap(pipe.scheduler)
    ops.reset_stats()
    torch.manual_seed(4)
    assert torch.equal(tiny.generate(pipe, steps=6, **given), want) and want.isfinite().all()
    assert sum(ops.stats()["solver_step"].values()) >= 4
    handle.restore()
