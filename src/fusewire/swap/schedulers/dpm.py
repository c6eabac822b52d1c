"""DPM-Solver++ of order one and two, and its SDE: x0 is stored in the latents' dtype; the update is float32, or with EDM's levels in that dtype too."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_dpmsolver_multistep import EDMDPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from fusewire import ops
from fusewire.models.layers import How
from fusewire.swap.fused import MAKERS
from fusewire.swap.schedulers.common import KNOWN, Known, Scalars, gathered, indexed, of_levels, on_cpu, prepared, unknown_prediction, usable
from fusewire.swap.schedulers.ddim import NOISE
from fusewire.swap.schedulers.euler import edm_scales, noise_of_levels
from fusewire.swap.schedulers.layout import laid
from fusewire.swap.schedulers.noise import of_sigmas

Stock, EDM = DPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler


def _maker(how: How) -> dict:
    @functools.wraps(Stock.step)
    def step(self, model_output, timestep, sample, generator=None, variance_noise=None, return_dict=True):
        previous = _stepped(self, model_output, timestep, sample, generator, variance_noise, how, wide=True)
        if previous is None:
            return Stock.step(self, model_output, timestep, sample, generator, variance_noise, return_dict)
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    return {"step": step, **indexed(Stock), **of_sigmas(Stock, "add_noise", ("00c60ff12782",), noisy)}


def _edm_maker(how: How) -> dict:
    @functools.wraps(EDM.step)
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        previous = _stepped(self, model_output, timestep, sample, generator, None, how, wide=False)
        if previous is None:
            return EDM.step(self, model_output, timestep, sample, generator, return_dict)
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    return {"step": step, **indexed(EDM), **noise_of_levels(EDM)}


def _stepped(scheduler, model_output, timestep, sample, generator, noise, how: How, wide: bool) -> torch.Tensor | None:
    """The latents after a step; None where stock must make it, or complain. ``wide``: whether the update, and noise, is float32."""
    if scheduler.num_inference_steps is None or not usable(model_output, sample) or not on_cpu(scheduler.sigmas):
        return None
    if noise is not None and noise.shape != sample.shape:
        return None
    if scheduler._step_index is None:
        scheduler._init_step_index(timestep)
    index, steps, config = scheduler._step_index, len(scheduler.timesteps), scheduler._internal_dict
    last = index == steps - 1 and (
        config["euler_at_final"] or (config["lower_order_final"] and steps < 15) or config["final_sigmas_type"] == "zero")
    second, before = config["solver_order"] == 2 and scheduler.lower_order_nums >= 1 and not last, scheduler.model_outputs[-1]
    table = prepared(scheduler, (second,), (scheduler.sigmas,), sample, how.numerics == "exact", lambda scalars: _columns(scheduler, scalars, second, wide))
    if table.rows is None or not 0 <= index < len(table.rows) or (second and (index == 0 or not usable(before, sample))):
        return None
    if config["algorithm_type"] == "sde-dpmsolver++":
        dtype = torch.float32 if wide else model_output.dtype
        noise = (randn_tensor(model_output.shape, generator=generator, device=model_output.device, dtype=dtype) if noise is None
                 else noise.to(device=model_output.device, dtype=dtype))
    else:
        noise = None
    previous, x0, _ = ops.solver_step(sample, model_output, table.rows, index, previous=before if second else None, noise=noise,
                                      wide_x0=False, wide_out=wide, reciprocal=table.reciprocal, numerics=how.numerics)
    scheduler.model_outputs = [*scheduler.model_outputs[1:], x0]
    if scheduler.lower_order_nums < config["solver_order"]:
        scheduler.lower_order_nums += 1
    scheduler._step_index += 1
    return laid(previous, (sample, model_output), how.numerics)


def noisy(scheduler, sample, noise, sigma):
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigma)
    return alpha * sample + sigma * noise


def _columns(scheduler, scalars: Scalars, second: bool, wide: bool) -> dict:
    return gathered([_row(scheduler, scalars, i, second and i > 0, wide) for i in range(len(scheduler.sigmas) - 1)])


def _row(scheduler, scalars: Scalars, i: int, second: bool, wide: bool) -> dict:
    way = way_of(scheduler, i, i + 1)
    x, noise = (way.x, way.noise) if wide else (scalars.left(way.x), scalars.left(way.noise))
    row = dict(x0_row(scheduler, scalars, i), x=x, x0=scalars.left(way.x0), noise=noise)
    if not second:
        return row
    r0 = (log_ratio(scheduler, i) - log_ratio(scheduler, i - 1)) / way.h
    return dict(row, e_x0=1.0, e_previous=-1.0, e_scale=scalars.left(1.0 / r0), e=scalars.left(slope_weight(scheduler, way)))


def x0_row(scheduler, scalars: Scalars, i: int) -> dict:
    """How the prediction at sigmas[i] becomes x0, in the latents' dtype."""
    config, sigma = scheduler.config, scheduler.sigmas[i]
    if isinstance(scheduler, EDM):
        skip, out = edm_scales(config, sigma)
        return dict(x0_x=scalars.left(skip), x0_m=scalars.left(out))
    if config.prediction_type == "flow_prediction":
        return dict(x0_x=1.0, x0_m=-scalars.left(sigma))
    return scalars.prediction(config.prediction_type, *scheduler._sigma_to_alpha_sigma_t(sigma))


