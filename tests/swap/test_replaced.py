"""What users put in the place of methods: on an instance, on a class of PyTorch's, before the swap and after it. It is what runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import fusewire
from fusewire import ops
from fusewire.errors import NothingToDo
from fusewire.kernels.library import CPU
from fusewire.swap.report import SwapError
from tests.models import stock_unet
from tests.swap.trajectories import fused_steps


def autoencoder(**config) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(64,), norm_num_groups=8, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), **config)


def trajectory(scheduler) -> torch.Tensor:
    scheduler.set_timesteps(6)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x), t, x, generator=torch.Generator().manual_seed(1)).prev_sample
    return x


@pytest.mark.parametrize("numerics", ("exact", "close"))
@pytest.mark.parametrize("cls, name", ((DPMSolverMultistepScheduler, "convert_model_output"), (DDPMScheduler, "_get_variance"), (DDIMScheduler, "step")))
def test_a_method_of_a_scheduler(cls, name, numerics):
    def replaced():
        scheduler = cls()
        original = getattr(scheduler, name)
        if name == "step":
            def other(model_output, *args, **kwargs):
                return original(model_output * 0.5, *args, **kwargs)
        else:
            def other(*args, **kwargs):
                return original(*args, **kwargs) * 0.5
        setattr(scheduler, name, other)
        return scheduler

    want = trajectory(replaced())
    assert not torch.equal(want, trajectory(cls()))
    with pytest.raises(NothingToDo, match=f"its {name} was replaced on the instance"):
        fusewire.swap(replaced(), numerics)
    scheduler, after = replaced(), cls()
    fusewire.swap(after, numerics)
    ops.reset_stats()
    trajectory(after)
    assert fused_steps() == 6  # until something is replaced
    if name != "step":
        setattr(after, name, (lambda original: lambda *args, **kwargs: original(*args, **kwargs) * 0.5)(getattr(after, name)))
        assert torch.equal(trajectory(after), want)
    assert torch.equal(trajectory(scheduler), want)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("first", (True, False), ids=("before", "after"))
def test_seamless_tiling(first, dtype):
    """Convolutions that wrap around by a ``_conv_forward`` of their own: the picture of a rolled latent is the rolled picture."""
    def wrapped(self, x, weight, bias):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias, self.stride, 0)

    def tile(vae):
        for layer in vae.decoder.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                layer._conv_forward = wrapped.__get__(layer, type(layer))

    vae, z = autoencoder().to(dtype).eval(), torch.randn(1, 4, 16, 16).to(dtype)
    if first:
        tile(vae)
    with fusewire.swapped(vae, "close") as handle, torch.no_grad():
        assert sum(entry.op == "convolution" for entry in handle.report.swapped) >= 8
        tile(vae)
        plain, rolled = vae.decode(z).sample, vae.decode(z.roll((5, 3), (2, 3))).sample
    assert (rolled.roll((-5, -3), (2, 3)) - plain).abs().max() <= 16 * torch.finfo(dtype).eps * plain.abs().max()


@pytest.mark.parametrize("numerics", ("exact", "close"))
@pytest.mark.parametrize("cls", (nn.GroupNorm, nn.LayerNorm, nn.SiLU, nn.Linear, nn.Conv2d))
def test_a_forward_of_pytorchs(cls, numerics, monkeypatch):
    """As programs do that compute all norms in float32. The factor makes it visible."""
    original = cls.forward
    unet, given = stock_unet.unet().eval(), stock_unet.unet_inputs()

    @torch.no_grad()
    def output():
        return unet(**given, return_dict=False)[0]

    plain = output()
    with monkeypatch.context() as patched:
        patched.setattr(cls, "forward", lambda self, x: original(self, x) * 1.25)
        want = output()
        with fusewire.swapped(unet, numerics):
            got = output()
    assert not torch.allclose(want, plain, rtol=1e-2)
    if numerics == "exact":
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with fusewire.swapped(unet, numerics):  # and again as PyTorch has it
        ops.reset_stats()
        torch.testing.assert_close(output(), plain, rtol=1e-4, atol=1e-4)
        assert ops.stats()["group_norm_silu"]["cpu"] or not CPU.loaded


class Noise(nn.Module):
    def forward(self, weight):
        return weight + 0.01 * torch.randn_like(weight)


@pytest.mark.parametrize("part, change, numerics", (("conv_norm_out", lambda layer: parametrize.register_parametrization(layer, "weight", Noise()), "exact"),
                                                    ("conv_norm_out", lambda layer: parametrize.register_parametrization(layer, "weight", Noise()), "close"),
                                                    ("conv_in", spectral_norm, "close")))
@pytest.mark.parametrize("first", (True, False), ids=("before", "after"))
def test_weights_that_are_computed_are_computed_once(part, change, numerics, first):
    def run(numerics):
        vae = autoencoder(latent_channels=4).train()
        if numerics and not first:
            fusewire.swap(vae, numerics)
        change(getattr(vae.decoder, part))
        if numerics and first:
            fusewire.swap(vae, numerics)
        torch.manual_seed(1)
        ops.reset_stats()
        decoded = vae.decode(torch.randn(1, 4, 8, 8)).sample
        assert not CPU.loaded or bool(ops.stats()["group_norm_silu"]["cpu"]) is bool(numerics)
        return decoded

    got, want = run(numerics), run(None)
    if numerics == "exact":
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_attentions_that_lie_elsewhere_are_named():
    """GLIGEN's fusers have an attention and a feed-forward that no block of ours runs."""
    unet = UNet2DConditionModel(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=24,
                                attention_head_dim=2, attention_type="gated", down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    for numerics in ("exact", "close"):
        with fusewire.swapped(unet, numerics) as handle:
            left = {entry.name: entry for entry in handle.report.left}
            for name, module in unet.named_modules():
                if name.endswith(("fuser.attn", "fuser.ff")):
                    assert left[name].reason == "it lies in a block that we do not know" and left[name].by_choice is (numerics == "exact")
    with pytest.raises(SwapError, match="it lies in a block that we do not know"):
        fusewire.swap(unet, "close", strict=True)
