"""Every sampler against the golden trajectories of official repositories in float64, and step by step against diffusers' schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler,
                       FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler, LMSDiscreteScheduler)

from fusewire import ops
from fusewire.kernels.library import CPU
from fusewire.kernels.sampler_step.tables import PLACE
from fusewire.models import guidance, schedules, solvers
from fusewire.models.samplers import sample
from tests.models.golden import golden

FLOAT64 = 1e-10


def near(got, want, bound=FLOAT64) -> bool:
    return got.shape == want.shape and bool((got - want).abs().max() <= bound * want.abs().max())


def follow(model, x, plan, noise=None, **options):
    """x before each call of the model and after the last; every step was one call of the op, on the kernel where there is one."""
    path, seen = [], []

    def watched(given, time):
        seen.append(given)
        return model(given, time)

    ops.reset_stats()
    out = sample(watched, x, plan, noise=noise, callback=lambda i, x: path.append(x), **options)
    assert ops.stats()["solver_step"]["cpu" if CPU.loaded else "reference"] == len(plan.times) == len(path)
    assert out is path[-1]
    return torch.stack(seen), torch.stack([x, *path])


def denoiser(x, sigma):
    """The analytic model of the golden files."""
    return x / (1 + sigma**2) + 0.3 * torch.tanh(x) * sigma / (1 + sigma)


CHURN = dict(churn=2.0, churn_from=0.05, churn_to=10.0, churn_noise=1.003)
KARRAS = {
    "euler": solvers.euler, "euler_churn": lambda s: solvers.euler(s, **CHURN), "euler_ancestral": solvers.euler_ancestral, "heun": solvers.heun,
    "heun_churn": lambda s: solvers.heun(s, **CHURN), "dpmpp_2m": solvers.dpmpp_2m, "dpmpp_2m_sde": lambda s: solvers.dpmpp_2m(s, sde=1.0),
    "dpmpp_2m_sde_eta0": lambda s: solvers.dpmpp_2m(s, sde=0.0), "dpmpp_2m_sde_heun": lambda s: solvers.dpmpp_2m(s, sde=1.0, heun=True),
    "lms": solvers.lms, "lms_order2": lambda s: solvers.lms(s, order=2),
}


@pytest.mark.parametrize("name", KARRAS)
def test_golden_trajectories_of_k_diffusion(name):
    file, _ = golden("k_diffusion_samplers")
    plan, noise = KARRAS[name](file["mid/sigmas"]), file["in/noise"].double()
    begins = [i for i, second in enumerate(plan.second) if not second]
    seen, path = follow(denoiser, file["in/x0"].double() * file["mid/sigmas"][0], plan, lambda i: noise[begins.index(i)])
    assert near(path[-1], file[f"out/{name}"]) and near(seen[begins], file[f"out/{name}_steps"])


@pytest.mark.parametrize("name, churn", [("plain", {}), ("churn", dict(churn=3.0, churn_from=0.05, churn_to=50.0, churn_noise=1.003))])
def test_golden_trajectories_of_edm(name, churn):
    """Every call of the network: Euler's and the correction's, with churn."""
    file, _ = golden("edm_sampler")
    plan, noise = solvers.heun(schedules.karras_sigmas(6, 0.002, 80), **churn), file["in/noise"].double()
    seen, path = follow(denoiser, file["in/latents"].double() * 80, plan, lambda i: noise[i // 2])
    assert near(plan.times, file[f"mid/{name}_call_sigma"]) and near(seen, file[f"mid/{name}_call_x"]) and near(path[-1], file[f"out/{name}_x"])


@pytest.mark.parametrize("skip", ["time_uniform", "logSNR"])
@pytest.mark.parametrize("order", [1, 2])
def test_golden_trajectories_of_dpm_solver(order, skip):
    file, _ = golden("dpm_solver")
    log_alphas, nodes = 0.5 * torch.log(schedules.alphas_cumprod(file["mid/betas"])), torch.arange(1, 1001, dtype=torch.float64) / 1000

    def log_alpha(t):  # linear between the steps of training, as the repository has it
        place = (t * 1000 - 1).clamp(0, 999)
        below = place.floor().long().clamp(max=998)
        return log_alphas[below] + (place - below) * (log_alphas[below + 1] - log_alphas[below])

    def half_log_snr(t):
        return log_alpha(t) - 0.5 * torch.log(-torch.expm1(2 * log_alpha(t)))

    times = torch.linspace(1, 1 / 1000, 7, dtype=torch.float64)
    if skip == "logSNR":
        wanted = torch.linspace(half_log_snr(nodes[-1:]).item(), half_log_snr(nodes[:1]).item(), 7, dtype=torch.float64)
        low, high = torch.full((7,), 1e-3, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
        for _ in range(80):
            middle = (low + high) / 2
            high, low = torch.where(half_log_snr(middle) < wanted, middle, high), torch.where(half_log_snr(middle) < wanted, low, middle)
        times = (low + high) / 2
    alpha = log_alpha(times).exp()
    plan = solvers.dpmpp_2m((1 - alpha**2).sqrt(), "eps", alphas=alpha, times=times[:-1], order=order)

    def eps(x, t):
        return 0.8 * x / (1 + 0.1 * x**2) + 0.1 * torch.sin((t - 1 / 1000) * 1000 / 100)

    _, path = follow(eps, file["in/x_T"].double(), plan)
    name, bound = f"out/dpmsolverpp_multistep_{order}_{skip}", FLOAT64 if skip == "time_uniform" else 1e-6  # (the repository's inverse interpolates)
    assert near(path, file[f"{name}_steps"], bound) and near(path[-1], file[name], bound)


def analytic_eps(x, t):
    return 0.8 * x / (1 + 0.1 * x**2) + 0.1 * torch.sin(t / 100)


@pytest.fixture
def guided_diffusion():
    file, _ = golden("guided_diffusion_process")
    bar, times = schedules.alphas_cumprod(schedules.linear_betas()), file["mid/timestep_map"].flip(0)
    return file, bar, times, file["in/x_T"].double(), file["in/loop_noise"].double()


@pytest.mark.parametrize("name, eta", [("ddim_loop", 0.0), ("ddim_eta_loop", 0.7)])
def test_golden_ddim(guided_diffusion, name, eta):
    file, bar, times, x, noise = guided_diffusion
    _, path = follow(analytic_eps, x, solvers.ddim(bar, times, eta=eta, limit=1.0), lambda i: noise[i])
    assert near(path[1:], file[f"out/{name}"])


def test_golden_ddim_with_classifier_guidance(guided_diffusion):
    file, bar, times, x, _ = guided_diffusion

    def model(x, t):
        gradient, alpha, sigma = 0.3 * torch.cos(x) - 0.05 * x + 0.001 * t, bar[t.long()].sqrt(), (1 - bar[t.long()]).sqrt()
        # The repository clips x0, takes eps from that, and guides it
        x0 = ((x - sigma * analytic_eps(x, t)) / alpha).clamp(-1, 1)
        return guidance.towards_class((x - alpha * x0) / sigma, gradient, sigma)

    _, path = follow(model, x, solvers.ddim(bar, times))
    assert near(path[1:], file["out/ddim_guided_loop"])


def test_golden_ddpm_with_learned_variances(guided_diffusion):
    """A learned variance is the caller's noise: what the plan multiplies it by is divided out."""
    file, bar, times, x, noise = guided_diffusion
    plan, now = solvers.ddpm(bar, times, limit=1.0), [x]
    after = torch.cat([bar[times][1:], torch.ones(1, dtype=torch.float64)])
    beta = 1 - bar[times] / after
    posterior = beta * (1 - after) / (1 - bar[times])
    posterior[-1] = posterior[-2]

    def learned(i):
        part = (torch.tanh(0.5 * now[-1]) + 1) / 2
        return torch.exp(0.5 * (part * beta[i].log() + (1 - part) * posterior[i].log())) * noise[i] / plan.table[i, PLACE["noise"]]

    def model(x, t):
        now.append(x)
        return analytic_eps(x, t)

    _, path = follow(model, x, plan, learned)
    assert near(path[1:], file["out/ddpm_loop"])


