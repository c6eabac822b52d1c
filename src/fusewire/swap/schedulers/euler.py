"""Euler, EDM's Euler, Euler ancestral and Heun: noise levels that lie on the CPU. All step in float32 but Heun, in the latents' dtype."""

from __future__ import annotations

import functools

import torch
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler, EDMEulerSchedulerOutput
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler, EulerAncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler, EulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler, HeunDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from fusewire import ops
from fusewire.models.layers import How
from fusewire.swap.fused import MAKERS
from fusewire.swap.schedulers.churn import churned, excess
from fusewire.swap.schedulers.common import KNOWN, Known, Prepared, Scalars, indexed, on_cpu, prepared, stamp, unknown_limit, unknown_prediction, usable
from fusewire.swap.schedulers.ddim import NOISE
from fusewire.swap.schedulers.layout import laid
from fusewire.swap.schedulers.noise import of_sigmas


def columns_at(scalars: Scalars, kind: str, level: torch.Tensor, dt: torch.Tensor, hat: torch.Tensor | None = None) -> dict:
    """x0 at ``level``, its slope, and a step of ``dt`` along it. ``hat``: the level that churn has raised the latents to."""
    hat = level if hat is None else hat
    if kind == "epsilon":
        x0 = dict(x0_x=1.0, x0_m=-scalars.left(hat))
    elif kind == "v_prediction":
        x0 = dict(x0_x=1.0, x_divisor=scalars.divisor(level**2 + 1), x0_m=scalars.right(-level / (level**2 + 1) ** 0.5))
    else:
        x0 = dict(x0_m=1.0)
    return dict(x0, e_x=1.0, e_x0=-1.0, e_divisor=scalars.divisor(hat), x=1.0, e=dt)


def table_of_levels(scheduler, model_output, timestep, sample, exact: bool, columns, key: tuple = (), more: tuple[torch.Tensor, ...] = ()) -> Prepared | None:
    """The table of the schedule, once the index of this step is known; None where stock must make it, or complain. ``more``: what else it is made from."""
    if not (getattr(scheduler, "is_scale_input_called", True) and isinstance(timestep, torch.Tensor) and timestep.is_floating_point()
            and usable(model_output, sample) and on_cpu(scheduler.sigmas)):
        return None
    if scheduler._step_index is None:
        scheduler._init_step_index(timestep)
    table = prepared(scheduler, key, (scheduler.sigmas, *more), sample, exact, columns)
    return table if table.rows is not None and 0 <= scheduler._step_index < len(scheduler.sigmas) - 1 else None


def laid_x0(x0, kind: str, sample, model_output, numerics: str, clipped: bool = False) -> torch.Tensor:
    """x0 where stock's lies: a velocity comes before the latents in its sum, and x0 that the model has predicted and nothing has clipped is its output."""
    if kind == "epsilon":
        return laid(x0, (sample, model_output), numerics)
    if kind == "v_prediction":
        return laid(x0, (model_output, sample), numerics)
    return laid(x0, (model_output,), numerics) if clipped else model_output


def noise_of_levels(stock: type) -> dict:
    return of_sigmas(stock, "add_noise", ("b1c93e85d09d",), lambda scheduler, sample, noise, sigma: sample + noise * sigma)


