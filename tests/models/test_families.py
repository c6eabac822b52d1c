"""What every family has to do besides being right: train under autocast, compile without a graph break, be copied, take published sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (AutoencoderKL, ControlNetModel, DiTTransformer2DModel, FluxControlNetModel, PixArtTransformer2DModel, SD3ControlNetModel,
                       UNet2DConditionModel, UNet2DModel)

from fusewire.models.controlnet import ControlNet, ControlNetConfig
from fusewire.models.controlnet_flux import FluxControlNet, FluxControlNetConfig
from fusewire.models.controlnet_sd3 import SD3ControlNet, SD3ControlNetConfig
from fusewire.models.dit import DiT, DiTConfig
from fusewire.models.pixart import PixArt, PixArtConfig
from fusewire.models.unet import UNet, UNetConfig
from fusewire.models.vae import AutoencoderKL as OurAutoencoderKL
from fusewire.models.vae import AutoencoderKLConfig
from tests.models import stock_unet, test_dit, test_ip_adapter, test_pixart, test_unet, test_vae
from tests.tolerance import MODEL_FLOAT32


def case(name: str, numerics: str):
    """(stock, ours, inputs)"""
    if name == "DiT":
        stock = stock_unet.dit()
        return stock, test_dit.ours(stock, numerics), stock_unet.dit_inputs()
    if name.startswith("PixArt"):
        stock = test_pixart.stock_model(name.removeprefix("PixArt "))
        return stock, test_pixart.ours(stock, numerics), test_pixart.inputs(name.removeprefix("PixArt "))
    if name == "IP-Adapters":
        stock, _ = test_ip_adapter.stock_model("sd", "three")
        return stock, test_ip_adapter.ours("sd", stock, numerics), test_ip_adapter.inputs("sd", "three")
    if name == "VAE":
        stock = stock_unet.vae()
        return stock, test_vae.ours(stock, numerics), {"sample": test_vae.picture(2, 12, 8)}
    stock = test_unet.stock_model(name.removeprefix("UNet "))
    return stock, test_unet.ours(stock, numerics), test_unet.inputs(name.removeprefix("UNet "))


def run(model, data: dict) -> torch.Tensor:
    return model(*data.values()) if list(data) == ["sample"] else model(**data)


FAMILIES = ["DiT", "PixArt sigma", "PixArt alpha", "UNet sd", "UNet sdxl", "UNet adm", "UNet guided", "VAE", "IP-Adapters"]


@pytest.mark.parametrize("name", FAMILIES)
def test_exact_is_equal_to_diffusers_under_autocast(name):
    stock, model, data = case(name, "exact")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(model, data), stock(**data, return_dict=False)[0])


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_autocast_trains(name, numerics):
    _, model, data = case(name, numerics)
    with torch.autocast("cpu", torch.bfloat16):
        loss = run(model.train(), data).float().square().mean()
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.dtype is torch.float32 and torch.isfinite(parameter.grad).all(), key
        # A bias of keys moves all logits of a query alike, which a softmax does not see.
        assert parameter.grad.any() or key.endswith("to_k.bias"), key


@pytest.mark.parametrize("numerics", [pytest.param("exact", marks=pytest.mark.slow), "close"])  # exact: the same forwards
@pytest.mark.parametrize("name", [*FAMILIES[:-1], pytest.param(FAMILIES[-1], marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(name, numerics):
    _, model, data = case(name, numerics)
    torch._dynamo.reset()
    with torch.no_grad():
        want = run(model, data)
        got = run(torch.compile(model, fullgraph=True, backend="eager"), data)  # what AOT makes of each op: tests/kernels
    assert (got - want).abs().max() <= MODEL_FLOAT32 * want.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_has_weights_of_its_own(name):
    _, model, data = case(name, "close")
    other = copy.deepcopy(model)
    with torch.no_grad():
        want = run(model, data)
        assert torch.equal(run(other, data), want)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(run(other, data), want)


XL = dict(block_out_channels=(320, 640, 1280), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
          up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
          transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
          projection_class_embeddings_input_dim=2816)
ADM = dict(block_out_channels=(256, 256, 512, 512, 1024, 1024), down_block_types=("DownBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
           up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",) * 3, attention_head_dim=64, num_class_embeds=1000, out_channels=6,
           resnet_time_scale_shift="scale_shift", attn_norm_num_groups=32, downsample_type="resnet", upsample_type="resnet")
DDPM = dict(block_out_channels=(128, 128, 256, 256, 512, 512), down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4, attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False,
            freq_shift=1, norm_eps=1e-6)
FOUR = dict(block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2, sample_size=1024)
# The published models at full size; diffusers' defaults are SD1.5's but for the text
FULL = {"SD1.5": (UNet2DConditionModel, UNet, UNetConfig, dict(cross_attention_dim=768)),
        "SD2.1": (UNet2DConditionModel, UNet, UNetConfig, dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
                                                               use_linear_projection=True, upcast_attention=True)),
        "SDXL": (UNet2DConditionModel, UNet, UNetConfig, XL),
        "ADM": (UNet2DModel, UNet, UNetConfig, ADM),
        "DDPM": (UNet2DModel, UNet, UNetConfig, DDPM),
        "SD1.5's ControlNet": (ControlNetModel, ControlNet, ControlNetConfig, dict(cross_attention_dim=768)),
        "SDXL's ControlNet": (ControlNetModel, ControlNet, ControlNetConfig, {key: value for key, value in XL.items() if key != "up_block_types"}),
        "SD3's ControlNet": (SD3ControlNetModel, SD3ControlNet, SD3ControlNetConfig,
                             dict(num_layers=6, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192)),
        "SD3.5-large's ControlNet": (SD3ControlNetModel, SD3ControlNet, SD3ControlNetConfig,
                                     dict(num_layers=19, num_attention_heads=38, joint_attention_dim=None, caption_projection_dim=2048, pos_embed_max_size=None,
                                          pos_embed_type=None, use_pos_embed=False, force_zeros_for_pooled_projection=False)),
        "FLUX.1's union of ControlNets": (FluxControlNetModel, FluxControlNet, FluxControlNetConfig,
                                          dict(num_layers=5, num_single_layers=10, guidance_embeds=True, num_mode=10)),
        "FLUX.1's ControlNet that sees pixels": (FluxControlNetModel, FluxControlNet, FluxControlNetConfig,
                                                 dict(num_layers=2, num_single_layers=0, guidance_embeds=True, patch_size=2,
                                                      conditioning_embedding_channels=16)),
        "DiT-XL/2": (DiTTransformer2DModel, DiT, DiTConfig, dict(out_channels=8)),
        "PixArt-alpha": (PixArtTransformer2DModel, PixArt, PixArtConfig, dict(caption_channels=4096)),
        "FLUX.1's autoencoder": (AutoencoderKL, OurAutoencoderKL, AutoencoderKLConfig,
                                 dict(FOUR, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False))}


@pytest.mark.parametrize("name", FULL)
def test_full_size_has_the_parameters_of_diffusers(name):
    """Shapes alone: nothing of it takes memory."""
    stock_class, model_class, config_class, config = FULL[name]
    with torch.device("meta"):
        stock = stock_class(**config)
        model = model_class(config_class.from_dict(stock.config))
    assert {key: value.shape for key, value in model.state_dict().items()} == {key: value.shape for key, value in stock.state_dict().items()}