def test_golden_mean_of_classifier_guidance(guided_diffusion):
    file = guided_diffusion[0]
    assert near(guidance.mean_towards_class(file["out/mean_noclip"], file["out/variance_noclip"], file["mid/gradient"]), file["out/condition_mean"])


@pytest.mark.parametrize("sigma", [0.6, torch.tensor(0.6), torch.tensor([0.6, 0.3]).view(2, 1, 1, 1)], ids=["float", "0-dim", "by sample"])
def test_clip_guidance(sigma):
    """The gradient of a cosine, known in closed form, by one op; a step along it brings picture and text together."""
    weight, text, z = torch.randn(8, 48), torch.nn.functional.normalize(torch.randn(2, 8), dim=1), torch.randn(2, 3, 4, 4)

    def cosine(z):
        return torch.cosine_similarity(z.flatten(1) @ weight.T, text, dim=1)

    with torch.no_grad():
        gradient, eps = guidance.gradient_of(cosine, z), torch.randn_like(z)
        embedded = z.flatten(1) @ weight.T
        length = embedded.norm(dim=1, keepdim=True)
        want = ((text - cosine(z)[:, None] * embedded / length) / length) @ weight
        with torch.profiler.profile() as seen:
            guided = guidance.towards_class(eps, gradient, sigma, 3.0)
        assert (cosine(z + 0.1 * gradient) > cosine(z)).all()
    assert near(gradient.flatten(1), want, 1e-5) and near(guided, eps - 3.0 * sigma * gradient, 1e-6) and not gradient.requires_grad
    assert [event.key for event in seen.key_averages() if event.key in ("aten::add", "aten::sub", "aten::mul", "aten::addcmul")] == [
        "aten::addcmul" if isinstance(sigma, torch.Tensor) else "aten::add"]


SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def stock_path(scheduler, model, x, draws):
    """x after each step of diffusers' scheduler; ``draws``: its generator, where it takes one."""
    path = []
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(given, t), t, x, **draws, return_dict=False)[0]
        path.append(x)
    return torch.stack(path)


def net(x, t):
    return 0.6 * torch.tanh(x) + 0.1 * torch.sin(t / 100) + 0.05 * x


DISCRETE = [
    (DDIMScheduler(**SD, clip_sample=False), lambda s: solvers.ddim(s.alphas_cumprod, s.timesteps)),
    (DDIMScheduler(**SD, clip_sample=False, prediction_type="v_prediction"), lambda s: solvers.ddim(s.alphas_cumprod, s.timesteps, "v")),
    (DDIMScheduler(clip_sample=False, prediction_type="sample"), lambda s: solvers.ddim(s.alphas_cumprod, s.timesteps, "x0")),
    (DDIMScheduler(**SD, clip_sample=False), lambda s: solvers.ddim(s.alphas_cumprod, s.timesteps, eta=0.7), dict(eta=0.7)),
    (DDPMScheduler(), lambda s: solvers.ddpm(s.alphas_cumprod, s.timesteps, limit=1.0)),
    (DDPMScheduler(**SD, clip_sample=False, prediction_type="v_prediction", variance_type="fixed_large"),
     lambda s: solvers.ddpm(s.alphas_cumprod, s.timesteps, "v", large=True)),
    (LCMScheduler(), lambda s: solvers.lcm(s.alphas_cumprod, s.timesteps)),
    (EulerDiscreteScheduler(**SD), lambda s: solvers.euler(s.sigmas, "eps", times=s.timesteps)),
    (EulerDiscreteScheduler(**SD, prediction_type="v_prediction", use_karras_sigmas=True), lambda s: solvers.euler(s.sigmas, "v", times=s.timesteps)),
    (EulerAncestralDiscreteScheduler(**SD), lambda s: solvers.euler_ancestral(s.sigmas, "eps", times=s.timesteps)),
    (HeunDiscreteScheduler(**SD), lambda s: solvers.heun(once(s.sigmas), "eps", times=once(s.timesteps))),
    (LMSDiscreteScheduler(**SD), lambda s: solvers.lms(s.sigmas, "eps", times=s.timesteps)),
    (DPMSolverMultistepScheduler(**SD), lambda s: two_m(s, "eps")),
    (DPMSolverMultistepScheduler(**SD, prediction_type="v_prediction", solver_type="heun"), lambda s: two_m(s, "v", heun=True)),
    (DPMSolverMultistepScheduler(**SD, algorithm_type="sde-dpmsolver++"), lambda s: two_m(s, "eps", sde=1.0)),
    (DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0), lambda s: two_m(s, "velocity", flow=True)),
    (FlowMatchEulerDiscreteScheduler(shift=3.0), lambda s: solvers.euler(s.sigmas, "velocity", times=s.timesteps)),
    (FlowMatchHeunDiscreteScheduler(shift=3.0), lambda s: solvers.heun(once(s.sigmas), "velocity", times=once(s.timesteps))),
]


