"""What the tests of swapped schedulers share: configurations of each, runs of their steps, and what counts as the same."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import pytest
import torch
from diffusers import (DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, DEISMultistepScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler,
                       EDMDPMSolverMultistepScheduler, EDMEulerScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler,
                       FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler, KDPM2AncestralDiscreteScheduler,
                       KDPM2DiscreteScheduler, LCMScheduler, LMSDiscreteScheduler, PNDMScheduler, TCDScheduler, UniPCMultistepScheduler)

from fusewire import ops
from fusewire.kernels.library import CPU

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
NO_CLIP = dict(SD, clip_sample=False)
V, X0 = dict(prediction_type="v_prediction"), dict(prediction_type="sample")
DPM, SINGLE, EDMDPM = DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, EDMDPMSolverMultistepScheduler
SDE = dict(SD, algorithm_type="sde-dpmsolver++")
CHURN, SOME_CHURN = dict(s_churn=2.0), dict(s_churn=40.0, s_tmin=0.3, s_tmax=5.0, s_noise=1.1)
PNDM = dict(SD, skip_prk_steps=True, steps_offset=1)  # as Stable Diffusion's repositories have it
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
# A flow at levels that are not a flow's: sigma is not the level itself then
NO_FLOW = dict(SD, prediction_type="flow_prediction")
KARRAS, EXPONENTIAL, BETA = dict(use_karras_sigmas=True), dict(use_exponential_sigmas=True), dict(use_beta_sigmas=True)
CONFIGS = [
    (DDIMScheduler, NO_CLIP, {}), (DDIMScheduler, SD | dict(clip_sample_range=1.3), {}), (DDIMScheduler, NO_CLIP | V, {}), (DDIMScheduler, NO_CLIP | X0, {}),
    (DDIMScheduler, SD | X0, {}), (DDIMScheduler, SD | X0, dict(eta=0.5, use_clipped_model_output=True)),
    (DDIMScheduler, NO_CLIP | dict(set_alpha_to_one=False, steps_offset=1), dict(eta=0.7)), (DDIMScheduler, SD, dict(eta=1.0, use_clipped_model_output=True)),
    (DDIMScheduler, NO_CLIP | V | dict(rescale_betas_zero_snr=True, timestep_spacing="trailing"), {}), (DDIMScheduler, {}, dict(eta=0.3)),
    (DDPMScheduler, {}, {}), (DDPMScheduler, NO_CLIP, {}), (DDPMScheduler, NO_CLIP | V, {}), (DDPMScheduler, SD | X0, {}),
    (DDPMScheduler, NO_CLIP | dict(variance_type="fixed_large"), {}), (DDPMScheduler, SD | dict(variance_type="fixed_small_log"), {}),
    (DDPMScheduler, dict(variance_type="learned_range"), {}), (DDPMScheduler, NO_CLIP | V | dict(variance_type="learned"), {}),
    (DDPMScheduler, dict(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing"), {}),
    (DDPMScheduler, dict(variance_type="learned_range", timestep_spacing="trailing"), {}),
    (LCMScheduler, {}, {}), (LCMScheduler, V, {}), (LCMScheduler, X0 | dict(clip_sample=True), {}), (LCMScheduler, dict(timestep_scaling=1.0), {}),
    (EulerDiscreteScheduler, SD, {}), (EulerDiscreteScheduler, SD | V, {}), (EulerDiscreteScheduler, SD | X0, {}),
    (EulerDiscreteScheduler, SD | dict(use_karras_sigmas=True), {}), (EulerDiscreteScheduler, SD | dict(timestep_spacing="leading", steps_offset=1), {}),
    (EulerDiscreteScheduler, SD | V | dict(timestep_type="continuous", rescale_betas_zero_snr=True), {}),
    (EulerDiscreteScheduler, SD | dict(final_sigmas_type="sigma_min", interpolation_type="log_linear"), {}),
    (EulerDiscreteScheduler, SD, CHURN), (EulerDiscreteScheduler, SD | V, SOME_CHURN), (EulerDiscreteScheduler, SD | X0, CHURN),
    (EDMEulerScheduler, {}, {}), (EDMEulerScheduler, V | dict(sigma_schedule="exponential", final_sigmas_type="sigma_min"), {}), (EDMEulerScheduler, {}, CHURN),
    (EulerAncestralDiscreteScheduler, SD, {}), (EulerAncestralDiscreteScheduler, SD | V, {}),
    (HeunDiscreteScheduler, SD, {}), (HeunDiscreteScheduler, SD | V, {}), (HeunDiscreteScheduler, SD | X0 | dict(clip_sample=True), {}),
    (HeunDiscreteScheduler, SD | dict(use_karras_sigmas=True, clip_sample=True), {}),
    (KDPM2DiscreteScheduler, SD, {}), (KDPM2DiscreteScheduler, SD | V | dict(timestep_spacing="trailing"), {}), (KDPM2DiscreteScheduler, SD | KARRAS, {}),
    (KDPM2AncestralDiscreteScheduler, SD, {}), (KDPM2AncestralDiscreteScheduler, SD | V | dict(timestep_spacing="leading", steps_offset=1), {}),
    (KDPM2AncestralDiscreteScheduler, SD | KARRAS, {}),
    (TCDScheduler, {}, {}), (TCDScheduler, {}, dict(eta=0.0)), (TCDScheduler, X0 | dict(set_alpha_to_one=False), dict(eta=1.0)),
    (TCDScheduler, dict(rescale_betas_zero_snr=True), dict(eta=0.7)),
    (DDIMInverseScheduler, NO_CLIP, {}), (DDIMInverseScheduler, SD, {}), (DDIMInverseScheduler, NO_CLIP | V | dict(set_alpha_to_one=False), {}),
    (DDIMInverseScheduler, SD | X0 | dict(steps_offset=1, timestep_spacing="trailing"), {}),
    (FlowMatchHeunDiscreteScheduler, dict(shift=3.0), {}), (FlowMatchHeunDiscreteScheduler, {}, CHURN), (FlowMatchHeunDiscreteScheduler, {}, SOME_CHURN),
    (LMSDiscreteScheduler, SD, {}), (LMSDiscreteScheduler, SD | V, dict(order=3)),
    (LMSDiscreteScheduler, SD | X0 | dict(use_karras_sigmas=True), dict(order=2)),
    (PNDMScheduler, PNDM, {}), (PNDMScheduler, {}, {}), (PNDMScheduler, PNDM | dict(set_alpha_to_one=True, timestep_spacing="trailing"), {}),
    (DPM, SD, {}), (DPM, SD | V, {}), (DPM, SD | X0, {}), (DPM, SD | dict(use_karras_sigmas=True), {}), (DPM, SD | dict(solver_type="heun"), {}),
    (DPM, SD | dict(solver_order=1), {}), (DPM, SD | dict(euler_at_final=True, lower_order_final=False, final_sigmas_type="sigma_min"), {}),
    (DPM, FLOW, {}), (DPM, SDE, {}), (DPM, SDE | V, {}),
    (DPM, SDE | dict(solver_type="heun", use_karras_sigmas=True), {}), (DPM, SD | dict(rescale_betas_zero_snr=True, timestep_spacing="trailing"), {}),
    (EDMDPM, {}, {}), (EDMDPM, V | dict(algorithm_type="sde-dpmsolver++", solver_type="heun"), {}),
    (EDMDPM, dict(sigma_schedule="exponential", euler_at_final=True, final_sigmas_type="sigma_min"), {}),
    (SINGLE, SD, {}), (SINGLE, SD | V | dict(solver_type="heun"), {}), (SINGLE, SD | dict(solver_order=3, final_sigmas_type="sigma_min"), {}),
    (SINGLE, SDE | dict(solver_order=3), {}), (SINGLE, FLOW, {}), (SINGLE, SDE | X0 | dict(solver_type="heun", use_karras_sigmas=True), {}),
    (UniPCMultistepScheduler, SD, {}), (UniPCMultistepScheduler, FLOW, {}), (UniPCMultistepScheduler, SD | dict(disable_corrector=[0, 2]), {}),
    (UniPCMultistepScheduler, SD | V | dict(solver_type="bh1", final_sigmas_type="sigma_min"), {}),
    (UniPCMultistepScheduler, SD | X0 | dict(lower_order_final=False), {}), (UniPCMultistepScheduler, SD | dict(solver_order=1, solver_type="bh1"), {}),
    (DEISMultistepScheduler, SD, {}), (DEISMultistepScheduler, SD | V | dict(use_karras_sigmas=True), {}), (DEISMultistepScheduler, FLOW, {}),
    (DEISMultistepScheduler, SD | X0 | dict(solver_order=1, lower_order_final=False), {}),
    (DEISMultistepScheduler, NO_FLOW, {}), (DEISMultistepScheduler, NO_FLOW | KARRAS, {}), (DEISMultistepScheduler, NO_FLOW | EXPONENTIAL, {}),
    (DEISMultistepScheduler, NO_FLOW | BETA, {}), (DEISMultistepScheduler, NO_FLOW | dict(solver_order=1), {}),
    (DPM, NO_FLOW, {}), (SINGLE, NO_FLOW | KARRAS, {}), (UniPCMultistepScheduler, NO_FLOW | EXPONENTIAL, {}), (UniPCMultistepScheduler, NO_FLOW | BETA, {}),
]
IDS = [f"{cls.__name__.removesuffix('Scheduler')} {config} {options}".replace(str(SD)[1:-1], "SD") for cls, config, options in CONFIGS]
ONE_EACH = [next(case for case in CONFIGS if case[0] is cls) for cls in dict.fromkeys(cls for cls, *_ in CONFIGS)]
# Of these the runs with noise and in pipelines are left out of the default run: what differs from the others' is in the tests below.
SELDOM = (LMSDiscreteScheduler, FlowMatchHeunDiscreteScheduler, EDMEulerScheduler, EDMDPM, SINGLE, DEISMultistepScheduler, UniPCMultistepScheduler,
          KDPM2DiscreteScheduler, DDIMInverseScheduler)
each_scheduler = pytest.mark.parametrize("cls, config, options", ONE_EACH, ids=[cls.__name__ for cls, *_ in ONE_EACH])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def seldom(cases: list[tuple], ids: list[str], *more: type) -> list:
    return [pytest.param(*case, id=name, marks=pytest.mark.slow if case[0] in (*SELDOM, *more) else ()) for case, name in zip(cases, ids)]


def fused_steps() -> int:
    """How many calls of the op the compiled library has served; where there is none, the reference."""
    return ops.stats()["solver_step"]["cpu" if CPU.loaded else "reference"]


class Path(NamedTuple):
    """What the steps of a run returned, the generator's state after it, and how many steps were fused."""

    seen: list[torch.Tensor]
    state: torch.Tensor
    fused: int


