"""The swapped schedulers but flow matching's Euler: stock's bits, noise and errors, and nothing asked of the device."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import (DDIMScheduler, DDPMScheduler, DEISMultistepScheduler, EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler,
                       KDPM2DiscreteScheduler, LCMScheduler, PNDMScheduler, TCDScheduler, UniPCMultistepScheduler)

import fusewire
from fusewire import ops
from tests.swap.trajectories import (CONFIGS, DPM, DTYPES, EDMDPM, IDS, SINGLE, V, X0, Path, alike, each_scheduler, fused_steps, same, scaled,
                                     trajectory)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls, config, options", CONFIGS, ids=IDS)
def test_trajectory_is_stock(cls, config, options, dtype):
    """x, x0 and the random numbers drawn, from the beginning and from the middle; 16 steps, as DPM-Solver++ and its like then end otherwise."""
    for steps, start in ((7, 0), (7, 3), *([(16, 0)] if "lower_order_final" in cls(**config).config else [])):
        scheduler = cls(**config)
        want, state = trajectory(scheduler, dtype, steps, start, options), dict(vars(scheduler))
        fused = cls(**config)
        with fusewire.swapped(fused):
            got = trajectory(fused, dtype, steps, start, options)
            assert got.fused == len(scheduler.timesteps) - start * scheduler.order and want.fused == 0
        assert same(got, want)
        assert all(alike(vars(fused)[key], value) for key, value in state.items())
        assert set(vars(fused)) == set(vars(scheduler))  # restored: nothing of ours is left


def test_timesteps_that_end_before_the_first():
    """Trailing, 61 steps of 1000: the last one is -1, before which there is none."""
    given = dict(variance_type="learned_range", timestep_spacing="trailing")
    want, fused = trajectory(DDPMScheduler(**given), steps=61), DDPMScheduler(**given)
    with fusewire.swapped(fused):
        assert same(trajectory(fused, steps=61), want) and fused.timesteps[-1] == -1 and want.seen[-1].isfinite().all()


def test_subnormal_weights():
    """UniPC on a cosine schedule at Karras' levels: halves of float16's smallest numbers must not be rounded once more."""
    def run(scheduler):
        scheduler.set_timesteps(20)
        scheduler.set_begin_index(0)  # (two of its timesteps are the same)
        draw = torch.Generator().manual_seed(2)
        x, seen = torch.randn(2, 4, 6, 5, generator=draw).half(), []
        for timestep in scheduler.timesteps:
            noise = x.tanh() * 0.7 + 0.1 * torch.randn(2, 4, 6, 5, generator=draw).half()  # much like the latents', so that nothing overflows
            seen.append(x := scheduler.step(noise, timestep, x, return_dict=False)[0])
        return seen

    scheduler = UniPCMultistepScheduler(beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True)
    want = run(scheduler)
    with fusewire.swapped(scheduler):
        ops.reset_stats()
        assert all(map(torch.equal, run(scheduler), want)) and fused_steps() and all(x.isfinite().all() for x in want)


@each_scheduler
def test_close_stays_near_stock(cls, config, options):
    scheduler = cls(**config)
    want = trajectory(scheduler, options=options)
    with fusewire.swapped(scheduler, numerics="close"):
        got = trajectory(scheduler, options=options)
        assert got.fused == len(scheduler.timesteps)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item()) for a, b in zip(got.seen, want.seen))


class Asked(Exception):
    pass


class Remote(torch.Tensor):
    """A tensor on a device: whoever looks at a value of it, or of a tensor computed from it, waits for the device, and is told (``told``)."""

    told = False

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if cls.told and name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"):
            raise Asked(name)
        return super().__torch_function__(function, types, args, kwargs or {})


def remotely(scheduler, options, monkeypatch):
    """``trajectory`` with latents, predictions and timesteps on a device of which nothing may be asked from the second step on."""
    generator, draw = torch.Generator().manual_seed(3), torch.Generator().manual_seed(5)
    scheduler.set_timesteps(7)
    scheduler.timesteps = scheduler.timesteps.as_subclass(Remote)
    given = dict(options, **({"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}))
    x, seen = (torch.randn(2, 4, 6, 5, generator=draw) * getattr(scheduler, "init_noise_sigma", 1.0)).as_subclass(Remote), []
    fused = 0
    for i in range(len(scheduler.timesteps)):
        timestep, before = scheduler.timesteps[i], fused_steps()
        monkeypatch.setattr(Remote, "told", i > 0)
        seen.append(scaled(scheduler, x, timestep))
        result = scheduler.step(torch.randn(2, 4, 6, 5, generator=draw).as_subclass(Remote), timestep, x, return_dict=False, **given)
        monkeypatch.setattr(Remote, "told", False)
        fused += fused_steps() > before
        x = result[0]
        seen += result
    return Path([tensor.as_subclass(torch.Tensor) for tensor in seen], generator.get_state(), fused)


@each_scheduler
def test_nothing_is_asked_of_the_device(cls, config, options, monkeypatch):
    want, scheduler = trajectory(cls(**config), options=options), cls(**config)
    with fusewire.swapped(scheduler):
        got = remotely(scheduler, options, monkeypatch)
        assert same(got, want) and got.fused == len(scheduler.timesteps)


def test_flow_euler_asks_nothing_of_the_device(monkeypatch):
    def path(scheduler):
        scheduler.set_timesteps(7)
        scheduler.timesteps, draw = scheduler.timesteps.as_subclass(Remote), torch.Generator().manual_seed(5)
        x, seen = torch.randn(2, 4, 6, 5, generator=draw).as_subclass(Remote), []
        for i in range(7):
            timestep, output = scheduler.timesteps[i], torch.randn(2, 4, 6, 5, generator=draw).as_subclass(Remote)
            monkeypatch.setattr(Remote, "told", i > 0 and type(scheduler) is not FlowMatchEulerDiscreteScheduler)
            x = scheduler.step(output, timestep, x, return_dict=False)[0]
            monkeypatch.setattr(Remote, "told", False)
            seen.append(x.as_subclass(torch.Tensor))
        return seen

    want, scheduler = path(FlowMatchEulerDiscreteScheduler(shift=3.0)), FlowMatchEulerDiscreteScheduler(shift=3.0)
    with fusewire.swapped(scheduler):
        ops.reset_stats()
        assert all(map(torch.equal, path(scheduler), want))
        assert sum(ops.stats()["flow_euler_step"].values()) >= 6


@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler, LCMScheduler])
def test_stock_asks_at_every_step(cls, monkeypatch):
    """That the test above can fail."""
    with pytest.raises(Asked):
        remotely(cls(), {}, monkeypatch)


@pytest.mark.parametrize("cls, config, reason", [
    (DDIMScheduler, dict(thresholding=True), "quantile"), (DDPMScheduler, dict(variance_type="fixed_large_log"), "variance_type is 'fixed_large_log'"),
    (DPM, dict(algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min"), "algorithm_type"), (DPM, dict(solver_order=3), "solver_order is 3"),
    (DPM, dict(thresholding=True), "quantile"), (LCMScheduler, dict(thresholding=True), "quantile"),
    (EulerAncestralDiscreteScheduler, X0, "prediction_type is 'sample'"), (KDPM2DiscreteScheduler, X0, "prediction_type is 'sample'"),
    (TCDScheduler, V, "prediction_type is 'v_prediction'"), (PNDMScheduler, V, "prediction_type is 'v_prediction'"),
    (UniPCMultistepScheduler, dict(solver_order=3), "solver_order is 3"), (UniPCMultistepScheduler, dict(predict_x0=False), "predict_x0 is False"),
    (UniPCMultistepScheduler, dict(solver_p=DDIMScheduler()), "solver_p is a DDIMScheduler"),
    (DEISMultistepScheduler, dict(solver_order=3), "solver_order is 3"),
    (SINGLE, dict(solver_order=3, solver_type="heun"), "solver_order is 3 with solver_type 'heun'"), (EDMDPM, dict(thresholding=True), "quantile"),
])
def test_refused_with_a_reason(cls, config, reason):
    with pytest.raises(ValueError, match=reason):
        fusewire.swap(cls(**config))
