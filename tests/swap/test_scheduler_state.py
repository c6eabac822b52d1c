"""What a swapped scheduler keeps between steps, and what changes under it: tables, levels, modes, copies, restores, and what is left to stock."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle

import pytest
import torch
from diffusers import (DDIMScheduler, DDPMScheduler, EDMEulerScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler,
                       FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler, LMSDiscreteScheduler,
                       PNDMScheduler)

import fusewire
from fusewire import ops
from fusewire.swap.schedulers.common import KNOWN
from tests.swap.trajectories import DTYPES, EDMDPM, ONE_EACH, PNDM, SD, each_scheduler, equal, fused_steps, same, scaled, trajectory


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