def scaled(scheduler, x, timestep):
    return scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x  # (a flow's have none)


def trajectory(scheduler, dtype=torch.float32, steps=7, start=0, options=None, wrap=lambda x: x):
    """Everything that the steps of a run return, and the inputs as the scheduler scales them."""
    generator = torch.Generator().manual_seed(3)
    scheduler.set_timesteps(steps)
    takes = inspect.signature(scheduler.step).parameters
    options = dict(options or {}, **({"generator": generator} if "generator" in takes else {}))
    draw = torch.Generator().manual_seed(5)
    x, seen = wrap((torch.randn(2, 4, 6, 5, generator=draw) * getattr(scheduler, "init_noise_sigma", 1.0)).to(dtype)), []
    channels, fused = 8 if "learned" in str(scheduler.config.get("variance_type")) else 4, 0
    for timestep in scheduler.timesteps[start * scheduler.order:]:
        seen.append(scaled(scheduler, x, timestep))
        output, before = wrap(torch.randn(2, channels, 6, 5, generator=draw).to(dtype)), fused_steps()
        result = scheduler.step(output, timestep, x, return_dict=False, **options)
        fused += fused_steps() > before
        x = result[0]
        seen += result
    return Path(seen, generator.get_state(), fused)


def same(got: Path, want: Path) -> bool:
    return got.state.equal(want.state) and len(got.seen) == len(want.seen) and all(
        a.dtype is b.dtype and equal(a, b) for a, b in zip(got.seen, want.seen))


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Infinities too, and NaN where the other has it."""
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=0, atol=0, equal_nan=True)


def alike(got, want) -> bool:
    """A part of a scheduler's state, tensors and what holds them by value."""
    if isinstance(want, list):
        return isinstance(got, list) and len(got) == len(want) and all(map(alike, got, want))
    if isinstance(want, torch.Tensor):
        return isinstance(got, torch.Tensor) and equal(got, want)
    return not isinstance(want, (int, float, type(None))) or got == want
