"""Where the swapped schedulers' results lie in memory: where stock's do, which is now the latents' layout, now that of the model's output.

A model rounds channels-last latents otherwise than contiguous ones: in another layout, whole pictures are not stock's.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import (DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler, StableDiffusionPipeline,
                       UniPCMultistepScheduler)

import fusewire
from fusewire import ops
from tests.effort import EFFORT
from tests.models import stock_unet
from tests.swap.trajectories import CONFIGS, DTYPES, NO_CLIP, SD, X0, V, equal, fused_steps, scaled

MORE = [(DDPMScheduler, NO_CLIP | X0, {}), (DDPMScheduler, NO_CLIP | X0 | dict(variance_type="learned_range"), {}), (LCMScheduler, X0, {}),
        (HeunDiscreteScheduler, SD | X0, {}), (HeunDiscreteScheduler, SD | V | dict(clip_sample=True), {}),
        (FlowMatchEulerDiscreteScheduler, {}, {}), (FlowMatchEulerDiscreteScheduler, dict(stochastic_sampling=True), {})]


def what_decides(case: tuple) -> tuple:
    """What may change the order of stock's sums: the prediction, whether x0 is clipped, the solver, noise, the stages."""
    cls, config, options = case
    scheduler = cls(**config)
    names = ("prediction_type", "clip_sample", "solver_order", "solver_type", "algorithm_type", "variance_type", "skip_prk_steps", "stochastic_sampling")
    return (cls, *(scheduler.config.get(name) for name in names), "s_churn" in options, "eta" in options, options.get("order"))


CASES = list({what_decides(case): case for case in reversed([*CONFIGS, *MORE])}.values())[::-1]
IDS = ["-".join(getattr(part, "__name__", str(part)) for part in what_decides(case) if part not in (None, False)) for case in CASES]
# The layout of the latents (c: contiguous, l: channels-last, -: as the step before left them, as for all further steps) and of the model's outputs.
# Those of the second half are changed by a callback in the middle: between a solver's stages and steps, where the latents that it keeps come first.
RUNS = [("c", "l"), ("l", "c"), ("l", "l"), ("-l", "c"), ("l-c", "l"), ("--l", "c"), ("---l", "c"), ("l---c", "l"), ("-----l", "c")]


def laid(x: torch.Tensor, layout: str) -> torch.Tensor:
    return x if layout == "-" else x.contiguous(memory_format=torch.channels_last if layout == "l" else torch.contiguous_format)


def results(scheduler, options: dict, dtype: torch.dtype, latents: str, output: str) -> list[torch.Tensor]:
    """Everything that the steps of a run return."""
    scheduler.set_timesteps(7)
    draw, takes = torch.Generator().manual_seed(5), inspect.signature(scheduler.step).parameters
    given = options | (dict(generator=torch.Generator().manual_seed(3)) if "generator" in takes else {})
    x, seen = torch.randn(2, 4, 6, 5, generator=draw).to(dtype), []
    channels = 8 if "learned" in str(scheduler.config.get("variance_type")) else 4
    for i, timestep in enumerate(scheduler.timesteps):
        x = laid(x, latents[i] if i < len(latents) else "-")
        scaled(scheduler, x, timestep)
        found = scheduler.step(laid(torch.randn(2, channels, 6, 5, generator=draw).to(dtype), output), timestep, x, return_dict=i % 2 == 0, **given)
        found = [one for one in (found if isinstance(found, tuple) else found.values()) if one is not None]
        x = found[0]
        seen += found
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls, config, options", CASES, ids=IDS)
def test_results_lie_as_stocks_do(cls, config, options, dtype):
    """In 16 bits churn copies; the others lie as in float32, which `make test-all` looks at too."""
    if dtype is torch.bfloat16 and EFFORT == 1 and "s_churn" not in options:
        pytest.skip("float32 says it")
    for run in RUNS:
        want, scheduler = results(cls(**config), options, dtype, *run), cls(**config)
        with fusewire.swapped(scheduler):
            ops.reset_stats()
            got = results(scheduler, options, dtype, *run)
            assert fused_steps() or sum(ops.stats()["flow_euler_step"].values())
        assert [one.stride() for one in got] == [one.stride() for one in want], run
        assert all(map(equal, got, want)), run


def test_layouts_differ_in_stock():
    """That the test above can fail: stock's layouts are neither always the latents' nor always the model's output's."""
    def last(cls, config, *run) -> set[bool]:
        return {one.is_contiguous() for one in results(cls(**config), {}, torch.float32, *run)}

    assert last(DDIMScheduler, NO_CLIP | X0, "c", "l") == {False} and last(DDIMScheduler, NO_CLIP, "c", "l") == {True}
    assert last(HeunDiscreteScheduler, SD | V, "c", "l") == {True, False}
    changed = results(UniPCMultistepScheduler(), {}, torch.float32, "---l", "c")
    assert all(one.is_contiguous() for one in changed)  # the corrected latents are kept, and come first


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler, LCMScheduler])
def test_pictures_of_a_channels_last_unet_that_predicts_x0(cls, dtype):
    unet = stock_unet.unet("sd", dtype).to(memory_format=torch.channels_last)
    pipe = StableDiffusionPipeline(vae=stock_unet.vae(dtype), text_encoder=None, tokenizer=None, unet=unet, scheduler=cls(**NO_CLIP | X0),
                                   safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(2)).to(dtype)

    def pictures() -> torch.Tensor:
        return pipe(prompt_embeds=embeds, negative_prompt_embeds=-embeds, guidance_scale=4.0, num_inference_steps=5, output_type="pt",
                    generator=torch.Generator().manual_seed(7)).images

    want = pictures()
    assert want.isfinite().all() and want.std() > 0
    with fusewire.swapped(pipe.scheduler):
        ops.reset_stats()
        assert torch.equal(pictures(), want) and fused_steps() == 5
