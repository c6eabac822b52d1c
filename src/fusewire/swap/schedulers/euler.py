"""Euler, Euler ancestral and Heun: noise levels that lie on the CPU. The first two step in float32, Heun in the latents' dtype."""

from __future__ import annotations

import functools

import torch
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler, EulerAncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler, EulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler, HeunDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from fusewire import ops
from fusewire.models.layers import How
from fusewire.swap.fused import MAKERS
from fusewire.swap.schedulers.common import KNOWN, Known, Prepared, Scalars, indexed, prepared, unknown_prediction, usable
from fusewire.swap.schedulers.ddim import NOISE
from fusewire.swap.schedulers.noise import of_sigmas


def _columns(scalars: Scalars, kind: str, level: torch.Tensor, dt: torch.Tensor) -> dict:
    """x0 at ``level``, its slope, and a step of ``dt`` along it."""
    if kind == "epsilon":
        x0 = dict(x0_x=1.0, x0_m=-scalars.left(level))
    elif kind == "v_prediction":
        x0 = dict(x0_x=1.0, x_divisor=scalars.divisor(level**2 + 1), x0_m=scalars.right(-level / (level**2 + 1) ** 0.5))
    else:
        x0 = dict(x0_m=1.0)
    return dict(x0, e_x=1.0, e_x0=-1.0, e_divisor=scalars.divisor(level), x=1.0, e=dt)


def _table(scheduler, model_output, timestep, sample, exact: bool, columns, key: tuple = ()) -> Prepared | None:
    """The table of the schedule, once the index of this step is known; None where stock must make it, or complain."""
    if not (getattr(scheduler, "is_scale_input_called", True) and isinstance(timestep, torch.Tensor) and timestep.is_floating_point()
            and usable(model_output, sample) and scheduler.sigmas.is_cpu):
        return None
    if scheduler._step_index is None:
        scheduler._init_step_index(timestep)
    table = prepared(scheduler, key, (scheduler.sigmas,), sample, exact, columns)
    return table if table.rows is not None and 0 <= scheduler._step_index < len(table.rows) else None


def _noise(stock: type) -> dict:
    return of_sigmas(stock, "add_noise", ("b1c93e85d09d",), lambda scheduler, sample, noise, sigma: sample + noise * sigma)


def _euler(how: How) -> dict:
    exact, stock = how.numerics == "exact", EulerDiscreteScheduler.step

    @functools.wraps(stock)
    def step(self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0, generator=None, return_dict=True):
        kind, sigmas = self._internal_dict["prediction_type"], self.sigmas
        table = _table(self, model_output, timestep, sample, exact, lambda scalars: _columns(scalars, kind, sigmas[:-1], sigmas[1:] - sigmas[:-1]))
        if table is None or s_churn != 0:
            return stock(self, model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, return_dict)
        previous, x0, _ = ops.solver_step(sample, model_output, table.rows, self._step_index, reciprocal=table.reciprocal, numerics=how.numerics)
        self._step_index += 1
        if kind in ("sample", "original_sample"):
            x0 = model_output
        return EulerDiscreteSchedulerOutput(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    return {"step": step, **indexed(EulerDiscreteScheduler), **_noise(EulerDiscreteScheduler)}


def euler_reason(scheduler) -> str:
    return unknown_prediction(scheduler, "epsilon", "v_prediction", "sample", "original_sample")


def _ancestral(how: How) -> dict:
    exact, stock = how.numerics == "exact", EulerAncestralDiscreteScheduler.step

    @functools.wraps(stock)
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        table = _table(self, model_output, timestep, sample, exact, lambda scalars: _ancestral_columns(scalars, self.config.prediction_type, self.sigmas))
        if table is None:
            return stock(self, model_output, timestep, sample, generator, return_dict)
        noise = randn_tensor(model_output.shape, dtype=model_output.dtype, device=model_output.device, generator=generator)
        previous, x0, _ = ops.solver_step(sample, model_output, table.rows, self._step_index, noise=noise, reciprocal=table.reciprocal,
                                          numerics=how.numerics)
        self._step_index += 1
        return EulerAncestralDiscreteSchedulerOutput(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    return {"step": step, **indexed(EulerAncestralDiscreteScheduler), **_noise(EulerAncestralDiscreteScheduler)}


def _ancestral_columns(scalars: Scalars, kind: str, sigmas: torch.Tensor) -> dict:
    level, to = sigmas[:-1], sigmas[1:]
    up = (to**2 * (level**2 - to**2) / level**2) ** 0.5
    down = (to**2 - up**2) ** 0.5
    return dict(_columns(scalars, kind, level, down - level), noise=scalars.right(up))


def ancestral_reason(scheduler) -> str:
    return unknown_prediction(scheduler, "epsilon", "v_prediction")


def _heun(how: How) -> dict:
    exact, stock = how.numerics == "exact", HeunDiscreteScheduler.step

    @functools.wraps(stock)
    def step(self, model_output, timestep, sample, return_dict=True):
        first = self.dt is None
        sigmas, table = self.sigmas, None
        if first or (usable(self.prev_derivative, sample) and usable(self.sample, sample)):
            table = _table(self, model_output, timestep, sample, exact, lambda scalars: _heun_columns(scalars, self.config, sigmas, first), (first,))
        if table is None:
            return stock(self, model_output, timestep, sample, return_dict)
        index = self._step_index
        previous, x0, slope = ops.solver_step(
            sample, model_output, table.rows, index, previous=None if first else self.prev_derivative, base=None if first else self.sample,
            keep_slope=first, wide_x0=False, wide_out=False, reciprocal=table.reciprocal, numerics=how.numerics)
        if first:
            self.prev_derivative, self.dt, self.sample = slope, sigmas[index + 1] - sigmas[index], sample
        else:
            self.prev_derivative = self.dt = self.sample = None
        self._step_index += 1
        return HeunDiscreteSchedulerOutput(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    return {"step": step, **indexed(HeunDiscreteScheduler), **_noise(HeunDiscreteScheduler)}


def _heun_columns(scalars: Scalars, config, sigmas: torch.Tensor, first: bool) -> dict:
    """``first``: a step of Euler from sigmas[i]; otherwise the mean of two slopes, of which the second is taken at sigmas[i]."""
    level = sigmas[:-1]
    dt = sigmas[1:] - level if first else torch.cat([level[:1] * 0, level[1:] - level[:-1]])
    columns = dict(_columns(scalars, config.prediction_type, level, scalars.right(dt)), **scalars.limit(config))
    return columns if first else dict(columns, e_previous=1.0, e_scale=0.5)


def heun_reason(scheduler) -> str:
    return unknown_prediction(scheduler, "epsilon", "v_prediction", "sample")


MAKERS |= {EulerDiscreteScheduler: _euler, EulerAncestralDiscreteScheduler: _ancestral, HeunDiscreteScheduler: _heun}
# As diffusers 0.40 to 0.42 has them.
for _stock, _step, _reason in ((EulerDiscreteScheduler, "1fcb0d4ca74f", euler_reason), (EulerAncestralDiscreteScheduler, "32f68c4df86e", ancestral_reason),
                               (HeunDiscreteScheduler, "fbda640c2203", heun_reason)):
    KNOWN[_stock] = Known({_stock.step: (_step,), _stock._init_step_index: ("0f14aee91d40",), _stock.index_for_timestep: ("8e92214a3413",)} | NOISE, _reason)
