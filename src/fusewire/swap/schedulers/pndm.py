"""PNDM: Runge and Kutta's four stages, then Adams and Bashforth's sums of the model's last outputs, all in the latents' dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from fusewire import ops
from fusewire.models.layers import How
from fusewire.swap.fused import MAKERS
from fusewire.swap.schedulers.common import KNOWN, Known, Scalars, host_alphas, place, prepared, stacked, times, unknown_prediction, usable, within
from fusewire.swap.schedulers.ddim import NARROW
from fusewire.swap.schedulers.layout import laid
from fusewire.swap.schedulers.noise import of_alphas

Stock = PNDMScheduler
# Blocks of the table: from one output, the second step (the first time again), from two, the sums of three and of four and what follows each, the stages
ONE, AGAIN, TWO, SUM_3, FROM_3, SUM_4, FROM_4, STAGE = range(8)


def _maker(how: How) -> dict:
    exact = how.numerics == "exact"

    @functools.wraps(Stock.step)
    def step(self, model_output, timestep, sample, return_dict=True):
        index = place(self, timestep) if self.num_inference_steps is not None and usable(model_output, sample) else None
        table, run = None, None if index is None else _stage if _in_stages(self) else _sum
        if run is not None:
            skipped = index - self.counter if run is _stage else 0
            sources = self.alphas_cumprod, self.timesteps, self.final_alpha_cumprod
            table = prepared(self, (self.num_inference_steps, skipped), sources, sample, exact, lambda scalars: _columns(self, scalars, skipped))

        def solve(block: int, x, m, **given):
            return ops.solver_step(x, m, table.rows, block * len(self.timesteps) + index, reciprocal=table.reciprocal, numerics=how.numerics, **NARROW, **given)

        found = None if table is None or table.rows is None else run(self, index, model_output, sample, solve)
        if found is None:
            return Stock.step(self, model_output, timestep, sample, return_dict)
        previous, base = found
        previous = laid(previous, (base, model_output), how.numerics)
        self.counter += 1
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    return {"step": step, **of_alphas(Stock)}


def _in_stages(scheduler) -> bool:
    return not scheduler.config.skip_prk_steps and scheduler.counter < len(scheduler.prk_timesteps)


def _stage(scheduler, index: int, model_output, sample, solve: Callable) -> tuple[torch.Tensor, torch.Tensor] | None:
    """One of the four stages, and the latents that it begins with; None where stock must run it."""
    stage, total = scheduler.counter % 4, scheduler.cur_model_output
    base = sample if stage == 0 or scheduler.cur_sample is None else scheduler.cur_sample
    begun = usable(total, sample) if stage else isinstance(total, int) and total == 0
    begun = begun and within(scheduler, times(scheduler)[index], scheduler.prk_timesteps[scheduler.counter // 4 * 4])
    if not begun or not usable(base, sample):
        return None
    if stage == 3:
        scheduler.cur_model_output = 0
        return solve(STAGE, total, model_output, base=base)[0], base
    previous, _, scheduler.cur_model_output = solve(STAGE, sample, model_output, base=base, previous=total if stage else None, keep_slope=True)
    if stage == 0:
        scheduler.ets.append(model_output)
        scheduler.cur_sample = sample
    return previous, base


def _sum(scheduler, index: int, model_output, sample, solve: Callable) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A step of the multistep phase, and the latents that it begins with; None where stock must run it."""
    config, again = scheduler.config, scheduler.counter == 1
    outputs = scheduler.ets if again else [*scheduler.ets[-3:], model_output]
    base, count = scheduler.cur_sample if again else sample, len(outputs)
    time, ratio = times(scheduler)[index], config.num_train_timesteps // scheduler.num_inference_steps
    if (not all(usable(tensor, sample) for tensor in (*outputs, base)) or (scheduler.counter >= 2 if count == 1 else scheduler.counter < 2)
            or not within(scheduler, time + ratio if again else time) or (not config.skip_prk_steps and len(scheduler.ets) < 3)):
        return None
    if again:
        previous, scheduler.cur_sample = solve(AGAIN, outputs[-1], model_output, base=base)[0], None
    elif count == 1:
        previous, scheduler.cur_sample = solve(ONE, sample, model_output)[0], sample
    elif count == 2:
        previous = solve(TWO, outputs[-2], model_output, base=base)[0]
    elif count == 3:
        previous = solve(FROM_3, solve(SUM_3, outputs[-2], model_output, previous=outputs[-3])[0], model_output, base=base)[0]
    else:
        previous = solve(FROM_4, solve(SUM_4, outputs[-2], model_output, previous=outputs[-3], noise=outputs[-4])[0], model_output, base=base)[0]
    scheduler.ets = outputs
    return previous, base


