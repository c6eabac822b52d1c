"""Heun's method along a flow: float32, with a first and a second stage as ``HeunDiscreteScheduler`` has them, and churn."""

from __future__ import annotations

import functools

import torch
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler, FlowMatchHeunDiscreteSchedulerOutput

from fusewire import ops
from fusewire.models.layers import How
from fusewire.swap.fused import MAKERS
from fusewire.swap.schedulers.churn import churned, excess
from fusewire.swap.schedulers.common import KNOWN, Known, Scalars, host_levels, indexed, prepared, stamp, usable
from fusewire.swap.schedulers.ddim import NOISE
from fusewire.swap.schedulers.layout import laid

Stock = FlowMatchHeunDiscreteScheduler


def _maker(how: How) -> dict:
    exact = how.numerics == "exact"

    @functools.wraps(Stock.step)
    def step(self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0, generator=None, return_dict=True):
        run = None
        if isinstance(self.sigmas, torch.Tensor) and isinstance(timestep, torch.Tensor) and timestep.is_floating_point() and usable(model_output, sample):
            if self._step_index is None:
                self._init_step_index(timestep)
            run = _stage(self, s_churn, s_tmin, s_tmax, sample)
        table = None
        if run is not None:
            first, before, extra = run
            columns = functools.partial(_columns, self, first=first, before=before)
            table = prepared(self, (first, before), (self.sigmas,), sample, exact, columns)
        if table is None or table.rows is None:
            return Stock.step(self, model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, return_dict)
        index = self._step_index
        given = dict(keep_slope=first, previous=None if first else self.prev_derivative, base=None if first else self.sample)
        if extra:
            previous, _, sample, slope = churned(self, model_output, sample, how.numerics, s_noise, generator, extra, _level(self, first), columns,
                                                 (first, before), **given)
        else:
            previous, _, slope = ops.solver_step(sample, model_output, table.rows, index, reciprocal=table.reciprocal, numerics=how.numerics, **given)
        previous = laid(previous, (sample if first else self.sample, model_output), how.numerics)
        if first:  # stock keeps a float32 copy: the latents of 16 bits are kept, the same values, as a copy too, for they may be written to in between
            self.prev_derivative, self.sample = slope, sample if sample.dtype is torch.float32 else sample.clone()
            self.dt = self.sigmas[index + 1] - self.sigmas[index] * (before + 1)
            self._fusewire_stage = (self.dt, self.sigmas, stamp(self.sigmas), index, before)
        else:
            self.prev_derivative = self.dt = self.sample = None
        self._step_index += 1
        return FlowMatchHeunDiscreteSchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    return {"step": step, **indexed(Stock)}


def _stage(scheduler, s_churn: float, s_tmin: float, s_tmax: float, sample: torch.Tensor) -> tuple[bool, float, float] | None:
    """(whether this is a first stage, the excess that the first stage has or had, this one's); None where stock must tell."""
    first, index = scheduler.dt is None, scheduler._step_index
    if not (0 if first else 1) <= index < len(scheduler.sigmas) - 1:
        return None
    extra = excess(scheduler, index if first else index - 1, s_churn, s_tmin, s_tmax)
    if extra < 0:
        return None
    if first:
        return first, extra, extra
    dt, sigmas, version, begun, before = scheduler.__dict__.get("_fusewire_stage") or (None,) * 5
    if dt is not scheduler.dt or sigmas is not scheduler.sigmas or version != stamp(sigmas) or index != begun + 1:
        return None
    slope, base = scheduler.prev_derivative, scheduler.sample
    wanted = torch.float32 if extra else sample.dtype
    for tensor, dtype in ((slope, torch.float32), (base, wanted)):
        if not (tensor.dtype is dtype and tensor.shape == sample.shape and tensor.device == sample.device):
            return None
    return first, before, extra


def _level(scheduler, first: bool) -> torch.Tensor:
    """Where the pair of stages to which each step belongs begins."""
    level = host_levels(scheduler)[:-1]
    return level if first else torch.cat([level[:1], level[:-1]])


def _columns(scheduler, scalars: Scalars, first: bool, before: float) -> dict:
    """As stock: float32, but for the product with the model's output."""
    sigmas = host_levels(scheduler)
    level, hat = sigmas[:-1], _level(scheduler, first) * (before + 1)
    columns = dict(x0_x=1.0, x0_m=-scalars.right(level), e_x=1.0, e_x0=-1.0, x=1.0)
    if first:
        return dict(columns, e_divisor=hat, e=sigmas[1:] - hat)
    return dict(columns, e_divisor=level, e=level - hat, e_previous=1.0, e_scale=0.5)


MAKERS[Stock] = _maker
# As diffusers 0.40 to 0.42 has them.
KNOWN[Stock] = Known({Stock.step: ("108c33306aec",), Stock._init_step_index: ("1b309104c896",), Stock.index_for_timestep: ("3b375f4f0717",)} | NOISE,
                     lambda scheduler: "")
