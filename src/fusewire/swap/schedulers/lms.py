"""LMS: Adams and Bashforth's sum of the last four slopes, all in the latents' dtype."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler, LMSDiscreteSchedulerOutput

from fusewire import ops
from fusewire.models.layers import How
from fusewire.swap.fused import MAKERS
from fusewire.swap.schedulers.common import KNOWN, Known, Scalars, indexed, stacked, usable
from fusewire.swap.schedulers.ddim import NARROW
from fusewire.swap.schedulers.euler import columns_at, laid_x0, levels_reason, noise_of_levels, table_of_levels
from fusewire.swap.schedulers.layout import laid

Stock = LMSDiscreteScheduler


def _maker(how: How) -> dict:
    exact = how.numerics == "exact"

    @functools.wraps(Stock.step)
    def step(self, model_output, timestep, sample, order=4, return_dict=True):
        table = None
        if order in (1, 2, 3, 4) and all(usable(slope, sample) for slope in self.derivatives):
            table = table_of_levels(self, model_output, timestep, sample, exact, lambda scalars: _columns(self, scalars, order), (order,))
        if table is None:
            return Stock.step(self, model_output, timestep, sample, order, return_dict)
        index, steps, slopes = self._step_index, len(self.sigmas) - 1, self.derivatives
        past = slopes[::-1][:min(index + 1, order) - 1]
        options = dict(NARROW, reciprocal=table.reciprocal, numerics=how.numerics)
        if len(past) < 2:
            previous, x0, slope = ops.solver_step(sample, model_output, table.rows, steps * len(past) + index, base=past[0] if past else None,
                                                  noise=sample if past else None, keep_slope=True, **options)
        else:
            total, x0, slope = ops.solver_step(sample, model_output, table.rows, steps * 2 + index, base=past[0], noise=past[1], keep_slope=True, **options)
            previous, _, _ = ops.solver_step(total, past[-1], table.rows, steps * (len(past) + 1) + index, noise=sample, **options)
        self.derivatives = [*(slopes[1:] if len(slopes) >= order else slopes), slope]
        self._step_index += 1
        previous = laid(previous, (sample, model_output), how.numerics)
        x0 = laid_x0(x0, self.config.prediction_type, sample, model_output, how.numerics)
        return LMSDiscreteSchedulerOutput(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    return {"step": step, **indexed(Stock), **noise_of_levels(Stock)}


def _columns(scheduler, scalars: Scalars, order: int) -> dict:
    """Blocks: the step from one slope; from two; the sum of the first two or three; what follows it, where these were all, and where there is a fourth.

    Stock adds the latents to the sum of all slopes: they come last, in the place of noise.
    """
    weights, steps = _weights(tuple(scheduler.sigmas.tolist()), order), len(scheduler.sigmas) - 1
    slope = columns_at(scalars, scheduler.config.prediction_type, scheduler.sigmas[:-1], weights[0])
    return stacked(steps, slope, dict(slope, x=weights[1], noise=1.0), dict(slope, x=weights[1], noise=weights[2]), dict(x=1.0, noise=1.0),
                   dict(x=1.0, e_m=1.0, e=weights[3], noise=1.0))


@functools.lru_cache(maxsize=64)
def _weights(levels: tuple[float, ...], order: int) -> torch.Tensor:
    """[4, S] what multiplies the last four slopes: stock's integrals, which it takes at each step anew."""
    holder, weights = SimpleNamespace(sigmas=torch.tensor(levels, dtype=torch.float32)), torch.zeros(4, len(levels) - 1, dtype=torch.float64)
    for i in range(len(levels) - 1):
        of = min(i + 1, order)
        weights[:of, i] = torch.tensor([Stock.get_lms_coefficient(holder, of, i, k) for k in range(of)], dtype=torch.float64)
    return weights


MAKERS[Stock] = _maker
# As diffusers 0.40 to 0.42 has them.
KNOWN[Stock] = Known({Stock.step: ("4603c4d8bd61",), Stock._init_step_index: ("0f14aee91d40",), Stock.index_for_timestep: ("8e92214a3413",),
                      Stock.get_lms_coefficient: ("cf3c0fb3b03a",)}, levels_reason)