def _columns(scheduler, scalars: Scalars, skipped: int) -> dict:
    config, now = scheduler.config, torch.tensor(times(scheduler))
    ratio = config.num_train_timesteps // scheduler.num_inference_steps
    to = _way(scheduler, scalars, now, now - ratio)
    # A GPU divides by a number, wherever the alphas lie, by multiplying with its reciprocal.
    twelfth = dict(x0_x=1 / torch.tensor(12.0, dtype=torch.float32)) if scalars.device.type != "cpu" else dict(x0_x=1.0, x_divisor=12.0)
    blocks = [dict(to, x0_m=1.0), dict(_way(scheduler, scalars, now + ratio, now), x0_x=1.0, x0_m=1.0, x0_divisor=2.0),
              dict(to, x0_x=-1.0, x0_m=3.0, x0_divisor=2.0),
              dict(x0_x=-16.0, x0_m=23.0, e_x0=1.0, e_previous=5.0, e=1.0), dict(to, **twelfth),
              dict(x0_x=-59.0, x0_m=55.0, e_x0=1.0, e_previous=37.0, e=1.0, noise=-9.0), dict(to, x0_x=1 / 24)]
    return stacked(len(now), *blocks, *([] if config.skip_prk_steps else [_stages(scheduler, scalars, now, skipped)]))


def _stages(scheduler, scalars: Scalars, now: torch.Tensor, skipped: int) -> dict:
    """Three stages step with the model's output, in the place of x0, and add a part of it to the sum in e; the fourth, with that sum.

    Of a run that leaves out the first ``skipped`` steps.
    """
    config, of, steps = scheduler.config, torch.as_tensor(scheduler.prk_timesteps), (torch.arange(len(now)) - skipped).clamp(min=0)
    half = config.num_train_timesteps // scheduler.num_inference_steps // 2
    way = _way(scheduler, scalars, of[(steps // 4 * 4).clamp(max=len(of) - 1)], torch.where(steps % 2 == 0, now - half, now))
    fourth, one = steps % 4 == 3, torch.ones(len(now), dtype=torch.float64)

    def both(early, last) -> torch.Tensor:
        return torch.where(fourth, last * one, early * one)

    early = torch.where(steps % 4 == 0, one / 6, one / 3)
    return dict(x0_x=both(0, 1), x0_m=both(way["e_x0"], 1 / 6), x0_divisor=both(way["e_divisor"], 1), e_m=both(early, 0),
                e_x0=both(0, way["e_x0"]), e_previous=both(1, 0), e_divisor=both(1, way["e_divisor"]), x=way["x"], x0=both(-1, 0), e=both(0, -1))


def _way(scheduler, scalars: Scalars, now: torch.Tensor, then: torch.Tensor) -> dict:
    """From time ``now`` to ``then`` by Liu et al. (2022), formula 9, with the noise in the place of x0."""
    bar = host_alphas(scheduler)
    alpha = bar[now.clamp(max=len(bar) - 1)]
    before = torch.where(then >= 0, bar[then.clamp(0, len(bar) - 1)], scheduler.final_alpha_cumprod.cpu())
    return dict(x=scalars.left((before / alpha)**0.5), e_x0=scalars.left(before - alpha), e=-1.0,
                e_divisor=scalars.divisor(alpha * (1 - before)**0.5 + (alpha * (1 - alpha) * before)**0.5))


def reason(scheduler) -> str:
    return unknown_prediction(scheduler, "epsilon")


MAKERS[Stock] = _maker
# As diffusers 0.40 to 0.42 has them.
KNOWN[Stock] = Known({Stock.step: ("cf093bfe1dff",), Stock.step_prk: ("3bc0ec169146",), Stock.step_plms: ("92584fd562b2",),
                      Stock._get_prev_sample: ("fc39554dfb38",)}, reason)
