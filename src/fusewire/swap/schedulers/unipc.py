"""UniPC of order one and two: the correction of the last step, then the next one, all in the latents' dtype."""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import torch
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from fusewire import ops
from fusewire.models.layers import How
from fusewire.swap.fused import MAKERS
from fusewire.swap.schedulers.common import KNOWN, Known, Scalars, gathered, indexed, of_levels, on_cpu, prepared, usable
from fusewire.swap.schedulers.ddim import NARROW
from fusewire.swap.schedulers.dpm import log_ratio, noisy, x0_row
from fusewire.swap.schedulers.layout import laid
from fusewire.swap.schedulers.noise import of_sigmas

Stock = UniPCMultistepScheduler
# Blocks of the table: x0 with the change that corrects a step of order one, or two; the corrected latents; a step of order one together with x0; from x0;
# one of order two
CHANGE_1, CHANGE_2, CORRECTED, WHOLE, STEP_1, STEP_2 = range(6)


def _maker(how: How) -> dict:
    exact = how.numerics == "exact"

    @functools.wraps(Stock.step)
    def step(self, model_output, timestep, sample, return_dict=True):
        table, steps = None, len(self.sigmas) - 1
        if self.num_inference_steps is not None and usable(model_output, sample) and on_cpu(self.sigmas):
            if self._step_index is None:
                self._init_step_index(timestep)
            if 0 <= self._step_index < steps:
                table = prepared(self, (), (self.sigmas,), sample, exact, lambda scalars: _columns(self, scalars))
        order = None if table is None or table.rows is None else _orders(self, sample)
        if order is None:
            return Stock.step(self, model_output, timestep, sample, return_dict)
        (corrector, order), index, outputs, rows = order, self._step_index, self.model_outputs, table.rows

        def solve(block: int, x, m, at: int = index, **given):
            return ops.solver_step(x, m, rows, block * steps + at, numerics=how.numerics, **NARROW, **given)

        if corrector:
            slope, last = None, outputs[-1]
            if corrector == 2:  # the slope of the last step of order two, where that one left it
                *known, slope = self.__dict__.get("_fusewire_slope") or (None,) * 4
                if not all(map(operator.is_, known, (last, outputs[-2], rows))):
                    _, _, slope = solve(STEP_2, outputs[-2], last, index - 1, keep_slope=True)
            change, x0, _ = solve(CHANGE_2 if corrector == 2 else CHANGE_1, sample, model_output, previous=last, noise=slope, reciprocal=table.reciprocal)
            sample = laid(solve(CORRECTED, self.last_sample, last, previous=change)[0], (self.last_sample, last), how.numerics)
            if order == 1:
                previous, _, _ = solve(STEP_1, sample, x0)
        else:
            previous, x0, _ = solve(WHOLE, sample, model_output, reciprocal=table.reciprocal)
        if order == 2:
            previous, _, slope = solve(STEP_2, outputs[-1], x0, base=sample, keep_slope=True)
            self._fusewire_slope = (x0, outputs[-1], rows, slope)
        previous = laid(previous, (sample, x0), how.numerics)
        self.model_outputs, self.timestep_list = [*outputs[1:], x0], [*self.timestep_list[1:], timestep]
        self.this_order, self.last_sample = order, sample
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)
        self._step_index += 1
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    return {"step": step, **indexed(Stock), **of_sigmas(Stock, "add_noise", ("00c60ff12782",), noisy)}


def _orders(scheduler, sample) -> tuple[int, int] | None:
    """(order of the corrector or 0, of the step); None where the past is not one that the op serves."""
    index, config, outputs = scheduler._step_index, scheduler._internal_dict, scheduler.model_outputs
    order = min(config["solver_order"], len(scheduler.timesteps) - index) if config["lower_order_final"] else config["solver_order"]
    order = min(order, scheduler.lower_order_nums + 1)
    corrects = index > 0 and index - 1 not in scheduler.disable_corrector and scheduler.last_sample is not None
    corrector = scheduler.this_order if corrects else 0
    # predict_x0 and solver_p are attributes, which nothing tells a change of; a run begun again has a past, and no level before the first one
    if not scheduler.predict_x0 or scheduler.solver_p or (order == 2 and index == 0) or (corrector == 2 and index == 1):
        return None
    needed = [*([scheduler.last_sample, *outputs[-corrector:]] if corrects else []), *([outputs[-1]] if order == 2 else [])]
    return (corrector, order) if all(usable(tensor, sample) for tensor in needed) else None


