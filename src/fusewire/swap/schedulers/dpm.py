"""DPM-Solver++ of order one and two, and its SDE: x0 is stored in the latents' dtype, the update is float32."""

from __future__ import annotations

import functools

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from fusewire import ops
from fusewire.models.layers import How
from fusewire.swap.fused import MAKERS
from fusewire.swap.schedulers.common import KNOWN, Known, Scalars, indexed, no_thresholding, prepared, unknown_prediction, usable
from fusewire.swap.schedulers.ddim import NOISE
from fusewire.swap.schedulers.noise import of_sigmas

Stock = DPMSolverMultistepScheduler


def _maker(how: How) -> dict:
    exact = how.numerics == "exact"

    @functools.wraps(Stock.step)
    def step(self, model_output, timestep, sample, generator=None, variance_noise=None, return_dict=True):
        if self.num_inference_steps is None or not usable(model_output, sample) or not self.sigmas.is_cpu:
            return Stock.step(self, model_output, timestep, sample, generator, variance_noise, return_dict)
        if self._step_index is None:
            self._init_step_index(timestep)
        index, steps, config = self._step_index, len(self.timesteps), self._internal_dict
        last = index == steps - 1 and (
            config["euler_at_final"] or (config["lower_order_final"] and steps < 15) or config["final_sigmas_type"] == "zero")
        second = config["solver_order"] == 2 and self.lower_order_nums >= 1 and not last
        table = prepared(self, (second,), (self.sigmas,), sample, exact, lambda scalars: _columns(self, scalars, second))
        if table.rows is None or not 0 <= index < len(table.rows) or (second and not usable(self.model_outputs[-1], sample)):
            return Stock.step(self, model_output, timestep, sample, generator, variance_noise, return_dict)

        noise = None
        if config["algorithm_type"] == "sde-dpmsolver++":
            noise = (randn_tensor(model_output.shape, generator=generator, device=model_output.device, dtype=torch.float32) if variance_noise is None
                     else variance_noise.to(device=model_output.device, dtype=torch.float32))
        previous, x0, _ = ops.solver_step(sample, model_output, table.rows, index, previous=self.model_outputs[-1] if second else None, noise=noise,
                                          wide_x0=False, reciprocal=table.reciprocal, numerics=how.numerics)
        self.model_outputs = [*self.model_outputs[1:], x0]
        if self.lower_order_nums < config["solver_order"]:
            self.lower_order_nums += 1
        self._step_index += 1
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    return {"step": step, **indexed(Stock), **of_sigmas(Stock, "add_noise", ("00c60ff12782",), _noisy)}


def _noisy(scheduler, sample, noise, sigma):
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigma)
    return alpha * sample + sigma * noise


def _columns(scheduler, scalars: Scalars, second: bool) -> dict:
    rows = [_row(scheduler, scalars, i, second and i > 0) for i in range(len(scheduler.sigmas) - 1)]
    names = dict.fromkeys(name for row in rows for name in row)
    missing = dict(e_scale=1.0, x0_divisor=1.0)
    return {name: [float(row.get(name, missing.get(name, 0.0))) for row in rows] for name in names}


def _row(scheduler, scalars: Scalars, i: int, second: bool) -> dict:
    """One row by 0-dim tensors, in stock's order: an exponential has other last bits in a vector."""
    config, sigmas = scheduler.config, scheduler.sigmas
    alpha_t, sigma_t = scheduler._sigma_to_alpha_sigma_t(sigmas[i + 1])
    alpha_s, sigma_s = scheduler._sigma_to_alpha_sigma_t(sigmas[i])
    lambda_s = torch.log(alpha_s) - torch.log(sigma_s)
    h = torch.log(alpha_t) - torch.log(sigma_t) - lambda_s
    if config.prediction_type == "flow_prediction":
        row = dict(x0_x=1.0, x0_m=-scalars.left(sigmas[i]))
    else:
        row = scalars.prediction(config.prediction_type, alpha_s, sigma_s)
    sde = config.algorithm_type == "sde-dpmsolver++"
    if sde:
        row |= dict(x=sigma_t / sigma_s * torch.exp(-h), noise=sigma_t * torch.sqrt(1.0 - torch.exp(-2 * h)))
        own = alpha_t * (1 - torch.exp(-2.0 * h))
    else:
        row |= dict(x=sigma_t / sigma_s)
        own = -(alpha_t * (torch.exp(-h) - 1.0))
    row["x0"] = scalars.left(own)
    if not second:
        return row
    alpha_1, sigma_1 = scheduler._sigma_to_alpha_sigma_t(sigmas[i - 1])
    r0 = (lambda_s - (torch.log(alpha_1) - torch.log(sigma_1))) / h
    if config.solver_type == "midpoint":
        change = 0.5 * own
    elif sde:
        change = alpha_t * ((1.0 - torch.exp(-2.0 * h)) / (-2.0 * h) + 1.0)
    else:
        change = alpha_t * ((torch.exp(-h) - 1.0) / h + 1.0)
    return dict(row, e_x0=1.0, e_previous=-1.0, e_scale=scalars.left(1.0 / r0), e=scalars.left(change))


def reason(scheduler) -> str:
    config = scheduler.config
    if config.algorithm_type not in ("dpmsolver++", "sde-dpmsolver++"):
        return f"algorithm_type is {config.algorithm_type!r}"
    if config.solver_order > 2:
        return f"solver_order is {config.solver_order}"
    if config.variance_type is not None:
        return f"variance_type is {config.variance_type!r}"
    return no_thresholding(scheduler) or unknown_prediction(scheduler, "epsilon", "sample", "v_prediction", "flow_prediction")


MAKERS[Stock] = _maker
# As diffusers 0.40 to 0.42 has them.
KNOWN[Stock] = Known({Stock.step: ("6c5cb6c8c653",), Stock._init_step_index: ("5f59d121f9c6",), Stock.index_for_timestep: ("0d43966bf673",),
                      Stock.convert_model_output: ("0fd90cb9c9db",), Stock.dpm_solver_first_order_update: ("fe68dc1a3f49",),
                      Stock.multistep_dpm_solver_second_order_update: ("9530e38a250c",), Stock._sigma_to_alpha_sigma_t: ("f87ad03893c0",)} | NOISE, reason)
