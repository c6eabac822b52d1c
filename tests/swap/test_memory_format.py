"""In which order pictures lie in memory: what is drawn like them, noise and dropouts, is drawn in that order."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusewire
from fusewire import ops
from fusewire.kernels.library import CPU
from fusewire.models.convolution import convolution
from fusewire.parity import measure


def assert_fused() -> None:
    assert not CPU.loaded or ops.stats()["group_norm_silu"]["cpu"]


both = pytest.mark.parametrize("numerics", ("exact", "close"))


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module


@both
@pytest.mark.parametrize("attention", (True, False))
@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@torch.no_grad()
def test_latents_and_pictures_of_an_autoencoder(dtype, batch, attention, numerics):
    """``torch.randn_like(latents)``, as training scripts draw noise, gives stock's numbers to each place."""
    stock = AutoencoderKL(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                          latent_channels=4, norm_num_groups=8, mid_block_add_attention=attention).eval().to(dtype)
    x = torch.randn(batch, 3, 32, 32).to(dtype)

    def strides(model) -> list[tuple[int, ...]]:
        distribution = model.encode(x).latent_dist
        return [distribution.mean.stride(), torch.randn_like(distribution.mean).stride(), model.decode(distribution.mean).sample.stride()]

    want = strides(stock)
    fusewire.swap(stock, numerics)
    assert strides(stock) == want
    assert_fused()


@both
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_dropout_is_stocks(dtype, numerics):
    block = randomised(ResnetBlock2D(in_channels=64, out_channels=64, temb_channels=None, groups=8, dropout=0.3)).to(dtype).train()
    x = torch.randn(2, 64, 12, 12).to(dtype)

    def masks(block) -> torch.Tensor:
        seen = []
        handle = block.conv2.register_forward_pre_hook(lambda module, args: seen.append(args[0] != 0))
        torch.manual_seed(5)
        with torch.no_grad():
            block(x, None)
        handle.remove()
        return seen[0]

    want = masks(block)
    fusewire.swap(block, numerics)
    assert torch.equal(masks(block), want)
    assert_fused()
    assert 0.2 < (~want).double().mean() < 0.4


@both
def test_a_whole_u_net_with_dropout(numerics):
    """Its attention gives channels-last pictures in stock, in float32 too."""
    model = randomised(UNet2DModel(sample_size=16, in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1, dropout=0.2,
                                   down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8)).train()
    x, time = torch.randn(2, 3, 16, 16), torch.tensor([3, 500])

    def output() -> torch.Tensor:
        torch.manual_seed(5)
        return model(x, time).sample.detach()

    want = output()
    fusewire.swap(model, numerics)
    got = output()
    assert_fused()
    assert torch.equal(got, want) if numerics == "exact" else (got - want).abs().max() < 1e-4 * want.abs().max()


@both
def test_a_reentrant_checkpoint_computes_the_same_dropout(numerics):
    """Its forward runs without gradients, its recomputation with them: other ways to convolve, one mask."""
    block = randomised(ResnetBlock2D(in_channels=64, out_channels=64, temb_channels=None, groups=8, dropout=0.3)).train()
    stock, x = copy.deepcopy(block), torch.randn(2, 64, 12, 12, requires_grad=True)
    fusewire.swap(block, numerics)
    found = []
    for module in (stock, block):
        torch.manual_seed(5)
        checkpoint(module, x, None, use_reentrant=True).square().mean().backward()
        found.append(x.grad)
        x.grad = None
    assert_fused()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


@both
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("last", (False, True))
def test_dropout_where_weights_are_channels_last(last, dtype, numerics):
    """``unet.to(memory_format=torch.channels_last)``, as guides for training have it: stock's pictures go channels-last after the first convolution."""
    block = randomised(ResnetBlock2D(in_channels=16, out_channels=32, temb_channels=None, groups=4, dropout=0.3)).to(dtype).train()
    block.to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, 12, 12).to(dtype).to(memory_format=torch.channels_last if last else torch.contiguous_format)

    def output() -> torch.Tensor:
        torch.manual_seed(5)
        return block(x, None).detach()

    want = output()
    fusewire.swap(block, numerics)
    got = output()
    assert_fused()
    assert got.stride() == want.stride()
    assert torch.equal(got, want) if numerics == "exact" else (got - want).abs().max() <= (1e-4 if dtype is torch.float32 else 2e-2) * want.abs().max()


def test_the_layout_of_any_convolution_in_training():
    """PyTorch's, whichever of picture and weight lies channels-last; 1 x 1 kernels, single channels and pixels, whose strides say little."""
    shapes = [(8, 16, 3, 6, 6), (8, 16, 1, 6, 6), (1, 16, 3, 6, 6), (16, 1, 3, 6, 6), (1, 16, 1, 6, 6), (16, 8, 3, 1, 1), (16, 8, 1, 1, 5), (64, 64, 1, 8, 8)]
    for (channels, out, kernel, *size), of_weight, of_x, dtype in itertools.product(shapes, (0, 1), (0, 1), (torch.float32, torch.bfloat16)):
        module = nn.Conv2d(channels, out, kernel, padding=kernel // 2).to(dtype).train()
        module.to(memory_format=torch.channels_last if of_weight else torch.contiguous_format)
        x = torch.randn(2, channels, *size).to(dtype).contiguous(memory_format=torch.channels_last if of_x else torch.contiguous_format)
        want, got = module(x), convolution(module, x)
        assert [s for s, n in zip(got.stride(), got.shape) if n > 1] == [s for s, n in zip(want.stride(), want.shape) if n > 1], (channels, out, kernel, size)


@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize("channels, size", ((64, 32), (128, 16)))
def test_the_gradient_of_a_weight_in_float32(channels, size, last):
    """Behind a decoder's attention pictures lie channels-last, of which PyTorch's own gradient of a weight errs less than half as much."""
    draw = torch.Generator().manual_seed(0)
    module = randomised(nn.Conv2d(channels, channels, 3, padding=1)).train()
    twin = copy.deepcopy(module).double()
    form = dict(memory_format=torch.channels_last if last else torch.contiguous_format)
    x, grad = (torch.randn(2, channels, size, size, generator=draw).contiguous(**form) for _ in range(2))
    true, stock, ours = ([*torch.autograd.grad(run(x.to(twin_dtype)), kept.weight, grad.to(twin_dtype))] for run, kept, twin_dtype in (
        (twin, twin, torch.float64), (module, module, torch.float32), (functools.partial(convolution, module), module, torch.float32)))
    found = measure(ours, stock, true, exact=False)
    assert found.holds, found.reason