class Way(NamedTuple):
    """What Zhao et al. (2023) multiply with between two levels: the latents, x0 and the change; the divisor of the slope before; the corrector's weights."""

    x: torch.Tensor
    x0: torch.Tensor
    change: torch.Tensor
    ratio: torch.Tensor
    rhos: torch.Tensor


def _way(scheduler, i: int) -> Way:
    """From sigmas[i] to the next, by 0-dim tensors in stock's order."""
    (alpha, sigma), (_, sigma_s) = (scheduler._sigma_to_alpha_sigma_t(level) for level in (scheduler.sigmas[i + 1], scheduler.sigmas[i]))
    here, one = log_ratio(scheduler, i), torch.ones((), dtype=torch.float32)
    h = log_ratio(scheduler, i + 1) - here
    phi_1 = torch.expm1(-h)
    scale = -h if scheduler.config.solver_type == "bh1" else phi_1
    ratio, rhos = one, torch.zeros(2, dtype=torch.float32)
    if i > 0:
        ratio = (log_ratio(scheduler, i - 1) - here) / h
        phi_2 = phi_1 / -h - 1
        rows = torch.stack([ratio, one])
        if h.isfinite():  # the last step, to a level of 0, is never corrected
            rhos = torch.linalg.solve(torch.stack([torch.pow(rows, 0), rows]), torch.stack([phi_2 / scale, (phi_2 / -h - 1 / 2) * 2 / scale]))
    return Way(sigma / sigma_s, -(alpha * phi_1), -(alpha * scale), ratio, rhos)


def _columns(scheduler, scalars: Scalars) -> dict:
    """Stock moves the levels to the latents' device, but not those of the prediction."""
    moved, steps = Scalars(scalars.dtype, scalars.device, scalars.device, scalars.exact), range(len(scheduler.sigmas) - 1)
    ways, x0 = [_way(scheduler, i) for i in steps], [x0_row(scheduler, scalars, i) for i in steps]
    last, change = [ways[0], *ways], dict(e_x0=1.0, e_previous=-1.0, e=1.0)

    def to(way: Way) -> dict:
        return dict(x=moved.left(way.x), x0=moved.left(way.x0))

    # Stock adds a change of 0 in a step of order one, which is nothing, or after an infinite h of bh1 all there is.
    return gathered([
        *(dict(x0[i], **change, e_scale=0.5) for i in steps),
        *(dict(x0[i], **change, e_scale=moved.left(last[i].rhos[1]), noise=moved.left(last[i].rhos[0])) for i in steps),
        *(dict(to(last[i]), x0_m=1.0, e_previous=1.0, e=moved.left(last[i].change)) for i in steps),
        *(dict(x0[i], **to(ways[i]), scale=1 + 0 * ways[i].change) for i in steps),
        *(dict(to(ways[i]), x0_m=1.0, scale=1 + 0 * ways[i].change) for i in steps),
        *(dict(to(ways[i]), x0_m=1.0, e_x=1.0, e_x0=-1.0, e_divisor=moved.divisor(ways[i].ratio), e=0.5 * moved.left(ways[i].change).double()) for i in steps),
    ])


def reason(scheduler) -> str:
    if not scheduler.predict_x0:
        return "predict_x0 is False"
    if scheduler.solver_p:
        return f"solver_p is a {type(scheduler.solver_p).__name__}"
    return of_levels(scheduler)


MAKERS[Stock] = _maker
# As diffusers 0.40 to 0.42 has them.
KNOWN[Stock] = Known({Stock.step: ("b0e0ebb63463",), Stock._init_step_index: ("5f59d121f9c6",), Stock.index_for_timestep: ("0d43966bf673",),
                      Stock.convert_model_output: ("36a8b27f1b9b",), Stock.multistep_uni_p_bh_update: ("a9637fa7655a",),
                      Stock.multistep_uni_c_bh_update: ("5108706a503f",), Stock._sigma_to_alpha_sigma_t: ("f87ad03893c0",)}, reason)