def once(values):
    """The levels of Heun's method, which diffusers has twice but for the first."""
    return torch.cat([values[:1], values[1::2]])


def two_m(scheduler, kind, flow=False, **options):
    sigma = scheduler.sigmas.double()
    alpha = 1 - sigma if flow else 1 / (sigma**2 + 1).sqrt()
    return solvers.dpmpp_2m(sigma if flow else sigma * alpha, kind, alphas=alpha, times=scheduler.timesteps, **options)


@pytest.mark.parametrize("case", DISCRETE, ids=[f"{type(s).__name__} {s.config.get('prediction_type', '')} {more}" for s, _, *more in DISCRETE])
def test_step_by_step_as_diffusers(case):
    """In float32, from the same noise: what differs is the rounding of the coefficients, which are float64 here."""
    scheduler, plan_of, *options = case
    scheduler.set_timesteps(9)
    torch.manual_seed(1)
    plan, x = plan_of(scheduler), torch.randn(2, 4, 6, 5)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    draws = {} if "generator" not in scheduler.step.__code__.co_varnames else {"generator": torch.Generator().manual_seed(2)}
    draws |= options[0] if options else {}
    mine = torch.Generator().manual_seed(2)
    want = stock_path(scheduler, net, x, draws)
    _, path = follow(net, x, plan, lambda i: torch.randn(2, 4, 6, 5, generator=mine))
    for i, (got, theirs) in enumerate(zip(path[1:], want, strict=True)):
        assert near(got, theirs, 2e-5), f"step {i}: {(got - theirs).abs().max() / theirs.abs().max()}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", KARRAS)
