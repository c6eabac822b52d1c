"""DEIS of order one and two in the logarithm of rho: the noise is what is stored, all in the latents' dtype."""

from __future__ import annotations

import functools

import numpy as np
import torch
from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from fusewire import ops
from fusewire.models.layers import How
from fusewire.swap.fused import MAKERS
from fusewire.swap.schedulers.common import KNOWN, Known, Scalars, gathered, indexed, of_levels, on_cpu, prepared, usable
from fusewire.swap.schedulers.ddim import NARROW
from fusewire.swap.schedulers.dpm import log_ratio, noisy, x0_row
from fusewire.swap.schedulers.layout import laid
from fusewire.swap.schedulers.noise import of_sigmas

Stock = DEISMultistepScheduler


def _maker(how: How) -> dict:
    exact = how.numerics == "exact"

    @functools.wraps(Stock.step)
    def step(self, model_output, timestep, sample, return_dict=True):
        table = None
        if self.num_inference_steps is not None and usable(model_output, sample) and on_cpu(self.sigmas):
            if self._step_index is None:
                self._init_step_index(timestep)
            index, count, config = self._step_index, len(self.timesteps), self._internal_dict
            last = index == count - 1 and config["lower_order_final"] and count < 15
            second = config["solver_order"] == 2 and self.lower_order_nums >= 1 and not last
            if 0 <= index < len(self.sigmas) - 1 and (not second or (index > 0 and usable(self.model_outputs[-1], sample))):
                table = prepared(self, (), (self.sigmas,), sample, exact, lambda scalars: _columns(self, scalars))
        if table is None or table.rows is None:
            return Stock.step(self, model_output, timestep, sample, return_dict)
        options = dict(NARROW, reciprocal=table.reciprocal, numerics=how.numerics)
        previous, _, noise = ops.solver_step(sample, model_output, table.rows, index, keep_slope=True, **options)
        if second:
            previous, _, _ = ops.solver_step(sample, noise, table.rows, len(self.sigmas) - 1 + index, previous=self.model_outputs[-1], **options)
        self.model_outputs = [*self.model_outputs[1:], noise]
        if self.lower_order_nums < config["solver_order"]:
            self.lower_order_nums += 1
        self._step_index += 1
        previous = laid(previous, (sample, model_output), how.numerics)
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    return {"step": step, **indexed(Stock), **of_sigmas(Stock, "add_noise", ("00c60ff12782",), noisy)}


def _columns(scheduler, scalars: Scalars) -> dict:
    """Blocks: the noise, in the place of the slope, and a step along it; a step along two."""
    steps = range(len(scheduler.sigmas) - 1)
    return gathered([*(_first(scheduler, scalars, i) for i in steps), *(_second(scheduler, scalars, i) if i else {} for i in steps)])


def _first(scheduler, scalars: Scalars, i: int) -> dict:
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[i])
    alpha_t, sigma_t = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[i + 1])
    h = log_ratio(scheduler, i + 1) - log_ratio(scheduler, i)
    if scheduler.config.prediction_type == "flow_prediction":
        sigma = scheduler.sigmas[i]  # stock divides by the level itself, which is sigma with use_flow_sigmas only
    return dict(x0_row(scheduler, scalars, i), e_x=1.0, e_x0=-scalars.left(alpha), e_divisor=scalars.divisor(sigma), x=scalars.left(alpha_t / alpha),
                e=-scalars.left(sigma_t * (torch.exp(h) - 1.0)))


def _second(scheduler, scalars: Scalars, i: int) -> dict:
    """Zhang and Chen (2022), with the line through the last two noises integrated."""
    (alpha_t, sigma_t), (alpha, sigma), (alpha_1, sigma_1) = (scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[k]) for k in (i + 1, i, i - 1))
    rho_t, rho, rho_1 = sigma_t / alpha_t, sigma / alpha, sigma_1 / alpha_1

    def weight(of: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        def integral(to: torch.Tensor) -> torch.Tensor:
            return to * (-_log(other) + _log(to) - 1) / (_log(of) - _log(other))

        return integral(rho_t) - integral(rho)

    return dict(x0_x=1.0, x_divisor=scalars.divisor(alpha), x0_m=scalars.left(weight(rho, rho_1)), x0=1.0, e_previous=1.0,
                e=scalars.left(weight(rho_1, rho)), scale=scalars.left(alpha_t))


def _log(value: torch.Tensor) -> torch.Tensor:
    """NumPy's, as stock's: PyTorch's has other last bits."""
    return torch.as_tensor(np.log(value.numpy()))


MAKERS[Stock] = _maker
# As diffusers 0.40 to 0.42 has them.
KNOWN[Stock] = Known({Stock.step: ("e667df137cb8",), Stock._init_step_index: ("5f59d121f9c6",), Stock.index_for_timestep: ("0d43966bf673",),
                      Stock.convert_model_output: ("a6b88649272e",), Stock.deis_first_order_update: ("8f1ac23b05a2",),
                      Stock.multistep_deis_second_order_update: ("fbdfb0ac39f1",), Stock._sigma_to_alpha_sigma_t: ("f87ad03893c0",)}, of_levels)
