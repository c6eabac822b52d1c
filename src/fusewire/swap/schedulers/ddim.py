"""DDIM and DDPM: all arithmetic in the latents' dtype; coefficients come from a table of products of alphas."""

from __future__ import annotations

import functools

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from fusewire import ops
from fusewire.models.layers import How
from fusewire.swap.fused import MAKERS
from fusewire.swap.schedulers.common import (
    KNOWN, Known, Scalars, host_alphas, no_thresholding, place, prepared, times, unknown_limit, unknown_prediction, usable, within)
from fusewire.swap.schedulers.layout import laid
from fusewire.swap.schedulers.noise import of_alphas

NARROW = dict(wide_x0=False, wide_out=False)
KINDS = ("epsilon", "sample", "v_prediction")
LEARNED = ("learned", "learned_range")
NOISE = {randn_tensor: ("051bb3b0a49a",)}


def products(scheduler, at: list[int], after_all) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(alphas_cumprod at ``at``, at the times after them, 1 - the first): float32 [S], as stock takes them. ``after_all``: beyond the last step."""
    bar = host_alphas(scheduler)
    now, then = (torch.tensor(indices).clamp(max=len(bar) - 1) for indices in at)  # of those beyond, the step is stock's
    before = torch.where(then >= 0, bar[then.clamp(min=0)], after_all.cpu())
    return bar[now], before, 1 - bar[now]


def summed(scheduler, sample, model_output) -> tuple[torch.Tensor, torch.Tensor]:
    """What stock adds up, x0 before the latents: where the model predicts x0, its output comes first."""
    return (model_output, sample) if scheduler.config.prediction_type == "sample" else (sample, model_output)


def laid_results(scheduler, previous, x0, sample, model_output, numerics: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The results where stock's lie; x0 that the model has predicted and nothing has clipped is its very output."""
    operands, config = summed(scheduler, sample, model_output), scheduler.config
    previous = laid(previous, operands, numerics)
    if config.prediction_type != "sample":
        return previous, laid(x0, operands, numerics)
    return previous, laid(x0, (model_output,), numerics) if config.clip_sample else model_output


