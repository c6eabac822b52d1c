"""LCM and TCD, the samplers of consistency models: a sample without noise, and then noise to the next time, all in the latents' dtype.

LCM goes to the data's end (Luo et al., 2023), TCD to a time before the next one, from where noise leads back (Zheng et al., 2024).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from diffusers.schedulers.scheduling_lcm import LCMScheduler, LCMSchedulerOutput
from diffusers.schedulers.scheduling_tcd import TCDScheduler, TCDSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from fusewire import ops
from fusewire.models.layers import How
from fusewire.swap.fused import MAKERS
from fusewire.swap.schedulers.common import KNOWN, Known, Scalars, host_alphas, indexed, place, prepared, times, unknown_prediction, usable, within
from fusewire.swap.schedulers.ddim import NARROW, NOISE, ddim_reason, products, summed
from fusewire.swap.schedulers.layout import laid
from fusewire.swap.schedulers.noise import of_alphas


def _fused(scheduler, model_output, timestep, sample, generator, numerics: str, columns: Callable[[Scalars], dict], key: tuple = (), noisy: bool = True):
    """(previous, the sample before the noise), with the step counted; None where it is stock's."""
    index = place(scheduler, timestep)
    if (index is None or scheduler.num_inference_steps is None or not usable(model_output, sample)
            or not within(scheduler, *times(scheduler)[index:index + 2])):
        return None
    if scheduler._step_index is None:
        scheduler._init_step_index(timestep)
    if scheduler._step_index != index:  # stock takes coefficients from both: the index and the timestep
        return None
    sources = scheduler.alphas_cumprod, scheduler.timesteps, scheduler.final_alpha_cumprod
    table = prepared(scheduler, (*key, scheduler.num_inference_steps), sources, sample, numerics == "exact", columns)
    if table.rows is None:
        return None
    noise = None
    if noisy and index != scheduler.num_inference_steps - 1:
        noise = randn_tensor(model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype)
    previous, _, before = ops.solver_step(sample, model_output, table.rows, index, noise=noise, keep_slope=True, **NARROW, reciprocal=table.reciprocal,
                                          numerics=numerics)
    scheduler._step_index += 1
    return tuple(laid(result, summed(scheduler, sample, model_output), numerics) for result in (previous, before))


def _lcm(how: How) -> dict:
    @functools.wraps(LCMScheduler.step)
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        def columns(scalars: Scalars) -> dict:
            return _lcm_columns(self, scalars, Scalars(sample.dtype, sample.device, self.timesteps.device, how.numerics == "exact"))

        found = _fused(self, model_output, timestep, sample, generator, how.numerics, columns)
        if found is None:
            return LCMScheduler.step(self, model_output, timestep, sample, generator, return_dict)
        self.sigma_data = 0.5  # as stock leaves it
        return LCMSchedulerOutput(*found) if return_dict else found

    return {"step": step, **indexed(LCMScheduler), **of_alphas(LCMScheduler)}


def _lcm_columns(scheduler, scalars: Scalars, of_times: Scalars) -> dict:
    config, now = scheduler.config, times(scheduler)
    bar, before, beta = products(scheduler, (now, [*now[1:], now[-1]]), scheduler.final_alpha_cumprod)
    scaled = torch.tensor(now) * config.timestep_scaling
    square = scaled**2 + 0.5**2
    noisy = torch.arange(len(now)) != scheduler.num_inference_steps - 1
    return dict(scalars.prediction(config.prediction_type, bar.sqrt(), beta.sqrt()), **scalars.limit(config), e_x=of_times.left(0.5**2 / square),
                e_x0=of_times.left(scaled / square**0.5), e=torch.where(noisy, scalars.left(before.sqrt()).double(), 1.0),
                noise=scalars.left((1 - before).sqrt()))


def _tcd(how: How) -> dict:
    @functools.wraps(TCDScheduler.step)
    def step(self, model_output, timestep, sample, eta=0.3, generator=None, return_dict=True):
        found = None
        if isinstance(eta, (int, float)) and 0 <= eta <= 1:
            found = _fused(self, model_output, timestep, sample, generator, how.numerics, lambda scalars: _tcd_columns(self, scalars, eta), (float(eta),),
                           eta > 0)
        if found is None:
            return TCDScheduler.step(self, model_output, timestep, sample, eta, generator, return_dict)
        return TCDSchedulerOutput(*found) if return_dict else found

    return {"step": step, **indexed(TCDScheduler), **of_alphas(TCDScheduler)}


def _tcd_columns(scheduler, scalars: Scalars, eta: float) -> dict:
    """e is the sample at time s: of x0 and the model's noise, or of the model's x0 and what of the latents that leaves for noise."""
    now, bar = torch.tensor(times(scheduler)), host_alphas(scheduler)
    then = torch.cat([now[1:], now.new_zeros(1)])
    at, before = bar[now], torch.where(then >= 0, bar[then.clamp(min=0)], scheduler.final_alpha_cumprod.cpu())
    target = bar[torch.floor((1 - eta) * then).to(torch.long)]
    alpha, sigma, ratio = scalars.left(target.sqrt()), scalars.left((1 - target).sqrt()), before / target
    if scheduler.config.prediction_type == "epsilon":
        noised = dict(scalars.prediction("epsilon", at.sqrt(), (1 - at).sqrt()), e_m=sigma, e_x0=alpha)
    else:
        noised = dict(x0_x=1.0, x0_m=-scalars.left(at**0.5), x0_divisor=scalars.divisor((1 - at) ** 0.5), e_m=alpha, e_x0=sigma)
    noisy = (torch.arange(len(now)) != scheduler.num_inference_steps - 1) & (eta > 0)
    return dict(noised, e=torch.where(noisy, scalars.left(ratio.sqrt()).double(), 1.0), noise=scalars.left((1 - ratio).sqrt()))


def tcd_reason(scheduler) -> str:
    """A velocity would need both x0 and its noise at once."""
    return unknown_prediction(scheduler, "epsilon", "sample")


MAKERS |= {LCMScheduler: _lcm, TCDScheduler: _tcd}
# As diffusers 0.40 to 0.42 has them.
KNOWN[LCMScheduler] = Known({LCMScheduler.step: ("83ef17ffb0c7",), LCMScheduler._init_step_index: ("0f14aee91d40",),
                             LCMScheduler.index_for_timestep: ("8e92214a3413",),
                             LCMScheduler.get_scalings_for_boundary_condition_discrete: ("b9b9fd6e23da",)} | NOISE, ddim_reason)
KNOWN[TCDScheduler] = Known({TCDScheduler.step: ("29049105b0fb",), TCDScheduler._init_step_index: ("0f14aee91d40",),
                             TCDScheduler.index_for_timestep: ("8e92214a3413",)} | NOISE, tcd_reason)
