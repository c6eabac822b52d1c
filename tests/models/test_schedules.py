"""Noise schedules against the tables of diffusers' schedulers and of official repositories; conversions between predictions."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from fusewire.models import schedules
from tests.models.golden import golden

SCHEDULES = {
    "linear": (schedules.linear_betas, dict(beta_schedule="linear")),
    "scaled_linear": (schedules.scaled_linear_betas, dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)),
    "cosine": (schedules.cosine_betas, dict(beta_schedule="squaredcos_cap_v2")),
}
FLOAT32 = 1.2e-7  # diffusers' tables are float32


def near(mine: torch.Tensor, theirs: torch.Tensor, units: float) -> bool:
    """Within ``units`` float32 roundings of each value."""
    return bool(((mine - theirs.double()).abs() <= units * FLOAT32 * theirs.double().abs() + 1e-12).all())


@pytest.mark.parametrize("name", SCHEDULES)
def test_betas_and_products_are_diffusers(name):
    make, config = SCHEDULES[name]
    stock, betas = DDPMScheduler(**config), make()
    bar = schedules.alphas_cumprod(betas)
    assert betas.dtype is bar.dtype is torch.float64 and near(betas, stock.betas, 2)
    # float32 rounds every 1 - beta, by up to half a unit, and the product again: the errors of 1000 factors add up
    assert near(bar, stock.alphas_cumprod, 1000)
    halfway = schedules.alphas_cumprod(stock.betas)
    assert near(halfway[:10], stock.alphas_cumprod[:10], 10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_terminal_snr(name):
    make, config = SCHEDULES[name]
    mine = schedules.alphas_cumprod(schedules.zero_terminal_snr(make()))
    theirs = DDIMScheduler(**config, rescale_betas_zero_snr=True).alphas_cumprod.double()
    assert mine[-1].abs() < 1e-15 and (mine - theirs).abs().max() < 1e-5
    assert torch.isclose(mine[0], schedules.alphas_cumprod(make())[0], rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50, 333, 1000])
@pytest.mark.parametrize("spacing, offset", [("leading", 0), ("leading", 1), ("linspace", 0), ("trailing", 0)])
def test_timesteps_are_diffusers(spacing, offset, steps):
    stock = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    stock.set_timesteps(steps)
    assert torch.equal(schedules.timesteps(steps, spacing, offset), stock.timesteps.double())


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_sigmas_at_times_are_diffusers(name, spacing, steps):
    make, config = SCHEDULES[name]
    stock = EulerDiscreteScheduler(**config, timestep_spacing=spacing)
    stock.set_timesteps(steps)
    times = schedules.timesteps(steps, spacing, whole=False)
    assert near(times, stock.timesteps, 2)
    mine = schedules.sigmas_at(times, schedules.alphas_cumprod(make()))
    assert len(mine) == steps + 1 and mine[-1] == 0
    assert torch.allclose(mine, stock.sigmas.double(), rtol=2e-4)  # of float32 products; times of float32
    exactly = schedules.sigmas_at(stock.timesteps.double(), stock.alphas_cumprod.double())
    assert near(exactly, stock.sigmas, 40)  # 1 - abar in float32, where abar is near 1


@pytest.mark.parametrize("option, make", [("use_karras_sigmas", schedules.karras_sigmas), ("use_exponential_sigmas", schedules.exponential_sigmas)])
def test_karras_and_exponential_sigmas_are_diffusers(option, make):
    stock = EulerDiscreteScheduler(**{option: True})
    stock.set_timesteps(9)
    assert near(make(9, stock.sigmas[-2].item(), stock.sigmas[0].item()), stock.sigmas, 20)


def test_karras_and_exponential_sigmas_are_those_of_the_official_repositories():
    file = golden("k_diffusion_samplers")[0]
    assert torch.allclose(schedules.karras_sigmas(7, 0.03, 14.6), file["mid/sigmas"], rtol=1e-13, atol=0)
    assert torch.allclose(schedules.exponential_sigmas(7, 0.03, 14.6), file["mid/sigmas_exponential"], rtol=1e-13, atol=0)
    sigmas = golden("edm_sampler")[0]["mid/plain_call_sigma"]  # each twice but the first and the last
    assert torch.allclose(schedules.karras_sigmas(6, 0.002, 80)[:-1], sigmas[[0, 1, 3, 5, 7, 9]], rtol=1e-12, atol=0)


def test_products_and_posterior_of_guided_diffusion():
    file = golden("guided_diffusion_process")[0]
    bar = schedules.alphas_cumprod(schedules.linear_betas())[file["mid/timestep_map"]]
    assert torch.allclose(bar, file["mid/alphas_cumprod"], rtol=1e-12, atol=0)


def test_probe_of_the_dpm_solver_schedule():
    """alpha and sigma of the discrete schedule between its steps: linear in log alpha, as the repository has it; ours at the steps themselves."""
    file = golden("dpm_solver")[0]
    bar = schedules.alphas_cumprod(file["mid/betas"])
    place = file["in/t_probe"].double() * 1000 - 1
    on_a_step = (place - place.round()).abs() < 1e-4
    at = place.round().long()[on_a_step]
    assert on_a_step.any()
    assert torch.allclose(bar[at].sqrt(), file["mid/alpha"][on_a_step], rtol=1e-5)
    assert torch.allclose((1 - bar[at]).sqrt(), file["mid/sigma"][on_a_step], rtol=1e-4)


def test_flow_sigmas_with_a_dynamic_shift_are_diffusers():
    stock = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for tokens, mu in ((256, 0.5), (4096, 1.15), (1024, 0.63)):
        shift = schedules.flow_shift(tokens)
        assert math.isclose(shift, math.exp(mu), rel_tol=1e-12)
        stock.set_timesteps(sigmas=torch.linspace(1, 1 / 6, 6).double().numpy(), mu=mu)
        assert near(schedules.flow_sigmas_shifted_once(6, shift, torch.float64, smallest=1 / 6), stock.sigmas, 4)


@pytest.mark.parametrize("kind", schedules.PREDICTIONS)
@pytest.mark.parametrize("alpha, sigma", [(0.6, 0.8), (0.3, 0.7), (1.0, 4.0)])
def test_conversions(kind, alpha, sigma):
    """Any kind from any other, on a variance-preserving path, a flow, and with alpha 1."""
    x0, eps = torch.randn(2, 3, 4, 5, dtype=torch.float64).unbind(0)
    z, truth = alpha * x0 + sigma * eps, {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "velocity": eps - x0}
    for to, want in truth.items():
        assert torch.allclose(schedules.converted(truth[kind], z, kind, to, alpha, sigma), want, atol=1e-12)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_conversions_are_diffusers(kind):
    name = {"x0": "sample", "eps": "epsilon", "v": "v_prediction"}[kind]
    stock = DDIMScheduler(prediction_type=name, clip_sample=False)
    stock.set_timesteps(10)
    output, z = torch.randn(2, 1, 3, 4, 4)
    bar = stock.alphas_cumprod[500].double()
    want = stock.step(output, 500, z).pred_original_sample
    got, _ = schedules.x0_and_eps(output.double(), z.double(), kind, bar.sqrt(), (1 - bar).sqrt())
    assert torch.allclose(got, want.double(), atol=1e-4)


@pytest.mark.parametrize("call, message", [
    (lambda: schedules.timesteps(0), "^steps is 0"), (lambda: schedules.timesteps(3, "even"), "^spacing is 'even'"),
    (lambda: schedules.flow_sigmas(0), "^steps is 0"), (lambda: schedules.karras_sigmas(0, 0.1, 10.0), "^steps is 0"),
    (lambda: schedules.exponential_sigmas(0, 0.1, 10.0), "^steps is 0"),
    (lambda: schedules.x0_and_eps(torch.ones(1), torch.ones(1), "score", 1, 1), "^kind is 'score'"),
    (lambda: schedules.converted(torch.ones(1), torch.ones(1), "eps", "score", 1, 1), "^to is 'score'"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
