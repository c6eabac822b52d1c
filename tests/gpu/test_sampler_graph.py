"""Whole sampling loops on a GPU: one CUDA graph holds every call of the model and every step, and gives the bits of the loop launched step by step."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CUDA
from fusewire.models.samplers import Conditioning, prepare, prepare_flow, sample, sample_flow_euler
from tests.loops import FLOW, PLANS, conditioning, guided, tiny_mmdit, tiny_unet
from tests.tolerance import assert_exact

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
numeric = pytest.mark.parametrize("numerics", ["exact", "close"])
SHAPE = (2, 4, 8, 8)


@contextmanager
def no_synchronisation():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def captured(loop) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """The graph of ``loop()`` and where its result will lie; called twice on another stream before, so that kernels are built and libraries awake."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loop()
        loop()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), no_synchronisation():
        out = loop()
    return graph, out


def check(loop, *given: torch.Tensor) -> None:
    """The captured loop against the launched one, for two sets of numbers in ``given``, which the loop reads."""
    graph, out = captured(loop)
    seen = []
    for seed in (1, 2):
        generator = torch.Generator("cuda").manual_seed(seed)
        for tensor in given:
            tensor.normal_(generator=generator)
        with no_synchronisation():
            graph.replay()
            replayed, want = out.clone(), loop()
        assert want.isfinite().all()
        assert_exact(replayed, want)
        seen.append(want)
    assert not torch.equal(*seen)


def latents(dtype, *more: int) -> torch.Tensor:
    return torch.zeros(*more, *SHAPE, device="cuda", dtype=dtype)


@pytest.mark.parametrize("skip_layers", [None, (1,)], ids=str)
@numeric
@dtypes
@torch.no_grad()
def test_graph_capture_of_a_flow(dtype, numerics, skip_layers):
    """An MMDiT with guidance, and with skip-layer guidance."""
    mmdit, positive = tiny_mmdit(numerics).to("cuda", dtype), conditioning(2, dtype, "cuda")
    negative, steps, x = Conditioning(*(-one for one in positive)), prepare_flow(FLOW, "cuda", 4.0), latents(dtype)
    options = dict(skip_layers=skip_layers, skip_stop=0.5, numerics=numerics)
    check(lambda: sample_flow_euler(mmdit, x, steps, positive, negative, **options), x)


@pytest.mark.parametrize("name", ["ddim", "euler ancestral", "heun churn", "dpmpp_2m sde", "lms"])
@numeric
@dtypes
@torch.no_grad()
def test_graph_capture_of_a_unet(name, dtype, numerics):
    unet, steps = tiny_unet(numerics).to("cuda", dtype), prepare(PLANS[name], "cuda", 3.0)
    states = conditioning(2, dtype, "cuda").encoder_hidden_states
    model, x, noise = guided(unet, torch.cat([-states, states])), latents(dtype), latents(dtype, len(steps.times))
    check(lambda: sample(model, x, steps, noise=lambda i: noise[i], numerics=numerics), x, noise)


@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA.loaded, reason=CUDA.reason or "-"))])
@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_graph_capture_of_every_solver(name, backend):
    """On the kernels of either backend, with an analytic model in float16."""
    steps, x = prepare(PLANS[name], "cuda", 3.0), latents(torch.float16)
    noise = latents(torch.float16, len(steps.times))

    def loop():
        with forced(backend):
            return sample(lambda x, time: torch.cat([0.3 * torch.sin(x), 0.5 * torch.tanh(x + time / 1000)]), x, steps, noise=lambda i: noise[i])

    check(loop, x, noise)


@torch.no_grad()
def test_graph_capture_of_one_step():
    """Replayed once a step: timestep and scalars are taken by a counter on the device, which the graph itself moves on."""
    mmdit, positive, steps = tiny_mmdit().to("cuda"), conditioning(2, torch.float32, "cuda"), prepare_flow(FLOW, "cuda")
    x, counter = latents(torch.float32), torch.zeros((), dtype=torch.int64, device="cuda")

    def step():
        v = mmdit(x, *positive, steps.timesteps.index_select(0, counter.view(1)).expand(len(x)))
        x.copy_(ops.sampler_step(x, v, steps.table, counter))
        counter.add_(1)
        return x

    graph, _ = captured(step)
    for seed in (1, 2):
        start = torch.randn(SHAPE, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        x.copy_(start)
        counter.zero_()
        with no_synchronisation():
            for _ in range(len(steps.timesteps)):
                graph.replay()
        assert_exact(x, sample_flow_euler(mmdit, start, steps, positive))


@torch.no_grad()
def test_graph_capture_with_noise_that_nobody_supplies():
    """Each replay draws from PyTorch's generator as the launched loop does."""
    steps, x = prepare(PLANS["ddpm"], "cuda"), torch.randn(SHAPE, device="cuda")

    def loop():
        return sample(lambda x, time: 0.5 * torch.tanh(x), x, steps)

    graph, out = captured(loop)
    torch.cuda.manual_seed(5)
    want = [loop() for _ in range(2)]
    torch.cuda.manual_seed(5)
    for one in want:
        graph.replay()
        assert_exact(out, one)
    assert not torch.equal(*want)
