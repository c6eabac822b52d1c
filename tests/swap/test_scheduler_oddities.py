"""What people do to a scheduler that no pipeline does: runs begun again, times that come back, attributes of another kind. Stock's bits, or its error."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (DDIMScheduler, DDPMScheduler, DEISMultistepScheduler, EDMEulerScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler,
                       FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler, LMSDiscreteScheduler,
                       PNDMScheduler, UniPCMultistepScheduler)
from torch._dynamo.testing import CompileCounterWithBackend

import fusewire
from fusewire import ops
from fusewire.errors import NothingToDo
from fusewire.kernels.library import CPU
from tests.swap.trajectories import DPM, EDMDPM, SD, SDE, equal, fused_steps, scaled

X = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
OUTPUTS = [torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(1, 13)]


def alike(cls, config: dict, run, fused: bool | None = True) -> None:
    """``run(scheduler)`` returns, or raises, the same for a stock scheduler and a swapped one, of whose steps some, or none, were ``fused``. None: ``run``
    looks for itself, as calls in a graph are not counted."""
    found = []
    for swapped in (False, True):
        scheduler = cls(**config)
        if swapped:
            fusewire.swap(scheduler)
            ops.reset_stats()
        torch.manual_seed(0)
        try:
            found.append(run(scheduler))
        except Exception as error:
            found.append(error)
    assert fused is None or bool(fused_steps()) == fused
    stock, ours = found
    if isinstance(stock, Exception):
        assert type(ours) is type(stock) and str(ours) == str(stock)
    else:
        assert equal(ours, stock)


def stepped(scheduler, indices, x=X, **more) -> torch.Tensor:
    for i, index in enumerate(indices):
        timestep = scheduler.timesteps[index]
        scaled(scheduler, x, timestep)
        x = scheduler.step(OUTPUTS[i], timestep, x, **more).prev_sample
    return x


@pytest.mark.parametrize("cls, config", [
    (UniPCMultistepScheduler, SD), (DEISMultistepScheduler, SD), (HeunDiscreteScheduler, SD), (FlowMatchHeunDiscreteScheduler, {}),
    (DPM, SD | dict(final_sigmas_type="sigma_min")), (EDMDPM, dict(final_sigmas_type="sigma_min"))], ids=lambda v: getattr(v, "__name__", ""))
def test_a_run_that_is_begun_again(cls, config):
    """Its past is that of the run before, at the first level or in the middle of two stages; what follows is fused again."""
    def run(scheduler):
        scheduler.set_timesteps(6)
        stepped(scheduler, range(3))
        scheduler._step_index = None
        at = 3 if cls is FlowMatchHeunDiscreteScheduler else 0
        return stepped(scheduler, [at, at + 1, at + 2])

    alike(cls, config, run)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_one_buffer_of_latents(dtype):
    """Heun's method along a flow keeps where its first stage began: not the caller's tensor, which the next latents are written to."""
    def run(scheduler):
        scheduler.set_timesteps(4)
        latents = X.to(dtype)
        for timestep, output in zip(scheduler.timesteps, OUTPUTS):
            latents.copy_(scheduler.step(output.to(dtype), timestep, latents).prev_sample)
        return latents

    alike(FlowMatchHeunDiscreteScheduler, {}, run)


@pytest.mark.parametrize("cls, variance", [(DDPMScheduler, "fixed_small"), (DDPMScheduler, "learned_range"), (DDIMScheduler, ""), (LCMScheduler, "")])
def test_times_that_come_back(cls, variance):
    def run(scheduler):
        times = [900, 500, 900, 500, 100]
        if cls is DDPMScheduler:
            scheduler.set_timesteps(timesteps=[900, 500, 100])
        else:
            scheduler.set_timesteps(5)
        scheduler.timesteps = torch.tensor(times)
        x = X
        for output, timestep in zip(OUTPUTS, scheduler.timesteps):
            output = torch.cat([output, output / 9], 1) if variance == "learned_range" else output
            x = scheduler.step(output, timestep, x, generator=torch.Generator().manual_seed(int(timestep))).prev_sample
        return x

    # LCM begins such a run at the second place, where its index and its time are not of one step: stock's
    alike(cls, SD | (dict(variance_type=variance) if variance else {}), run, fused=cls is not LCMScheduler)


@pytest.mark.parametrize("first", (500, 0), ids=("later", "first"))
@pytest.mark.parametrize("cls", (DDIMScheduler, DDPMScheduler, PNDMScheduler))
def test_times_beyond_the_trainings(cls, first):
    """A step at another time is not disturbed by one that is never made; one that is made raises stock's error."""
    def run(scheduler):
        scheduler.set_timesteps(1000)
        return stepped(scheduler, [first])

    alike(cls, SD | dict(steps_offset=1), run, fused=first > 0 and cls is not PNDMScheduler)


def test_noise_that_broadcasts():
    def run(scheduler):
        scheduler.set_timesteps(5)
        return stepped(scheduler, [0, 1], variance_noise=torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(9)))

    alike(DPM, SDE, run, fused=False)


