"""Whole sampling loops, from the first call of the model on: nothing waits for the device, and nothing is copied to or from it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusewire import ops
from fusewire.models.samplers import Conditioning, prepare, prepare_flow, sample, sample_flow_euler
from tests.loops import FLOW, PLANS, conditioning, guided, tiny_mmdit, tiny_unet

each_plan = pytest.mark.parametrize("name", PLANS)
WAITS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim")


class Waited(Exception):
    pass


class Made(TorchFunctionMode):
    """Raises where a tensor is made of numbers: on a GPU they would be copied there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor) and not isinstance(args[-1], torch.Tensor):
            raise Waited(f"{function.__name__} of numbers")
        return function(*args, **(kwargs or {}))


class Watch(TorchDispatchMode):
    """Raises where an op asks for a value, and, while tensors live on ``meta`` in the place of a GPU, where one takes or makes a tensor on the CPU.

    Whatever lies on the CPU then was made on the host, within the loop or before it: on a GPU a copy of it would follow.
    """

    def __init__(self, device: str, armed: bool = True):
        super().__init__()
        self.device, self.armed, self.calls = device, armed, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if self.armed:
            self.calls += 1
            name = function._schema.name.partition("::")[2]
            by_mask = name.startswith("index") and any(t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor))
            if name in WAITS or by_mask:
                raise Waited(name)
            for tensor in tree_leaves((args, kwargs, out)):
                if isinstance(tensor, torch.Tensor) and tensor.device.type != self.device:
                    raise Waited(f"{name} with a tensor on {tensor.device}")
        return out


@pytest.mark.parametrize("device, call, message", [
    ("cpu", lambda x: x.sum().item(), "_local_scalar_dense"), ("cpu", lambda x: bool(x.sum() > 0), "is_nonzero|_local_scalar_dense"),
    ("cpu", lambda x: x.nonzero(), "nonzero"), ("cpu", lambda x: x[x > 0], "index"), ("cpu", lambda x: torch.equal(x, x), "equal"),
    ("meta", lambda x: x * torch.ones(()), "a tensor on cpu"), ("meta", lambda x: torch.ones(3).to("meta"), "a tensor on cpu"),
    ("meta", lambda x: x.copy_(torch.ones(3, device="cpu")), "a tensor on cpu"),
    ("meta", lambda x: torch.as_tensor(2.0, device="meta"), "as_tensor of numbers"),
    ("meta", lambda x: x.new_tensor([2.0]), "new_tensor of numbers"),
])
def test_what_is_watched(device, call, message):
    x = torch.ones(3, device=device)
    with pytest.raises(Waited, match=message), Watch(device), Made():
        call(x)


def loop(device: str, ready: bool, name: str, watch, dtype=torch.float32) -> torch.Tensor:
    """``sample`` with a tiny U-Net and guidance, armed from its beginning where the plan is ``ready``, otherwise from the first call of the model."""
    unet, text = tiny_unet().to(device, dtype), torch.cat([conditioning(2, dtype, device)[0], conditioning(2, dtype, device)[0] + 1])
    plan, draw = PLANS[name], torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 8, 8, generator=draw).to(device, dtype)
    noise = torch.randn(len(plan.times), 2, 4, 8, 8, generator=draw).to(device, dtype)
    steps = prepare(plan, device, 3.0) if ready else plan
    run = guided(unet, text)
    if watch is None:
        return sample(run, x, steps, noise=lambda i: noise[i], **{} if ready else {"guidance_scale": 3.0})
    watch.armed = ready

    def model(x, time):
        watch.armed = True
        return run(x, time)

    with watch, Made() if ready else nullcontext():
        out = sample(model, x, steps, noise=lambda i: noise[i], **{} if ready else {"guidance_scale": 3.0})
    assert watch.calls > 100 and out.device.type == device
    return out


@each_plan
def test_nothing_is_asked_of_the_device(name):
    """On the CPU, with its kernels; prepared or not, the same bits."""
    want = loop("cpu", False, name, None)
    assert want.isfinite().all()
    assert torch.equal(loop("cpu", True, name, Watch("cpu")), want) and torch.equal(loop("cpu", False, name, Watch("cpu")), want)


@pytest.mark.parametrize("ready", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["prepared", "plan"])  # which are prepared first
@each_plan
def test_nothing_is_copied_to_the_device(name, ready):
    loop("meta", ready, name, Watch("meta"))


def flow_loop(device: str, ready: bool, skip_layers, guidance_scale: float, watch) -> torch.Tensor:
    mmdit, positive = tiny_mmdit().to(device), conditioning(2, torch.float32, device)
    negative = Conditioning(*(-one for one in positive))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)).to(device)
    steps, given = (prepare_flow(FLOW, device, guidance_scale), {}) if ready else (FLOW, {"guidance_scale": guidance_scale})
    if watch is None:
        return sample_flow_euler(mmdit, x, steps, positive, negative, skip_layers=skip_layers, skip_stop=0.5, **given)
    watch.armed = ready

    def model(*arguments, **options):
        watch.armed = True
        return mmdit(*arguments, **options)

    with watch, Made() if ready else nullcontext():
        out = sample_flow_euler(model, x, steps, positive, negative, skip_layers=skip_layers, skip_stop=0.5, **given)
    assert watch.calls > 100
    return out


@pytest.mark.parametrize("skip_layers, guidance_scale", [(None, 1.0), (None, 4.0), ((1,), 4.0)], ids=str)
def test_flow_euler(skip_layers, guidance_scale):
    want = flow_loop("cpu", False, skip_layers, guidance_scale, None)
    assert want.isfinite().all()
    for ready in (True, False):
        assert torch.equal(flow_loop("cpu", ready, skip_layers, guidance_scale, Watch("cpu")), want)
        flow_loop("meta", ready, skip_layers, guidance_scale, Watch("meta"))


def test_noise_that_nobody_supplies():
    steps = prepare(PLANS["dpmpp_2m sde"], "meta")
    with Watch("meta") as watch, Made():
        sample(lambda x, time: x * time, torch.empty(2, 3, device="meta"), steps)
    assert watch.calls


def test_one_step_with_the_row_counted_on_the_device():
    """What a graph of one step holds: timestep and scalars by a counter that the step itself moves on; the loop's bits."""
    mmdit, positive = tiny_mmdit(), conditioning(2, torch.float32, "cpu")
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    want = sample_flow_euler(mmdit, start, FLOW, positive)
    steps, x, counter = prepare_flow(FLOW, "cpu"), start.clone(), torch.zeros((), dtype=torch.int64)
    with Watch("cpu"), Made():
        for _ in range(len(steps.timesteps)):
            v = mmdit(x, *positive, steps.timesteps.index_select(0, counter.view(1)).expand(2))
            x.copy_(ops.sampler_step(x, v, steps.table, counter))
            counter.add_(1)
    assert torch.equal(x, want)


@pytest.mark.parametrize("call", [
    lambda x: sample(lambda x, time: x, x, prepare(PLANS["ddim"], "cpu", 2.0), guidance_scale=2.0),
    lambda x: sample_flow_euler(lambda x, *more: x, x, prepare_flow(FLOW, "cpu", 2.0), Conditioning(x, x), Conditioning(x, x), guidance_scale=2.0),
])
def test_guidance_comes_once(call):
    with pytest.raises(ValueError, match="^guidance_scale is 2.0; what was prepared has its own"):
        call(torch.ones(1, 1, 2, 2))
