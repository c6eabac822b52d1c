"""Samplers, schedules and conversions against trajectories of official repositories that ``test_solvers`` and ``test_samplers`` do not follow."""

from __future__ import annotations

import math

import pytest
import torch

from fusewire import ops
from fusewire.models import guidance, schedules, solvers
from fusewire.models.samplers import Conditioning, flow_interpolate, sample, sample_flow_euler
from tests.models.golden import golden
from tests.models.test_samplers import velocity
from tests.models.test_solvers import FLOAT64, analytic_eps, follow, guided_diffusion, near  # noqa: F401  (one is a fixture)


def linear_path(t):
    """(alpha, sigma, and their slopes) of SiT's three paths from noise at t = 0 to a picture at 1."""
    return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)


def gvp_path(t):
    quarter = math.pi / 2
    return torch.sin(t * quarter), torch.cos(t * quarter), quarter * torch.cos(t * quarter), -quarter * torch.sin(t * quarter)


def vp_path(t, low=0.1, high=20.0):
    log_alpha, slope = -0.25 * (1 - t) ** 2 * (high - low) - 0.5 * (1 - t) * low, 0.5 * (1 - t) * (high - low) + 0.5 * low
    alpha = log_alpha.exp()
    sigma = (1 - alpha**2).sqrt()
    return alpha, sigma, alpha * slope, -slope * alpha**2 / sigma


SIT = {"Linear": linear_path, "GVP": gvp_path, "VP": vp_path}


def sit_model(x, t):
    return 0.7 * torch.tanh(x) + 0.4 * x * (1 - t) - 0.1 * t


def drift(kind, path, x, t):
    """dx/dt of the probability flow, and eps: of a model of noise, or of the score, by way of x0 and eps."""
    alpha, sigma, alpha_slope, sigma_slope = SIT[path](t)
    output = sit_model(x, t)
    if kind == "velocity":  # of which the sign is the other one in SiT
        x0, eps = schedules.x0_and_eps(-output, x, "velocity", alpha, sigma)
    else:
        x0, eps = schedules.x0_and_eps(-sigma * output if kind == "score" else output, x, "eps", alpha, sigma)
    return alpha_slope * x0 + sigma_slope * eps, -eps / sigma


@pytest.mark.parametrize("path, kind", [("Linear", "velocity_None"), *((path, kind) for path in SIT for kind in ("noise_None", "score_likelihood"))])
def test_conversions_of_sit(path, kind):
    file, _ = golden("sit_transport")
    t = file[f"out/t_{path}_{kind}"].view(-1, 1, 1, 1)
    alpha, sigma, *_ = SIT[path](t)
    slope, score = drift(kind.partition("_")[0], path, alpha * file["in/x1"] + sigma * file["in/x0"], t)
    assert near(slope, file[f"out/drift_{path}_{kind}"]) and near(score, file[f"out/score_{path}_{kind}"])


@pytest.mark.parametrize("kind", ["velocity", "noise"])
@pytest.mark.parametrize("path", SIT)
@pytest.mark.parametrize("name", ["euler", "heun2"])
def test_ode_of_sit(name, path, kind):
    """Every state of Euler's and Heun's method; a model of the velocity begins at pure noise and, but on VP's path, ends at the picture."""
    file, _ = golden("sit_transport")
    start, stop = 0.0 if kind == "velocity" or path == "VP" else 1e-3, 1.0 if kind == "velocity" and path != "VP" else 1 - 1e-3
    sigmas = 1 - torch.linspace(start, stop, 6, dtype=torch.float64)
    plan = solvers.euler(sigmas, "velocity") if name == "euler" else solvers.heun(sigmas, "velocity", correct_last=True)

    def model(x, sigma):
        return -(sit_model(x, 1 - sigma) if kind == "velocity" else drift(kind, path, x, 1 - sigma)[0])

    _, states = follow(model, file["in/x0"].double(), plan)
    assert near(states[::2 if name == "heun2" else 1], file[f"out/ode_{name}_{path}_{kind}_None"])


def test_times_of_a_corrected_last_step():
    sigmas = schedules.linspace(1, 0, 4)
    own, given = (solvers.heun(sigmas, "velocity", correct_last=True, times=times).times for times in (None, 1000 * sigmas))
    assert torch.equal(own, sigmas[[0, 1, 1, 2, 2, 3]]) and torch.equal(given, 1000 * own)