@pytest.mark.parametrize("cls, name, change", [
    *((cls, "timesteps", list) for cls in (DDIMScheduler, PNDMScheduler)),
    *((cls, "final_alpha_cumprod", float) for cls in (DDIMScheduler, LCMScheduler, PNDMScheduler)), (DDPMScheduler, "one", float),
    *((cls, "sigmas", torch.Tensor.numpy) for cls in (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler,
                                                      EDMEulerScheduler, FlowMatchHeunDiscreteScheduler))])
def test_attributes_of_another_kind(cls, name, change):
    def run(scheduler):
        scheduler.set_timesteps(5)
        setattr(scheduler, name, change(getattr(scheduler, name)))
        return stepped(scheduler, range(3))

    alike(cls, {}, run, fused=False)


@pytest.mark.parametrize("name, value", [("predict_x0", False), ("solver_p", DDIMScheduler())])
def test_unipc_that_changes_on_the_way(name, value):
    def run(scheduler):
        scheduler.set_timesteps(6)
        x = stepped(scheduler, range(2))
        setattr(scheduler, name, value)
        return scheduler.step(OUTPUTS[5], scheduler.timesteps[2], x).prev_sample

    alike(UniPCMultistepScheduler, SD, run)


def test_an_eta_that_changes_in_place():
    def run(scheduler):
        scheduler.set_timesteps(5)
        eta, x = torch.tensor(0.2), X
        for i in range(3):
            x = scheduler.step(OUTPUTS[i], scheduler.timesteps[i], x, eta=eta, generator=torch.Generator().manual_seed(i)).prev_sample
            eta.add_(0.3)
        return x

    alike(DDIMScheduler, SD, run)


@pytest.mark.parametrize("limit", (0.0, 1e5))
@pytest.mark.parametrize("cls", (DDIMScheduler, DDPMScheduler, LCMScheduler, HeunDiscreteScheduler))
def test_a_limit_that_no_table_holds(cls, limit):
    with pytest.raises(NothingToDo, match=f"clip_sample_range is {limit}"):
        fusewire.swap(cls(clip_sample=True, clip_sample_range=limit))
    fusewire.swap(cls(clip_sample=False, clip_sample_range=limit))


@pytest.mark.filterwarnings("ignore")
def test_compiled_steps_of_pndm():
    def run(scheduler):
        scheduler.set_timesteps(5)
        counter, x = CompileCounterWithBackend("eager"), X
        step = torch.compile(lambda output, timestep, x: scheduler.step(output, timestep, x, return_dict=False)[0], backend=counter)
        for output, timestep in zip(OUTPUTS, scheduler.timesteps):
            x = step(output, timestep, x)
        assert not any("solver_step" in str(node.target) for graph in counter.graphs for node in graph.graph.nodes)  # what compiles is stock's step
        return x

    alike(PNDMScheduler, SD | dict(skip_prk_steps=True), run, fused=None)


def test_a_shallow_copy_has_swaps_of_its_own():
    scheduler = DDIMScheduler()
    first = fusewire.swap(scheduler)
    other = copy.copy(scheduler)
    second = fusewire.swap(other, numerics="close")
    first.restore()
    assert type(scheduler) is DDIMScheduler and other.fusewire_how.numerics == "close"
    second.restore()
    assert other.fusewire_how.numerics == "exact"


def test_a_scheduler_that_its_pipeline_replaced_is_restored():
    from tests.tiny import tiny_pipeline

    pipe = tiny_pipeline()
    with fusewire.swapped(pipe):
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler and not any(key.startswith("_fusewire_in_force") for key in vars(pipe.scheduler))


def test_a_flow_scales_nothing():
    """Bria's pipeline asks every scheduler whose class is not the stock one to scale the model's input."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    with fusewire.swapped(scheduler):
        assert scheduler.scale_model_input(X, 3) is X
    assert not hasattr(scheduler, "scale_model_input")


@pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
def test_a_run_begun_again_is_fused_from_its_second_step_on():
    scheduler = UniPCMultistepScheduler(**SD)
    with fusewire.swapped(scheduler):
        scheduler.set_timesteps(6)
        stepped(scheduler, range(3))
        scheduler._step_index = None
        stepped(scheduler, [0, 1])
        before = fused_steps()
        stepped(scheduler, [2])
        assert fused_steps() > before


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_tables_while_another_dtype_is_the_default(dtype):
    """PNDM's first steps weigh by sixths and thirds, which are none in 16 bits."""
    def steps(scheduler) -> list[torch.Tensor]:
        torch.set_default_dtype(dtype)
        try:
            scheduler.set_timesteps(6)
            x, seen = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32), []
            for t in scheduler.timesteps:
                seen.append(x := scheduler.step(torch.tanh(x), t, x).prev_sample)
            return seen
        finally:
            torch.set_default_dtype(torch.float32)

    scheduler = PNDMScheduler()
    want = steps(scheduler)
    with fusewire.swapped(scheduler):
        ops.reset_stats()
        assert all(map(torch.equal, steps(scheduler), want)) and fused_steps()
