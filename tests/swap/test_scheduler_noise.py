"""``add_noise`` of the swapped schedulers: stock's bits; and whole runs in which, after the first step, nothing is copied to the device or asked of it."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMInverseScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusewire
from fusewire import ops
from fusewire.swap.schedulers import common
from tests.swap.trajectories import DPM, ONE_EACH, SDE, seldom

CASES = [*(case for case in ONE_EACH if case[0] is not DDIMInverseScheduler), (DPM, SDE, {}), (FlowMatchEulerDiscreteScheduler, dict(shift=3.0), {})]
IDS = [f"{cls.__name__} {'sde' if config is SDE else ''}" for cls, config, _ in CASES]
each_scheduler = pytest.mark.parametrize("cls, config, options", seldom(CASES, IDS))
SHAPE = (2, 4, 6, 5)


class Copied(Exception):
    pass


class Watch(TorchDispatchMode):
    """``meta`` stands for a GPU: an op with tensors on both sides copies. (A single number on the CPU is handed to a kernel as it is.)"""

    armed = False
    fused = 0  # steps

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        host = [t for t in tensors if not t.is_meta and (t.dim() or "copy" in name)]
        if self.armed and host and len({t.is_meta for t in tensors}) == 2:
            raise Copied(name)
        return out


def solved() -> int:
    return sum(sum(ops.stats()[name].values()) for name in ("solver_step", "flow_euler_step"))


def noised(scheduler, picture, noise, timesteps):
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(picture, timesteps, noise)
    return scheduler.add_noise(picture, noise, timesteps)


def run(scheduler, kind: str, begin: bool, device: str, dtype=torch.float32, options={}, watch=Watch()) -> list[torch.Tensor]:
    """What a pipeline does: latents after each step, blended with the noised picture for inpainting."""
    draw = torch.Generator().manual_seed(3)

    def randn():
        return torch.randn(SHAPE, generator=draw).to(device, dtype)

    scheduler.set_timesteps(7)
    order = getattr(scheduler, "order", 1)
    timesteps = scheduler.timesteps[0 if kind == "text" else 2 * order:]
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0 if kind == "text" else 2 * order)
    picture, noise, mask = randn(), randn(), (randn() > 0).to(dtype)
    x, seen = noise, []
    if kind == "img2img":  # (of inpainting too, but at strength 1; there DDIM's tables come to the device after the first step)
        x = noised(scheduler, picture, noise, timesteps[:1])
    torch.manual_seed(4)
    for i, t in enumerate(timesteps):
        watch.armed = i > 0
        with watch:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            before = solved()
            x = scheduler.step(torch.tanh(x) * 0.7, t, x, return_dict=False, **options)[0]
            watch.fused += solved() > before
            if kind == "inpainting":
                known = noised(scheduler, picture, noise, torch.tensor([timesteps[i + 1]])) if i < len(timesteps) - 1 else picture
                x = (1 - mask) * known + mask * x
        seen.append(x)
    return seen


@pytest.mark.parametrize("begin", [True, False], ids=["begin_index", "looked up"])
@pytest.mark.parametrize("kind", ["text", "img2img", "inpainting"])
@each_scheduler
def test_nothing_is_copied_to_the_device(cls, config, options, kind, begin, monkeypatch):
    """But a second table, once (of steps of order two; where stock has moved what the first was made from): from pinned memory, which nobody waits for."""
    scheduler, watch, uploads, uploaded = cls(**config), Watch(), [], common.uploaded

    def unwatched(table, device):
        armed, watch.armed = watch.armed, False
        uploads.append(table)
        try:
            return uploaded(table, device)
        finally:
            watch.armed = armed

    monkeypatch.setattr(common, "uploaded", unwatched)
    with fusewire.swapped(scheduler):
        seen = run(scheduler, kind, begin, "meta", options=options, watch=watch)
        assert len(uploads) <= 2 and all(x.is_meta for x in seen) and watch.fused == len(seen)


@each_scheduler
def test_stock_copies_after_every_step(cls, config, options):
    """That the test above can fail."""
    if cls is FlowMatchHeunDiscreteScheduler:
        pytest.skip("its levels lie on the device: it waits for them instead")
    with pytest.raises((Copied, RuntimeError, NotImplementedError)):
        run(cls(**config), "inpainting", True, "meta", options=options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("begin", [True, False], ids=["begin_index", "looked up"])
@pytest.mark.parametrize("kind", ["img2img", "inpainting"])
@each_scheduler
def test_bits_are_stock(cls, config, options, kind, begin, dtype):
    want, scheduler = run(cls(**config), kind, begin, "cpu", dtype, options), cls(**config)
    with fusewire.swapped(scheduler):
        got = run(scheduler, kind, begin, "cpu", dtype, options)
    assert all(map(torch.equal, got, want)) and all(x.isfinite().all() for x in want)


@each_scheduler
def test_other_arguments_are_stock(cls, config, options):
    """Several timesteps, timesteps that are not in the schedule, levels that were changed."""
    def outcome(scheduler, timesteps, change):
        scheduler.set_timesteps(7)
        if change and hasattr(scheduler, "sigmas"):
            noised(scheduler, x, y, scheduler.timesteps[1:2])
            scheduler.sigmas[:] = scheduler.sigmas * 0.5
        try:
            return noised(scheduler, x, y, timesteps(scheduler))
        except (IndexError, RuntimeError, ValueError) as error:
            return str(error)

    x, y = torch.randn(2, *SHAPE)
    for timesteps in (lambda s: s.timesteps[[1, 3]], lambda s: s.timesteps[3:4], lambda s: torch.tensor([5000]), lambda s: s.timesteps[3:4].double()):
        for change in (False, True):
            want, scheduler = outcome(cls(**config), timesteps, change), cls(**config)
            with fusewire.swapped(scheduler):
                got = outcome(scheduler, timesteps, change)
            assert type(got) is type(want) and (got == want if isinstance(want, str) else torch.equal(got, want))
