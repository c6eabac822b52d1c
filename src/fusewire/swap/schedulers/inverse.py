"""DDIM run backwards, from a picture to the noise it would come from: DDIM's step towards the later of two times."""

from __future__ import annotations

import functools

import torch
from diffusers.schedulers.scheduling_ddim_inverse import DDIMInverseScheduler, DDIMSchedulerOutput

from fusewire import ops
from fusewire.models.layers import How
from fusewire.swap.fused import MAKERS
from fusewire.swap.schedulers.common import KNOWN, Known, Scalars, host_alphas, place, prepared, times, usable, within
from fusewire.swap.schedulers.ddim import NARROW, ddim_reason, laid_results


def _inverse(how: How) -> dict:
    exact = how.numerics == "exact"

    @functools.wraps(DDIMInverseScheduler.step)
    def step(self, model_output, timestep, sample, return_dict=True):
        index, table = place(self, timestep), None
        if index is not None and self.num_inference_steps is not None and usable(model_output, sample) and within(self, times(self)[index]):
            sources = self.alphas_cumprod, self.timesteps, self.initial_alpha_cumprod
            table = prepared(self, (self.num_inference_steps,), sources, sample, exact, lambda scalars: _columns(self, scalars))
        if table is None or table.rows is None:
            return DDIMInverseScheduler.step(self, model_output, timestep, sample, return_dict)
        previous, x0, _ = ops.solver_step(sample, model_output, table.rows, index, **NARROW, reciprocal=table.reciprocal, numerics=how.numerics)
        previous, x0 = laid_results(self, previous, x0, sample, model_output, how.numerics)
        return DDIMSchedulerOutput(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    return {"step": step}


def _columns(scheduler, scalars: Scalars) -> dict:
    config, later, bar = scheduler.config, torch.tensor(times(scheduler)), host_alphas(scheduler)
    earlier = (later - config.num_train_timesteps // scheduler.num_inference_steps).clamp(max=config.num_train_timesteps - 1)
    at = torch.where(earlier >= 0, bar[earlier.clamp(min=0, max=len(bar) - 1)], scheduler.initial_alpha_cumprod.cpu())
    to = bar[later.clamp(max=len(bar) - 1)]  # of those beyond, the step is stock's
    alpha, sigma, kind = at**0.5, (1 - at) ** 0.5, config.prediction_type
    if kind == "epsilon":
        noise = dict(e_m=1.0)
    elif kind == "v_prediction":
        noise = dict(e_m=scalars.left(alpha), e_x=scalars.left(sigma))
    else:
        noise = dict(e_x=1.0, e_m=-scalars.left(alpha), e_divisor=scalars.divisor(sigma))
    return dict(scalars.prediction(kind, alpha, sigma), **scalars.limit(config), **noise, x0=scalars.left(to**0.5), e=scalars.left((1 - to) ** 0.5))


MAKERS[DDIMInverseScheduler] = _inverse
# As diffusers 0.40 to 0.42 has it.
KNOWN[DDIMInverseScheduler] = Known({DDIMInverseScheduler.step: ("346e8b29fd5a",)}, ddim_reason)