@pytest.mark.parametrize("name, scale", [("traj", None), ("traj_cfg", 2.0)])
def test_euler_of_minrf(name, scale):
    file, _ = golden("minrf")
    cond, null = (file[f"in/{key}"].double().view(-1, 1, 1, 1) for key in ("cond", "null"))

    def model(z, t):
        each = [0.7 * torch.tanh(z) + 0.4 * z * t - 0.1 * c for c in ((cond,) if scale is None else (null, cond))]
        return torch.cat(each)

    _, states = follow(model, file["in/z1"].double(), solvers.euler(schedules.linspace(1, 0, 7), "velocity"), guidance_scale=scale or 1.0)
    assert near(states, file[f"out/{name}"])


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_schedule_of_flux(tokens):
    """With its dynamic shift, linear in the number of tokens, and without."""
    file, _ = golden("flux_sampling")
    steps = len(file[f"out/schedule_{tokens}"]) - 1
    for name, shift in ((f"schedule_{tokens}", schedules.flow_shift(tokens)), (f"schedule_noshift_{tokens}", 1.0)):
        got = schedules.flow_sigmas_shifted_once(steps, shift, torch.float64, smallest=1 / steps)
        assert torch.allclose(got, file[f"out/{name}"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("loop", ["sample", "sample_flow_euler"])
def test_denoising_of_flux(loop):
    """Tokens at every call of the model, by either loop, on the schedule for their number."""
    file, _ = golden("flux_sampling")
    x, tokens = file["out/packed"], file["out/packed"].shape[1]
    txt, vec = (file[f"in/{name}"].double() for name in ("txt", "vec"))
    sigmas = schedules.flow_sigmas_shifted_once(5, schedules.flow_shift(tokens), torch.float64, smallest=1 / 5)
    assert torch.allclose(sigmas, file["out/schedule_used"], rtol=1e-12, atol=0)
    seen = []

    def model(x, txt, vec, timestep):
        seen.append(x)
        means = 0.1 * txt.mean((1, 2)) + 0.05 * vec.mean(1) - 0.02 * 3.5
        return 0.7 * torch.tanh(x) + 0.4 * x * (1 - timestep / 1000).view(-1, 1, 1) + means.view(-1, 1, 1)

    if loop == "sample":
        out = sample(lambda x, t: model(x, txt, vec, (t * 1000).expand(len(x))), x, solvers.euler(sigmas, "velocity"))
    else:
        out = sample_flow_euler(model, x, sigmas, Conditioning(txt, vec), numerics="close")
    assert near(torch.stack(seen), file["mid/steps"]) and near(out, file["out/denoised"])


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_slg"])
def test_dpmpp_2m_of_sd35(name):
    """DPM-Solver++ on a flow's levels, with guidance in the step, and with skip-layer guidance in the model."""
    file, _ = golden("sd35_sampling")
    file = {key: value.double() for key, value in file.items()}
    positive, negative = ((file[f"in/c_{which}"], file[f"in/y_{which}"]) for which in ("pos", "neg"))
    sigmas = schedules.flow_sigmas(6, 3.0, torch.float64)
    calls = []

    def model(x, sigma):
        calls.append(x)
        timestep = (1000 * sigma).expand(len(x))
        uncond, cond = velocity(x, *negative, timestep), velocity(x, *positive, timestep)
        if name == "dpmpp_2m" or not 0.01 * 6 < len(calls) - 1 < 0.4 * 6:
            return torch.cat([uncond, cond])
        guided = guidance.classifier_free(uncond, cond, 4.5) + 2.5 * (cond - velocity(x, *positive, timestep, skip_layers=(7, 8, 9)))
        return torch.cat([guided, guided])

    x = flow_interpolate(file["in/latent"], file["in/noise"], sigmas[0])
    out = sample(model, x, solvers.dpmpp_2m(sigmas, "velocity"), guidance_scale=4.5)
    assert near(out, file[f"out/{name}"])
    if name == "dpmpp_2m":
        assert near(torch.stack(calls), file["mid/dpmpp_2m_x"])


def test_ddpm_of_guided_diffusion_with_classifier_guidance(guided_diffusion):  # noqa: F811
    """Algorithm 1 of Dhariwal and Nichol (2021): the mean of the step, moved, and then the noise, with learned variances."""
    file, bar, times, x, noise = guided_diffusion
    table = solvers.ddpm(bar, times, limit=1.0).table
    after = torch.cat([bar[times][1:], torch.ones(1, dtype=torch.float64)])
    beta = 1 - bar[times] / after
    posterior = beta * (1 - after) / (1 - bar[times])
    posterior[-1] = posterior[-2]
    for i, t in enumerate(times.double()):
        part = (torch.tanh(0.5 * x) + 1) / 2
        variance = torch.exp(part * beta[i].log() + (1 - part) * posterior[i].log())
        gradient = 0.3 * torch.cos(x) - 0.05 * x + 0.001 * t
        mean, _, _ = ops.solver_step(x, analytic_eps(x, t), table, i, numerics="close")
        x = guidance.mean_towards_class(mean, variance, gradient) + (variance.sqrt() * noise[i] if t > 0 else 0)
        assert near(x, file["out/ddpm_guided_loop"][i])


def test_x0_of_guided_diffusion(guided_diffusion):  # noqa: F811
    """From eps, and from an eps that was guided."""
    file, bar, times, *_ = guided_diffusion
    at = bar[file["mid/timestep_map"]][file["in/t"]].view(-1, 1, 1, 1)
    x, eps = file["in/x"].double(), file["mid/model_output"][:, :3]
    assert near(schedules.x0_and_eps(eps, x, "eps", at.sqrt(), (1 - at).sqrt())[0], file["out/pred_xstart_noclip"])
    guided = guidance.towards_class(eps, file["mid/gradient"], (1 - at).sqrt())
    assert near(schedules.x0_and_eps(guided, x, "eps", at.sqrt(), (1 - at).sqrt())[0], file["out/condition_score_xstart"])


def test_ddpm_of_dalle2_from_x0():
    """A prior's step on the cosine schedule, whose tables are float32 there; one timestep for each sample."""
    file, _ = golden("dalle2_prior")
    bar = schedules.alphas_cumprod(schedules.cosine_betas(50))
    plan = solvers.ddpm(bar, range(49, -1, -1), "x0")
    for i, t in enumerate(file["in/t"].tolist()):
        x, x0, noise = (file[name][i:i + 1].double() for name in ("in/image_embed", "out/x_start", "in/noise"))
        mean, got, _ = ops.solver_step(x, x0, plan.table, 49 - t, numerics="close")
        assert torch.equal(got, x0) and near(mean, file["out/mean"][i:i + 1], 1e-6)
        assert near(ops.solver_step(x, x0, plan.table, 49 - t, noise=noise, numerics="close")[0], file["out/p_sample"][i:i + 1], 1e-6)
