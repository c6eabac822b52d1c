"""KDPM2 and its ancestral form, k-diffusion's names for DPM-Solver-2 (Lu et al., 2022): two stages of Euler's kind, by way of a level between.

All arithmetic is in the latents' dtype. The levels themselves lie on the CPU, those between where the timesteps lie: PyTorch rounds scalars by their place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import KDPM2AncestralDiscreteScheduler, KDPM2AncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteScheduler, KDPM2DiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from fusewire import ops
from fusewire.models.layers import How
from fusewire.swap.fused import MAKERS
from fusewire.swap.schedulers.common import KNOWN, Known, Scalars, host_levels, indexed, usable
from fusewire.swap.schedulers.ddim import NOISE
from fusewire.swap.schedulers.euler import columns_at, laid_x0, noise_of_levels, noise_or_velocity, table_of_levels
from fusewire.swap.schedulers.layout import laid

LEVELS, ANCESTRAL = ("sigmas_interpol",), ("sigmas_interpol", "sigmas_down", "sigmas_up")
Columns = Callable[[list[torch.Tensor], Scalars, Scalars, str, bool], dict]


def _stage(scheduler, model_output, timestep, sample, numerics: str, names: tuple[str, ...], columns: Columns, generator=None):
    """(previous, x0) of the stage that ``scheduler.sample`` tells, whose step is then taken; None where it is stock's."""
    first, tensors = scheduler.sample is None, [getattr(scheduler, name, None) for name in names]
    if not all(isinstance(levels, torch.Tensor) for levels in tensors) or not (first or usable(scheduler.sample, sample)):
        return None
    exact, kind = numerics == "exact", scheduler._internal_dict["prediction_type"]
    host = [host_levels(scheduler, name) for name in ("sigmas", *names)]  # of both stages at the first, so that none waits for the device after it
    between = Scalars(sample.dtype, sample.device, tensors[0].device, exact)
    table = table_of_levels(scheduler, model_output, timestep, sample, exact, lambda scalars: columns(host, scalars, between, kind, first), (first,),
                            tuple(tensors))
    if table is None or not (first or scheduler._step_index):
        return None
    index, base = scheduler._step_index, sample if first else scheduler.sample
    noise = None
    if not first and len(names) > 1:
        noise = randn_tensor(model_output.shape, dtype=model_output.dtype, device=model_output.device, generator=generator)
    previous, x0, _ = ops.solver_step(sample, model_output, table.rows, index, base=None if first else base, noise=noise, wide_x0=False, wide_out=False,
                                      reciprocal=table.reciprocal if first else between.reciprocal, numerics=numerics)
    scheduler.sample = sample if first else None
    scheduler._step_index += 1
    return laid(previous, (base, sample, model_output), numerics), laid_x0(x0, kind, sample, model_output, numerics)


def _before(levels: torch.Tensor) -> torch.Tensor:
    """Row i: what the second stage finds one place before its own; the first row is of no stage."""
    return levels.roll(1)[:-1]


def _plain_columns(host: list[torch.Tensor], scalars: Scalars, between: Scalars, kind: str, first: bool) -> dict:
    sigmas, inter = host
    if first:
        return columns_at(scalars, kind, sigmas[:-1], between.right(inter[1:] - sigmas[:-1]))
    return columns_at(between, kind, inter[:-1], scalars.right(sigmas[:-1] - _before(sigmas)))


def _ancestral_columns(host: list[torch.Tensor], scalars: Scalars, between: Scalars, kind: str, first: bool) -> dict:
    sigmas, inter, down, up = host
    if first:
        return columns_at(scalars, kind, sigmas[:-1], between.right(inter[:-1] - sigmas[:-1]))
    return dict(columns_at(between, kind, _before(inter), between.right(_before(down) - _before(sigmas))), noise=between.right(_before(up)))


def _plain(how: How) -> dict:
    stock = KDPM2DiscreteScheduler.step

    @functools.wraps(stock)
    def step(self, model_output, timestep, sample, return_dict=True):
        found = _stage(self, model_output, timestep, sample, how.numerics, LEVELS, _plain_columns)
        if found is None:
            return stock(self, model_output, timestep, sample, return_dict)
        return KDPM2DiscreteSchedulerOutput(*found) if return_dict else found

    return {"step": step, **indexed(KDPM2DiscreteScheduler), **noise_of_levels(KDPM2DiscreteScheduler)}


def _ancestral(how: How) -> dict:
    stock = KDPM2AncestralDiscreteScheduler.step

    @functools.wraps(stock)
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        found = _stage(self, model_output, timestep, sample, how.numerics, ANCESTRAL, _ancestral_columns, generator)
        if found is None:
            return stock(self, model_output, timestep, sample, generator, return_dict)
        if self.sample is not None:  # after the first stage, as stock leaves it
            index = self._step_index - 1
            self.dt = self.sigmas_interpol[index] - self.sigmas[index]
        return KDPM2AncestralDiscreteSchedulerOutput(*found) if return_dict else found

    return {"step": step, **indexed(KDPM2AncestralDiscreteScheduler), **noise_of_levels(KDPM2AncestralDiscreteScheduler)}


MAKERS |= {KDPM2DiscreteScheduler: _plain, KDPM2AncestralDiscreteScheduler: _ancestral}
# As diffusers 0.40 to 0.42 has them.
for _stock, _step in ((KDPM2DiscreteScheduler, "cba5dbef4768"), (KDPM2AncestralDiscreteScheduler, "ed4c1afb749e")):
    KNOWN[_stock] = Known({_stock.step: (_step,), _stock._init_step_index: ("0f14aee91d40",), _stock.index_for_timestep: ("8e92214a3413",)} | NOISE,
                          noise_or_velocity)
