"""SDXL's autoencoder overflows in float16: its pipeline turns it to float32 for a decode, after the swap, and back."""

import pytest
import torch

import fusewire
from fusewire import ops
from fusewire.kernels.library import CPU
from tests.compat.families import FAMILIES


@pytest.mark.parametrize("numerics", ["exact", "close"])
@torch.no_grad()
def test_force_upcast(numerics):
    """The decode's group norms run in float32, the U-Net's in float16; the picture is stock's; then the autoencoder is float16 again."""
    pipe = FAMILIES["SDXL"].pipe(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    pipe.vae.decoder.conv_in.weight.mul_(8192.0)  # beyond float16 from here on
    pipe.vae.decoder.conv_in.bias.mul_(8192.0)
    seen = []
    pipe.vae.decoder.conv_norm_out.register_forward_pre_hook(lambda module, args: seen.append((args[0].dtype, args[0].abs().max().item())))

    def generate():
        return FAMILIES["SDXL"].generate(pipe, num_inference_steps=2, output_type="pt")

    want = generate()
    with fusewire.swapped(pipe, numerics) as handle:
        ops.reset_stats()
        got = generate()
        served = ops.stats()["group_norm_silu"]
    assert {"unet", "vae"} <= {entry.name.split(".")[0] for entry in handle.report.swapped} and served["cpu" if CPU.loaded else "reference"]
    assert torch.isfinite(want).all() and want.std() > 0.01 and pipe.vae.dtype is torch.float16
    assert len(seen) == 2 and all(dtype is torch.float32 for dtype, _ in seen) and seen[0][1] > 65504
    assert torch.equal(got, want) if numerics == "exact" else (got - want).abs().max() <= 0.02 * want.abs().max()
    assert torch.equal(generate(), want)
