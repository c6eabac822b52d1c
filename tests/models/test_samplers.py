"""The flow-Euler loop against diffusers' scheduler and pipeline arithmetic, and against golden tensors of the official repository."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open

from fusewire import ops
from fusewire.models.samplers import Conditioning, flow_interpolate, sample_flow_euler
from fusewire.models.schedules import flow_sigmas, flow_sigmas_shifted_once

GOLDEN = Path(__file__).parents[1] / "data" / "sd35_sampling.safetensors"


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.7])
@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50])
def test_sigmas_are_diffusers(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    assert torch.equal(flow_sigmas(steps, shift), scheduler.sigmas)


def test_shift_applied_once_and_twice():
    assert torch.allclose(flow_sigmas(4, 3.0), torch.tensor([1, 0.8577, 0.6022, 0.0089, 0]), atol=5e-5)
    assert torch.allclose(flow_sigmas_shifted_once(4, 3.0), torch.tensor([1, 0.8573, 0.6007, 0.0030, 0]), atol=5e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_guidance_and_steps_round_as_diffusers(dtype, guidance_scale):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    outputs = torch.randn(7, 4, 4, 9, 7).to(dtype)  # [uncond; cond] of each step
    x = want = torch.randn(2, 4, 9, 7).to(dtype)
    for timestep, both in zip(scheduler.timesteps, outputs):  # the arithmetic of diffusers' pipeline
        uncond, cond = both.chunk(2)
        v = uncond + guidance_scale * (cond - uncond) if guidance_scale > 1 else cond
        want = scheduler.step(v, timestep, want, return_dict=False)[0]
    calls = iter(outputs)
    condition = Conditioning(torch.zeros(2, 1, 1), torch.zeros(2, 1))

    def model(hidden_states, *rest):
        both = next(calls)
        return both if guidance_scale > 1 else both[2:]

    ops.reset_stats()
    got = sample_flow_euler(model, x, flow_sigmas(7), condition, condition, guidance_scale=guidance_scale)
    assert torch.equal(got, want) and got.dtype is dtype and sum(ops.stats()["flow_euler_step"].values()) == 7


def velocity(hidden_states, encoder_hidden_states, pooled_projections, timestep, skip_layers=()):
    """The analytic velocity that the golden tensors were made with; see the file's notes."""
    x, sigma = hidden_states, (timestep / 1000).view(-1, 1, 1, 1)

    def mean(tensor):
        return tensor.flatten(1).mean(1).view(-1, 1, 1, 1)

    return (0.7 * x * (1 - 0.3 * sigma) + 0.2 * torch.tanh(x + mean(encoder_hidden_states)) + 0.05 * mean(pooled_projections)
            - 0.1 * len(tuple(skip_layers)))


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 2.7e-5)], ids=str)
@pytest.mark.parametrize("name, skip", [("euler", None), ("euler_slg", (7, 8, 9))])
def test_golden_trajectory_of_the_official_repository(name, skip, dtype, bound):
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key).to(dtype) for key in file.keys()}
    sigmas = flow_sigmas(6, 3.0, dtype)
    assert (sigmas - tensors["mid/sigmas"]).abs().max() <= bound
    x = flow_interpolate(tensors["in/latent"], tensors["in/noise"], sigmas[0])
    path = [x]
    out = sample_flow_euler(velocity, x, sigmas, Conditioning(tensors["in/c_pos"], tensors["in/y_pos"]), Conditioning(tensors["in/c_neg"], tensors["in/y_neg"]),
                            guidance_scale=4.5, skip_layers=skip, skip_scale=2.5, skip_start=0.01, skip_stop=0.4, numerics="close",
                            callback=lambda step, x: path.append(x))
    assert out.dtype is dtype and out is path[-1]
    assert (out - tensors[f"out/{name}"]).abs().max() <= bound * tensors[f"out/{name}"].abs().max()
    if skip is None:
        assert (torch.stack(path[:-1]) - tensors["mid/euler_x"]).abs().max() <= bound * tensors["mid/euler_x"].abs().max()


def test_guidance_without_a_negative_is_an_error():
    condition = Conditioning(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="^negative is None"):
        sample_flow_euler(velocity, torch.zeros(1, 1, 2, 2), flow_sigmas(2), condition, guidance_scale=2.0)
    with pytest.raises(ValueError, match="^steps is 0"):
        flow_sigmas(0)


def test_no_guidance_calls_the_model_once_a_step():
    batches = []

    def model(x, *rest):
        batches.append(x.shape[0])
        return torch.ones_like(x)

    condition = Conditioning(torch.zeros(3, 1, 1), torch.zeros(3, 1))
    out = sample_flow_euler(model, torch.zeros(3, 1, 2, 2), flow_sigmas(4), condition)
    assert batches == [3] * 4 and torch.allclose(out, torch.full_like(out, -1.0))