def _euler(how: How) -> dict:
    exact, stock = how.numerics == "exact", EulerDiscreteScheduler.step

    @functools.wraps(stock)
    def step(self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0, generator=None, return_dict=True):
        kind = self._internal_dict["prediction_type"]
        table = table_of_levels(self, model_output, timestep, sample, exact, lambda scalars: _euler_columns(scalars, kind, self.sigmas))
        extra = 0.0 if table is None else excess(self, self._step_index, s_churn, s_tmin, s_tmax)
        if table is None or extra < 0:
            return stock(self, model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, return_dict)
        if extra:
            previous, x0, *_ = churned(self, model_output, sample, how.numerics, s_noise, generator, extra, self.sigmas[:-1],
                                       lambda scalars: _euler_columns(scalars, kind, self.sigmas, extra))
        else:
            previous, x0, _ = ops.solver_step(sample, model_output, table.rows, self._step_index, reciprocal=table.reciprocal, numerics=how.numerics)
        self._step_index += 1
        previous, x0 = laid(previous, (sample, model_output), how.numerics), laid_x0(x0, kind, sample, model_output, how.numerics)
        return EulerDiscreteSchedulerOutput(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    return {"step": step, **indexed(EulerDiscreteScheduler), **noise_of_levels(EulerDiscreteScheduler)}


def _euler_columns(scalars: Scalars, kind: str, sigmas: torch.Tensor, extra: float = 0.0) -> dict:
    level = sigmas[:-1]
    hat = level * (extra + 1)
    return columns_at(scalars, kind, level, sigmas[1:] - hat, hat)


def euler_reason(scheduler) -> str:
    return unknown_prediction(scheduler, "epsilon", "v_prediction", "sample", "original_sample")


def _edm(how: How) -> dict:
    exact, stock = how.numerics == "exact", EDMEulerScheduler.step

    @functools.wraps(stock)
    def step(self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0, generator=None, return_dict=True,
             pred_original_sample=None):
        table = None
        if pred_original_sample is None:
            table = table_of_levels(self, model_output, timestep, sample, exact, lambda scalars: _edm_columns(scalars, self.config, self.sigmas))
        extra = 0.0 if table is None else excess(self, self._step_index, s_churn, s_tmin, s_tmax)
        if table is None or extra < 0:
            return stock(self, model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, return_dict, pred_original_sample)
        if extra:
            previous, x0, *_ = churned(self, model_output, sample, how.numerics, s_noise, generator, extra, self.sigmas[:-1],
                                       lambda scalars: _edm_columns(scalars, self.config, self.sigmas, extra))
        else:
            previous, x0, _ = ops.solver_step(sample, model_output, table.rows, self._step_index, reciprocal=table.reciprocal, numerics=how.numerics)
        self._step_index += 1
        previous, x0 = (laid(result, (sample, model_output), how.numerics) for result in (previous, x0))
        return EDMEulerSchedulerOutput(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    return {"step": step, **indexed(EDMEulerScheduler), **noise_of_levels(EDMEulerScheduler)}


def _edm_columns(scalars: Scalars, config, sigmas: torch.Tensor, extra: float = 0.0) -> dict:
    hat = sigmas[:-1] * (extra + 1)
    skip, out = edm_scales(config, hat)
    return dict(x0_x=skip, x0_m=scalars.left(out), e_x=1.0, e_x0=-1.0, e_divisor=scalars.divisor(hat), x=1.0, e=sigmas[1:] - hat)


def edm_scales(config, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(c_skip, c_out) of Karras et al. (2022), Table 1."""
    square = sigma**2 + config.sigma_data**2
    out = sigma * config.sigma_data / square**0.5
    return config.sigma_data**2 / square, -out if config.prediction_type == "v_prediction" else out


def noise_or_velocity(scheduler) -> str:
    return unknown_prediction(scheduler, "epsilon", "v_prediction")


def _ancestral(how: How) -> dict:
    exact, stock = how.numerics == "exact", EulerAncestralDiscreteScheduler.step

    @functools.wraps(stock)
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        kind = self._internal_dict["prediction_type"]
        table = table_of_levels(self, model_output, timestep, sample, exact, lambda scalars: _ancestral_columns(scalars, kind, self.sigmas))
        if table is None:
            return stock(self, model_output, timestep, sample, generator, return_dict)
        noise = randn_tensor(model_output.shape, dtype=model_output.dtype, device=model_output.device, generator=generator)
        previous, x0, _ = ops.solver_step(sample, model_output, table.rows, self._step_index, noise=noise, reciprocal=table.reciprocal,
                                          numerics=how.numerics)
        self._step_index += 1
        previous, x0 = laid(previous, (sample, model_output), how.numerics), laid_x0(x0, kind, sample, model_output, how.numerics)
        return EulerAncestralDiscreteSchedulerOutput(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    return {"step": step, **indexed(EulerAncestralDiscreteScheduler), **noise_of_levels(EulerAncestralDiscreteScheduler)}


def _ancestral_columns(scalars: Scalars, kind: str, sigmas: torch.Tensor) -> dict:
    level, to = sigmas[:-1], sigmas[1:]
    up = (to**2 * (level**2 - to**2) / level**2) ** 0.5
    down = (to**2 - up**2) ** 0.5
    return dict(columns_at(scalars, kind, level, down - level), noise=scalars.right(up))


def _heun(how: How) -> dict:
    exact, stock = how.numerics == "exact", HeunDiscreteScheduler.step

    @functools.wraps(stock)
    def step(self, model_output, timestep, sample, return_dict=True):
        first = self.dt is None
        sigmas, table = self.sigmas, None
        if first or (_goes_on(self) and usable(self.prev_derivative, sample) and usable(self.sample, sample)):
            table = table_of_levels(self, model_output, timestep, sample, exact, lambda scalars: _heun_columns(scalars, self.config, sigmas, first), (first,))
        if table is None:
            return stock(self, model_output, timestep, sample, return_dict)
        index = self._step_index
        previous, x0, slope = ops.solver_step(
            sample, model_output, table.rows, index, previous=None if first else self.prev_derivative, base=None if first else self.sample,
            keep_slope=first, wide_x0=False, wide_out=False, reciprocal=table.reciprocal, numerics=how.numerics)
        previous = laid(previous, (sample if first else self.sample, model_output), how.numerics)
        x0 = laid_x0(x0, self.config.prediction_type, sample, model_output, how.numerics, self.config.clip_sample)
        if first:
            self.prev_derivative, self.dt, self.sample = slope, sigmas[index + 1] - sigmas[index], sample
            self._fusewire_stage = (self.dt, sigmas, stamp(sigmas), index)
        else:
            self.prev_derivative = self.dt = self.sample = None
        self._step_index += 1
        return HeunDiscreteSchedulerOutput(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    return {"step": step, **indexed(HeunDiscreteScheduler), **noise_of_levels(HeunDiscreteScheduler)}


def _goes_on(scheduler) -> bool:
    """Whether the second stage goes the way of the first: it is the next step, by levels that have not changed since."""
    dt, sigmas, version, index = scheduler.__dict__.get("_fusewire_stage") or (None,) * 4
    return dt is scheduler.dt and sigmas is scheduler.sigmas and version == stamp(sigmas) and scheduler._step_index == index + 1


def _heun_columns(scalars: Scalars, config, sigmas: torch.Tensor, first: bool) -> dict:
    """``first``: a step of Euler from sigmas[i]; otherwise the mean of two slopes, of which the second is taken at sigmas[i]."""
    level = sigmas[:-1]
    dt = sigmas[1:] - level if first else torch.cat([level[:1] * 0, level[1:] - level[:-1]])
    columns = dict(columns_at(scalars, config.prediction_type, level, scalars.right(dt)), **scalars.limit(config))
    return columns if first else dict(columns, e_previous=1.0, e_scale=0.5)


def heun_reason(scheduler) -> str:
    return unknown_limit(scheduler) or levels_reason(scheduler)


def levels_reason(scheduler) -> str:
    return unknown_prediction(scheduler, "epsilon", "v_prediction", "sample")


MAKERS |= {EulerDiscreteScheduler: _euler, EDMEulerScheduler: _edm, EulerAncestralDiscreteScheduler: _ancestral, HeunDiscreteScheduler: _heun}
# As diffusers 0.40 to 0.42 has them.
for _stock, _step, _reason in ((EulerDiscreteScheduler, "1fcb0d4ca74f", euler_reason), (EulerAncestralDiscreteScheduler, "32f68c4df86e", noise_or_velocity),
                               (HeunDiscreteScheduler, "fbda640c2203", heun_reason)):
    KNOWN[_stock] = Known({_stock.step: (_step,), _stock._init_step_index: ("0f14aee91d40",), _stock.index_for_timestep: ("8e92214a3413",)} | NOISE, _reason)
KNOWN[EDMEulerScheduler] = Known({EDMEulerScheduler.step: ("beb17fcb08ea",), EDMEulerScheduler._init_step_index: ("0f14aee91d40",),
                                  EDMEulerScheduler.index_for_timestep: ("8e92214a3413",),
                                  EDMEulerScheduler.precondition_outputs: ("74a831536945",)} | NOISE, noise_or_velocity)
