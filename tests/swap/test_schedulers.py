"""The swapped schedulers but flow matching's Euler: stock's bits, noise and errors, and nothing asked of the device."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
from typing import NamedTuple

import pytest
import torch
from diffusers import (DDIMScheduler, DDPMScheduler, DEISMultistepScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler,
                       EDMDPMSolverMultistepScheduler, EDMEulerScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler,
                       FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler, LMSDiscreteScheduler,
                       PNDMScheduler, UniPCMultistepScheduler)

import fusewire
from fusewire import ops
from fusewire.swap.schedulers.common import KNOWN

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
NO_CLIP = dict(SD, clip_sample=False)
V, X0 = dict(prediction_type="v_prediction"), dict(prediction_type="sample")
DPM, SINGLE, EDMDPM = DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, EDMDPMSolverMultistepScheduler
SDE = dict(SD, algorithm_type="sde-dpmsolver++")
CHURN, SOME_CHURN = dict(s_churn=2.0), dict(s_churn=40.0, s_tmin=0.3, s_tmax=5.0, s_noise=1.1)
PNDM = dict(SD, skip_prk_steps=True, steps_offset=1)  # as Stable Diffusion's repositories have it
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
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
]
IDS = [f"{cls.__name__.removesuffix('Scheduler')} {config} {options}".replace(str(SD)[1:-1], "SD") for cls, config, options in CONFIGS]
ONE_EACH = [next(case for case in CONFIGS if case[0] is cls) for cls in dict.fromkeys(cls for cls, *_ in CONFIGS)]
# Of these the runs with noise and in pipelines are left out of the default run: what differs from the others' is in the tests below.
SELDOM = (LMSDiscreteScheduler, FlowMatchHeunDiscreteScheduler, EDMEulerScheduler, EDMDPM, SINGLE, DEISMultistepScheduler, UniPCMultistepScheduler)
each_scheduler = pytest.mark.parametrize("cls, config, options", ONE_EACH, ids=[cls.__name__ for cls, *_ in ONE_EACH])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def seldom(cases: list[tuple], ids: list[str], *more: type) -> list:
    return [pytest.param(*case, id=name, marks=pytest.mark.slow if case[0] in (*SELDOM, *more) else ()) for case, name in zip(cases, ids)]


def fused_steps() -> int:
    return sum(ops.stats()["solver_step"].values())


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


@pytest.mark.parametrize("cls, config, options", [*ONE_EACH, (FlowMatchEulerDiscreteScheduler, {}, {})],
                         ids=[cls.__name__ for cls, *_ in ONE_EACH] + ["FlowMatchEuler"])
def test_results_lie_as_stocks_do(cls, config, options):
    """A model rounds channels-last latents, which an autoencoder may give to img2img, otherwise than contiguous ones: of the model's outputs alike."""
    def run(scheduler, last_of_x: bool, last_of_output: bool) -> list[tuple]:
        scheduler.set_timesteps(6)
        torch.manual_seed(0)
        x, seen = laid(torch.randn(2, 4, 6, 5), last_of_x), []
        for i, timestep in enumerate(scheduler.timesteps[:4]):
            x = scaled(scheduler, x, timestep)
            found = scheduler.step(laid(torch.randn(2, 4, 6, 5), last_of_output), timestep, x, return_dict=i % 2 == 0, **options)
            found = found if isinstance(found, tuple) else tuple(found.values())
            seen += [(one.stride(), one) for one in found if isinstance(one, torch.Tensor)]
            x = found[0]
        return seen

    def laid(x, last: bool):
        return x.to(memory_format=torch.channels_last) if last else x

    for layouts in ((True, False), (False, True), (True, True)):
        want, scheduler = run(cls(**config), *layouts), cls(**config)
        with fusewire.swapped(scheduler):
            ops.reset_stats()
            got = run(scheduler, *layouts)
            assert fused_steps() or sum(ops.stats()["flow_euler_step"].values())
        assert [strides for strides, _ in got] == [strides for strides, _ in want] and all(equal(a, b) for (_, a), (_, b) in zip(got, want))


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
def test_other_defaults(cls, config, options):
    """Tables that are made while another dtype or device is the default one are what they always are."""
    scheduler, fused = cls(**config), cls(**config)
    draw, noise = torch.Generator().manual_seed(1), dict(generator=None) if "generator" in inspect.signature(cls.step).parameters else {}
    x, output = torch.randn(1, 4, 3, 2, generator=draw), torch.randn(1, 4, 3, 2, generator=draw)

    def steps(scheduler, context) -> list[torch.Tensor]:
        scheduler.set_timesteps(5)
        torch.manual_seed(0)
        with context():
            scaled(scheduler, x, scheduler.timesteps[0])
            first = scheduler.step(output, scheduler.timesteps[0], x, return_dict=False, **noise, **options)[0]
        return [first, scheduler.step(output, scheduler.timesteps[1], first.float(), return_dict=False, **noise, **options)[0]]

    for context in (float64_by_default, lambda: torch.device("meta")):
        if context is not float64_by_default and cls in (DDPMScheduler, EDMDPM):
            continue  # stock itself needs the CPU to be the default
        want = steps(scheduler, context)
        with fusewire.swapped(fused):
            ops.reset_stats()
            assert all(map(equal, steps(fused, context), want)) and fused_steps()


