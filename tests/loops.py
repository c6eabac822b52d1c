"""What the tests of whole sampling loops share: a plan of every solver, and models small enough for a loop. (Without diffusers.)"""

from __future__ import annotations

import torch

from fusewire.models import schedules, solvers
from fusewire.models.mmdit import MMDiT, MMDiTConfig
from fusewire.models.samplers import Conditioning
from fusewire.models.unet import UNet, UNetConfig

SIGMAS, FLOW = schedules.karras_sigmas(5, 0.03, 14.6), schedules.flow_sigmas(5, 3.0)
BAR, TIMES = schedules.alphas_cumprod(schedules.scaled_linear_betas()), schedules.timesteps(5, "trailing")
ALPHAS = 1 / (SIGMAS**2 + 1).sqrt()
CHURN = dict(churn=2.0, churn_from=0.05, churn_to=10.0, churn_noise=1.003)
# Where a model of eps is told a sigma: a tiny model with random weights does not mind.
PLANS = {
    "ddim": solvers.ddim(BAR, TIMES), "ddim eta": solvers.ddim(BAR, TIMES, eta=0.7, limit=2.0), "ddpm": solvers.ddpm(BAR, TIMES),
    "lcm": solvers.lcm(BAR, TIMES), "euler": solvers.euler(SIGMAS, "eps"), "euler churn": solvers.euler(SIGMAS, "eps", **CHURN),
    "euler ancestral": solvers.euler_ancestral(SIGMAS, "v"), "heun": solvers.heun(SIGMAS, "eps"), "heun churn": solvers.heun(SIGMAS, "v", **CHURN),
    "flow euler": solvers.euler(FLOW, "velocity"), "flow heun": solvers.heun(FLOW, "velocity", correct_last=True),
    "dpmpp_2m": solvers.dpmpp_2m(SIGMAS, "eps"), "dpmpp_2m sde": solvers.dpmpp_2m(SIGMAS, "eps", sde=1.0),
    "dpmpp_2m of alphas": solvers.dpmpp_2m(SIGMAS * ALPHAS, "eps", alphas=ALPHAS, heun=True), "lms": solvers.lms(SIGMAS, "eps"),
}


def _random(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * 0.1)
    return model.eval().requires_grad_(False)


def tiny_mmdit(numerics: str = "close") -> MMDiT:
    return _random(MMDiT(MMDiTConfig(sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=64, num_attention_heads=2,
                                     joint_attention_dim=32, caption_projection_dim=128, pooled_projection_dim=16, pos_embed_max_size=8,
                                     qk_norm="rms_norm", dual_attention_layers=(0,)), numerics))


def tiny_unet(numerics: str = "close") -> UNet:
    return _random(UNet(UNetConfig(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                                   block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32, attention_head_dim=2, layers_per_block=1),
                        numerics))


def conditioning(batch: int, dtype: torch.dtype, device) -> Conditioning:
    generator = torch.Generator().manual_seed(batch)
    return Conditioning(*(torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for shape in ((batch, 7, 32), (batch, 16))))


def guided(unet: UNet, text: torch.Tensor):
    """The model of ``sample``: [uncond; cond] for x, as the step guides; ``text`` [2B, L, J]."""
    def model(x, time):
        return unet(torch.cat([x, x]), time, text)

    return model
