"""``fusewire.parity`` of pipelines that draw noise on the way, that are given latents, or that do not tell what it needs."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import fusewire
from fusewire import ops
from fusewire.errors import BadInput
from fusewire.kernels.library import CPU
from fusewire.parity import pictures
from tests.compat.families import FAMILIES
from tests.tiny import CALL, tiny_pipeline


def prove(pipe, **more):
    return fusewire.parity(pipe, **{**dict(prompts=["a red 7"], seeds=(0, 1), steps=3, levels=["picture"], numerics="exact", call=CALL), **more})


@pytest.fixture
def noisy():
    pipe = tiny_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)
    return pipe


def test_every_side_draws_the_same_noise(noisy):
    state = torch.random.get_rng_state()
    result = prove(noisy, numerics="both", levels=["model", "picture"])
    assert result.ok, result.failed
    assert not CPU.loaded or ops.stats()["solver_step"]["cpu"]  # the scheduler's, beside the denoiser's, which the level "model" looks for
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any("float64" in curve for curve in result.curves)  # whose loop has no noise
    first, again = (pictures.generate(noisy, pictures.plan(noisy, None, [seed], 3, 4.0, None, CALL)).latents[-1] for seed in (0, 0))
    other = pictures.generate(noisy, pictures.plan(noisy, None, [1], 3, 4.0, None, CALL)).latents[-1]
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_generator_begins_anew_and_is_left_alone(noisy):
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    for given in (generator, [generator, torch.Generator().manual_seed(8)]):
        assert prove(noisy, call=CALL | dict(generator=given)).ok
    assert torch.equal(generator.get_state(), state)


def test_latents_of_ones_own():
    pipe, latents = tiny_pipeline(), torch.randn(2, 4, 8, 8)
    run = pictures.plan(pipe, None, [0, 1], 2, 4.0, None, CALL | dict(latents=latents))
    assert torch.equal(run.noise, latents) and "latents" not in run.call
    assert prove(pipe, call=CALL | dict(latents=latents)).ok


def test_what_tells_no_size():
    pipe = tiny_pipeline()
    pipe.transformer.register_to_config(sample_size=None)
    for call in (lambda: prove(pipe), lambda: fusewire.profile(pipe, steps=1, rounds=1, call=CALL)):
        with pytest.raises(BadInput, match=r"StableDiffusion3Pipeline does not tell the size of its latents; call=\{'latents': ...\} does"):
            call()
    pipe.transformer.register_to_config(sample_size=(4, 6), in_channels=9)
    assert pictures.plan(pipe, None, [0], 1, 4.0, None, CALL).noise.shape == (1, 4, 4, 6)


def test_a_pipeline_that_calls_nothing_back(monkeypatch):
    pipe = tiny_pipeline()

    class Silent(type(pipe)):
        def __call__(self, *args, callback_on_step_end=None, **more):
            return super().__call__(*args, **more)

    silent = Silent(**pipe.components)
    with pytest.raises(BadInput, match="Silent calls nothing back after its steps"):
        prove(silent)


def test_latents_of_a_flux_pipeline():
    """Tokens of 2 x 2 latents, by the pipeline's own size or the one asked for; a denoiser that takes a mask beside them has as many channels."""
    pipe = FAMILIES["Flux.1"].pipe(torch.float32)
    pipe.default_sample_size = 6
    channels = pipe.transformer.config.in_channels
    assert pictures.plan(pipe, None, [0], 1, 4.0, None, {}).noise.shape == (1, 9, channels)
    assert pictures.plan(pipe, None, [0], 1, 4.0, 8 * pipe.vae_scale_factor, {}).noise.shape == (1, 16, channels)
    pipe.transformer.register_to_config(in_channels=6 * channels)
    assert pictures.plan(pipe, None, [0], 1, 4.0, None, {}).noise.shape == (1, 9, 4 * pipe.vae.config.latent_channels)
