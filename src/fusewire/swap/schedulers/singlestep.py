"""DPM-Solver++ in single steps of order one to three, and its SDE: a step of a higher order begins anew where the last of order one began."""

from __future__ import annotations

import functools

import torch
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from fusewire import ops
from fusewire.models.layers import How
from fusewire.swap.fused import MAKERS
from fusewire.swap.schedulers.common import KNOWN, Known, Scalars, gathered, indexed, of_levels, on_cpu, prepared, usable
from fusewire.swap.schedulers.ddim import NARROW, NOISE
from fusewire.swap.schedulers.dpm import log_ratio, noisy, slope_weight, unknown_solver, way_of, x0_row
from fusewire.swap.schedulers.layout import laid
from fusewire.swap.schedulers.noise import of_sigmas

Stock = DPMSolverSinglestepScheduler


def _maker(how: How) -> dict:
    exact = how.numerics == "exact"

    @functools.wraps(Stock.step)
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        table = None
        if self.num_inference_steps is not None and usable(model_output, sample) and on_cpu(self.sigmas):
            if self._step_index is None:
                self._init_step_index(timestep)
            if 0 <= self._step_index < min(len(self.order_list), len(self.sigmas) - 1):
                table = prepared(self, (), (self.sigmas,), sample, exact, lambda scalars: _columns(self, scalars))
        order = None if table is None or table.rows is None else _order(self, sample)
        if order is None:
            return Stock.step(self, model_output, timestep, sample, generator, return_dict)
        index, steps, outputs, noise = self._step_index, len(self.sigmas) - 1, self.model_outputs, None
        if self.config.algorithm_type == "sde-dpmsolver++":
            noise = randn_tensor(model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype)
        options = dict(NARROW, reciprocal=table.reciprocal, numerics=how.numerics)
        if order == 1:
            self.sample = sample
            previous, x0, _ = ops.solver_step(sample, model_output, table.rows, index, noise=noise, **options)
        else:  # x0 where the step begins is an older one: it comes in the place of noise, and noise with the slope
            before, row = outputs[1 - order], steps * (order - 1) + index
            part, x0, slope = ops.solver_step(sample, model_output, table.rows, row, previous=before, base=self.sample, noise=before, keep_slope=True,
                                              **options)
            previous, _, _ = ops.solver_step(part, slope, table.rows, row + 2 * steps, noise=noise, **options)
        previous = laid(previous, (self.sample, model_output), how.numerics)
        self.model_outputs = [*outputs[1:], x0]
        self._step_index += 1
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    return {"step": step, **indexed(Stock), **of_sigmas(Stock, "add_noise", ("00c60ff12782",), noisy)}


def _order(scheduler, sample) -> int | None:
    """The order of this step; None where the past is not one that the op serves."""
    order, outputs = scheduler.order_list[scheduler._step_index], scheduler.model_outputs
    while order > 1 and outputs[1 - order] is None:
        order -= 1
    return order if order == 1 or (usable(outputs[1 - order], sample) and usable(scheduler.sample, sample)) else None


def _columns(scheduler, scalars: Scalars) -> dict:
    """Blocks: a step of order one; the first pass of order two, and three; the second."""
    steps = range(len(scheduler.sigmas) - 1)
    ones = [dict(x0_row(scheduler, scalars, i), **_way(scalars, way_of(scheduler, i, i + 1))) for i in steps]
    twos, threes = ([_passes(scheduler, scalars, i, i - back if i >= back else i) for i in steps] for back in (1, 2))
    return gathered([*ones, *(one for one, _ in twos), *(one for one, _ in threes), *(two for _, two in twos), *(two for _, two in threes)])


def _way(scalars: Scalars, way) -> dict:
    return dict(x=scalars.left(way.x), x0=scalars.left(way.x0), noise=scalars.left(way.noise))


def _passes(scheduler, scalars: Scalars, i: int, start: int) -> tuple[dict, dict]:
    """The two passes of a step from sigmas[start], of whose slope sigmas[i] is the other end."""
    way = way_of(scheduler, start, i + 1)
    r0 = (log_ratio(scheduler, i) - log_ratio(scheduler, start)) / way.h
    weight = slope_weight(scheduler, way, scheduler.config.solver_type == "midpoint" and i - start < 2)
    first = dict(x0_row(scheduler, scalars, i), e_x0=1.0, e_previous=-1.0, e_scale=scalars.left(1.0 / r0), x=scalars.left(way.x), noise=scalars.left(way.x0))
    return first, dict(x=1.0, e_m=1.0, e=scalars.left(weight), noise=scalars.left(way.noise))


def reason(scheduler) -> str:
    if scheduler.config.solver_order == 3 and scheduler.config.solver_type == "heun":
        return "solver_order is 3 with solver_type 'heun'"
    return unknown_solver(scheduler) or of_levels(scheduler, 3)


MAKERS[Stock] = _maker
# As diffusers 0.40 to 0.42 has them.
KNOWN[Stock] = Known({Stock.step: ("106164b6576a",), Stock._init_step_index: ("5f59d121f9c6",), Stock.index_for_timestep: ("0d43966bf673",),
                      Stock.convert_model_output: ("6acf29f4d473",), Stock.dpm_solver_first_order_update: ("4589f0fbb333",),
                      Stock.singlestep_dpm_solver_second_order_update: ("b7c213545b14",), Stock.singlestep_dpm_solver_third_order_update: ("55a56f7fbf22",),
                      Stock.singlestep_dpm_solver_update: ("0db747f85d60",), Stock._sigma_to_alpha_sigma_t: ("f87ad03893c0",)} | NOISE, reason)
