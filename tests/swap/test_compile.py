"""torch.compile of a swapped transformer: no graph break. A swapped U-Net on the meta device."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch._dynamo.testing import CompileCounterWithBackend

import fusewire
from tests.models import stock_unet
from tests.models.stock_sd3 import VARIANTS
from tests.swap.tiny import inputs, run, stock_model
from tests.tolerance import MODEL_FLOAT32, PIPELINE_FLOAT32


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fullgraph(variant, numerics):
    torch._dynamo.reset()
    model = stock_model(variant)
    data = inputs()
    want = run(model, data)
    with fusewire.swapped(model, numerics):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = run(compiled, data)
    assert (got - want).abs().max() <= MODEL_FLOAT32
    torch._dynamo.reset()


def test_inductor_and_a_swap_under_a_compiled_model():
    torch._dynamo.reset()
    model = stock_model("sd3", num_layers=1)
    data = inputs()
    want = run(model, data)
    compiled = torch.compile(model, fullgraph=True)
    assert (run(compiled, data) - want).abs().max() <= PIPELINE_FLOAT32
    with fusewire.swapped(compiled):  # found inside the wrapper
        assert (run(compiled, data) - want).abs().max() <= PIPELINE_FLOAT32
    assert torch.equal(run(model, data), want)
    torch._dynamo.reset()


def test_inductor_of_a_block_with_two_attentions_in_close():
    torch._dynamo.reset()
    model = stock_model("sd3.5", num_layers=1)
    data = inputs()
    want = run(model, data)
    with fusewire.swapped(model, "close"):
        eager = run(model, data)
        got = run(torch.compile(model, fullgraph=True), data)
    assert (got - want).abs().max() <= PIPELINE_FLOAT32 and (got - eager).abs().max() <= PIPELINE_FLOAT32 and not torch.equal(eager, want)
    torch._dynamo.reset()


def test_repeated_blocks():
    torch._dynamo.reset()
    model = stock_model("sd3")
    model._repeated_blocks = ["JointTransformerBlock"]
    data = inputs()
    want = run(model, data)
    with fusewire.swapped(model):
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        assert all(block._compiled_call_impl is not None for block in model.transformer_blocks)
        assert (run(model, data) - want).abs().max() <= MODEL_FLOAT32
    torch._dynamo.reset()


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("variant", ["sd", "sdxl"])
def test_shapes_on_the_meta_device(variant, numerics):
    """PyTorch refuses to tell whether autocast is on there."""
    stock, data = stock_unet.unet(variant), stock_unet.unet_inputs(variant)
    handle = fusewire.swap(stock, numerics)
    assert handle.report.swapped
    data = {name: {key: one.to("meta") for key, one in value.items()} if isinstance(value, dict) else value.to("meta") for name, value in data.items()}
    out = stock.to("meta")(**data, return_dict=False)[0]
    assert out.is_meta and out.shape == data["sample"].shape


@pytest.mark.parametrize("recorded", [False, True])
def test_jit_trace(recorded):
    """torch.jit.trace compares two graphs, the second made without gradients."""
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=16, groups=4).eval()
    data = torch.randn(2, 8, 6, 6), torch.randn(2, 16)
    want = block(*data)
    want.sum().backward()
    gradient = block.conv1.weight.grad
    block.zero_grad()
    with fusewire.swapped(block), torch.set_grad_enabled(recorded):
        traced = torch.jit.trace(block, data)
        assert any("group_norm_silu" in node.kind() for node in traced.inlined_graph.nodes())
        assert torch.equal(traced(*data), want)
    if recorded:
        traced(*data).sum().backward()
        assert torch.allclose(block.conv1.weight.grad, gradient, rtol=0, atol=1e-5)


@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_frozen_weights(numerics):
    """inductor's freezing copies each module by ``cls.__new__(cls)``."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=16, groups=4).eval()
    x, time = torch.randn(2, 8, 6, 6), torch.randn(2, 16)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        want = block(x, time)
        fusewire.swap(block, numerics)
        got = torch.compile(block, fullgraph=True)(x, time)
    assert (got - want).abs().max() <= PIPELINE_FLOAT32
    torch._dynamo.reset()


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("cls", [FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_a_step_in_one_graph(cls, numerics):
    torch._dynamo.reset()
    scheduler, x = cls(), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def first(run):
        scheduler.set_timesteps(5)
        scheduler.set_begin_index(0)
        return run(torch.tanh(x), scheduler.timesteps[0], x, return_dict=False)[0]

    want = first(scheduler.step)
    with fusewire.swapped(scheduler, numerics):
        assert (first(torch.compile(scheduler.step, fullgraph=True, backend="aot_eager")) - want).abs().max() <= PIPELINE_FLOAT32
    torch._dynamo.reset()


@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_a_number_of_tokens_that_only_the_call_tells(numerics):
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = BasicTransformerBlock(32, 2, 16, activation_fn="gelu-approximate").eval()
    with torch.no_grad():
        outputs = []
        for numerics_of_run in (None, numerics):
            if numerics_of_run:
                fusewire.swap(block, numerics)
            counter = CompileCounterWithBackend("aot_eager")
            compiled = torch.compile(block.ff, fullgraph=True, backend=counter)
            for tokens in (70, 9):
                x = torch.randn(2, tokens, 32, generator=torch.Generator().manual_seed(tokens))
                torch._dynamo.decorators.mark_unbacked(x, 1)
                outputs.append(compiled(x))
            torch._dynamo.reset()
            ours = any("fusewire" in str(node.target) for graph in counter.graphs for node in graph.graph.nodes)
            assert ours == (numerics_of_run == "close")
    for got, want in zip(outputs[2:], outputs[:2]):
        assert (got - want).abs().max() <= MODEL_FLOAT32
