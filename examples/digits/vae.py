"""The autoencoder: a small AutoencoderKL, 32x32 RGB to 4x16x16 latents, in SD3's form (no quant convolutions, a shift)."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

from . import data

KL_WEIGHT = 1e-4   # per latent number against the pixel error's mean: keeps latents bounded, costs no sharpness


def build() -> AutoencoderKL:
    """The autoencoder with fresh weights."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=data.SIZE, block_out_channels=(24, 48),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
        norm_num_groups=8, use_quant_conv=False, use_post_quant_conv=False, force_upcast=False)


def pictures(scans: torch.Tensor, count: int, random: torch.Generator) -> torch.Tensor:
    """`count` pictures [count, 3, 32, 32] of random scans in random colours."""
    pick = torch.randint(len(scans), (count,), generator=random)
    ink = torch.randint(len(data.INKS), (count,), generator=random)
    paper = torch.randint(len(data.PAPERS), (count,), generator=random)
    return data.render(scans[pick], ink, paper, random)


def loss(vae: AutoencoderKL, scans: torch.Tensor, batch: int, random: torch.Generator) -> torch.Tensor:
    """Mean absolute and squared pixel error of the decoded posterior sample, plus the weighted KL divergence."""
    x = pictures(scans, batch, random)
    posterior = vae.encode(x).latent_dist
    z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=random)
    error = vae.decode(z).sample - x
    return error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean() / z[0].numel()


@torch.inference_mode()
def encode(vae: AutoencoderKL, x: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """Posterior means [N, 4, 16, 16] of pictures [N, 3, 32, 32], not yet scaled."""
    return torch.cat([vae.encode(part).latent_dist.mode() for part in x.split(batch)])


def set_scale(vae: AutoencoderKL, scans: torch.Tensor, random: torch.Generator) -> None:
    """Writes shift and scale into the config, so that (z - shift) * scale has mean 0 and deviation 1."""
    z = encode(vae, pictures(scans, 2048, random))
    vae.register_to_config(shift_factor=round(z.mean().item(), 5), scaling_factor=round(1 / z.std().item(), 5))