def log_ratio(scheduler, i: int) -> torch.Tensor:
    """lambda: half the logarithm of the ratio of signal to noise."""
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[i])
    return torch.log(alpha) - torch.log(sigma)


class Way(NamedTuple):
    """What multiplies latents, x0 and noise on the way between two levels; there alpha, and how much lambda grows."""

    x: torch.Tensor
    x0: torch.Tensor
    noise: torch.Tensor
    alpha: torch.Tensor
    h: torch.Tensor


def way_of(scheduler, start: int, end: int) -> Way:
    """From sigmas[start] to sigmas[end], by 0-dim tensors in stock's order: an exponential has other last bits in a vector."""
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[end])
    h, ratio = log_ratio(scheduler, end) - log_ratio(scheduler, start), sigma / scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[start])[1]
    if scheduler.config.algorithm_type == "sde-dpmsolver++":
        return Way(ratio * torch.exp(-h), alpha * (1 - torch.exp(-2.0 * h)), sigma * torch.sqrt(1.0 - torch.exp(-2 * h)), alpha, h)
    return Way(ratio, -(alpha * (torch.exp(-h) - 1.0)), torch.zeros((), dtype=torch.float32), alpha, h)


def slope_weight(scheduler, way: Way, midpoint: bool | None = None) -> torch.Tensor:
    """What multiplies x0's slope in a solver of order two."""
    if scheduler.config.solver_type == "midpoint" if midpoint is None else midpoint:
        return 0.5 * way.x0
    if scheduler.config.algorithm_type == "sde-dpmsolver++":
        return way.alpha * ((1.0 - torch.exp(-2.0 * way.h)) / (-2.0 * way.h) + 1.0)
    return way.alpha * ((torch.exp(-way.h) - 1.0) / way.h + 1.0)


def unknown_solver(scheduler) -> str:
    config = scheduler.config
    if config.algorithm_type not in ("dpmsolver++", "sde-dpmsolver++"):
        return f"algorithm_type is {config.algorithm_type!r}"
    return "" if getattr(config, "variance_type", None) is None else f"variance_type is {config.variance_type!r}"


def reason(scheduler) -> str:
    return unknown_solver(scheduler) or of_levels(scheduler)


def edm_reason(scheduler) -> str:
    return unknown_solver(scheduler) or of_levels(scheduler) or unknown_prediction(scheduler, "epsilon", "v_prediction")


MAKERS |= {Stock: _maker, EDM: _edm_maker}
# As diffusers 0.40 to 0.42 has them.
KNOWN[Stock] = Known({Stock.step: ("6c5cb6c8c653",), Stock._init_step_index: ("5f59d121f9c6",), Stock.index_for_timestep: ("0d43966bf673",),
                      Stock.convert_model_output: ("0fd90cb9c9db",), Stock.dpm_solver_first_order_update: ("fe68dc1a3f49",),
                      Stock.multistep_dpm_solver_second_order_update: ("9530e38a250c",), Stock._sigma_to_alpha_sigma_t: ("f87ad03893c0",)} | NOISE, reason)
KNOWN[EDM] = Known({EDM.step: ("39ff6e43e7ea",), EDM._init_step_index: ("5f59d121f9c6",), EDM.index_for_timestep: ("0d43966bf673",),
                    EDM.convert_model_output: ("ae890a19377e",), EDM.precondition_outputs: ("74a831536945",),
                    EDM.dpm_solver_first_order_update: ("a64e317b4f0f",), EDM.multistep_dpm_solver_second_order_update: ("d3e22d22adaf",),
                    EDM._sigma_to_alpha_sigma_t: ("cbfa223b3924",)} | NOISE, edm_reason)
