"""TCD: to a time before the next one, from where noise leads back (Zheng et al., 2024). All arithmetic is in the latents' dtype, as DDIM's."""

from __future__ import annotations

import functools

import torch
from diffusers.schedulers.scheduling_tcd import TCDScheduler, TCDSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from fusewire import ops
from fusewire.models.layers import How
from fusewire.swap.fused import MAKERS
from fusewire.swap.schedulers.common import KNOWN, Known, Scalars, host_alphas, indexed, place, prepared, times, unknown_prediction, usable, within
from fusewire.swap.schedulers.ddim import NARROW, NOISE, summed
from fusewire.swap.schedulers.layout import laid
from fusewire.swap.schedulers.noise import of_alphas


def _tcd(how: How) -> dict:
    exact = how.numerics == "exact"

    @functools.wraps(TCDScheduler.step)
    def step(self, model_output, timestep, sample, eta=0.3, generator=None, return_dict=True):
        index, table = place(self, timestep), None
        if (index is not None and self.num_inference_steps is not None and isinstance(eta, (int, float)) and 0 <= eta <= 1
                and usable(model_output, sample) and within(self, *times(self)[index:index + 2])):
            if self._step_index is None:
                self._init_step_index(timestep)
            if self._step_index == index:  # stock takes coefficients from both: the index and the timestep
                sources = self.alphas_cumprod, self.timesteps, self.final_alpha_cumprod
                table = prepared(self, (float(eta), self.num_inference_steps), sources, sample, exact, lambda scalars: _columns(self, scalars, eta))
        if table is None or table.rows is None:
            return TCDScheduler.step(self, model_output, timestep, sample, eta, generator, return_dict)
        noise = None
        if eta > 0 and index != self.num_inference_steps - 1:
            noise = randn_tensor(model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype)
        previous, _, noised = ops.solver_step(sample, model_output, table.rows, index, noise=noise, keep_slope=True, **NARROW,
                                              reciprocal=table.reciprocal, numerics=how.numerics)
        previous, noised = (laid(result, summed(self, sample, model_output), how.numerics) for result in (previous, noised))
        self._step_index += 1
        return TCDSchedulerOutput(prev_sample=previous, pred_noised_sample=noised) if return_dict else (previous, noised)

    return {"step": step, **indexed(TCDScheduler), **of_alphas(TCDScheduler)}


def _columns(scheduler, scalars: Scalars, eta: float) -> dict:
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


MAKERS[TCDScheduler] = _tcd
# As diffusers 0.40 to 0.42 has it.
KNOWN[TCDScheduler] = Known({TCDScheduler.step: ("29049105b0fb",), TCDScheduler._init_step_index: ("0f14aee91d40",),
                             TCDScheduler.index_for_timestep: ("8e92214a3413",)} | NOISE, tcd_reason)
