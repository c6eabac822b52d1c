"""The swapped FlowMatchEulerDiscreteScheduler: stock's bits, stock's errors, and no look-up of values for the first step."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SASolverScheduler

import fusewire
from fusewire import ops


def steps_of() -> int:
    return sum(ops.stats()["flow_euler_step"].values())


def trajectory(scheduler, dtype, steps=5, start=0, sample_dtype=None, **options):
    torch.manual_seed(2)
    scheduler.set_timesteps(steps, **options)
    x = torch.randn(2, 4, 6, 5).to(sample_dtype or dtype)
    path = []
    for timestep in scheduler.timesteps[start:]:
        x = scheduler.step(torch.randn(2, 4, 6, 5).to(dtype), timestep, x, return_dict=False)[0]
        path.append(x)
    return torch.stack(path)


@pytest.mark.parametrize("options, config", [({}, {}), (dict(device="cpu"), dict(shift=3.0)), (dict(mu=0.7), dict(use_dynamic_shifting=True)),
                                             ({}, dict(use_karras_sigmas=True)), ({}, dict(shift_terminal=0.1)), ({}, dict(invert_sigmas=True))], ids=str)
@pytest.mark.parametrize("dtype, sample_dtype", [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, torch.float32),
                                                 (torch.float64, None)], ids=str)
def test_trajectory(dtype, sample_dtype, options, config):
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    want, sigmas, timesteps = trajectory(scheduler, dtype, sample_dtype=sample_dtype, **options), scheduler.sigmas, scheduler.timesteps
    with fusewire.swapped(scheduler):
        ops.reset_stats()
        got = trajectory(scheduler, dtype, sample_dtype=sample_dtype, **options)
        assert steps_of() == 5 and scheduler.step_index == 5
        assert torch.equal(scheduler.sigmas, sigmas) and torch.equal(scheduler.timesteps, timesteps)
    assert got.dtype is want.dtype and torch.equal(got, want)


def test_the_first_step_looks_up_no_values(monkeypatch):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    want = trajectory(scheduler, torch.float32, start=2)
    looked_up = []
    with fusewire.swapped(scheduler):
        monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "index_for_timestep", lambda *args: looked_up.append(args))
        assert torch.equal(trajectory(scheduler, torch.float32, start=2), want) and not looked_up


def test_timesteps_that_repeat_or_come_from_elsewhere_are_looked_up_by_stock():
    scheduler = FlowMatchEulerDiscreteScheduler()
    model_output, x = torch.randn(2, 1, 4, 4)[:, None]

    def first_step(change):
        scheduler.set_timesteps(timesteps=[900.0, 500.0, 500.0, 100.0], sigmas=[0.9, 0.5, 0.4, 0.1])
        return scheduler.step(model_output, change(scheduler.timesteps), x).prev_sample

    changes = [lambda t: t[1], lambda t: t[3].clone(), lambda t: t[0].item()]
    want = [first_step(change) for change in changes]
    with fusewire.swapped(scheduler):
        assert all(torch.equal(first_step(change), value) for change, value in zip(changes, want))
        scheduler.set_timesteps(4)
        scheduler.timesteps = scheduler.timesteps.flip(0)  # set by hand: what is known of the old ones no longer holds
        scheduler.timesteps[1] = scheduler.timesteps[0]
        assert scheduler.step(model_output, scheduler.timesteps[0], x) is not None and scheduler.step_index == 2


def test_begin_index_and_changed_sigmas():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    def run():
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(2)
        x = torch.ones(1, 2, 2, 2)
        for timestep in scheduler.timesteps[2:5]:
            x = scheduler.step(x, timestep, x).prev_sample
            scheduler.sigmas[scheduler.step_index + 1] *= 0.5
        scheduler.sigmas = scheduler.sigmas * 0.9
        return scheduler.step(x, scheduler.timesteps[5], x).prev_sample

    want = run()
    with fusewire.swapped(scheduler):
        assert torch.equal(run(), want)


@pytest.mark.parametrize("call", [
    lambda scheduler, x: scheduler.step(x, 3, x),
    lambda scheduler, x: scheduler.step(x, torch.tensor(3), x),
    lambda scheduler, x: [scheduler.step(x, scheduler.timesteps[0], x) for _ in range(4)],
])
def test_errors_are_stock(call):
    scheduler = FlowMatchEulerDiscreteScheduler()
    messages = []
    for numerics in (None, "exact"):
        if numerics:
            fusewire.swap(scheduler, numerics)
        scheduler.set_timesteps(3)
        with pytest.raises((ValueError, IndexError)) as caught:
            call(scheduler, torch.ones(1, 2))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("dtype, sample_dtype, fused", [(torch.float32, None, 5), (torch.bfloat16, None, 5), (torch.float16, None, 5),
                                                        (torch.bfloat16, torch.float32, 4), (torch.float64, None, 0)], ids=str)
def test_stochastic_sampling(dtype, sample_dtype, fused):
    """Its steps are another op's, which wants latents and predictions of one dtype: from the second step on these are of the prediction's."""
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, shift=3.0)
    want, after = trajectory(scheduler, dtype, sample_dtype=sample_dtype), torch.get_rng_state()
    with fusewire.swapped(scheduler):
        ops.reset_stats()
        assert torch.equal(trajectory(scheduler, dtype, sample_dtype=sample_dtype), want) and torch.equal(torch.get_rng_state(), after)
        assert sum(ops.stats()["solver_step"].values()) == fused and steps_of() == 0


def test_per_token_steps_are_stock():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    arguments = torch.randn(1, 3, 2), scheduler.timesteps[0], torch.randn(1, 3, 2)
    want = scheduler.step(*arguments, per_token_timesteps=torch.full((1, 3), 900.0)).prev_sample
    with fusewire.swapped(scheduler):
        scheduler.set_timesteps(4)
        assert torch.equal(scheduler.step(*arguments, per_token_timesteps=torch.full((1, 3), 900.0)).prev_sample, want) and steps_of() == 0


def test_restored_in_the_middle_of_a_picture():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    want = trajectory(scheduler, torch.bfloat16)
    torch.manual_seed(2)
    handle = fusewire.swap(scheduler)
    scheduler.set_timesteps(5)
    x = torch.randn(2, 4, 6, 5).to(torch.bfloat16)
    for i, timestep in enumerate(scheduler.timesteps):
        if i == 2:
            handle.restore()
            assert type(scheduler) is FlowMatchEulerDiscreteScheduler and not [key for key in vars(scheduler) if "fusewire" in key]
        x = scheduler.step(torch.randn(2, 4, 6, 5).to(torch.bfloat16), timestep, x, return_dict=False)[0]
        assert torch.equal(x, want[i])


def test_a_copy_has_its_own_schedule():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    want = trajectory(scheduler, torch.float32)
    fusewire.swap(scheduler)
    scheduler.set_timesteps(5)
    twin = copy.deepcopy(scheduler)
    assert type(twin) is type(scheduler) and torch.equal(trajectory(twin, torch.float32), want) and scheduler.step_index is None
    assert type(scheduler.from_config(scheduler.config)) is FlowMatchEulerDiscreteScheduler  # what its class makes is nobody's swap


def test_another_scheduler_is_left_with_a_reason():
    with pytest.raises(ValueError, match="SASolverScheduler has no fused step"):
        fusewire.swap(SASolverScheduler())