@contextlib.contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("cls", [DDIMScheduler, LCMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, EDMEulerScheduler,
                                 FlowMatchEulerDiscreteScheduler])
def test_a_table_of_inference_mode_serves_a_graph(cls):
    scheduler, x = cls(), torch.randn(1, 4, 3, 2)
    with fusewire.swapped(scheduler):
        scheduler.set_timesteps(5)
        with torch.inference_mode():
            scheduler.step(x, scheduler.timesteps[0], x)
        leaf = x.clone().requires_grad_()
        scheduler.step(leaf, scheduler.timesteps[1], x).prev_sample.sum().backward()
        assert leaf.grad.isfinite().all() and leaf.grad.any()


def test_levels_that_change_between_heuns_stages():
    def run(scheduler):
        scheduler.set_timesteps(5)
        first = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
        scheduler.sigmas = scheduler.sigmas * 1.5
        return scheduler.step(x, scheduler.timesteps[1], first).prev_sample

    x, scheduler = torch.randn(1, 4, 3, 2), HeunDiscreteScheduler(**SD)
    want = run(scheduler)
    with fusewire.swapped(scheduler):
        assert torch.equal(run(scheduler), want)


@pytest.mark.parametrize("cls, config, name", [(DDIMScheduler, {}, "final_alpha_cumprod"), (PNDMScheduler, dict(skip_prk_steps=True), "final_alpha_cumprod"),
                                               (DDPMScheduler, {}, "one")])
def test_an_end_that_is_set_by_hand(cls, config, name):
    def run(scheduler):
        scheduler.set_timesteps(3)
        setattr(scheduler, name, end)
        steps = [scheduler.step(x, timestep, x, return_dict=False)[0] for timestep in scheduler.timesteps[:2]]
        setattr(scheduler, name, end - 5e-5)
        return [*steps, scheduler.step(x, scheduler.timesteps[2], x, return_dict=False)[0]]

    x, scheduler, end = torch.randn(1, 4, 3, 2), cls(**config), torch.tensor(1.0)
    torch.manual_seed(0)
    want = run(scheduler)
    with fusewire.swapped(scheduler):
        torch.manual_seed(0)
        assert all(map(torch.equal, run(scheduler), want))


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
    (EulerAncestralDiscreteScheduler, X0, "prediction_type is 'sample'"), (PNDMScheduler, V, "prediction_type is 'v_prediction'"),
    (UniPCMultistepScheduler, dict(solver_order=3), "solver_order is 3"), (UniPCMultistepScheduler, dict(predict_x0=False), "predict_x0 is False"),
    (UniPCMultistepScheduler, dict(solver_p=DDIMScheduler()), "solver_p is a DDIMScheduler"),
    (DEISMultistepScheduler, dict(solver_order=3), "solver_order is 3"),
    (SINGLE, dict(solver_order=3, solver_type="heun"), "solver_order is 3 with solver_type 'heun'"), (EDMDPM, dict(thresholding=True), "quantile"),
])
def test_refused_with_a_reason(cls, config, reason):
    with pytest.raises(ValueError, match=reason):
        fusewire.swap(cls(**config))


@each_scheduler
def test_what_the_op_does_not_serve_is_stock(cls, config, options):
    """Timesteps from elsewhere, float64, latents and predictions of two dtypes; stock's results and stock's errors."""
    def outcome(scheduler, change):
        scheduler.set_timesteps(5)
        timestep, x, output = change(scheduler.timesteps[0], *torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1)))
        torch.manual_seed(4)
        try:
            scaled(scheduler, x, timestep)
            return scheduler.step(output, timestep, x, **{k: v for k, v in options.items()}).prev_sample
        except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            return str(error)

    for change in (lambda t, x, m: (t.clone(), x, m), lambda t, x, m: (t.item(), x, m), lambda t, x, m: (int(t), x, m),
                   lambda t, x, m: (t, x.double(), m.double()), lambda t, x, m: (t, x, m.bfloat16()), lambda t, x, m: (t, x.bfloat16(), m)):
        want, scheduler = outcome(cls(**config), change), cls(**config)
        with fusewire.swapped(scheduler):
            got = outcome(scheduler, change)
        assert type(got) is type(want) and (got == want if isinstance(want, str) else torch.equal(got, want) and got.dtype is want.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("churns, change", [((2.0, 0.0), 1.0), ((0.0, 2.0), 1.0), ((1.0, 3.0), 1.0), ((0.0, 0.0), 0.5)])
def test_second_stage_after_another_first(churns, change, dtype):
    """Heun's method along a flow, churn or levels changed between the stages."""
    def run(scheduler):
        scheduler.set_timesteps(5)
        x, seen = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype), []
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step((x * 0.5).to(dtype), t, x, s_churn=churns[i % 2], generator=torch.Generator().manual_seed(i)).prev_sample
            seen.append(x)
            if i == 2:
                scheduler.sigmas[3:] *= change
        return seen

    scheduler = FlowMatchHeunDiscreteScheduler()
    want = run(FlowMatchHeunDiscreteScheduler())
    with fusewire.swapped(scheduler):
        before = fused_steps()
        assert all(map(torch.equal, run(scheduler), want)) and fused_steps() > before