def _ddim(how: How) -> dict:
    exact = how.numerics == "exact"

    @functools.wraps(DDIMScheduler.step)
    def step(self, model_output, timestep, sample, eta=0.0, use_clipped_model_output=False, generator=None, variance_noise=None, return_dict=True):
        index = place(self, timestep)
        table = None
        if (index is not None and self.num_inference_steps is not None and usable(model_output, sample) and within(self, times(self)[index])
                and (variance_noise is None or eta <= 0 or (generator is None and usable(variance_noise, sample)))):
            sources = self.alphas_cumprod, self.timesteps, self.final_alpha_cumprod
            table = prepared(self, (float(eta), use_clipped_model_output, self.num_inference_steps), sources, sample, exact,
                             lambda scalars: _ddim_columns(self, scalars, eta, use_clipped_model_output))
        if table is None or table.rows is None:
            return DDIMScheduler.step(self, model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict)
        if eta > 0 and variance_noise is None:
            variance_noise = randn_tensor(model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype)
        previous, x0, _ = ops.solver_step(sample, model_output, table.rows, index, noise=variance_noise if eta > 0 else None, **NARROW,
                                          reciprocal=table.reciprocal, numerics=how.numerics)
        previous, x0 = laid_results(self, previous, x0, sample, model_output, how.numerics)
        return DDIMSchedulerOutput(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    return {"step": step, **of_alphas(DDIMScheduler)}


def _ddim_columns(scheduler, scalars: Scalars, eta: float, clipped: bool) -> dict:
    config, now = scheduler.config, times(scheduler)
    ratio = config.num_train_timesteps // scheduler.num_inference_steps
    bar, before, beta = products(scheduler, (now, [t - ratio for t in now]), scheduler.final_alpha_cumprod)
    variance = ((1 - before) / beta) * (1 - bar / before)
    spread, alpha, sigma, kind = eta * variance**0.5, bar**0.5, beta**0.5, config.prediction_type
    if clipped or kind == "sample":  # from x0 clipped, or as the model gave it
        slope = {"e_x": 1.0, "e_x0" if clipped else "e_m": -scalars.left(alpha), "e_divisor": scalars.divisor(sigma)}
    elif kind == "epsilon":
        slope = dict(e_m=1.0)
    else:
        slope = dict(e_m=scalars.left(alpha), e_x=scalars.left(sigma))
    return dict(scalars.prediction(kind, alpha, sigma), **scalars.limit(config), **slope, x0=scalars.left(before**0.5),
                e=scalars.left((1 - before - spread**2) ** 0.5), noise=scalars.left(spread))


def ddim_reason(scheduler) -> str:
    return no_thresholding(scheduler) or unknown_limit(scheduler) or unknown_prediction(scheduler, *KINDS)


def _ddpm(how: How) -> dict:
    exact = how.numerics == "exact"

    @functools.wraps(DDPMScheduler.step)
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        index, table = place(self, timestep), None
        mean, predicted = _halves(model_output) if self.variance_type in LEARNED else (model_output, None)
        if (index is not None and (self.num_inference_steps or self.custom_timesteps) and usable(mean, sample)
                and within(self, times(self)[index], _after(times(self), index))):
            sources = self.alphas_cumprod, self.timesteps, self.one
            table = prepared(self, (self.variance_type,), sources, sample, exact, lambda scalars: _ddpm_columns(self, scalars))
        if table is None or table.rows is None:
            return DDPMScheduler.step(self, model_output, timestep, sample, generator, return_dict)
        noise = None
        if times(self)[index] > 0:
            noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            if predicted is not None:
                noise = _spread(self, index, predicted) * noise
        previous, x0, _ = ops.solver_step(sample, mean, table.rows, index, noise=noise, **NARROW, reciprocal=table.reciprocal,
                                          numerics=how.numerics)
        previous, x0 = laid_results(self, previous, x0, sample, mean, how.numerics)
        return DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    return {"step": step, **of_alphas(DDPMScheduler)}


def _halves(model_output) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(mean, variance) of a model that predicts both."""
    if not isinstance(model_output, torch.Tensor) or model_output.dim() < 2 or model_output.shape[1] % 2:
        return None, None
    return torch.split(model_output, model_output.shape[1] // 2, dim=1)


def _after(now: list, index: int) -> int:
    """What follows a time, -1 after the last: of one that comes back, as in RePaint, stock takes what follows its first place."""
    following = now.index(now[index]) + 1
    return now[following] if following < len(now) else -1


def _spread(scheduler, index: int, predicted: torch.Tensor) -> torch.Tensor:
    """The square root of the variance that the model predicts, by PyTorch's calls."""
    if scheduler.variance_type == "learned":
        return predicted**0.5
    now, bar = times(scheduler), scheduler.alphas_cumprod
    then = _after(now, index)
    alpha, before = bar[now[index]], bar[then] if then >= 0 else scheduler.one
    own = 1 - alpha / before
    least, most = torch.log(torch.clamp((1 - before) / (1 - alpha) * own, min=1e-20)), torch.log(own)
    part = (predicted + 1) / 2
    return torch.exp(0.5 * (part * most + (1 - part) * least))


def _ddpm_columns(scheduler, scalars: Scalars) -> dict:
    config, now = scheduler.config, times(scheduler)
    bar, before, beta = products(scheduler, (now, [_after(now, i) for i in range(len(now))]), scheduler.one)
    ratio = bar / before
    own = 1 - ratio
    if scheduler.variance_type in LEARNED:
        spread = torch.ones(len(now))  # the noise comes multiplied already
    elif scheduler.variance_type == "fixed_large":
        spread = own**0.5
    else:
        variance = ((1 - before) / beta * own).clamp(min=1e-20)
        if scheduler.variance_type == "fixed_small":
            spread = variance**0.5
        else:  # one by one: a logarithm has other last bits in a vector
            spread = torch.stack([torch.exp(0.5 * torch.log(value)) for value in variance])
    return dict(scalars.prediction(config.prediction_type, bar**0.5, beta**0.5), **scalars.limit(config), x0=scalars.left(before**0.5 * own / beta),
                x=scalars.left(ratio**0.5 * (1 - before) / beta), noise=scalars.left(spread))


def ddpm_reason(scheduler) -> str:
    if scheduler.variance_type not in ("fixed_small", "fixed_small_log", "fixed_large", *LEARNED) or scheduler.variance_type != scheduler.config.variance_type:
        return f"variance_type is {scheduler.variance_type!r}"
    return ddim_reason(scheduler)


MAKERS |= {DDIMScheduler: _ddim, DDPMScheduler: _ddpm}
# As diffusers 0.40 to 0.42 has them.
KNOWN[DDIMScheduler] = Known({DDIMScheduler.step: ("19a7bd2615e4",), DDIMScheduler._get_variance: ("d8e657c75e97",)} | NOISE, ddim_reason)
KNOWN[DDPMScheduler] = Known({DDPMScheduler.step: ("fe98ed067ecc",), DDPMScheduler._get_variance: ("6de39fa3d3e0",),
                              DDPMScheduler.previous_timestep: ("890df85b0452",)} | NOISE, ddpm_reason)