def test_16_bits(name, dtype):
    """x in 16 bits; the history of multistep solvers in float32."""
    file, _ = golden("k_diffusion_samplers")
    plan, noise = KARRAS[name](file["mid/sigmas"]), file["in/noise"].to(dtype)
    out = sample(denoiser, (file["in/x0"] * file["mid/sigmas"][0]).to(dtype), plan, noise=lambda i: noise[i // 2 if any(plan.second) else i])
    assert out.dtype is dtype and near(out.double(), file[f"out/{name}"], 0.1 if dtype is torch.bfloat16 else 0.02)


def test_guidance_inside_the_step():
    sigmas = schedules.karras_sigmas(5, 0.03, 14.6)
    x, scales = torch.randn(2, 3, 4, dtype=torch.float64) * 14.6, guidance.interval(sigmas[:-1], 4.0, 0.1, 5.0)
    assert scales[0] == 1.0 and 4.0 in scales and scales[-1] == 1.0
    both = iter(scales)
    want = sample(lambda x, s: guidance.classifier_free(-denoiser(x, s), denoiser(x, s), next(both)), x, solvers.dpmpp_2m(sigmas))
    got = sample(lambda x, s: torch.cat([-denoiser(x, s), denoiser(x, s)]), x, solvers.dpmpp_2m(sigmas), guidance_scale=scales)
    assert near(got, want, 1e-12)


def test_rescaled_guidance_is_diffusers():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    uncond, cond = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    guided = guidance.classifier_free(uncond, cond, 7.5)
    assert near(guidance.classifier_free(uncond, cond, 7.5, rescale=0.7), rescale_noise_cfg(guided, cond, 0.7), 1e-12)


def test_scale_embedding_is_diffusers():
    from diffusers import LatentConsistencyModelPipeline

    scale = torch.tensor([1.0, 3.5, 8.0])
    for dim in (8, 17, 256):
        want = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scale - 1, embedding_dim=dim)
        assert (guidance.scale_embedding(scale.double(), dim) - want).abs().max() < 1e-3  # of angles up to 7000 in float32


LEVELS = torch.tensor([2.0, 1.0, 0.0])


def gaussian_flow(start: torch.Tensor, sigmas: torch.Tensor, plan) -> torch.Tensor:
    """A plan's way from ``start`` along the flow between data of N(1.3, 0.6^2) and noise, whose velocity is known."""
    def velocity(x, level):
        level = level.double()
        alpha, variance = 1 - level, ((1 - level) * 0.6)**2 + level**2
        centred = (x - alpha * 1.3) / variance
        return level * centred - (1.3 + alpha * 0.36 * centred)  # the means of eps and x0 given x

    return sample(velocity, start, plan, noise=lambda i: torch.randn(start.shape, generator=torch.Generator().manual_seed(i), dtype=start.dtype))


def test_dpmpp_2m_of_a_flow_from_pure_noise():
    """Its first alpha is 0: the order is two, and with noise the distribution is that of the data."""
    start, errors = torch.tensor([[1.5], [-0.7], [0.2]], dtype=torch.float64), []
    for steps in (20, 40, 80):
        sigmas = schedules.flow_sigmas(steps)
        plan = solvers.dpmpp_2m(sigmas, "velocity", alphas=1 - sigmas)
        assert plan.table.isfinite().all()
        errors.append((gaussian_flow(start, sigmas, plan) - (1.3 + 0.6 * start)).abs().max().item())
    assert errors[2] < errors[1] / 3 and errors[1] < errors[0] / 3
    sigmas, start = schedules.flow_sigmas(100), torch.randn(4000, 1, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = gaussian_flow(start, sigmas, solvers.dpmpp_2m(sigmas, "velocity", alphas=1 - sigmas, sde=1.0))
    assert abs(found.mean() - 1.3) < 0.04 and abs(found.std() - 0.6) < 0.04


@pytest.mark.parametrize("order", range(1, 7))
def test_lms_has_its_order(order):
    """On data N(0, 0.6^2) in levels from 10 to 1, where the slope is x * sigma / (0.36 + sigma^2): as many steps more, so much less error."""
    start, errors = torch.tensor([[3.0]], dtype=torch.float64), []
    for steps in (40, 80):
        sigmas = torch.linspace(10, 1, steps + 1, dtype=torch.float64)
        plan = solvers.lms(sigmas, order=order)
        found = sample(lambda x, level: x * 0.36 / (0.36 + level.double()**2), start, plan)
        errors.append(abs((found / start).item() - ((0.36 + 1) / (0.36 + 100))**0.5))
    assert errors[1] < errors[0] / 1.8 and (order < 2 or errors[1] < errors[0] / 3.3), errors


def test_float32_noise_leaves_the_latents_dtype():
    x = torch.randn(2, 3).half()
    plan = solvers.euler(LEVELS, churn=2.0)
    assert sample(lambda x, level: x * 0.5, x, plan, noise=lambda i: torch.randn(2, 3)).dtype is torch.float16


def test_guidance_by_a_level_of_each_sample():
    eps, gradient, sigma = torch.randn(3, 4, 3, 3), torch.randn(3, 4, 3, 3), torch.rand(3)
    want = torch.stack([guidance.towards_class(eps[i], gradient[i], sigma[i].item(), 2.0) for i in range(3)])
    assert torch.allclose(guidance.towards_class(eps, gradient, sigma, 2.0), want)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="records no gradients"):
        guidance.gradient_of(lambda z: z.sum(1), torch.randn(2, 3))


@pytest.mark.parametrize("call, message", [
    (lambda: solvers.ddim(torch.ones(10), [1], "score"), "^kind is 'score'"),
    (lambda: solvers.heun(torch.tensor([2.0, 1.0, 0.0]), times=torch.ones(2), churn=1.0), "^times is given"),
    (lambda: solvers.euler(torch.tensor([2.0, 1.0, 0.0]), times=torch.ones(2), churn=1.0), "^times is given"),
    (lambda: solvers.heun(torch.tensor([2.0, 1.0, 0.0]), times=torch.ones(2), kind="velocity", correct_last=True), "^times has 2 values; it should have 3"),
    (lambda: solvers.heun(torch.tensor([2.0, 1.0, 0.0]), "v", correct_last=True), "^kind is 'v'"),
    (lambda: solvers.euler(LEVELS, times=torch.ones(3)), r"^times has shape \[3\]; for 2 calls of the model it should be \[2\]"),
    (lambda: solvers.ddim(torch.ones(10) / 2, [500, -1]), "^times is .* from 0 to 9"), (lambda: solvers.lcm(torch.ones(10) / 2, []), "^times is"),
    *((lambda of=of, levels=levels: of(torch.tensor(levels)), "^sigmas is")
      for of in (solvers.euler, solvers.heun, solvers.dpmpp_2m, solvers.lms) for levels in ([], [1.0], [0.0, 1.0, 2.0], [1.0, -1.0])),
    (lambda: solvers.lms(LEVELS, order=0), "^order is 0"), (lambda: solvers.lms(LEVELS, order=7), "^order is 7"),
    (lambda: solvers.dpmpp_2m(LEVELS, order=3), "^order is 3"), (lambda: solvers.dpmpp_2m(LEVELS, alphas=torch.ones(2)), "^alphas has 2 values"),
    (lambda: solvers.euler(LEVELS, churn=-1.0), "^churn is -1.0; it should be at least 0"),
    (lambda: solvers.euler(LEVELS, "velocity", churn=1.0), "^churn is 1.0 and kind 'velocity'"),
    (lambda: solvers.heun(LEVELS, "velocity", churn=1.0), "^churn is 1.0 and kind 'velocity'"),
    (lambda: solvers.euler_ancestral(LEVELS, "velocity"), "^eta is 1.0 and kind 'velocity'"),
    (lambda: solvers.dpmpp_2m(LEVELS, "velocity", sde=1.0), "^sde is 1.0 and kind 'velocity'"),
    (lambda: schedules.timesteps(1.5), "^steps is 1.5"), (lambda: guidance.scale_embedding(torch.ones(1), 3), "^dim is 3"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_integral_of_lagrange_polynomials():
    """The weights of a multistep method integrate every polynomial of its order exactly."""
    nodes, (start, stop) = torch.tensor([1.0, 2.5, 3.0, 7.0], dtype=torch.float64), (torch.tensor(1.0).double(), torch.tensor(0.3).double())
    weights = torch.tensor([solvers._integral(nodes, j, start, stop) for j in range(4)], dtype=torch.float64)
    for power in range(4):
        want = (stop ** (power + 1) - start ** (power + 1)) / (power + 1)
        assert math.isclose((weights * nodes**power).sum().item(), want.item(), rel_tol=1e-10)
