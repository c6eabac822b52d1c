"""torch.export of swapped models, with sizes that may change: what was swapped is in the graph, and no size becomes a limit of ours."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

import fusewire
from fusewire import ops
from fusewire.kernels.library import CPU
from tests.models.stock_text import stock_model

LAST = torch.channels_last
both = pytest.mark.parametrize("numerics", ("exact", "close"))


@both
@pytest.mark.parametrize("strict", (True, False))
@torch.no_grad()
def test_a_group_norm_of_any_height(strict, numerics):
    block = ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=None, groups=4).eval().to(memory_format=LAST)
    fusewire.swap(block, numerics)
    x, other = (torch.randn(2, 8, height, 40).to(memory_format=LAST) for height in (40, 16))
    program = export(block, (x, None), dynamic_shapes=({2: Dim("h", min=8, max=128)}, None), strict=strict)
    assert any(str(node.target).startswith("fusewire.group_norm_silu") for node in program.graph.nodes) or not CPU.loaded
    program = program.module()
    for given in (x, other):
        got, want = program(given, None), block(given, None)
        assert torch.equal(got, want) if numerics == "exact" else (got - want).abs().max() < 1e-4


@pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
@pytest.mark.parametrize("strict", (True, False))
@torch.no_grad()
def test_linears_of_any_number_of_tokens(strict):
    """By default torch.export hands out stand-ins of Parameters: the linears are ours in the graph too."""
    model = stock_model("T5 gated-gelu", d_model=256, d_ff=512).eval()
    fusewire.swap(model, "close")

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, embeds):
            return self.model(inputs_embeds=embeds)[0]

    x, other = torch.randn(2, 77, 256), torch.randn(2, 20, 256)
    program = export(Hidden(), (x,), dynamic_shapes=({1: Dim("t", min=2, max=512)},), strict=strict)
    names = {str(node.target) for node in program.graph.nodes}
    assert any(name.startswith(("fusewire.linear", "fusewire.bias_activation", "fusewire.gated_mlp", "fusewire.geglu")) for name in names), names
    for given in (x, other):
        assert (program.module()(given) - Hidden()(given)).abs().max() < 1e-4


@both
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("inputs", (512, 1024))
@torch.no_grad()
def test_a_linear_is_compiled_once_for_all_lengths(inputs, dtype, numerics):
    weight, bias = torch.randn(256, inputs).to(dtype), torch.randn(256).to(dtype)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x: ops.linear(x, weight, bias, activation="gelu_tanh", numerics=numerics), backend=counter, dynamic=True)
    for tokens in (77, 333, 20, 154, 30, 64):
        compiled(torch.randn(2, tokens, inputs).to(dtype))
    torch._dynamo.reset()
    assert counter.frame_count == 1
    ours = any(str(node.target).startswith("fusewire") for node in counter.graphs[0].graph.nodes)
    assert ours == (numerics == "close" and CPU.loaded)