@pytest.mark.parametrize("cls, config, more", [(EDMEulerScheduler, {}, dict(pred_original_sample=torch.full((2, 4, 6, 5), 0.3))),
                                               (EulerDiscreteScheduler, SD, dict(s_churn=-1.0)), (EDMEulerScheduler, {}, dict(s_churn=-1.0)),
                                               (FlowMatchHeunDiscreteScheduler, {}, dict(s_churn=-1.0)), (LMSDiscreteScheduler, SD, dict(order=5))])
def test_arguments_that_are_left_to_stock(cls, config, more):
    want, scheduler = trajectory(cls(**config), options=more), cls(**config)
    with fusewire.swapped(scheduler):
        got = trajectory(scheduler, options=more)
        assert same(got, want) and got.fused == 0


def test_pndm_beyond_its_times_is_an_error_as_in_stock():
    def message(scheduler):
        scheduler.set_timesteps(5)
        x = torch.ones(1, 4, 4, 4)
        scheduler.step(x, scheduler.timesteps[0], x)
        with pytest.raises(IndexError) as caught:
            scheduler.step(x, scheduler.timesteps[0], x)
        return str(caught.value)

    scheduler, want = PNDMScheduler(**PNDM), message(PNDMScheduler(**PNDM))
    with fusewire.swapped(scheduler):
        assert message(scheduler) == want


@pytest.mark.parametrize("cls", [*dict.fromkeys(cls for cls, *_ in ONE_EACH), FlowMatchEulerDiscreteScheduler])
def test_stock_methods_that_were_never_verified(cls, monkeypatch):
    known = KNOWN[cls]
    assert cls.step in known.verified
    for function in known.verified:
        monkeypatch.setitem(KNOWN, cls, known._replace(verified=known.verified | {function: ("of another source",)}))
        with pytest.raises(ValueError, match=f"{function.__name__} is not one that was verified"):
            fusewire.swap(cls())


@each_scheduler
def test_copies_signatures_and_changed_tables(cls, config, options):
    scheduler = cls(**config)
    want = trajectory(scheduler, options=options)
    fusewire.swap(scheduler)
    assert inspect.signature(scheduler.step) == inspect.signature(cls(**config).step)
    assert inspect.signature(scheduler.set_timesteps) == inspect.signature(cls(**config).set_timesteps)
    assert same(trajectory(scheduler, options=options), want)
    for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert type(twin) is type(scheduler) and same(trajectory(twin, options=options), want)
    changed, plain = (pickle.loads(pickle.dumps(s)) for s in (scheduler, cls(**config)))
    for one in (changed, plain):
        if hasattr(one, "alphas_cumprod"):
            one.alphas_cumprod[:] = one.alphas_cumprod**1.5  # what was computed from it no longer holds
    assert same(trajectory(changed, options=options), trajectory(plain, options=options))


@pytest.mark.parametrize("cls, config, options", [*ONE_EACH, (FlowMatchEulerDiscreteScheduler, {}, {})], ids=lambda v: getattr(v, "__name__", ""))
def test_inference_mode(cls, config, options):
    """Tensors made there have no version; that they were written to is seen nevertheless."""
    def run(scheduler):
        with torch.inference_mode():
            scheduler.set_timesteps(5)
            x = torch.ones(1, 2, 4, 4)
            for i, t in enumerate(scheduler.timesteps[:4]):
                scaled(scheduler, x, t)
                x = scheduler.step(x * 0.5, t, x, return_dict=False)[0]
                if i == 1 and hasattr(scheduler, "sigmas"):
                    scheduler.sigmas[3:] *= 0.5
        return x

    scheduler, plain = cls(**config), cls(**config)
    torch.manual_seed(1)
    want = run(plain)
    with fusewire.swapped(scheduler):
        torch.manual_seed(1)
        assert torch.equal(run(scheduler), want)


@each_scheduler
def test_restored_in_the_middle(cls, config, options):
    """A run may be begun swapped and ended by stock, and the other way round: the state is stock's."""
    want = trajectory(cls(**config), options=options)
    for swap_first in (True, False):
        scheduler, calls = cls(**config), []
        handle = fusewire.swap(scheduler) if swap_first else None

        def change(x):
            calls.append(x)
            if len(calls) == 5:
                handle.restore() if swap_first else fusewire.swap(scheduler)
            return x

        assert same(trajectory(scheduler, options=options, wrap=change), want)
